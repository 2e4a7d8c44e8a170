"""Predictions beside published runs: what is read, what is compared, and how good is counted."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from parallel.planning.accuracy.evaluate import GB, Judged, evaluate, fitting, observed, read, read_nameless
from parallel.planning.accuracy.held_out import gpu_kind, measure, publication
from parallel.planning.accuracy.metrics import Errors, choices, coverage, noise, rank_correlation, rankings, timed
from parallel.planning.accuracy.page import BEYOND, page
from parallel.planning.accuracy.report import constants, report, to_json
from parallel.planning.accuracy.targets import Target, targets
from parallel.planning.published.rows import TABLE, Published, Row, read_rows
from parallel.planning.timing.calibration import CONSTANTS, Calibration, load_calibration, priors
from parallel.planning.timing.fit import Observed, Runs
from parallel.planning.timing.hand_set import MEANINGS, hand_set

ROOT = Path(__file__).parents[2]
BELIEVED = Calibration(priors(), {"dense": 1.2, "moe": 1.3}, {})
KEYS = ["step_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu_pct", "mem_per_gpu_gb"]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Every seventh row of the table, and a row for each of its sources."""
    table = read_rows()
    first = {row.source: row.index for row in reversed(table)}
    return [row for row in table if row.index % 7 == 0 or row.index in first.values()]


@pytest.fixture(scope="module")
def judged(rows: list[Row]) -> list[Judged]:
    return evaluate(rows, BELIEVED)


def run(step_s: float, published_s: float, judged: Judged, **tags: str) -> Judged:
    """``judged`` with other figures and tags."""
    assert judged.run is not None
    tokens = judged.run.plan.global_batch * judged.run.workload.seq_len / judged.run.plan.world_size
    measured = Published(step_time_s=published_s, tokens_per_s_per_gpu=tokens / published_s)
    return replace(judged, step_s=step_s, measured=measured, run=replace(judged.run, tags={**judged.run.tags, **tags}))


def test_no_prediction_depends_on_what_a_row_measured(rows: list[Row], judged: list[Judged]) -> None:
    blind = evaluate([replace(row, measured=Published()) for row in rows], BELIEVED)
    wrong = evaluate([replace(row, measured=Published(7.0, 7.0, 7.0, 7.0, 7.0)) for row in rows], BELIEVED)
    for one, two, three in zip(judged, blind, wrong, strict=True):
        assert one.predicted == two.predicted == three.predicted, one.row
        assert two.time_error is None and two.memory_error is None


def test_a_row_is_written_in_the_form_that_scripts_read(rows: list[Row], judged: list[Judged]) -> None:
    for row, each in zip(rows, judged, strict=True):
        form = each.to_dict()
        assert list(form) == ["row", "predicted", "published", "skipped"] and form["row"] == row.index
        assert list(form["predicted"]) == list(form["published"]) == KEYS
        assert form["published"] == asdict(row.measured), "as the table has it, nothing filled in"
        assert all(value is None for value in form["predicted"].values()) == (form["skipped"] is not None)


def test_units_of_a_prediction_agree_with_each_other(judged: list[Judged]) -> None:
    for each in judged:
        if (run := each.run) is None:
            continue
        told = each.predicted
        assert told.step_time_s and told.tokens_per_s_per_gpu and told.tflops_per_gpu and told.mfu_pct
        tokens = run.plan.global_batch * run.workload.seq_len
        assert told.tokens_per_s_per_gpu * told.step_time_s * run.plan.world_size == pytest.approx(tokens, rel=1e-12)
        share = told.tflops_per_gpu * 1e12 / run.topology.peak(run.execution.precision)
        assert told.mfu_pct == pytest.approx(100 * share, rel=1e-12) and 0 < share < 1, each.row


def test_rows_that_make_no_sense_are_skipped_with_a_reason(rows: list[Row]) -> None:
    sound = next(row for row in rows if row.model.startswith("Llama") and row.gpus)
    broken = [
        replace(sound, gpu="abacus"),
        replace(sound, precision="int3"),
        replace(sound, layers=10**9),
        replace(sound, gpus=0, dp=0),
        replace(sound, global_batch_seqs=0),
        replace(sound, seq_len=0),
        replace(sound, tp=3, pp=5, dp=7),
        Row(9, Published(), model="nobody knows"),
    ]
    judged = evaluate([*broken, sound], BELIEVED)
    for each in judged[:-1]:
        assert each.skipped and each.run is None and each.predicted == Published(), each
    assert judged[-1].skipped is None and coverage(judged) == pytest.approx(1 / 9)
    told = json.dumps(to_json(judged, BELIEVED), allow_nan=False)
    assert len(json.loads(told)["rows"]) == 9 and "abacus" in report(judged)


