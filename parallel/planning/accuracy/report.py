"""An evaluation as text, for a person, and as plain values, for scripts. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from parallel.planning.accuracy.evaluate import Judged
from parallel.planning.accuracy.metrics import Errors, case, choices, coverage, grouped, rankings, timed
from parallel.planning.accuracy.regret import Regret
from parallel.planning.accuracy.targets import Target, targets
from parallel.planning.tables import aligned, figure, percent
from parallel.planning.timing.calibration import CONSTANTS, Calibration, Constant
from parallel.planning.timing.hand_set import hand_set
from stoker.formats import stamp

FORMAT, VERSION = "plan-evaluation", 1
#: Said of a fitted constant that is not what it is called.
OUTSIDE = "outside its physical range: docs/planner-accuracy.md says why"
#: By what rows are put together.
GROUPS: Mapping[str, Callable[[Judged], str]] = {
    "kind": lambda judged: judged.tag("kind"),
    "source": lambda judged: judged.tag("source"),
    "gpu": lambda judged: judged.tag("gpu") or "not named",
    "precision": lambda judged: judged.precision,
    "model": lambda judged: judged.tag("model"),
}
#: Characters of a name in a table.
NAME = 30


def report(judged: Sequence[Judged], regrets: Mapping[int, Regret] | None = None) -> str:
    """Every row, every group, and the lines that predictions are held to. ``regrets``: left out, they are not told."""
    blocks = [
        list(_head(judged)),
        _rows(judged, regrets or {}),
        list(_skipped(judged)),
        list(_noted(judged)),
        *(_group(judged, name) for name in GROUPS),
        _ranks(judged),
        _choices(judged),
        list(_regrets(judged, regrets or {})),
        target_lines(targets(judged)),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def target_lines(found: Sequence[Target]) -> list[str]:
    words = {True: "met", False: "NOT MET", None: "unknown"}
    rows = [(target.name, words[target.met], *target.figures(), target.detail) for target in found]
    return aligned(("held to", "", "limit", "reached", ""), rows, words=(0, 1, -1))


def constants(calibration: Calibration) -> list[str]:
    """Every constant with its meaning, those that are fitted and those that were set by hand."""
    rows = []
    for constant in CONSTANTS:
        value = calibration.values[constant.name]
        outside = "" if constant.is_physical(value) else f" ({OUTSIDE})"
        rows.append((constant.name, constant_text(constant, value), constant.meaning + outside))
    by_hand = [(each.name, value_text(each.value), f"{each.meaning} ({each.where})") for each in hand_set()]
    spreads = ", ".join(f"{kind} {spread:.3g}" for kind, spread in calibration.spreads.items())
    bars = f"error bars: predicted time over and under by a factor of {spreads}"
    return [
        *aligned(("constant", "value", "meaning"), rows, words=(0, -1)),
        bars,
        "",
        *aligned(("set by hand, not fitted", "value", "meaning"), by_hand, words=(0, -1)),
    ]


def value_text(value: Any) -> str:
    """A number, a pair of year and month, or a few of them, without the marks of code."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {value_text(each)}" for name, each in value.items())
    if isinstance(value, tuple):
        nested = any(isinstance(each, tuple) for each in value)
        return ("; " if nested else " x ").join(map(value_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def constant_text(constant: Constant, value: float) -> str:
    """A shift, which is a logarithm, as the factor that it is: "x 1.05"."""
    return f"{'x ' * (constant.kind == 'shift')}{constant.natural(value):.3g}"


def to_json(
    judged: Sequence[Judged], calibration: Calibration, regrets: Mapping[int, Regret] | None = None
) -> dict[str, Any]:
    """``rows`` as scripts read them; beside it what a person would ask next."""
    return {
        "format": stamp(FORMAT, VERSION),
        "rows": [each.to_dict() for each in judged],
        "details": [_details(each, regrets or {}) for each in judged],
        "summary": {
            "coverage": coverage(judged),
            "step_time": {name: _errors(judged, name, lambda each: each.time_error) for name in GROUPS},
            "memory": {name: _errors(judged, name, lambda each: each.memory_error) for name in GROUPS},
            "rank_correlation": {
                name: asdict(ranking) for name, ranking in rankings(judged, lambda each: each.tag("model")).items()
            },
            "plan_choice": [{"case": list(name), **asdict(choice)} for name, choice in choices(judged).items()],
            "targets": [{**asdict(target), "met": target.met} for target in targets(judged)],
        },
        "calibration": {"values": dict(calibration.values), "provenance": dict(calibration.provenance)},
    }


def _details(judged: Judged, regrets: Mapping[int, Regret]) -> dict[str, Any]:
    run, regret = judged.run, regrets.get(judged.row)
    return {
        "row": judged.row,
        "tags": dict(run.tags) if run else None,
        "plan": run.plan.to_dict() if run else None,
        "assumed": list(run.assumed) if run else [],
        "doubtful": run.doubtful if run else None,
        "stated": run.stated if run else False,
        "published_step_time_s": judged.measured.step_time_s,
        "step_time_error": judged.time_error,
        "memory_error": judged.memory_error,
        "memory_upper_gb": judged.memory_upper_gb,
        "note": judged.note,
        "regret": asdict(regret) if regret else None,
    }


def _errors(
    judged: Sequence[Judged], name: str, error: Callable[[Judged], float | None]
) -> dict[str, dict[str, float]]:
    groups = {key: Errors.of(map(error, rows)) for key, rows in grouped(judged, GROUPS[name]).items()}
    return {key: asdict(errors) for key, errors in groups.items() if errors}


def _head(judged: Sequence[Judged]) -> Iterator[str]:
    modelled = [each for each in judged if each.skipped is None]
    times, memories = timed(judged), [each for each in judged if each.memory_error is not None]
    yield (
        f"{len(judged)} rows, {len(modelled)} of them modelled ({percent(coverage(judged))}); "
        f"{len(times)} step times and {len(memories)} memory figures to compare"
    )
    unsound = [each.row for each in modelled if each.time_error is not None and not each.sound]
    if unsound:
        yield (
            f"{len(unsound)} step times are shown and not counted: their rows are doubted, or ran in a deterministic "
            "mode (marked *)"
        )


def _rows(judged: Sequence[Judged], regrets: Mapping[int, Regret]) -> list[str]:
    head = (
        "row",
        "model",
        "gpu",
        "precision",
        "gpus",
        "published s",
        "predicted s",
        "error",
        "GB",
        "predicted",
        "error",
    )
    return aligned(
        (*head, *(("regret",) if regrets else ())),
        [
            (
                f"{each.row}{'' if each.sound else '*'}",
                _name(each.tag("model"), 24),
                each.tag("gpu"),
                each.precision,
                str(each.run.plan.world_size) if each.run else "",
                *(figure(value) for value in (each.measured.step_time_s, each.step_s)),
                percent(each.time_error, sign=True),
                figure(each.measured.mem_per_gpu_gb),
                figure(each.memory_gb),
                percent(each.memory_error, sign=True),
                *((percent(_regret(regrets, each.row), sign=True),) if regrets else ()),
            )
            for each in judged
            if each.skipped is None
        ],
        words=range(4),
    )


def _regret(regrets: Mapping[int, Regret], row: int) -> float | None:
    return regrets[row].regret if row in regrets else None


def _skipped(judged: Sequence[Judged]) -> Iterator[str]:
    reasons: dict[str, list[int]] = {}
    for each in judged:
        if each.skipped is not None:
            reasons.setdefault(each.skipped, []).append(each.row)
    if reasons:
        yield "rows that are not modelled"
    for reason, rows in reasons.items():
        yield f"  {', '.join(map(str, rows))}: {reason}"


def _noted(judged: Sequence[Judged]) -> Iterator[str]:
    noted = [each for each in judged if each.note]
    if noted:
        yield "rows whose predicted memory is more than the device has"
    yield from (f"  {each.row}: {each.note}" for each in noted)


def _group(judged: Sequence[Judged], name: str) -> list[str]:
    rows = []
    for value, members in grouped(judged, GROUPS[name]).items():
        time = Errors.of(each.time_error for each in timed(members))
        memory = Errors.of(each.memory_error for each in members)
        if time or memory:
            rows.append((_name(value), *error_cells(time), *error_cells(memory)[:4]))
    head = (name, *("times", "median", "mean", "max", "<15 %", "bias"), *("GBs", "median", "mean", "max"))
    return aligned(head, rows) if rows else []


def error_cells(errors: Errors | None) -> tuple[str, ...]:
    """Count, median, mean, maximum, share within 15 %, bias."""
    if errors is None:
        return ("-",) * 6
    sizes = (percent(size) for size in (errors.median, errors.mean, errors.maximum))
    return (str(errors.count), *sizes, percent(errors.good, 0), percent(errors.bias, sign=True))


def _ranks(judged: Sequence[Judged]) -> list[str]:
    found = rankings(judged, lambda each: each.tag("model"))
    rows = [(_name(name), str(ranking.runs), f"{ranking.correlation:.2f}") for name, ranking in found.items()]
    return aligned(("rank correlation of throughput, by model", "runs", "Spearman"), rows) if rows else []


def _choices(judged: Sequence[Judged]) -> list[str]:
    rows = [
        (" ".join(map(str, name)), str(choice.layouts), str(choice.picked), str(choice.best), percent(choice.kept))
        for name, choice in choices(judged).items()
    ]
    head = ("of the published layouts of one case", "layouts", "our pick", "best", "of its throughput")
    return aligned(head, rows) if rows else []


def _regrets(judged: Sequence[Judged], regrets: Mapping[int, Regret]) -> Iterator[str]:
    if regrets:
        yield "the planner's own layout against the published one, both predicted (below zero: the planner's is faster)"
        yield from (f"  {line}" for line in regret_lines(judged, regrets))


def regret_lines(judged: Sequence[Judged], regrets: Mapping[int, Regret]) -> Iterator[str]:
    """By kind of model, over distinct cases; one with several published layouts is held against the best of them."""
    for kind, members in grouped(judged, lambda each: each.tag("kind")).items():
        cases = grouped(members, case)
        own = [max(found) for rows in cases.values() if (found := _known(rows, regrets))]
        if own:
            yield (
                f"{kind}: {len(own)} cases, median {percent(median(own), sign=True)}, worst "
                f"{percent(max(own), sign=True)}, {sum(each > 0.02 for each in own)} more than 2 % slower; "
                f"in {len(cases) - len(own)} nothing that the planner tries fits"
            )


def _known(rows: Sequence[Judged], regrets: Mapping[int, Regret]) -> list[float]:
    return [regret for each in rows if (regret := _regret(regrets, each.row)) is not None]


def _name(text: str, most: int = NAME) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
