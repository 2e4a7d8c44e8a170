"""What predictions are held to: each line with its limit, what was reached, and whether that is enough. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from parallel.planning.accuracy.evaluate import Judged
from parallel.planning.accuracy.metrics import Errors, choices, coverage, rankings, stated, timed

#: The eight A100 points on which Calculon (SC'23) states its error, by how the table names their source.
KORTHIKANTI = "Korthikanti"


@dataclass(frozen=True)
class Target:
    """``value`` is to be at most ``limit``, or at least, where ``at_least``; None: no row tells. ``unit``: "%" of
    shares, "" of plain numbers. ``detail``: how many rows, or which are worst."""

    name: str
    value: float | None
    limit: float
    detail: str = ""
    at_least: bool = False
    unit: str = "%"

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def figures(self) -> tuple[str, str]:
        """Limit and value as text."""

        def text(number: float) -> str:
            return f"{100 * number:.2f} %" if self.unit == "%" else f"{number:.3g}"

        return f"{'>=' if self.at_least else '<='} {text(self.limit)}", "-" if self.value is None else text(self.value)


def targets(judged: Sequence[Judged]) -> list[Target]:
    """Every line, of whatever rows are given."""
    return [*_time(judged), *_memory(judged), *_order(judged), _coverage(judged)]


def _time(judged: Sequence[Judged]) -> Iterator[Target]:
    runs = timed(stated(judged))
    dense = Errors.of(each.time_error for each in runs if each.tag("kind") == "dense")
    yield _error("dense, layout fully stated: median error of step time", dense, "median", 0.06)
    yield _error("dense, layout fully stated: rows within 15 %", dense, "good", 0.90, at_least=True)
    racks = [each for each in runs if each.tag("kind") == "moe" and each.run and each.run.topology.rack_scale]
    errors = Errors.of(each.time_error for each in racks)
    yield _error("MoE on NVL72, layout fully stated: median error of step time", errors, "median", 0.10)
    points = Errors.of(each.time_error for each in timed(judged) if KORTHIKANTI in each.tag("source"))
    yield _error("Korthikanti's A100 points: mean error of step time", points, "mean", 0.0365)


def _memory(judged: Sequence[Judged]) -> Iterator[Target]:
    yield _error("memory: median error", Errors.of(each.memory_error for each in judged), "median", 0.05)
    over = [(each.over_bound, each.row, each.doubted_memory) for each in judged if each.over_bound is not None]
    most, row = max(((excess, row) for excess, row, doubted in over if not doubted), default=(None, None))
    detail = "" if row is None else f"row {row} of {sum(not doubted for _, _, doubted in over)}"
    doubtful = max(((excess, row) for excess, row, doubted in over if doubted), default=(0.0, 0))
    if doubtful[0] > 0:
        detail += f"; of those whose memory is doubted row {doubtful[1]} by {100 * doubtful[0]:.1f} %"
    yield Target("memory: published over the upper bound, at most", most and max(most, 0.0), 0.03, detail)


def _order(judged: Sequence[Judged]) -> Iterator[Target]:
    within = rankings(judged, lambda each: (each.tag("model"), each.tag("gpu"), each.precision))
    models = rankings(judged, lambda each: each.tag("model"))
    for name, limit, found in (
        ("Spearman per model over GPU kinds and layouts", 0.9, models),
        ("Spearman per model within one GPU kind and precision", 0.8, within),
    ):
        values = {key: ranking.correlation for key, ranking in found.items()}
        middle = median(values.values()) if values else None
        yield Target(f"{name}: median", middle, limit, _reached(values, limit), True, "")
        yield Target(f"{name}: each", min(values.values(), default=None), limit, _short(values, limit), True, "")
    name, limit = "throughput of our pick over the best published", 0.97
    kept = {key: choice.kept for key, choice in choices(judged).items()}
    yield Target(f"{name}: mean", mean(kept.values()) if kept else None, limit, _reached(kept, limit), True)
    yield Target(f"{name}: each", min(kept.values(), default=None), limit, _short(kept, limit), True)


def _coverage(judged: Sequence[Judged]) -> Target:
    count = sum(each.skipped is None for each in judged)
    return Target("coverage: rows that could be modelled", coverage(judged), 0.90, f"{count} of {len(judged)}", True)


def _error(name: str, errors: Errors | None, figure: str, limit: float, at_least: bool = False) -> Target:
    if errors is None:
        return Target(name, None, limit, "no rows", at_least)
    return Target(name, getattr(errors, figure), limit, f"{errors.count} rows", at_least)


def _reached(values: Mapping[Any, float], limit: float) -> str:
    return f"{sum(value >= limit for value in values.values())} of {len(values)} reach it"


def _short(values: Mapping[Any, float], limit: float) -> str:
    """The three that fall shortest, in words."""
    short = sorted((value, key) for key, value in values.items() if value < limit)
    return ", ".join(f"{_words(key)} {value:.2f}" for value, key in short[:3])


def _words(key: Any) -> str:
    return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)