def test_golden_values_are_those_of_the_last_pipeline_rank(judged: list[Judged]) -> None:
    compared = 0
    for row, each in zip(read_rows(), evaluate(read_rows()[537:559], BELIEVED), strict=False):
        assert each.memory is not None and each.run is not None, row
        assert each.memory_gb == each.memory.stages[-1].allocated / GB
        compared += each.run.plan.pp > 1 and each.memory_gb < each.memory.allocated / GB
    assert compared, "none of them has a stage that is fuller than the last: the test tells nothing"
    others = [each for each in judged if each.memory and "golden" not in each.tag("source")]
    assert all(each.memory_gb == each.memory.allocated / GB for each in others if each.memory)


def test_nothing_doubtful_is_fitted(judged: list[Judged]) -> None:
    everything = read(read_rows())
    fitted = {each.row for each in fitting(everything)}
    for each in everything:
        if each.row in fitted:
            assert each.measured.step_time_s and each.run and not each.run.execution.deterministic
            assert not any(text.startswith("gpus=") and ":" in text for text in each.run.assumed)
    # Rows whose notes say that layout or time contradict another row; and rows whose doubt is about memory or FLOPs.
    assert not fitted & {31, 224, 255, 308, 310, 312, 353} and {559, 560, 562, 565} <= fitted


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=30))
def test_rank_correlation_of_all_pairs_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    ours = rank_correlation(x, y, tied=0.0)
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert ours is None
    else:
        assert ours == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_rank_correlation_leaves_out_pairs_that_lie_within_five_percent() -> None:
    published = [100.0, 104.0, 200.0, 207.0]
    assert rank_correlation([2.0, 1.0, 4.0, 3.0], published, tied=0.0) == pytest.approx(0.6)
    # Ranks 2 1 4 3 against 1 2 3 4 over the four pairs that are left, by hand: (2 1 3 2).(2 3 1 2) / 18 = 14/18.
    kept = [(2, 2), (1, 3), (3, 1), (2, 2)]
    by_hand = sum(a * b for a, b in kept) / math.sqrt(sum(a * a for a, _ in kept) * sum(b * b for _, b in kept))
    assert rank_correlation([2.0, 1.0, 4.0, 3.0], published) == pytest.approx(by_hand)
    assert rank_correlation([1.0, 2.0], [100.0, 101.0]) is None


def test_errors_are_counted_by_hand() -> None:
    found = Errors.of([0.1, -0.2, None, 0.3, -0.04])
    assert found is not None and found.count == 4
    assert astuple(found)[1:] == pytest.approx((0.15, 0.16, 0.3, 0.5, 0.03))
    assert Errors.of([None]) is None


def test_plan_choice_is_the_throughput_of_our_pick_over_the_best(judged: list[Judged]) -> None:
    base = next(each for each in timed(judged) if each.run and each.run.plan.world_size >= 16)
    assert base.run is not None
    other = replace(base.run, plan=replace(base.run.plan, recompute="full"))
    slow = replace(base, row=2, run=other)
    # Ours is predicted to be the fastest and is published second: 10 s against 8 s.
    found = choices([run(9.0, 10.0, replace(base, row=1)), run(9.5, 8.0, slow)])
    assert [(choice.picked, choice.best, choice.kept) for choice in found.values()] == [(1, 2, 0.8)]
    # The same layout again under newer software counts at its best.
    newer = replace(base.run, execution=replace(base.run.execution, generation=(2030, 1)))
    again = choices([run(9.0, 10.0, base), run(9.5, 8.0, slow), run(9.0, 7.0, replace(base, row=3, run=newer))])
    assert [choice.kept for choice in again.values()] == [1.0]
    assert not choices([run(9.0, 10.0, base), run(9.0, 7.0, replace(base, run=newer))]), "one layout is no choice"


