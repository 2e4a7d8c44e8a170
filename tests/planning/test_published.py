"""Published runs: the table is read, every row becomes a run or says why not, and nothing measured gets in."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from parallel.planning.models.architectures import architecture_of
from parallel.planning.published.plans import layout_counts
from parallel.planning.published.recipes import recipe_of, recipes
from parallel.planning.published.rows import Published, Row, read_rows
from parallel.planning.published.runs import Run, Skipped, flops_per_token, interpret, published
from stoker.errors import Refusal

ROWS = read_rows()
RUNS = [interpret(row) for row in ROWS]
HEADER = "source,model,seq_len,global_batch_seqs,micro_batch,gpu,gpus,precision,tp,pp,vpp,ep,etp,cp,dp,recompute,notes"


def run_of(**cells: object) -> Run:
    found = interpret(made(**cells))
    assert isinstance(found, Run), found
    return found


def made(**cells: object) -> Row:
    """A row of Llama-3-8B on eight H100, with the given cells instead."""
    usual: dict[str, object] = {
        "source": "a table",
        "model": "Llama-3-8B",
        "year": 2025,
        "seq_len": 8192,
        "global_batch_seqs": 128,
        "micro_batch": 1,
        "gpu": "H100",
        "gpus": 8,
        "precision": "BF16",
        "tp": 1,
        "pp": 1,
    }
    return Row(0, Published(), **{**usual, **cells})  # type: ignore[arg-type]


def table(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_more_than_nine_rows_of_ten_are_modelled_and_the_others_say_why() -> None:
    skipped = {found.index: found.reason for found in RUNS if isinstance(found, Skipped)}
    assert len(ROWS) == 567
    assert set(skipped) == {2, 3, 224, *range(255, 263), 564}
    assert all("compressed sparse attention" in skipped[index] for index in (2, 3, 564))
    assert "ep=32" in skipped[224]
    assert all("doubts its layout" in skipped[index] for index in range(255, 263))


def test_no_measured_figure_is_an_input() -> None:
    """Every measured column, and every measured number in the notes, replaced: the same runs."""
    dice = random.Random(0)
    for row, found in zip(ROWS, RUNS, strict=True):
        notes = re.sub(r"HFU [\d.]+", f"HFU {dice.random()}", row.notes)
        notes = re.sub(r"(result) [\d.]+", rf"\1 {dice.randrange(9000)}", notes)
        notes = re.sub(r"[\d.]+ (GB|GiB|TF|ms|tok|seq/s)", rf"{dice.random():.3f} \1", notes)
        lie = Published(**{each.name: dice.random() * 1000 for each in fields(Published)})
        again = interpret(replace(row, measured=lie, notes=notes))
        if isinstance(found, Run):
            assert isinstance(again, Run), (row.index, again)
            assert replace(again, doubtful=None) == replace(found, doubtful=None), row.index


def test_every_cell_that_is_not_given_is_told() -> None:
    told = ("micro_batch", "zero", "recompute", "sequence_parallel", "etp", "vpp", "gpus", "global_batch")
    for row, found in zip(ROWS, RUNS, strict=True):
        if isinstance(found, Skipped) or "Megatron-Bridge" in row.source:
            continue
        text = " ".join(found.assumed)
        plan = found.plan
        missing = {"micro_batch": row.micro_batch is None, "recompute": not row.recompute, "gpus": row.gpus is None}
        missing["zero"] = row.zero_stage is None
        missing["vpp"] = row.vpp is None and plan.pp > 1 and "layout" not in row.notes
        missing["etp"] = row.etp is None and plan.tp > 1 and found.tags["kind"] == "moe"
        missing["sequence_parallel"] = row.seq_parallel is None and plan.tp > 1
        missing["global_batch"] = row.global_batch_seqs is None
        assert all(name in text for name in told if missing[name]), (row.index, found.assumed)


def test_a_fully_stated_row_is_the_row() -> None:
    for row, found in zip(ROWS, RUNS, strict=True):
        if isinstance(found, Skipped) or not found.stated:
            continue
        plan = found.plan
        assert (plan.world_size, plan.global_batch, plan.micro_batch) == (
            row.gpus,
            row.global_batch_seqs,
            row.micro_batch,
        )
        assert plan.pp == row.pp and plan.ep == (row.ep or 1) and plan.cp == (row.cp or 1)
        assert plan.dp == row.dp or row.dp is None or found.execution.stack == "neuron"
        if plan.vpp != (row.vpp or 1):
            assert any(text.startswith("vpp=") for text in found.assumed), row.index
    assert Counter(found.stated for found in RUNS if isinstance(found, Run))[True] > 400


PAIRS = {
    "Llama-3-8B": 0.0515e12,
    "Llama-3-70B": 0.4492e12,
    "Llama-3.1-405B": 2.524e12,
}


@pytest.mark.parametrize("model", PAIRS)
def test_flops_of_llama_agree_with_published_throughput(model: str) -> None:
    (work, *_) = (
        found.workload
        for row, found in zip(ROWS, RUNS, strict=True)
        if isinstance(found, Run) and row.model == model and row.seq_len == 8192
    )
    assert work.training_flops == pytest.approx(PAIRS[model], rel=2e-3)


#: Sources' own accounting differs: Megatron-Bridge before 26.06 left out a matrix of GPT-OSS's gated experts, and took
#: another inner width of Nemotron-3-Nano's Mamba layers.
OTHERWISE = ("GPT-OSS", "Nemotron-3-Nano")


def test_tokens_a_second_times_flops_are_the_published_tflops() -> None:
    """Median within 0.5 % for every source and model, and each row within what rounding of its figures leaves."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row, found in zip(ROWS, RUNS, strict=True):
        measured = row.measured
        if isinstance(found, Skipped) or row.model.startswith(OTHERWISE) or found.doubtful:
            continue
        if measured.tokens_per_s_per_gpu and measured.tflops_per_gpu and (flops := flops_per_token(row, found)):
            ratio = measured.tflops_per_gpu * 1e12 / (measured.tokens_per_s_per_gpu * flops)
            ratios.setdefault((row.source, row.model), []).append(ratio)
    assert len(ratios) >= 18
    for key, each in ratios.items():
        assert sorted(each)[len(each) // 2] == pytest.approx(1, abs=0.0125), key
        assert all(ratio == pytest.approx(1, abs=0.02) for ratio in each), key


@pytest.mark.parametrize("index", [292, 294, 296, 298])
def test_step_times_of_korthikanti_give_his_utilisation(index: int) -> None:
    row, found = ROWS[index], RUNS[index]
    assert isinstance(found, Run) and row.measured.step_time_s and row.measured.mfu_pct
    flops = flops_per_token(row, found)
    assert flops is not None
    achieved = flops * found.plan.global_batch * 2048 / (row.measured.step_time_s * found.plan.world_size)
    assert achieved / 312e12 == pytest.approx(row.measured.mfu_pct / 100, rel=2e-3)


def test_sc21_counts_the_flops_of_its_formula() -> None:
    """arXiv 2104.04473, equation 3: 96 B s l h^2 (1 + s/6h + V/16lh), full recompute included."""
    for index in range(281, 291):
        row, found = ROWS[index], RUNS[index]
        assert isinstance(found, Run) and row.layers and row.hidden and row.vocab and row.seq_len
        s, l, h, V = row.seq_len, row.layers, row.hidden, row.vocab
        formula = 96 * l * h * h * (1 + s / (6 * h) + V / (16 * l * h))
        # The formula runs the head as often as the layers; it is not run again.
        assert flops_per_token(row, found) == pytest.approx(formula, rel=0.025)


def test_step_time_is_filled_from_throughput_and_from_tflops() -> None:
    found = run_of(gpus=8, dp=8)
    tokens = 128 * 8192 / 8
    row = replace(made(), measured=Published(tokens_per_s_per_gpu=10_000.0))
    assert published(row, found).step_time_s == pytest.approx(tokens / 10_000)
    row = replace(made(), measured=Published(tflops_per_gpu=400.0))
    full = published(row, found)
    assert full.step_time_s == pytest.approx(tokens * found.workload.training_flops / 400e12)
    assert full.tokens_per_s_per_gpu == pytest.approx(tokens / (full.step_time_s or 0))
    row = replace(made(), measured=Published(mfu_pct=40.0))
    assert published(row, found).step_time_s == pytest.approx(
        tokens * found.workload.training_flops / (0.4 * found.topology.peak("bfloat16"))
    )
    assert asdict(published(made(), found)) == dict.fromkeys(asdict(Published()))


def test_equal_models_are_the_same_workload() -> None:
    assert run_of(gpus=8).workload is run_of(gpus=16, gpu="GB200").workload


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"gpus": 64, "tp": 2, "pp": 4, "cp": 2}, {"dp": 4}),
        ({"gpus": None, "dp": 4, "tp": 2, "pp": 4}, {"world_size": 32}),
        ({"gpus": 8, "micro_batch": None, "seq_len": 4096}, {"micro_batch": 2}),
        ({"gpus": 8, "micro_batch": None, "seq_len": 2048, "recompute": "full"}, {"micro_batch": 16}),
        ({"gpus": 8, "micro_batch": None, "notes": "local batch 4, GA 4"}, {"micro_batch": 4}),
        ({"gpus": 8, "pp": 4, "micro_batch": None, "seq_len": 512}, {"micro_batch": 1}),
        ({"gpus": 512, "tp": None, "pp": None, "global_batch_seqs": 64}, {"tp": 2, "cp": 4, "pp": 1}),
        ({"gpus": 8, "zero_stage": 3}, {"zero": 3}),
        ({"gpus": 8, "source": "llm-foundry MPT"}, {"zero": 3}),
        ({"gpus": 8, "tp": 2, "seq_parallel": 0}, {"sequence_parallel": False}),
        ({"gpus": 8, "tp": 2}, {"sequence_parallel": True}),
        ({"gpus": 8, "tp": 2, "year": 2021}, {"sequence_parallel": False, "zero": 0}),
        ({"gpus": 16, "tp": 2, "model": "Mixtral-8x7B", "ep": 8}, {"etp": 2}),
        ({"gpus": 16, "tp": 2, "model": "Mixtral-8x7B", "ep": 8, "source": "Megatron-Bridge"}, {"etp": 1}),
        ({"gpus": 8, "tp": 2, "model": "Mixtral-8x7B", "ep": 8}, {"etp": 1}),
        ({"gpus": 512, "tp": 32, "dp": 32, "gpu": "Trainium1", "source": "AWS Neuron"}, {"tp": 16, "dp": 32}),
    ],
)
def test_empty_cells_follow_from_the_others(cells: dict[str, object], expected: dict[str, object]) -> None:
    plan = run_of(**cells).plan
    assert {name: getattr(plan, name) for name in expected} == expected


