"""Tables as text: aligned for a terminal, or in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Cells = Sequence[str]


def aligned(head: Cells, rows: Sequence[Cells], words: Sequence[int] = (0,)) -> list[str]:
    """Lines of a table. The columns ``words`` (-1: the last) begin at one edge, the others are numbers and end at one.

    >>> aligned(("axis", "ranks"), [("tp", "8"), ("dp", "16")])
    ['axis  ranks', 'tp        8', 'dp       16']
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    left = {index % len(head) for index in words}
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def markdown(head: Cells, rows: Sequence[Cells], words: Sequence[int] = (0,)) -> list[str]:
    """Lines of the same table in Markdown."""
    left = {index % len(head) for index in words}
    rule = ["---" if index in left else "---:" for index in range(len(head))]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (head, rule, *rows)]


def percent(share: float | None, digits: int = 1, sign: bool = False) -> str:
    """ "4.2 %"; "-" for what is not known."""
    return "-" if share is None else f"{100 * share:{'+' if sign else ''}.{digits}f} %"


def figure(value: float | None) -> str:
    """Three to four significant digits, or "-"; thousands apart."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