def test_ranks_are_of_groups_of_four_runs_and_more(judged: list[Judged]) -> None:
    base = timed(judged)[0]
    sizes = {"a": 4, "b": 3}
    runs = [run(float(s), float(s), base, model=m) for m, count in sizes.items() for s in range(1, 1 + count)]
    found = rankings(runs, lambda each: each.tag("model"))
    assert {model: ranking.correlation for model, ranking in found.items()} == {"a": 1.0}


def test_noise_is_of_rows_that_no_model_can_tell_apart(judged: list[Judged]) -> None:
    base = timed(judged)[0]
    assert base.run is not None
    other = replace(base, run=replace(base.run, plan=replace(base.run.plan, recompute="full")))
    assert noise([run(1.0, 10.0, base), run(1.0, 12.0, base), run(1.0, 99.0, other)]) == [pytest.approx(0.2)]


def test_targets_say_what_is_not_met_and_what_is_not_known(judged: list[Judged]) -> None:
    assert Target("", 0.06, 0.06).met and not Target("", 0.061, 0.06).met
    assert Target("", 0.97, 0.97, at_least=True).met and not Target("", 0.9699, 0.97, at_least=True).met
    assert Target("", None, 1.0).met is None
    found = {target.name: target for target in targets(judged)}
    korthikanti = [abs(each.time_error or 0.0) for each in judged if "Korthikanti" in each.tag("source")]
    value = found["Korthikanti's A100 points: mean error of step time"].value
    assert korthikanti and value == pytest.approx(mean(korthikanti))
    assert all(target.met is None for target in targets([]) if not target.name.startswith("coverage"))


def _leaky(runs: Sequence[Observed]) -> dict[str, float]:
    """No fit, but values that tell which runs it was given."""
    return priors() | {"step_s": float(np.mean([run.step_s for run in runs]))}


def test_what_is_held_out_is_not_seen(judged: list[Judged]) -> None:
    rows = read([row for row in read_rows() if row.index in {each.row for each in judged}])
    source = publication(rows[0])
    changed = [
        replace(each, measured=replace(each.measured, step_time_s=3 * (each.measured.step_time_s or 1.0)))
        if publication(each) == source
        else each
        for each in rows
    ]
    before, after = (measure(each, each, _leaky, search=False) for each in (rows, changed))
    for one, two in zip(before.by_source, after.by_source, strict=True):
        assert (one.step_s == two.step_s) == (publication(one) == source or one.run is None), one.row
    gpu = gpu_kind(rows[0])
    values = {**_leaky(observed([each for each in fitting(rows) if gpu_kind(each) != gpu]))}
    theirs = [each for each in before.by_gpu if each.run and gpu_kind(each) == gpu]
    told = Runs(observed(theirs)).predict(values)
    assert told == pytest.approx([each.step_s for each in theirs], rel=1e-4)  # constants are rounded to five digits


def test_a_fit_and_a_prediction_see_the_same_step_time(judged: list[Judged]) -> None:
    modelled = [each for each in judged if each.run]
    times = Runs(observed(modelled)).predict(BELIEVED.values)
    assert times == pytest.approx([each.step_s for each in modelled], rel=1e-12)


def test_the_page_says_every_row_and_is_the_same_twice(judged: list[Judged]) -> None:
    chosen = [row for row in read_rows() if row.index in {each.row for each in judged}]
    rows = read(chosen)
    found = measure(rows, read_nameless(chosen, rows), _leaky, search=False, date="2026-11-23")
    pages = [page(found), page(measure(rows, found.nameless, _leaky, search=False, date="2026-11-23"))]
    assert pages[0] == pages[1] and "2026-11-23" in pages[0]
    listed = {
        line.split("|")[1].strip().rstrip("s*") for line in pages[0].split("## Every row")[1].split("\n")[6:] if line
    }
    assert listed == {str(each.row) for each in rows if each.run}
    for constant in CONSTANTS:
        assert f"| {constant.name} |" in pages[0]


