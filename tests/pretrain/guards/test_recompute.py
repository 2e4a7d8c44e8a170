"""A number in doubt is computed again: hardware that errs once is found, named, and leaves no trace; a number that is
not finite for good is traced to where it arose."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from parallel.planning.plan import ParallelPlan
from pretrain.checkpoint.peers import Peers
from pretrain.guards.findings import Finding
from pretrain.guards.nonfinite import First, in_words, located
from pretrain.guards.replicas import Mismatch
from pretrain.health import StepReport
from tests.parity.jobs import step
from tests.parity.pool import Pool
from tests.parity.specs import DENSE, HYBRID, plan
from tests.parity.test_skip import poisoned
from tests.pretrain.guards.faults import fault, flip, make_trainer, to_nan

LAYOUTS: dict[str, ParallelPlan] = {
    "one": plan(1),
    "dp2.zero0": plan(2),
    "dp2.zero1": plan(2, zero=1),
    "tp2.sp": plan(2, tp=2, sequence_parallel=True),
    "pp2": plan(2, pp=2),
}


def transient(layout: dict[str, Any], where: str, rank: int) -> tuple[list[StepReport], list[str], str]:
    """Three steps, the second of which goes wrong once on one rank; reports, verdicts, and the state at the end."""
    trainer = make_trainer(DENSE, layout)
    reports, verdicts = [], []
    for index in range(3):
        with fault(trainer, where, to_nan, rank, times=int(index == 1)):
            report, verdict = step(trainer, index)
        reports.append(report)
        verdicts.append(verdict)
    return reports, verdicts, trainer.state_hash()


def clean(layout: dict[str, Any]) -> str:
    trainer = make_trainer(DENSE, layout)
    assert [step(trainer, index)[1] for index in range(3)] == ["apply"] * 3
    return trainer.state_hash()


@pytest.mark.parametrize("where", ["gemm", "gradient", "reduction"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fault_that_comes_once_is_computed_away_and_its_rank_named(layout: str, where: str, pool: Pool) -> None:
    size = LAYOUTS[layout].world_size
    guilty = size - 1
    spoilt = pool.run(size, transient, LAYOUTS[layout].to_dict(), where, guilty)
    states = pool.run(size, clean, LAYOUTS[layout].to_dict())
    for (reports, verdicts, state), expected in zip(spoilt, states, strict=True):
        assert verdicts == ["apply"] * 3 and state == expected, "as if it had not been"
        assert [report.findings for report in reports[::2]] == [(), ()]
        (finding,) = reports[1].findings
        assert finding.kind == "recompute" and reports[1].aux["recomputed"] == 1.0
        assert "the loss or gradient is not finite, and computed again the step gave another result" in finding.text
        if size > 1 and where != "gemm":
            assert finding.rank == guilty, finding.text
            assert ("it arose in a reduction" in finding.text) == (where == "reduction")
            assert reports[1].aux["recomputed.rank"] == guilty
        if where == "gemm" and layout.startswith("dp"):
            assert finding.rank == guilty, "a data rank keeps its error to itself until gradients are added"


def lasting(layout: dict[str, Any], where: str, rank: int, recompute: bool) -> tuple[str, tuple[Finding, ...], bool]:
    trainer = make_trainer(HYBRID, layout, recompute=recompute)
    step(trainer, 0)
    before = trainer.state_hash()
    if where == "weight":
        if trainer.groups.rank == rank:
            to_nan(trainer.parameters["layers.2.mixer.k.weight"].data)
        report, verdict = step(trainer, 2)
        return verdict, report.findings, True
    with poisoned(trainer, where, rank) if where != "own" else fault(trainer, "gradient", to_nan, rank, 99):  # type: ignore[arg-type]
        report, verdict = step(trainer, 2)
    return verdict, report.findings, trainer.state_hash() == before


@pytest.mark.parametrize(
    ("where", "rank", "expected"),
    [
        ("activation", 1, "on rank 1 the output of layers.0.mixer.norm.weight was the first"),
        ("weight", 1, "on rank 1 the weight of layers.2.mixer.k.weight was the first"),
        ("own", 1, "on rank 1 the gradient of final_norm.weight was the first"),
        ("loss", 0, "on rank 0 the loss was the first"),
        ("gradient", 1, "it arose where ranks add their numbers up"),
    ],
)
def test_the_first_number_that_is_not_finite_is_named_by_rank_and_place(
    where: str, rank: int, expected: str, pool: Pool
) -> None:
    for verdict, found, unmoved in pool.run(2, lasting, plan(2, zero=1).to_dict(), where, rank, True):
        assert verdict == "skip" and unmoved
        (finding,) = found
        assert finding.kind == "nonfinite" and expected in finding.text, finding.text
        assert finding.rank == (None if where == "gradient" else rank)


def test_without_recompute_the_rank_is_known_from_its_loss_alone(pool: Pool) -> None:
    for verdict, found, unmoved in pool.run(2, lasting, plan(2).to_dict(), "activation", 1, False):
        assert verdict == "skip" and unmoved
        assert [(finding.kind, finding.rank) for finding in found] == [("nonfinite", 1)]


def test_of_all_ranks_findings_the_earliest_counts() -> None:
    weight, output, late = [[0, 3], "weight", "w"], [[1, 0, 2], "output", "a"], [[1, 1, 0], "output", "b"]
    assert located([late, output, None]) == First("output", "a", 1, (1,))
    assert located([late, output, weight]) == First("weight", "w", 2, (2,))
    assert located([None, output, output]).rank is None
    assert in_words(located([None, output, output])) == "on ranks 1, 2 the output of a was the first"


#: Where a bit is flipped.
PLACES = ("gemm", "gradient", "weight", "reduction")


@dataclass
class Tally:
    """Of ``tries`` flips: found by the alarm and a second computation, found by comparing replicas, and not found but
    gone, the next state of every rank being what it is without."""

    tries: int = 0
    recompute: int = 0
    replicas: int = 0
    gone: int = 0

    @property
    def settled(self) -> bool:
        """Every flip was found, or left nothing behind."""
        return self.recompute + self.replicas + self.gone == self.tries


def recall(layout: dict[str, Any], place: str, bits: Sequence[int], tries: int) -> dict[int, Tally]:
    """Flips on rank 1, in the sixteenth step of a run whose guards look at every step."""
    trainer = make_trainer(DENSE, layout, spike="skip", spike_window=32, hash_every=1)
    for index in range(15):
        step(trainer, index * 2)
    tensors = [tensor for _, _, tensor in trainer.tensors()]
    kept, health = [tensor.clone() for tensor in tensors], trainer.health.state_dict()
    updates = trainer.optimizer.updates

    def restored() -> None:
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        trainer.optimizer.set_updates(updates)
        trainer.health.load_state_dict(health)

    step(trainer, 30)
    expected = trainer.state_hash()
    found = {}
    for bit in bits:
        tally = found[bit] = Tally()
        for number in range(tries):
            restored()
            tally.tries += 1
            found_by = ""
            try:
                with fault(trainer, place, flip(bit, 97 * number + bit), rank=1):
                    report, _ = step(trainer, 30)
                found_by = "".join({finding.kind for finding in report.findings} & {"recompute"})
                trainer.twins.compare(30)
            except Mismatch:
                found_by = "replicas"
            tally.recompute += found_by == "recompute"
            tally.replicas += found_by == "replicas"
            same = Peers(trainer.groups.control).gather(trainer.state_hash() == expected)
            tally.gone += not found_by and all(same)
    return found


def test_a_weight_and_a_reduced_gradient_are_guarded_at_every_bit_and_a_gradient_at_the_largest(pool: Pool) -> None:
    bits = (0, 12, 30)
    for place in PLACES[1:]:
        tallies = pool.run(2, recall, plan(2).to_dict(), place, bits, 1)[0]
        assert tallies[30].recompute + tallies[30].replicas == 1, (place, tallies)
        if place in ("weight", "reduction"):
            assert all(tally.settled for tally in tallies.values()), (place, tallies)


@pytest.mark.verify
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_recall_by_bit_position(place: str, zero: int, pool: Pool, tmp_path: Path) -> None:
    """Writes the rows behind the table of docs/guards.md to $STOKER_TABLES, where that is set."""
    tallies = pool.run(2, recall, plan(2, zero=zero).to_dict(), place, range(32), 8)[0]
    rows = [f"{zero},{place},{bit},{t.tries},{t.recompute},{t.replicas},{t.gone}" for bit, t in tallies.items()]
    folder = Path(os.environ.get("STOKER_TABLES", tmp_path))
    header = "zero,place,bit,flips,recompute,replicas,gone"
    (folder / f"recall-{place}-zero{zero}.csv").write_text("\n".join([header, *rows]) + "\n")
    # With ZeRO-1 a reduced gradient has no replica. A product's output is normed by the next layer, which makes of the
    # largest number a token without content.
    guarded = {"weight": range(32), "reduction": range(30 if zero else 0, 31), "gradient": (30,), "gemm": ()}[place]
    assert all(tallies[bit].settled for bit in guarded), tallies


def test_what_need_not_repeat_to_the_last_bit_is_another_result_only_if_the_alarm_is_gone(pool: Pool) -> None:
    assert pool.run(1, inexact, plan(1).to_dict()) == [([], ["spike"], ["recompute"])]


def inexact(layout: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Kinds found of a clean step, of a spike that comes twice with other last bits, and of one that comes once."""
    trainer = make_trainer(DENSE, layout, spike="skip", spike_window=16)
    trainer.recompute._exact = False
    for index in range(4):
        report, _ = step(trainer, index * 2)
    found = [[finding.kind for finding in report.findings]]
    real = trainer.optimizer.gradient_norm
    for values in ([1e3, 1e3 * (1 + 2**-40)], [1e3, None]):
        with patch.object(trainer.optimizer, "gradient_norm", partial(_told, iter(values), real)):
            report, _ = step(trainer, 8)
        found.append([finding.kind for finding in report.findings])
    return found[0], found[1], found[2]


def _told(values: Iterator[float | None], real: Callable[[Any], float], world: Any) -> float:
    """The next of ``values``, or what is measured where it is None."""
    value, measured = next(values), real(world)
    return measured if value is None else value
