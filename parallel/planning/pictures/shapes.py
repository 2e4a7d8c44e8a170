"""What pictures are made of. No torch.

Shapes carry classes only: ``cell`` with one of ``c0`` to ``c7`` (a palette), ``line`` and ``dot``, ``grid`` and
``axis``, ``ink`` for a line in the colour of the text, ``label`` and ``inside`` for text. Whoever puts a picture into a
page gives the classes their look. Every cell says in words what it is when one points at it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement

PALETTE = 8
#: Pixels: a chart over the width of a page, the margin for its labels; a character of a label, a line of text.
WIDTH, MARGIN = 1040, 58
CHARACTER, LINE = 6.6, 16
PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))

#: x, y, width and height of a cell.
Box = tuple[float, float, float, float]
#: Class, further attributes and words of a key.
Key = tuple[str, Mapping[str, str], str]


@dataclass(frozen=True)
class Picture:
    """A drawing with its title, ``unit`` (what is counted, from where to where) and, below it, ``notes`` in words.

    ``legend``: (classes of the key, what it is). ``head`` and ``rows``: its numbers as a table, the first ``words``
    columns of it words.
    """

    title: str
    unit: str
    drawing: Element
    legend: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    words: int = 1


def svg(width: float, height: float, label: str, look: str = "drawing") -> Element:
    """``drawing`` keeps its size, ``chart wide`` takes the width of the page."""
    size = {"viewBox": f"0 0 {width:g} {height:g}"}
    if look == "drawing":
        size = {"width": f"{width:g}", "height": f"{height:g}", **size}
    return Element("svg", {**size, "role": "img", "aria-label": label, "class": look})


def cell(parent: Element, box: Box, look: str, inside: str, words: str, **more: str) -> None:
    """A rounded box (x, y, width, height) with a few characters inside and its description in words."""
    x, y, width, height = box
    group = SubElement(parent, "g")
    SubElement(group, "title").text = words
    gap = min(0.5, width / 8)
    place = {"x": x + gap, "y": y + 0.5, "width": width - 2 * gap, "height": height - 1, "rx": min(4.0, width / 4)}
    SubElement(group, "rect", {**{key: f"{value:.1f}" for key, value in place.items()}, "class": look, **more})
    if inside:
        text(group, x + width / 2, y + height / 2, inside, "inside")


def text(parent: Element, x: float, y: float, words: str, look: str = "label", anchor: str = "") -> None:
    """``y``: the middle of the line. ``anchor``: start (as without), middle or end."""
    at = {"x": f"{x:.1f}", "y": f"{y:.1f}", "dy": ".35em", "class": look}
    SubElement(parent, "text", at | ({"text-anchor": anchor} if anchor else {})).text = words


def path(parent: Element, look: str, *moves: tuple[str, float, float]) -> None:
    """A path of absolute moves: ("M", x, y), ("L", x, y)."""
    SubElement(parent, "path", {"d": "".join(f"{move}{x:.1f} {y:.1f}" for move, x, y in moves), "class": look})


def across(parent: Element, look: str, x: float, y: float, to_x: float) -> None:
    path(parent, look, ("M", x, y), ("L", to_x, y))


def down(parent: Element, look: str, x: float, y: float, to_y: float) -> None:
    path(parent, look, ("M", x, y), ("L", x, to_y))


def ticks(low: float, high: float, about: int) -> Iterator[float]:
    """Round numbers in [low, high], about so many: multiples of 1, 2 or 5 times a power of ten.

    >>> list(ticks(0.0, 9.3, 5))
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(times for times in (1, 2, 5, 10) if times * power >= rough * (1 - 1e-9))
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield float(f"{index * step:.12g}")


def sized(value: float, unit: str) -> tuple[str, float]:
    """The name and the size of the unit in which ``value`` (in base units, such as B) is read best.

    >>> sized(8e10, "B"), sized(2.5e7, "B"), sized(0.0, "B")
    (('GB', 1000000000.0), ('MB', 1000000.0), ('B', 1.0))
    """
    return next(((f"{prefix}{unit}", size) for prefix, size in PREFIXES if value >= size), (unit, 1.0))


def number(value: float) -> str:
    """Four digits that count, thousands apart, never an exponent: 14,700, 1,727, 36.58."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """Values [low, high] to pixels [start, stop]."""
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def fits(words: str, width: float) -> bool:
    """Whether a cell of this width has room for a few characters."""
    return len(words) * CHARACTER + 2 <= width


def key_row(parent: Element, x: float, y: float, keys: Sequence[Key]) -> None:
    """A legend inside a drawing, for looks that a page's own keys have not."""
    for key in keys:
        look, more, words = key
        cell(parent, (x, y, LINE, LINE), look, "", words, **more)
        text(parent, x + LINE + 6, y + LINE / 2, words)
        x += key_width([key])


def key_width(keys: Sequence[Key]) -> float:
    return sum(LINE + 6 + len(words) * CHARACTER + 18 for _, _, words in keys)
