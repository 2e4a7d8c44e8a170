"""A rewind goes back before the batch that did harm and past it; a kill at any moment of it changes nothing (P5)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dataio.log import DataLog, Segment
from pretrain.guards import findings
from pretrain.guards.rewind import changes, pass_over, passing, rewinds
from pretrain.rundir import committed_steps, prepare
from tests.dataio.synthetic import TOKENIZER
from tests.launch.tiny import fixed, tiny
from tests.parity.pool import Pool
from tests.pretrain.guards.jobs import KILLS, POISON_STEP, run

STEPS = 18
OVERRIDES = [
    f"run.steps={STEPS}", "checkpoint.every=5", "guard.spike=rewind", "guard.spike_window=32", "train.lr=1e-3",
]  # fmt: skip


LOG = DataLog(3, TOKENIZER, (Segment.of(0, 64, 6, {"a": 2, "b": 1}, {"a": "1" * 64, "b": "2" * 64}),))


def segment(from_step: int, **changes: object) -> Segment:
    return replace(LOG.segments[0], from_step=from_step, **changes)  # type: ignore[arg-type]


def config(folder: Path) -> str:
    return str(tiny(folder, layers=["attention/dense"]))


def standing(folder: Path, name: str) -> tuple[list[dict[str, object]], bytes]:
    root = folder / "runs" / name
    return fixed(root), (root / "data_log.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> tuple[Path, list[tuple[str, str]]]:
    """A run of two ranks whose step 13 is a spike, and that is never killed."""
    folder = tmp_path_factory.mktemp("rewind")
    return folder, pool.run(2, run, config(folder), [*OVERRIDES, "run.name=whole"], (POISON_STEP,))


def test_a_rewind_is_the_run_whose_data_log_had_passed_over_the_batch_from_the_start(
    whole: tuple[Path, list[tuple[str, str]]], pool: Pool
) -> None:
    folder, ended = whole
    assert [how for how, _ in ended] == ["done done: "] * 2
    verdicts = [json.loads(line)["verdict"] for line in (folder / "runs/whole/metrics.jsonl").read_text().splitlines()]
    assert verdicts == ["apply"] * POISON_STEP + ["rewind"] + ["apply"] * (STEPS - 10)
    log = DataLog.open(folder / "runs/whole/data_log.jsonl")
    assert [(s.from_step, s.skip_batches) for s in log.segments] == [(0, 0), (POISON_STEP, 1)]
    assert [(line["kind"], line["step"]) for line in findings.read(folder / "runs/whole")] == [
        ("spike", POISON_STEP), ("rewind", POISON_STEP),
    ]  # fmt: skip

    prepare(folder / "runs/calm")
    (folder / "runs/calm/data_log.jsonl").write_bytes((folder / "runs/whole/data_log.jsonl").read_bytes())
    calm = [*OVERRIDES, "run.name=calm", "guard.spike=off"]
    assert pool.run(2, run, config(folder), calm, (POISON_STEP,)) == ended
    assert standing(folder, "calm") == standing(folder, "whole")


@pytest.mark.parametrize("kill", KILLS)
def test_p5_a_run_killed_in_the_middle_of_a_rewind_is_the_run_that_was_not(
    kill: str, whole: tuple[Path, list[tuple[str, str]]], pool: Pool
) -> None:
    folder, ended = whole
    overrides = [*OVERRIDES, f"run.name=killed-{list(KILLS).index(kill)}"]
    assert [how for how, _ in pool.run(2, run, config(folder), overrides, (POISON_STEP,), kill)] == ["killed"] * 2
    assert pool.run(2, run, config(folder), overrides, (POISON_STEP,)) == ended
    assert standing(folder, overrides[-1].split("=")[1]) == standing(folder, "whole")


def test_rewinds_without_a_new_checkpoint_end_and_say_so_whatever_was_killed_between(
    tmp_path: Path, pool: Pool
) -> None:
    overrides = [*OVERRIDES, "guard.max_rewinds=2", "run.name=lost"]
    poison = tuple(range(POISON_STEP, 99))
    first = pool.run(1, run, config(tmp_path), overrides, poison, "after the data log is written")
    assert first == [("killed", "")]
    ((how, _),) = pool.run(1, run, config(tmp_path), overrides, poison)
    assert how.startswith(f"stopped verdict: step {POISON_STEP}: the ") and "after 2 rewinds without a new" in how
    log = DataLog.open(tmp_path / "runs/lost/data_log.jsonl")
    assert [(s.from_step, s.skip_batches) for s in log.standing] == [(0, 0), (POISON_STEP, 2)]


def test_a_spike_before_the_first_checkpoint_goes_back_to_the_beginning(tmp_path: Path, pool: Pool) -> None:
    overrides = [*OVERRIDES, "checkpoint.every=null", "run.name=early"]
    ((how, _),) = pool.run(1, run, config(tmp_path), overrides, (POISON_STEP,))
    assert how == "done done: " and committed_steps(tmp_path / "runs/early") == [0, STEPS]
    assert len(fixed(tmp_path / "runs/early")) == STEPS


def test_a_batch_is_passed_over_and_what_was_planned_still_holds(tmp_path: Path) -> None:
    later = segment(40, seq_len=128)
    path = tmp_path / "data_log.jsonl"
    log = LOG.write(path).append(later, 0)
    (tmp_path / "torn").write_bytes(path.read_bytes() + b'{"torn')
    pass_over(tmp_path / "torn", 20)
    pass_over(tmp_path / "torn", 20)
    again = DataLog.open(tmp_path / "torn")
    assert again.segments[:2] == log.segments, "lines are only added"
    assert [(s.from_step, s.skip_batches) for s in again.standing] == [(0, 0), (20, 2), (40, 0)]
    assert again.standing[-1] == later
    assert [rewinds(again, known) for known in range(len(again.segments) + 1)] == [2, 2, 2, 1, 1, 0, 0]
    assert not changes(again, 20) and changes(again, 40) and not changes(again, 0) and not changes(again, 41)


def test_passing_over_leaves_everything_else_as_it_was() -> None:
    log = LOG.append(segment(10, seq_len=128), 0)
    (added,) = passing(log, 12)
    assert added == Segment(**{**vars(log.segments[-1]), "from_step": 12, "skip_batches": 1})
