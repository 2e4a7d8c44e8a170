"""Hardware chooses the model: the front against brute force, its rules, and what each machine is known to favour."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import pytest

from parallel.planning.design.report import report, to_json
from parallel.planning.design.scaling_laws import JOINT, RATIO_LOSS
from parallel.planning.design.search import (
    COST_STEP,
    FRACTIONS,
    LOSS_STEP,
    Cell,
    Choice,
    Front,
    Predictor,
    Question,
    search,
)
from parallel.planning.design.serving import serve
from parallel.planning.design.shapes import HEAD_DIM, TILE, Shape, shapes
from parallel.planning.design.throughput import EXPERT_ROWS, STATE, STATE_SHARE, Throughput, layouts, short_list, usable
from parallel.planning.execution import Execution
from parallel.planning.memory.prediction import predict_memory
from parallel.planning.topology import hardware_names, load_hardware
from parallel.planning.workload import Workload, check_divisibility
from stoker import canonical
from stoker.errors import Refusal

RACK = Question(load_hardware("gb200-nvl72"), gpus=576, days=30, serve_context=131_072)
BOARDS = Question(load_hardware("h100"), gpus=512, days=30, serve_context=131_072)
#: Three widths, so that a search takes a second.
FEW = tuple(shape for shape in shapes(RACK.topology) if shape.width in (2048, 4096, 7168))


def steady(question: Question, mfu: float = 0.4) -> Predictor:
    """A predictor by which every model reaches the same share of the peak, and the largest do not fit."""

    def predict(workload: Workload) -> Throughput | None:
        speed = mfu * question.gpus * question.topology.peak(question.precision) / workload.training_flops
        return Throughput(speed, 0.9 * speed, 1.1 * speed) if workload.parameters < 1e12 else None

    return predict


@cache
def predicted(question: Question) -> Front:
    """The front of a few shapes, by the real models of time and memory."""
    return search(question, among=FEW)


def cell(loss: float, gpu_hours: float, device_seconds: float) -> Cell:
    return (
        round(loss / LOSS_STEP),
        round(math.log(gpu_hours, COST_STEP)),
        round(math.log(device_seconds, COST_STEP)),
    )


def cells(choices: Iterable[Choice]) -> set[Cell]:
    return {cell(choice.loss, choice.gpu_hours, choice.serving.device_seconds) for choice in choices}


def beaten(one: Cell, others: Iterable[Cell]) -> bool:
    return any(other != one and all(a <= b for a, b in zip(other, one)) for other in others)


@pytest.mark.parametrize("question", [RACK, replace(BOARDS, days=3, serve_context=4096)], ids=["rack", "boards"])
def test_front_is_what_brute_force_finds_over_every_shape(question: Question) -> None:
    """No bound, no pruning, loss from the law by hand: the same cells."""
    predict = steady(question)
    most_days = 0.65 / 0.4 * usable(question.topology, question.gpus)[0] / question.gpus * question.days
    every = set()
    for shape in FEW[::3]:
        workload = shape.workload(question.seq_len)
        speed = predict(workload)
        active = workload.active_parameters - workload.embedding.parameters
        most = speed.tokens_per_s * 86_400 * most_days / active if speed else 0.0
        if speed is None or not 5 <= most <= 10_000:
            continue
        try:
            served = serve(workload, shape.caches(), question.topology, question.serve_context).device_seconds
        except Refusal:
            continue
        law = JOINT.at(shape.experts / shape.visits if shape.experts else 1, shape.visits or 1)
        for part in FRACTIONS:
            loss = law.loss(active, 86_400 * question.days * part * speed.tokens_per_s) + RATIO_LOSS[shape.linear]
            every.add(cell(loss, 24 * question.days * part * question.gpus, served))
    front = search(question, predict, FEW[::3])
    assert cells(front.choices) == {each for each in every if not beaten(each, every)}
    assert len(front.choices) > 5 and front.predicted < len(FEW[::3])


def test_the_same_question_has_the_same_answer() -> None:
    first, again = (search(RACK, steady(RACK), FEW) for _ in range(2))
    assert first == again
    assert report(first) == report(again)


def test_more_days_never_make_the_best_loss_worse() -> None:
    losses = []
    for days in (1, 4, 16, 64):
        question = replace(RACK, days=days)
        losses.append(search(question, steady(question), FEW).choices[0].loss)
    assert losses == sorted(losses, reverse=True)


def test_loss_bars_are_those_of_the_throughput() -> None:
    choice = search(RACK, steady(RACK), FEW).choices[0]
    law = JOINT.at(choice.shape.expansion, choice.shape.granularity)
    slow = law.loss(choice.active, 0.9 * choice.tokens) + RATIO_LOSS[choice.shape.linear]
    assert choice.loss_low < choice.loss < choice.loss_high == pytest.approx(slow)


def test_data_that_ends_ends_the_run_and_its_cost() -> None:
    bounded = replace(RACK, data_tokens=2e12)
    choices = search(bounded, steady(bounded), FEW).choices
    assert max(choice.tokens for choice in choices) == pytest.approx(2e12)
    for choice in choices:
        assert choice.gpu_hours == pytest.approx(choice.tokens / choice.throughput.tokens_per_s / 3600 * 576)
        assert choice.days <= 30 * (1 + 1e-9)


def test_long_contexts_turn_cheap_serving_to_linear_layers() -> None:
    """Of one shape trained alike: what softmax alone costs beside three linear layers of four."""
    plain = Shape(4096, 32, 1536, 128, 8)
    hybrid = replace(plain, linear=3)

    def ratio(context: int) -> float:
        costs = [
            serve(shape.workload(8192), shape.caches(), RACK.topology, context).device_seconds
            for shape in (plain, hybrid)
        ]
        return costs[0] / costs[1]

    assert ratio(256) < 1 < ratio(8192) < ratio(131_072)  # a state is worth a thousand cached tokens
    cheapest = min(search(RACK, steady(RACK), FEW).choices, key=lambda choice: choice.serving.device_seconds)
    assert cheapest.shape.linear > 0


def test_a_choice_says_where_the_law_extrapolates() -> None:
    for choice in search(RACK, steady(RACK), FEW).choices:
        assert any("active parameters" in text for text in choice.warnings) == (choice.active > 2.7e9)
        assert any("experts over" in text for text in choice.warnings) == (choice.shape.expansion > 32)


@pytest.mark.parametrize("name", [name for name in hardware_names() if name != "cpu"])
def test_shapes_keep_the_hard_rules_of_every_machine(name: str) -> None:
    topology = load_hardware(name)
    found = list(shapes(topology))
    assert len(set(found)) == len(found) > 500
    for shape in found:
        assert shape.width % HEAD_DIM == shape.hidden % TILE == shape.heads % shape.kv_heads == 0
        assert shape.layers % 8 == shape.layers % (shape.linear + 1) == 0
        assert 43 <= shape.width / shape.layers <= 130
        if shape.experts:
            assert 4 <= shape.expansion <= 64
            assert any(math.gcd(shape.experts, size) in (shape.experts, size) for size in topology.domain.practice)


@pytest.mark.parametrize("shape", [FEW[0], FEW[100], FEW[-1]], ids=str)
def test_a_shape_has_the_parameters_of_its_widths(shape: Shape) -> None:
    """Softmax layers, feed-forward, embedding and head by hand; norms and linear mixers are the small rest."""
    workload = replace(shape, linear=0).workload(4096)
    width, kv = shape.width, shape.kv_heads * HEAD_DIM
    feed = 3 * width * shape.hidden * (shape.experts or 1) + width * shape.experts
    layer = 2 * width * width + 2 * width * kv + feed + 2 * width
    assert workload.parameters == shape.layers * layer + 2 * shape.vocab * width + width
    assert len(shape.workload(4096).layers) == len(shape.caches()) == shape.layers


@pytest.mark.parametrize("question", [RACK, BOARDS], ids=["rack", "boards"])
def test_layouts_of_the_front_keep_the_rules_and_fit(question: Question) -> None:
    topology = question.topology
    world, in_domain = usable(topology, question.gpus)
    for choice in predicted(question).choices:
        workload, plan = choice.shape.workload(question.seq_len), choice.throughput.plan
        assert plan is not None and plan.world_size == world
        check_divisibility(workload, plan)
        assert in_domain % plan.tp == in_domain % plan.ep == 0
        if choice.shape.experts:
            rows = plan.micro_batch * question.seq_len / plan.tp * choice.shape.visits * plan.ep / choice.shape.experts
            assert rows >= EXPERT_ROWS
        memory = predict_memory(workload, plan, Execution(), topology)
        assert memory.fits(topology)
        state = max(sum(stage.components[name] for name in STATE) for stage in memory.stages)
        assert state <= STATE_SHARE * topology.known("device.memory_bytes")
        asked = question.batch_tokens / question.seq_len
        assert abs(plan.global_batch - asked) <= asked / 4


def test_a_rack_favours_many_fine_experts_over_its_domain_and_boards_hold_less() -> None:
    """DeepSeek-V3, Qwen3-235B, Kimi K2 on NVL72: 128 to 512 experts, of which a token visits 8, at EP 32 to 64."""
    rack, boards = predicted(RACK).choices, predicted(BOARDS).choices
    assert rack[0].throughput.plan is not None
    assert 128 <= rack[0].shape.experts <= 512 and rack[0].shape.visits == 8
    assert 32 <= rack[0].throughput.plan.ep <= 64
    assert all(choice.throughput.plan is not None and choice.throughput.plan.ep <= 8 for choice in boards)
    assert boards[0].parameters < rack[0].parameters


def test_boards_cut_a_model_of_many_experts_by_more_tensor_and_pipeline_ranks_than_a_rack() -> None:
    """DeepSeek-V3's known layouts: tp 1, pp 2 to 4, ep 32 to 64 on NVL72; tp 2, pp 8 on boards of eight."""
    workload = Shape(7168, 56, 2560, 256, 8, linear=3).workload(8192)
    found = [short_list(q.topology, q.gpus, q.batch_tokens)(workload) for q in (RACK, BOARDS)]
    plans = [each.plan for each in found if each and each.plan]
    assert [plan.ep for plan in plans] == [64, 8]
    assert plans[0].tp * plans[0].pp <= 8 < plans[1].tp * plans[1].pp


