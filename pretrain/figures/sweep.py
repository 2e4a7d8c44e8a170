"""Many runs beside each other: what they differ in, how they ended, which is the best. Fragments for ``stoker report``.

The pictures are in ``sweep_plots.py``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any
from xml.etree.ElementTree import Element

from pretrain.figures.chart import Line
from pretrain.figures.markup import facts, node, number, short

SEED = "run.seed"
#: A longer table scrolls in a frame of its own.
FEW_ROWS = 16
#: Reasons that are written out above the table; the table has all.
REASONS = 6


@dataclass(frozen=True)
class Row:
    """A run. ``values``: of the keys in which runs differ; ``setting``: equal for repetitions with other seeds;
    ``look``: colour of its ``state``; ``final``: its last step is done; ``value``: of the metric, where it stands;
    ``apart``: why it cannot be compared with most others; ``curve``: the metric over steps."""

    number: int
    name: str
    values: Mapping[str, Any]
    setting: str
    seed: int
    state: str
    look: str
    final: bool
    done: int
    steps: int
    value: float | None
    tokens_per_s: float | None
    curve: Line
    apart: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """The metric; NaN where there is none."""
        return math.nan if self.value is None else self.value

    @property
    def ranked(self) -> bool:
        """It takes part in comparisons: finished, finite, and of a kind with most others."""
        return self.final and not self.apart and math.isfinite(self.score)


@dataclass(frozen=True)
class Results:
    """A sweep, the best run first. ``averaged``: last measurements in ``metric``; ``base``: what the common
    configuration says of ``keys``; ``rule``: rungs at which runs were stopped; ``fixed``: overrides of all runs."""

    name: str
    metric: str
    averaged: int
    highest: bool
    keys: Sequence[str]
    base: Mapping[str, Any]
    rows: Sequence[Row]
    rule: Sequence[int] | None
    fixed: Mapping[str, Any]
    config: str

    @cached_property
    def ranked(self) -> list[Row]:
        return [row for row in self.rows if row.ranked]

    @cached_property
    def _plain(self) -> dict[int, float]:
        """Metrics, by seed, of the runs that differ from the common configuration in nothing but the seed."""
        same = [row for row in self.ranked if all(row.values[k] == self.base[k] for k in self.keys if k != SEED)]
        return {row.seed: row.score for row in same}

    @property
    def reference(self) -> str:
        """What ``difference`` is to: the base, where it has been run, or the best run."""
        return "to base" if self._plain else "to best"

    def difference(self, row: Row) -> float | None:
        """How far a run's metric is from the base's of the same seed, or from the best; None where it has no place."""
        if not row.ranked:
            return None
        if not self._plain:
            return row.score - self.ranked[0].score
        return row.score - self._plain[row.seed] if row.seed in self._plain else None


def shown(value: Any) -> str:
    """A value of a configuration; what is left to the default is said so."""
    if value is None:
        return "default"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def header(results: Results) -> Element:
    """Name, how far the runs are, and what cannot be compared."""
    states = Counter(row.state for row in results.rows)
    lead = ", ".join(f"{count:,} {state}" for state, count in states.most_common())
    found = [node("h1", results.name), node("p", f"{len(results.rows):,} runs: {lead}.", class_="lead")]
    if apart := Counter(reason for row in results.rows for reason in row.apart):
        shown_reasons = apart.most_common(REASONS)
        items = [node("li", f"{count:,} with {reason}") for reason, count in shown_reasons]
        if len(apart) > REASONS:
            items.append(node("li", f"{len(apart) - REASONS} more reasons, in the table"))
        words = "Not comparable by this metric with most runs, kept apart in the table and left out of the pictures:"
        found.append(node("div", node("b", words), node("ul", *items), class_="warning"))
    return node("header", *found)


def tiles(results: Results) -> Element:
    """The figures that one looks for first."""
    best = results.ranked[0] if results.ranked else None
    speeds = [row.tokens_per_s for row in results.rows if row.tokens_per_s is not None]
    done = sum(row.final for row in results.rows)
    pairs = [(f"{done:,} of {len(results.rows):,}", "runs done")]
    if best is not None:
        pairs.insert(0, (number(best.score, 5), f"best {results.metric}, {best.name}"))
        if results.reference == "to base" and (difference := results.difference(best)) is not None:
            pairs.insert(1, (_signed(difference), "the best, from the base of the same seed"))
    if speeds:
        pairs.append((short(sorted(speeds)[len(speeds) // 2]), "tokens a second, the median run"))
    return node("div", *(node("div", node("b", a), node("span", b), class_="tile") for a, b in pairs), class_="tiles")


def sweep_facts(results: Results) -> Element:
    """What all runs have in common, and how they are compared."""
    which = "highest" if results.highest else "lowest"
    mean = f", mean of the last {results.averaged} measurements" if results.averaged > 1 else ", the last measurement"
    pairs = [
        ("Configuration", results.config),
        ("All runs", ", ".join(f"{key}={shown(value)}" for key, value in results.fixed.items()) or "no override"),
        ("Base", ", ".join(f"{key}={shown(results.base[key])}" for key in results.keys) or "runs do not differ"),
        ("Metric", f"{results.metric}{mean}; the {which} is the best"),
    ]
    if results.rule is not None:
        rungs = ", ".join(f"{rung:,}" for rung in results.rule)
        pairs.append(
            ("Rule", f"runs may be stopped at step {rungs} (successive halving); which, depends on their order")
        )
    return facts(pairs)


def run_table(results: Results) -> list[Element]:
    """Every run, the best first; a click on a column sorts by it."""
    head = ["place", "run", *results.keys, results.metric, results.reference, "tokens/s", "steps", "state"]
    remarks = any(row.apart or row.notes for row in results.rows)
    place, rows = 0, []
    for row in results.rows:
        place += row.ranked
        cells = [_cell(f"{place}" if row.ranked else "–", place if row.ranked else math.inf, "number")]
        cells.append(node("td", node("a", row.name, href=f"{row.name}/")))
        cells += [_value(row.values[key], results.base[key]) for key in results.keys]
        cells.append(_cell(number(row.value, 5) if row.value is not None else "–", row.value, "number"))
        difference = results.difference(row)
        cells.append(_cell("–" if difference is None else _signed(difference), difference, "number"))
        cells.append(_cell("–" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}", row.tokens_per_s, "number"))
        cells.append(_cell(f"{row.done:,}" if row.final else f"{row.done:,} of {row.steps:,}", row.done, "number"))
        cells.append(_cell(row.state, None, f"state {row.look}"))
        if remarks:
            apart = [node("b", f"not comparable: {'; '.join(row.apart)}. ")] if row.apart else []
            cells.append(node("td", *apart, "; ".join(row.notes), class_="remark"))
        rows.append(node("tr", *cells, class_=None if row.ranked else "apart"))
    note = "Values that are the base's are grey. Runs that are not done, or not comparable, have no place."
    return [_table([*head, *(["remarks"] if remarks else [])], rows), node("p", note, class_="note")]


def setting_table(results: Results) -> list[Element]:
    """What repetitions with other seeds came to together; nothing where no setting was repeated."""
    settings: dict[str, list[Row]] = {}
    for row in results.ranked:
        settings.setdefault(row.setting, []).append(row)
    if not any(len(rows) > 1 for rows in settings.values()):
        return []
    keys = [key for key in results.keys if key != SEED]
    most = max(len(rows) for rows in settings.values())

    ordered = sorted(
        settings.values(), key=lambda rows: fmean(row.score for row in rows) * (-1 if results.highest else 1)
    )
    body = []
    for rows in ordered:
        found = [row.score for row in rows]
        deviation = stdev(found) if len(found) > 1 else None
        cells = [_value(rows[0].values[key], results.base[key]) for key in keys]
        cells.append(_cell(number(fmean(found), 5), fmean(found), "number"))
        cells.append(_cell("–" if deviation is None else number(deviation, 3), deviation, "number"))
        cells.append(_cell(f"{number(min(found), 5)} to {number(max(found), 5)}", max(found) - min(found), "number"))
        few = "" if len(found) == most else f" of {most}"
        cells.append(_cell(f"{len(found)}{few}", len(found), "number"))
        body.append(node("tr", *cells))
    note = (
        "Means over seeds; the deviation is that of single runs (n - 1). Two settings whose means differ by less than "
        "about one deviation are not told apart by so few seeds, and a mean over fewer seeds than the others' is not "
        "comparable with them."
    )
    return [
        _table([*keys, f"mean {results.metric}", "deviation", "lowest to highest", "seeds"], body),
        node("p", note, class_="note"),
    ]


def _table(head: Sequence[str], rows: Sequence[Element]) -> Element:
    looks = [cell.get("class") if cell.get("class") == "number" else None for cell in rows[0]] if rows else []
    cells = [
        node("th", node("button", name, type="button"), scope="col", class_=look)
        for name, look in zip(head, looks or [None] * len(head), strict=True)
    ]
    whole = node("table", node("thead", node("tr", *cells)), node("tbody", *rows), class_="sortable")
    return node("div", whole, class_="scroll tall" if len(rows) > FEW_ROWS else "scroll")


def _cell(text: str, value: float | None, look: str) -> Element:
    """A cell that is sorted by ``value``; last where it has none."""
    known = value is not None and math.isfinite(value)
    return node("td", text, class_=look, data_v=f"{value:.9g}" if known else None)


def _value(value: Any, base: Any) -> Element:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return _cell(shown(value), value if numeric else None, "same" if value == base else "changed")


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value, 3)}".replace("-", "−", 1) if value else "0"
