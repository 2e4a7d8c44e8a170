"""Stacked bars: what fills each row, how far it may go, and where there is no more. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from parallel.planning.pictures.shapes import (
    CHARACTER,
    MARGIN,
    PALETTE,
    WIDTH,
    across,
    cell,
    down,
    fits,
    svg,
    text,
    ticks,
)

#: Pixels: a bar, the gap between bars with the whisker in it, above the first.
BAR, GAP, TOP = 24, 14, 4
OTHER = "other"


@dataclass(frozen=True)
class Bar:
    """A row: ``parts`` from left to right, a whisker over [low, high], ``figures`` on its right. ``name`` begins the
    description of each part."""

    label: str
    name: str
    parts: Mapping[str, float]
    low: float
    high: float
    figures: str


def palette(totals: Mapping[str, float], colours: int = PALETTE) -> dict[str, str]:
    """A colour for each part that is there, in their order; of more parts than colours the smallest share the last."""
    there = [name for name, total in totals.items() if total > 0]
    most = colours if len(there) <= colours else colours - 1
    large = sorted(there, key=lambda name: -totals[name])[:most]
    own = {name: f"c{index}" for index, name in enumerate(name for name in there if name in large)}
    return {name: own.get(name, f"c{colours - 1}") for name in there}


def shares(looks: Mapping[str, str]) -> dict[str, list[str]]:
    """Parts by their colour, those that share one last."""
    found: dict[str, list[str]] = {}
    for name, look in sorted(looks.items(), key=lambda item: item[1]):
        found.setdefault(look, []).append(name)
    return found


def bar_keys(looks: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The legend of a palette: (classes of the key, what it is)."""
    for look, names in shares(looks).items():
        yield f"box {look}", names[0] if len(names) == 1 else f"{OTHER}: {', '.join(names)}"


def bars_drawing(
    bars: Sequence[Bar], looks: Mapping[str, str], unit: tuple[str, float], label: str, end: float | None = None
) -> Element:
    """The bars over one axis. ``unit``: its name and size; ``end``: a dashed line where there is no more.

    Values, whiskers and the end are in base units.
    """
    name, size = unit
    left = max(MARGIN, CHARACTER * max(len(bar.label) for bar in bars) + 8)
    right = WIDTH - CHARACTER * max(len(bar.figures) for bar in bars) - 12
    height = TOP + len(bars) * (BAR + GAP)
    drawing = svg(WIDTH, height + 24, label, "chart wide")
    per_base = (right - left) / (1.02 * max([end or 0.0, *(bar.high for bar in bars)]))
    for value in ticks(0, (right - left) / per_base / size, 8):
        at = left + value * size * per_base
        down(drawing, "grid", at, TOP, height)
        text(drawing, at, height + 12, f"{value:,.6g}", anchor="middle")
    text(drawing, left - 10, height + 12, name, anchor="end")
    for row, bar in enumerate(bars):
        _bar(drawing, bar, looks, unit, (left, TOP + row * (BAR + GAP), per_base))
    if end is not None:
        down(drawing, "line dashed c1", left + end * per_base, 0, height)
    across(drawing, "axis", left, height, right)
    return drawing


def _bar(
    drawing: Element, bar: Bar, looks: Mapping[str, str], unit: tuple[str, float], at: tuple[float, float, float]
) -> None:
    left, y, per_base = at
    name, size = unit
    text(drawing, 0, y + BAR / 2, bar.label)
    x = left
    for look, parts in shares(looks).items():
        held = sum(bar.parts.get(part, 0.0) for part in parts)
        width = held * per_base
        if width >= 0.5:
            inside = f"{held / size:.3g}" if held < 999.5 * size else f"{held / size:,.0f}"
            words = f"{bar.name}, {parts[0] if len(parts) == 1 else OTHER}: {held / size:,.2f} {name}"
            cell(drawing, (x, y, width, BAR), f"cell {look}", inside if fits(inside, width) else "", words)
        x += width
    low, high = left + bar.low * per_base, left + bar.high * per_base
    if high > low:
        across(drawing, "line ink", low, y + BAR + 4, high)
        for edge in (low, high):
            down(drawing, "line ink", edge, y + BAR + 1, y + BAR + 7)
    text(drawing, WIDTH, y + BAR / 2, bar.figures, anchor="end")