def test_spares_of_a_rack_are_billed_and_do_not_compute() -> None:
    assert usable(RACK.topology, 576) == (512, 64)
    assert usable(RACK.topology, 72) == (72, 72)
    assert usable(BOARDS.topology, 517) == (512, 8)
    longest = max(predicted(RACK).choices, key=lambda choice: choice.days)
    assert longest.gpu_hours == 576 * 24 * 30


def test_layouts_of_one_level_multiply_to_it_and_start_without_recompute() -> None:
    workload = Shape(4096, 64, 1536, 128, 8, linear=3).workload(8192)
    for level in (1, 2, 4, 8, 16):
        ways = list(layouts(workload, RACK.topology, 576, 2048, level))
        assert ways
        for plans in ways:
            assert [plan.recompute for plan in plans] == ["none", "selective", "full"]
            assert {plan.tp * plan.pp for plan in plans} == {level}
    assert not list(layouts(workload, RACK.topology, 576, 100, 1))  # 512 ranks cannot share 100 sequences


def test_report_and_json_tell_every_choice() -> None:
    front = search(RACK, steady(RACK), FEW)
    text, plain = report(front), to_json(front)
    for choice in front.choices:
        assert text.count(str(choice.shape)) >= 1
    assert f"EXTRAPOLATES: {sum(bool(choice.warnings) for choice in front.choices)} of" in text
    assert "price: none given" in text and "no end of data was given" in text
    assert [entry["loss"] for entry in plain["choices"]] == sorted(choice.loss for choice in front.choices)
    assert canonical.dumps(plain)  # refuses what is not plain, and infinities
    assert plain["question"]["hardware"] == "gb200-nvl72" and plain["question"]["data_tokens"] is None
    assert plain["choices"][0]["serving"]["cost"] is None


def test_a_price_turns_gpu_time_into_money() -> None:
    priced = replace(RACK, price_per_hour=2.0)
    front = search(priced, steady(priced), FEW)
    assert "price: none" not in report(front)
    assert f"{front.choices[0].gpu_hours:,.0f} = {2 * front.choices[0].gpu_hours:,.0f}" in report(front)
    serving = to_json(front)["choices"][0]["serving"]
    assert serving["cost"] == pytest.approx(serving["device_seconds"] / 1800)


def test_what_cannot_be_asked_is_refused() -> None:
    for name in ("gpus", "days", "serve_context", "data_tokens"):
        with pytest.raises(Refusal, match=f"{name}=0 must be above zero"):
            replace(RACK, **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="whole windows of seq_len=8192"):
        replace(RACK, batch_tokens=10_000)
    with pytest.raises(Refusal, match=r"no peak .*nvfp4"):
        replace(BOARDS, serve_precision="nvfp4")
    with pytest.raises(Refusal, match=r"no shape can be trained on 576 .* in 30 days: .*no layout fits"):
        search(RACK, lambda workload: None, FEW)