def test_weights_that_no_device_can_hold_are_sharded_and_the_row_doubted() -> None:
    """Row 116: 70 B parameters on 298 GB without any sharding of weights."""
    cells: dict[str, object] = {"model": "Llama-3-70B", "gpus": 64, "gpu": "GB300"}
    told = run_of(**cells, zero_stage=1)
    assert told.plan.zero == 3 and told.doubtful and "zero_stage=1" in told.doubtful and not told.stated
    silent = run_of(**cells)
    assert silent.plan.zero == 3 and silent.doubtful is None
    assert run_of(**cells, zero_stage=1, tp=2).plan.zero == 1
    assert [found.index for found in RUNS if isinstance(found, Run) and "zero_stage" in (found.doubtful or "")] == [116]


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"dp": 3}, r"tp\*pp\*cp\*dp = 1\*1\*1\*3 = 3 is not the 8 devices"),
        ({"gpu": "Cerebras"}, "gpu 'Cerebras' is none of the presets"),
        ({"model": "Nonesuch-9B"}, "Nonesuch-9B: hidden unknown"),
        ({"precision": "INT4"}, "precision 'INT4' is not known"),
        ({"global_batch_seqs": 12}, "global_batch"),
    ],
)
def test_a_row_that_cannot_be_says_why(cells: dict[str, object], reason: str) -> None:
    found = interpret(made(**cells))
    assert isinstance(found, Skipped) and re.search(reason, found.reason)