def test_without_the_name_of_its_publication_a_row_has_no_recipe_and_counts_as_it_did() -> None:
    chosen = [row for row in read_rows() if row.model == "DeepSeek-V3" and "Bridge" in row.source]
    named = read(chosen)
    nameless = read_nameless(chosen, named)
    pairs = [(one.run, two.run) for one, two in zip(named, nameless, strict=True) if one.run and two.run]
    assert len(pairs) > 30
    assert {one.execution.moment_bytes for one, _ in pairs} == {2}, "the recipe's"
    assert {two.execution.moment_bytes for _, two in pairs} == {4}, "which nobody else knows of"
    assert any(one.execution.dispatcher != two.execution.dispatcher for one, two in pairs)
    for one, two in zip(named, nameless, strict=True):
        if two.run:
            assert (one.tag("source"), one.measured, one.sound) == (two.tag("source"), two.measured, two.sound)


def test_a_row_that_does_not_fit_its_device_says_so(judged: list[Judged]) -> None:
    (base,) = [each for each in judged if each.run][:1]
    assert base.run is not None and base.memory is not None
    size = base.run.topology.known("device.memory_bytes")

    def with_memory(share: float) -> Judged:
        run, factor = base.run, base.memory.peak / (share * size)  # type: ignore[union-attr]
        device = replace(run.topology.device, memory_bytes=size * factor)  # type: ignore[union-attr]
        return replace(base, run=replace(run, topology=replace(run.topology, device=device)))  # type: ignore[union-attr, type-var]

    tight, over = with_memory(0.999), with_memory(1.5)
    assert with_memory(0.2).note is None
    assert "might not fit" in (tight.note or "") and "would not fit" in (over.note or "")
    assert f"{over.row}: {over.note}" in report([over])
    assert to_json([over], BELIEVED)["details"][0]["note"] == over.note


def test_every_number_of_the_time_model_is_fitted_or_told_to_be_set_by_hand() -> None:
    told = {(module, name) for module, names in MEANINGS.items() for name in names}
    apart = {"FORWARD", "BACKWARD", "VERSION", "COLUMN"}  # places in an array, and a file's format
    for module in MEANINGS:
        for name, value in vars(module).items():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
            flat = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
            numbers = bool(flat) and all(isinstance(each, int | float) for each in flat)
            if name.isupper() and numbers and name not in apart | {"STACKS"}:
                assert (module, name) in told, f"{module.__name__}.{name}"
    printed = "\n".join(constants(load_calibration()))
    for each in hand_set():
        assert f"\n{each.name} " in printed and each.meaning in printed


def test_constants_outside_their_range_are_told_on_the_page_with_the_reason() -> None:
    written = (ROOT / "docs" / "planner-accuracy.md").read_text(encoding="utf-8")
    values = load_calibration().values
    outside = [each for each in CONSTANTS if not each.is_physical(values[each.name])]
    for each in outside:
        assert BEYOND.get(each.name), f"{each.name} lies outside {each.least} to {each.most}: say why in BEYOND"
    fast = next(each for each in CONSTANTS if each.name == "links")
    assert fast.is_physical(1.0) and not fast.is_physical(1.01)
    late = next(each for each in CONSTANTS if each.name == "routing.2026-02")
    assert late.is_physical(0.0) and not late.is_physical(-0.01), "a shift is a logarithm"
    if "## Constants" in written and "lie outside" in written:
        assert all(f"- `{each.name}` " in written for each in outside)


def test_the_calibration_that_comes_with_stoker_is_of_this_table_and_these_constants() -> None:
    stored = load_calibration()
    assert list(stored.values) == [constant.name for constant in CONSTANTS] and len(CONSTANTS) <= 40
    assert all(math.isfinite(value) for value in stored.values.values())
    assert all(1 < spread < 2 for spread in stored.spreads.values()) and set(stored.spreads) == {"dense", "moe"}
    digest = hashlib.sha256(TABLE.read_bytes()).hexdigest()
    assert stored.provenance["table_sha256"] == digest, "run python -m parallel.planning.accuracy --fit"
    written = (ROOT / "docs" / "planner-accuracy.md").read_text(encoding="utf-8")
    assert digest[:12] in written and all(f"| {constant.name} |" in written for constant in CONSTANTS)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda rows: [{k: v for k, v in row.items() if k != "gpus"} for row in rows], "columns missing: gpus"),
        (lambda rows: [], "columns missing"),
    ],
)
def test_a_table_that_is_none_is_refused_in_words(edit, says: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = edit([next(csv.DictReader(file))])
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    with pytest.raises(ValueError, match=says):
        read_rows(path)
