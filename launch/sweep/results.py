"""What the runs of a sweep came to, as rows of a table: read from the run directories. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.sweep.definition import SEED, words
from launch.sweep.history import Outcome, State, state
from launch.sweep.ledger import Facts, Ledger, Trial, config_of
from launch.sweep.measured import Measured, Measurements
from pretrain.figures.chart import Line
from pretrain.figures.markup import number
from pretrain.figures.sweep import Results, Row
from stoker import canonical
from stoker.errors import Refusal

#: Colours of states; whatever is not here went wrong.
LOOKS = {
    Outcome.DONE: "c2",
    Outcome.CUT: "c4",
    Outcome.PREEMPTED: "c4",
    Outcome.WAITING: "c7",
    Outcome.RUNNING: "c0",
}
#: Runs that the terminal lists.
LISTED = 10


def results(ledger: Ledger) -> Results:
    """Every run of the ledger, the best first: those that can be compared with most others, then the rest."""
    asked = {trial.number for trial in ledger.active}
    measurements = Measurements(ledger)
    found = [_Run(t, state(ledger, t), t.number in asked, measurements.of(t)) for t in ledger.trials]
    measurements.keep()
    usual = _usual(ledger, found)
    keys = varied(trial.overrides for trial in ledger.trials)
    common = _common(ledger)
    base = {key: _at(common, key) for key in keys}
    rows = [_row(ledger, run, usual, base) for run in found]
    section = ledger.definition.metric
    rows.sort(key=lambda row: (bool(row.apart), not row.final, section.order(row.value), row.number))
    return Results(
        name=ledger.definition.name,
        metric=section.name,
        averaged=section.averaged,
        highest=section.mode == "max",
        keys=keys,
        base=base,
        rows=rows,
        rule=None if ledger.definition.stop is None else ledger.definition.stop.rungs(usual.steps),
        fixed={key: value for key, value in ledger.definition.base.items() if key not in keys},
        config=ledger.definition.config,
    )


@dataclass(frozen=True)
class _Run:
    trial: Trial
    state: State
    asked: bool
    measured: Measured


def _usual(ledger: Ledger, runs: Sequence[_Run]) -> Facts:
    """What most runs have in common of what decides whether they can be compared."""

    def most(values: Iterable[Any]) -> Any:
        return Counter(values).most_common(1)[0][0]

    facts = [run.trial.facts for run in runs]
    names = ("steps", "batch_tokens", "seed", "data", "tokenizer")
    return Facts(**{name: most(getattr(fact, name) for fact in facts) for name in names})


def _row(ledger: Ledger, run: _Run, usual: Facts, base: Mapping[str, Any]) -> Row:
    trial, outcome = run.trial, run.state.outcome
    notes = [] if run.asked else ["no longer asked for by the sweep's file"]
    if run.measured.problem and run.state.attempts:
        notes.append(run.measured.problem)
    if outcome is not Outcome.DONE and run.state.cause:
        notes.append(run.state.cause)
    return Row(
        number=trial.number,
        name=trial.name,
        values={key: trial.overrides.get(key, base[key]) for key in base},
        setting=canonical.dumps({key: value for key, value in trial.overrides.items() if key != SEED}),
        seed=trial.facts.seed,
        state=outcome.value,
        look=LOOKS.get(outcome, "c1"),
        final=outcome is Outcome.DONE,
        done=run.measured.done,
        steps=trial.facts.steps,
        value=run.measured.value,
        tokens_per_s=run.measured.tokens_per_s,
        curve=Line.of(trial.name, "c0", run.measured.steps, run.measured.values),
        apart=tuple(_differences(ledger, trial.facts, usual)),
        notes=tuple(notes),
    )


def _differences(ledger: Ledger, facts: Facts, usual: Facts) -> Iterable[str]:
    """Why a run cannot be compared with most others of the sweep by the metric alone.

    Seeds that the sweep's file varies as such are repetitions, not differences. Bits per byte of text do not depend on
    the tokenizer.
    """
    if facts.steps != usual.steps:
        yield f"{facts.steps:,} steps, not {usual.steps:,}"
    if facts.batch_tokens != usual.batch_tokens:
        yield f"{facts.batch_tokens:,} tokens a step, not {usual.batch_tokens:,}"
    if facts.data != usual.data:
        yield "other data, or another order of it"
    if facts.seed != usual.seed and not ledger.definition.seeds:
        yield f"another order of the data (seed {facts.seed}, not {usual.seed})"
    if facts.tokenizer != usual.tokenizer and not ledger.definition.metric.name.endswith("bits_per_byte"):
        yield "another tokenizer"


def varied(overrides: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys in which the runs differ, in the order of the file, the seed last."""
    given = list(overrides)
    keys = dict.fromkeys(key for one in given for key in one)
    absent = object()
    return [key for key in sorted(keys, key=SEED.__eq__) if len({_text(one.get(key, absent)) for one in given}) > 1]


def _text(value: Any) -> str:
    return canonical.dumps(value) if isinstance(value, dict | list | str | int | float | None) else ""


def _common(ledger: Ledger) -> Mapping[str, Any]:
    """The runs' common configuration, defaults written out where it is one by itself."""
    try:
        return config_of(ledger.root, ledger.values, 0, {}).resolved()
    except Refusal:
        return ledger.values


def _at(values: Any, key: str) -> Any:
    """What a configuration's file says of a key; None where it leaves it to the default."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return None
        values = values[part]
    return values


def best_lines(found: Results) -> list[str]:
    """The best runs, as lines for a terminal."""
    width = max((len(row.name) for row in found.rows), default=0)
    lines = [f"{found.metric}, {'highest' if found.highest else 'lowest'} first"]
    for row in found.rows[:LISTED]:
        changes = words({key: value for key, value in row.values.items() if value != found.base[key]})
        value = "–" if row.value is None or math.isnan(row.value) else number(row.value, 5)
        apart = f"  NOT COMPARABLE: {'; '.join(row.apart)}" if row.apart else ""
        lines.append(f"{row.name:{width}}  {value:>10}  {row.state}  {changes}{apart}")
    if len(found.rows) > LISTED:
        lines.append(f"and {len(found.rows) - LISTED} more")
    return lines