@pytest.mark.parametrize(
    ("written", "precision"),
    [
        ("BF16", "bfloat16"),
        ("amp_bf16", "bfloat16"),
        ("BF16+FP32 opt", "bfloat16"),
        ("FP16", "float16"),
        ("fp32", "float32"),
        ("FP8", "fp8"),
        ("FP8-CS", "fp8"),
        ("FP8 (current scaling)", "fp8"),
        ("FP8 tensorwise", "fp8"),
        ("FP8 rowwise", "fp8_block"),
        ("amp_fp8", "fp8"),
        ("FP8 (128x128 / 1x128 block)", "fp8_block"),
        ("FP8-BLK", "fp8_block"),
        ("MXFP8", "mxfp8"),
        ("FP8-MX", "mxfp8"),
        ("FP8 (32x32 block)", "mxfp8"),
        ("NVFP4", "nvfp4"),
    ],
)
def test_spellings_of_a_precision(written: str, precision: str) -> None:
    assert run_of(precision=written, gpu="GB200").execution.precision == precision


@pytest.mark.parametrize(
    ("gpu", "domain", "name", "size"),
    [
        ("GB300", 72, "gb300-nvl72", 72),
        ("GB200", 36, "gb200-nvl72", 36),
        ("H100 80GB", None, "h100", 8),
        ("A100-40GB", 8, "a100-40gb", 8),
        ("A100", 16, "a100-80gb", 16),
        ("MI300X", 8, "mi300x", 8),
    ],
)
def test_devices_and_their_domains(gpu: str, domain: int | None, name: str, size: int) -> None:
    topology = run_of(gpu=gpu, gpus_per_nvlink_domain=domain).topology
    assert (topology.name, topology.domain.size) == (name, size)
    assert topology.domain.practice[-1] <= size and topology.spares < size


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        ("HybridEP; A2A overlap on", {"dispatcher": "hybridep", "expert_overlap": True}),
        ("DeepEP + 1F1B overlap", {"dispatcher": "deepep", "expert_overlap": True}),
        ("A2A dispatcher, intra-node EP", {"dispatcher": "alltoall", "expert_overlap": False}),
        ("token-drop CF 1", {"routing": "dropped"}),
        ("real dropless routing", {"routing": "real"}),
        ("force-balanced; CUDA graphs", {"routing": "balanced", "graphs": "partial"}),
        ("cuda graph full_iteration", {"graphs": "full"}),
        ("optimizer state offload; BF16 moments", {"offload": ("optimizer",), "moment_bytes": 2}),
        ("FSDP FULL_SHARD; MP mode PURE", {"gradient_bytes": 2}),
        ("NeMo 24.03.01", {"generation": (2024, 3)}),
    ],
)
def test_notes_that_say_how_a_run_was_executed(notes: str, expected: dict[str, object]) -> None:
    execution = run_of(model="Qwen3 30B A3B", ep=8, notes=notes).execution
    assert {name: getattr(execution, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("cell", "modules"),
    [
        ("selective:mla_up_proj", ("mla_up",)),
        ("selective:norm+act+shared_expert", ("norm", "activation", "shared_expert")),
        ("selective(core attention)", ("core_attention",)),
        ("selective:layernorm+moe", ("norm", "moe")),
        ("none", ()),
    ],
)
def test_modules_that_are_recomputed(cell: str, modules: tuple[str, ...]) -> None:
    found = run_of(recompute=cell)
    assert (found.execution.recompute_modules, found.plan.recompute) == (modules, "none")


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("deepseek v3", "DeepSeek-V3"),
        ("DeepSeek-V3 671B", "DeepSeek-V3"),
        ("Llama 3.1 70B", "Llama-3-70B"),
        ("Llama3.1-405b", "Llama-3.1-405B"),
        ("Qwen3 30B A3B", "Qwen3-30B-A3B"),
        ("GPT OSS 120B", "GPT-OSS-120B"),
        ("nemotron_3_super", "Nemotron-3-Super-120B-A12B"),
    ],
)
def test_other_spellings_of_a_name_are_the_same_model(name: str, same: str) -> None:
    found = architecture_of(name)
    assert found is not None and found is architecture_of(same)


