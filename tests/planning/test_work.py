"""Ideal seconds of a step's work: against closed forms written here, and rules that any work must keep."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.planning.execution import Execution
from parallel.planning.models.mixers import attention, gated_delta
from parallel.planning.models.operations import Stream, assemble, layer, mlp, moe
from parallel.planning.plan import ParallelPlan
from parallel.planning.timing.layers import BACKWARD, COLUMN, FORWARD, INNER_HALF, products_s
from parallel.planning.timing.work import WorkTable, stacked
from parallel.planning.topology import load_hardware
from parallel.planning.workload import Workload

H100 = load_hardware("h100")
GB200 = load_hardware("gb200-nvl72")
D, SEQ, HEADS, F, VOCAB = 1024, 2048, 8, 4096, 32000


def dense(layers: int = 4) -> Workload:
    stream = Stream(D, SEQ)
    return assemble(stream, VOCAB, (layer(stream, attention(stream, HEADS, HEADS, 128), mlp(stream, F)),) * layers)


def expert(layers: int = 4, experts: int = 16) -> Workload:
    stream = Stream(D, SEQ)
    return assemble(
        stream, VOCAB, (layer(stream, attention(stream, HEADS, HEADS, 128), moe(stream, experts, 2, F)),) * layers
    )


def column(workload: Workload, plan: ParallelPlan, name: str, execution: Execution | None = None) -> np.ndarray:
    """[kinds, forward and backward] of one column."""
    work = WorkTable(workload, execution or Execution(), H100).step(plan)
    return work.columns[..., COLUMN[name]]


def plan_of(world: int, batch: int = 64, micro_batch: int = 1, layers: int = 4, **degrees: object) -> ParallelPlan:
    return ParallelPlan(world, batch, micro_batch, num_layers=layers, **degrees)  # type: ignore[arg-type]


def test_a_product_that_fills_its_waves_takes_its_flops_at_peak() -> None:
    peak = H100.peak("bfloat16")
    rows, out, inner = 256 * 132, 128 * 8, 65536  # eight tiles of 256 x 128 a processor
    ideal = 2 * rows * out * (inner + INNER_HALF) / peak
    assert products_s(rows, out, inner, peak, H100.device) == pytest.approx(ideal, rel=1e-12)
    one_more = products_s(rows + 1, out, inner, peak, H100.device)
    assert one_more == pytest.approx(ideal * 9 / 8, rel=1e-12), "a row more starts another wave"


def test_a_thin_product_takes_the_time_of_its_weights() -> None:
    """Sixteen rows against 8192 x 8192 in bfloat16: 134 MB of weight."""
    seconds = products_s(16, 8192, 8192, H100.peak("bfloat16"), H100.device)
    moved = (8192 * 8192 + 2 * 16 * 8192) * 2
    assert seconds == pytest.approx(moved / H100.known("device.memory_bandwidth"), rel=1e-12)


@given(
    rows=st.integers(1, 70_000),
    out=st.integers(1, 30_000),
    inner=st.integers(1, 30_000),
    count=st.integers(1, 300),
)
@settings(max_examples=200, deadline=None)
def test_products_are_never_faster_than_peak_or_than_memory(rows: int, out: int, inner: int, count: int) -> None:
    peak, bandwidth = H100.peak("bfloat16"), H100.known("device.memory_bandwidth")
    seconds = products_s(rows, out, inner, peak, H100.device, count)
    assert seconds >= 2 * count * rows * out * inner / peak * (1 - 1e-12)
    assert seconds >= 2 * count * (rows * inner + inner * out + rows * out) / bandwidth * (1 - 1e-12)
    assert products_s(rows + 257, out, inner, peak, H100.device, count) >= seconds


def test_backward_has_two_products_for_each_of_forward() -> None:
    work = column(dense(), plan_of(1), "product")
    assert work.shape == (1, 2)
    assert work[0, BACKWARD] / work[0, FORWARD] == pytest.approx(2, rel=0.1)


def test_work_of_a_kind_of_rank_is_that_of_its_layers() -> None:
    """Four equal layers over four ranks: one each; the first also holds the lookup, the last the head."""
    whole = column(dense(), plan_of(1), "attention").sum()
    parts = WorkTable(dense(), Execution(), H100).step(plan_of(4, pp=4))
    assert parts.ranks.tolist() == [1, 2, 1]
    assert parts.kind_of_rank == (0, 1, 1, 2)
    attended = parts.columns[..., COLUMN["attention"]].sum(-1)
    assert attended == pytest.approx([whole / 4] * 3)
    products = parts.columns[..., COLUMN["product"]].sum(-1)
    assert products[2] > products[1] == pytest.approx(products[0])


def test_full_recompute_runs_forward_again_and_leaves_the_head_alone() -> None:
    none, full = (
        WorkTable(dense(), Execution(), H100).step(plan_of(2, pp=2, recompute=mode)).columns
        for mode in ("none", "full")
    )
    again = full[0, BACKWARD] - none[0, BACKWARD]
    for name in ("attention", "product", "kernels"):
        assert again[COLUMN[name]] == pytest.approx(none[0, FORWARD, COLUMN[name]] - (name == "kernels"))
    assert full[:, FORWARD] == pytest.approx(none[:, FORWARD])
    head = none[1, :, COLUMN["product"]] - none[0, :, COLUMN["product"]]
    assert full[1, BACKWARD, COLUMN["product"]] - full[0, BACKWARD, COLUMN["product"]] == pytest.approx(head[BACKWARD])


def test_a_module_is_run_again_by_name() -> None:
    module = Execution(recompute_modules=("core_attention",))
    plain, again = column(dense(), plan_of(1), "attention"), column(dense(), plan_of(1), "attention", module)
    assert again[0, BACKWARD] == pytest.approx(plain[0, BACKWARD] + plain[0, FORWARD])
    assert column(dense(), plan_of(1), "product", module) == pytest.approx(column(dense(), plan_of(1), "product"))


def test_tensor_parallelism_halves_attention_and_sends_the_stream() -> None:
    one, two = plan_of(2, tp=1), plan_of(2, tp=2, sequence_parallel=True)
    assert column(dense(), two, "attention") == pytest.approx(column(dense(), one, "attention") / 2)
    assert not column(dense(), one, "tensor").any()
    sent = column(dense(), two, "tensor")[0]
    assert sent[BACKWARD] == pytest.approx(1.5 * sent[FORWARD]), "gathered inputs are gathered again for the gradients"
    gathered = (
        SEQ * D * 2
    )  # bytes of a micro-batch's stream; half of them cross the link, once in and once out a region
    regions = 2 * 4 + 2 * 0.5  # mixer and feed-forward of four layers, half a region each for embedding and head
    least = regions * 2 * gathered / 2 / H100.known("domain.bandwidth")
    assert least <= sent[FORWARD] <= 1.3 * least + regions * 2 * 16e-6, "and each collective starts in 15 us"


def test_experts_are_exchanged_inside_the_domain_or_across_it() -> None:
    inside = WorkTable(expert(), Execution(dispatcher="deepep"), GB200).step(plan_of(64, ep=16))
    across = WorkTable(expert(), Execution(dispatcher="deepep"), H100).step(plan_of(64, ep=16))
    network = COLUMN["expert_network"]
    assert not inside.columns[..., network].any()
    assert across.columns[..., network].all()
    assert inside.columns[..., COLUMN["expert_domain"]].all()


def test_fp8_runs_layers_in_fp8_and_the_head_and_the_router_not() -> None:
    fp8 = Execution(precision="fp8")
    base = column(expert(), plan_of(1), "product")[0]
    left = column(expert(), plan_of(1), "product", fp8)[0]
    quantised = column(expert(), plan_of(1), "quantised", fp8)[0]
    assert (left > 0).all() and (left < base).all()
    assert quantised == pytest.approx((base - left) / 2, rel=0.15), "twice the peak, and thin products wait for memory"
    assert (column(expert(), plan_of(1), "quantised_experts", fp8) > 0).all()


def test_fsdp_gathers_weights_every_micro_batch_and_zero_1_once_a_step() -> None:
    table = WorkTable(dense(), Execution(), H100)
    sharded, gathered = table.step(plan_of(16, zero=3)), table.step(plan_of(16, zero=1))
    assert sharded.columns[..., COLUMN["weights"]].all() and not sharded.reduce_s.any() and not sharded.gather_s.any()
    assert not gathered.columns[..., COLUMN["weights"]].any()
    # float32 gradients weigh twice what bfloat16 weights do, on the same way.
    assert gathered.reduce_s == pytest.approx(2 * gathered.gather_s, rel=0.1), "but for latency"
    assert gathered.optimizer_s == pytest.approx(table.step(plan_of(16, zero=0)).optimizer_s / 16)


def test_what_lives_in_host_memory_takes_the_host_link() -> None:
    plain = WorkTable(dense(), Execution(), GB200).step(plan_of(1))
    moved = WorkTable(dense(), Execution(offload=("optimizer", "activations"), offload_share=0.5), GB200).step(
        plan_of(1)
    )
    assert moved.optimizer_s > 10 * plain.optimizer_s
    kept = sum(block.activation_bytes("none") for block in dense().layers) * SEQ * 0.5
    assert moved.columns[0, FORWARD, COLUMN["offload"]] == pytest.approx(kept / GB200.known("host_link.bandwidth"))


def test_linear_attention_does_not_grow_with_the_window_and_softmax_does() -> None:
    def at(seq: int, name: str) -> float:
        stream = Stream(D, seq)
        mixers = {"linear": gated_delta(stream, 8, 8, 128, 128), "attention": attention(stream, HEADS, HEADS, 128)}
        work = assemble(stream, VOCAB, (layer(stream, mixers[name], mlp(stream, F)),))
        plan = ParallelPlan(1, 1, 1, num_layers=1)
        return float(WorkTable(work, Execution(), H100).step(plan).columns[0, FORWARD, COLUMN[name]] / seq)

    assert at(32768, "linear") == pytest.approx(at(4096, "linear"))
    assert at(32768, "attention") / at(4096, "attention") == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"pp": 2}, {"pp": 2, "vpp": 2}, {"ep": 4}, {"tp": 2, "ep": 2, "pp": 2}])
def test_side_by_side_steps_are_the_steps(degrees: dict[str, int]) -> None:
    table = WorkTable(expert(), Execution(), H100)
    alone = [table.step(plan_of(8)), table.step(plan_of(8, **degrees))]
    together = stacked(alone)
    for index, work in enumerate(alone):
        kinds = len(work.ranks)
        assert np.array_equal(together.columns[index, :kinds], work.columns)
        assert not together.ranks[index, kinds:].any()


def test_faster_links_and_memory_never_take_longer() -> None:
    slow = H100
    plan = plan_of(16, tp=2, ep=4, sequence_parallel=True, layers=4)
    for factor, before in pairwise((1.0, 2.0, 4.0)):
        fast = replace(
            slow,
            domain=replace(slow.domain, bandwidth=slow.known("domain.bandwidth") * before),
            network=replace(slow.network, bandwidth=slow.known("network.bandwidth") * before),
            device=replace(slow.device, memory_bandwidth=slow.known("device.memory_bandwidth") * before),
        )
        less = replace(
            slow,
            domain=replace(slow.domain, bandwidth=slow.known("domain.bandwidth") * factor),
            network=replace(slow.network, bandwidth=slow.known("network.bandwidth") * factor),
            device=replace(slow.device, memory_bandwidth=slow.known("device.memory_bandwidth") * factor),
        )
        quick, late = (WorkTable(expert(), Execution(), each).step(plan) for each in (fast, less))
        assert (quick.columns <= late.columns + 1e-15).all()
        assert (quick.reduce_s <= late.reduce_s).all() and (quick.optimizer_s <= late.optimizer_s).all()


def test_ranks_that_cut_an_expert_gather_its_copies_and_scatter_its_sums() -> None:
    """etp 2 over tp 2: each of two tokens' copies is on both ranks, in and out; half of it crosses the link."""
    whole, cut = (plan_of(2, tp=2, ep=ep, etp=3 - ep, sequence_parallel=True) for ep in (2, 1))
    more = column(expert(), cut, "tensor") - column(expert(), whole, "tensor")
    copies = SEQ / 2 * 2 * D * 2 * 2  # tokens of a rank, visits, width, bytes, ranks
    crossing = 4 * 2 * copies / 2 / H100.known("domain.bandwidth")
    assert crossing <= more[0, FORWARD] <= 1.3 * crossing + 4 * 2 * 20e-6, "and each starts in 15 us"
    assert column(expert(), cut, "experts") == pytest.approx(column(expert(), whole, "experts"), rel=0.2)
