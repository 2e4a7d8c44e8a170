"""``docs/fault-matrix.md``: what was tried, what it took, and what was not tried and why."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median

from launch.commands_bench import device
from pretrain.attempt import environment
from stoker.version import code_commit
from tests.faults.bench import Outcome
from tests.faults.matrix import Case, Row

PACKAGES = ("torch", "megatron-core", "numpy")


@dataclass
class Played:
    """A case, and what came of it: outcomes, or the errors of runs that gave none, or why it was skipped."""

    row: Row
    case: Case
    outcomes: list[Outcome] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    skipped: str | None = None

    @property
    def wrong(self) -> list[str]:
        return [each for outcome in self.outcomes for each in outcome.wrong] + self.errors

    def seconds(self, what: str) -> list[float]:
        """``noticed_s`` or ``training_s`` of every strike that has one."""
        strikes = (strike for outcome in self.outcomes for strike in outcome.strikes)
        return [value for strike in strikes if (value := getattr(strike, what)) is not None]

    @property
    def missed(self) -> list[str]:
        """Targets that the slowest strike missed."""
        if self.case.target is None:
            return []
        found = []
        for what, words in (("noticed_s", "noticed"), ("training_s", "training again")):
            limit, seconds = getattr(self.case.target, what), self.seconds(what)
            if not seconds or max(seconds) > limit:
                found.append(f"{words} {max(seconds):.2f} s" if seconds else f"{words}: not measured")
        return found

    @property
    def result(self) -> str:
        if self.skipped is not None:
            return f"skipped: {self.skipped}"
        if self.wrong:
            return f"FAILED: {self.wrong[0]}"
        return f"target missed: {', '.join(self.missed)}" if self.missed else "holds"

    @property
    def bad(self) -> bool:
        return bool(self.wrong or self.missed)


@dataclass(frozen=True)
class Tested:
    """What pytest said of the tests that a row names."""

    paths: Sequence[str]
    passed: int
    failed: int
    skipped: Sequence[str]


def page(command: str, played: Sequence[Played], tested: dict[int, Tested], rows: Sequence[Row]) -> str:
    """The whole page."""
    versions = environment()
    packages = ", ".join(f"{name} {versions['packages'].get(name)}" for name in PACKAGES)
    facts = {
        "command": f"`{command}`",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": code_commit() or "unknown",
        "device": f"{device()}; load {os.getloadavg()[2]:.1f} over the last 15 minutes, this included",
        "versions": f"python {versions['python']}, {packages}, gloo, {versions['platform']}",
    }
    lines = ["# Fault matrix", "", *(f"- {name}: {value}" for name, value in facts.items()), "", INTRODUCTION, ""]
    lines += table(
        ("row", "fault", "runs", "strikes", "noticed, s", "training again, s", "target, s", "oracles", "result"),
        (_cells(each) for each in played),
    )
    notes = [f"- {each.case.name}: {note}" for each in played for o in each.outcomes for note in o.notes]
    lines += ["", "## What runs said besides", "", *dict.fromkeys(notes)] if notes else []
    lines += ["", "## Rows that other tests cover", ""]
    lines += table(
        ("row", "fault", "tests", "passed", "failed", "skipped"),
        (
            (str(row.number), row.fault, " ".join(f"`{path}`" for path in row.tests), *_counts(tested.get(row.number)))
            for row in rows
            if row.tests
        ),
    )
    lines += ["", "## Not tried", ""]
    lines += [f"- row {row.number}, {row.fault}: {row.not_yet}" for row in rows if row.not_yet]
    lines += [f"- row {each.row.number}, {each.case.name}: {each.skipped}" for each in played if each.skipped]
    return "\n".join(lines) + "\n"


INTRODUCTION = """\
Written by the command above. Real runs of a small model in float64 on two ranks over gloo, each rank with a warm spare,
faults put in from outside or by a worker of the tests. Seconds are median (largest) over strikes, from the fault to the
supervisor's line about it and to the first step done again; a target is missed where the largest misses it. Oracles:
O1 curve and state of every rank after every step bit-identical to the undisturbed run; O2 committed checkpoints
unaltered and whole; O3 no more steps redone than lie between checkpoints, each window consumed once; O4 cause, kind and
rank named; O5 no process, shared memory or port left. Nothing here shows NCCL, InfiniBand or a network file system."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return [line(head), line("---" for _ in head), *map(line, rows)]


def _cells(each: Played) -> tuple[str, ...]:
    strikes = sum(len(outcome.strikes) for outcome in each.outcomes)
    target = each.case.target
    oracles = [
        name if all(not o.oracles[name] for o in each.outcomes) else f"**{name}**"
        for name in (each.outcomes[0].oracles if each.outcomes else ())
    ]
    return (
        str(each.row.number),
        each.case.name,
        str(len(each.outcomes) + len(each.errors)),
        str(strikes),
        _seconds(each.seconds("noticed_s")),
        _seconds(each.seconds("training_s")),
        f"{target.noticed_s:g}, {target.training_s:g}" if target else "",
        " ".join(oracles),
        each.result[:400],
    )


def _seconds(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({max(values):.2f})" if values else ""


def _counts(tested: Tested | None) -> tuple[str, str, str]:
    if tested is None:
        return "not run", "", ""
    reasons = "; ".join(sorted(set(tested.skipped)))[:200]
    return str(tested.passed), str(tested.failed), f"{len(tested.skipped)} {reasons}"