def test_an_unknown_model_is_built_from_its_columns_and_its_parameters_choose_its_form() -> None:
    columns: dict[str, object] = {"layers": 12, "hidden": 768, "ffn_hidden": 3072, "heads": 12, "vocab": 50257}
    gelu = run_of(model="Nonesuch-124M", params_total_b=0.124, **columns)
    assert gelu.workload.tied_embedding and gelu.workload.parameters == pytest.approx(124e6, rel=0.01)
    gated = run_of(model="Nonesuch-190M", params_total_b=0.190, **columns)
    assert not gated.workload.tied_embedding and gated.workload.parameters == pytest.approx(190e6, rel=0.01)
    assert any("parameters" in text for text in run_of(model="Nonesuch", params_total_b=7, **columns).assumed)


def test_parameters_are_those_that_the_rows_state() -> None:
    """But for MPT's small models at windows of 65,536 tokens, whose learned positions the rows leave out."""
    off = {
        (row.model, row.seq_len)
        for row, found in zip(ROWS, RUNS, strict=True)
        if isinstance(found, Run) and any("where the row states" in text for text in found.assumed)
    }
    assert off == {("MPT-3b", 65536), ("MPT-1b", 65536)}


def test_pipeline_layouts_are_unfolded() -> None:
    assert layout_counts("Et*2|(tt|)*5t|tmL") == [2, 2, 2, 2, 2, 2, 1, 1]
    assert layout_counts("Et*7|t*7mL") == [7, 7]
    assert layout_counts("Et*4|(t*4|)*14tmL") == [4] * 15 + [1]
    assert layout_counts("Et|(tt|)*30mL") == [1, *[2] * 30, 0]
    assert layout_counts("") == [0]


def test_recipes_are_of_known_models_and_their_layouts_have_all_layers() -> None:
    for recipe in recipes():
        entry = architecture_of(recipe.model)
        assert entry is not None and entry.layers, recipe
        ep = recipe.degrees[3]
        assert min(recipe.degrees) >= 1 and (ep == 1 or (entry.experts or 0) % ep == 0), recipe
        assert not recipe.layout or sum(layout_counts(recipe.layout)) == entry.layers


@pytest.mark.parametrize(
    ("container", "graphs", "recompute"),
    [("25.09", "partial", ("mla_up_proj",)), ("26.02", "layer", ("mla_up_proj",)), ("26.04", "layer", ("mlp",))],
)
def test_a_recipe_holds_until_the_next_release(container: str, graphs: str, recompute: tuple[str, ...]) -> None:
    cells = {"gpu": "GB200", "tp": 1, "pp": 4, "vpp": 4, "ep": 64, "cp": 1, "micro_batch": 1}
    row = made(
        source="Megatron-Bridge", model="DeepSeek-V3", notes=f"NeMo container: {container} NeMo Container", **cells
    )
    found = recipe_of(row, "mxfp8")
    assert found is not None and (found.cuda_graphs, found.recompute) == (graphs, recompute)
    assert recipe_of(replace(row, source="another table"), "mxfp8") is None


def test_a_table_may_have_more_columns_and_fewer_cells(tmp_path: Path) -> None:
    cells = "x,Llama-3-8B,8192,128,1,H100,8,BF16,1,1,,,,,,none,"
    (row,) = read_rows(table(tmp_path, HEADER + ",colour", cells + ",blue"))
    assert (row.model, row.tp, row.vpp, row.dp) == ("Llama-3-8B", 1, None, None)
    assert isinstance(interpret(row), Run)
    (short,) = read_rows(table(tmp_path, HEADER, cells.removesuffix(",none,")))
    assert short.recompute == ""


def test_p7_a_table_without_its_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="columns missing: gpu, tp"):
        read_rows(table(tmp_path, HEADER.replace(",gpu,", ",").replace(",tp,", ","), "x"))
    with pytest.raises(Refusal, match="not readable"):
        read_rows(tmp_path / "nothing.csv")


@pytest.mark.parametrize(
    ("cell", "wanted"), [("1.5", "a whole number"), ("x", "a whole number"), ("-1", "a whole number")]
)
def test_p7_a_row_with_a_cell_that_is_no_number_is_left_out_by_its_column(
    tmp_path: Path, cell: str, wanted: str
) -> None:
    good = "x,Llama-3-8B,8192,128,1,H100,8,BF16,1,1,,,,,,none,"
    sound, bad = read_rows(table(tmp_path, HEADER, good, good.replace(",128,1,", f",128,{cell},")))
    assert isinstance(interpret(sound), Run)
    left = interpret(bad)
    assert isinstance(left, Skipped)
    assert left.reason == f"column micro_batch: {cell!r} is not {wanted}, 0 or more"


def test_p7_a_measured_cell_that_is_no_number_was_not_published(tmp_path: Path) -> None:
    path = table(tmp_path, f"{HEADER},step_time_s", "x,Llama-3-8B,8192,128,1,H100,8,BF16,1,1,,,,,,none,,~1.2")
    (row,) = read_rows(path)
    assert row.measured.step_time_s is None
    assert isinstance(interpret(row), Run)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"topk": 99, "experts": 8}, "topk=99 of experts=8"),
        ({"heads": 7, "kv_heads": 8}, "does not divide heads"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"gpu": "GH200"}, "none of the presets"),
    ],
)
def test_p7_a_row_that_cannot_be_is_left_out_with_the_reason(change: dict[str, object], reason: str) -> None:
    left = interpret(replace(ROWS[25], **change))  # type: ignore[arg-type]
    assert isinstance(left, Skipped) and reason in left.reason
