"""The ranks as a grid, a cell each, coloured by health; nodes stand apart. Ten thousand of them are a few strokes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

import numpy as np

from launch.watch.record import Health, RankStatus
from launch.watch.words import NO_HEARTBEATS, size
from pretrain.figures.markup import UNKNOWN, duration, figure, node, number, table

#: Class and meaning of each health, the worst last.
LOOKS = {
    Health.WELL: ("c2", "well"),
    Health.UNKNOWN: ("c7", "unknown"),
    Health.QUIET: ("c4", "quiet: no heartbeat for three step times"),
    Health.SLOW: ("c3", "slow: behind its peers"),
    Health.GONE: ("c6", "gone: its process has ended"),
    Health.GUILTY: ("c1", "to blame for the last end"),
}
#: Pixels of the picture; columns of a row, at most; ranks of a grid whose cells have numbers and words of their own.
WIDTH, COLUMNS, SINGLE = 1040, 128, 256
#: Pixels of a cell, at most, and between two nodes; ranks that the table lists.
CELL, APART, LISTED = 34, 6, 24


def ranks_grid(ranks: Sequence[RankStatus], is_under_way: bool = True) -> list[Element]:
    """The grid and, below it, those that are not well; of a run that has ended, where its ranks stood."""
    if not ranks:
        return [node("p", "The ranks are unknown: no attempt has begun.", class_="missing")]
    counted = Counter(rank.health for rank in ranks)
    legend = [
        (f"box {look}", f"{counted[health]:,} {words if is_under_way or health is not Health.UNKNOWN else 'ended'}")
        for health, (look, words) in LOOKS.items()
        if counted[health]
    ]
    lagging = [rank.step for rank in ranks if rank.step is not None]
    steps = f"at steps {min(lagging):,} to {max(lagging):,}" if lagging and min(lagging) != max(lagging) else ""
    steps = steps or (f"at step {lagging[0]:,}" if lagging else "")
    nodes = len({rank.node for rank in ranks})
    unit = ", ".join(
        part for part in (f"{len(ranks):,} on {nodes:,} {'node' if nodes == 1 else 'nodes'}", steps) if part
    )
    phases = Counter(rank.phase for rank in ranks if rank.phase)
    doing = ", ".join(f"{count:,} in {phase}" for phase, count in phases.most_common(6))
    words = (
        f"{'Now' if is_under_way else 'At the end'}: {doing}."
        if doing
        else ""
        if ranks[0].node
        else f"{NO_HEARTBEATS[0].upper()}{NO_HEARTBEATS[1:]}."
    )
    picture = _picture(ranks)
    return [figure("Health", unit, picture, words, *_listed(ranks), legend=legend)]


def _picture(ranks: Sequence[RankStatus]) -> Element:
    per_node = _per_node(ranks)
    place, columns, rows = _places(ranks, per_node)
    gaps = (columns - 1) // per_node
    cell = min(CELL, (WIDTH - gaps * APART) / columns)
    width = min(WIDTH, columns * cell + gaps * APART)
    svg = node(
        "svg", viewBox=f"0 0 {width:.0f} {rows * cell:.1f}", class_="grid-of-ranks", role="img", aria_label="ranks"
    )
    svg.set("width", f"{width:.0f}")
    svg.extend((_cells if len(ranks) <= SINGLE else _strokes)(ranks, place, per_node, cell))
    return svg


def _per_node(ranks: Sequence[RankStatus]) -> int:
    """Ranks of the largest node, as far as a row has room; a row where nodes are unknown."""
    most = max(Counter(rank.node for rank in ranks).values())
    return most if most <= COLUMNS and len({rank.node for rank in ranks}) > 1 else COLUMNS


def _places(ranks: Sequence[RankStatus], per_node: int) -> tuple[list[tuple[int, int]], int, int]:
    """Row and column of each rank: each node keeps together, several nodes share a row."""
    most = 32 if len(ranks) <= SINGLE else COLUMNS
    nodes_in_row = max(1, most // per_node)
    row_columns = min(per_node * nodes_in_row, most) if per_node < COLUMNS else most
    order = {name: index for index, name in enumerate(dict.fromkeys(rank.node for rank in ranks))}
    within: Counter[str | None] = Counter()
    place = []
    for rank in ranks:
        slot = within[rank.node]
        within[rank.node] += 1
        if len(order) > 1:
            index = order[rank.node] * per_node + slot
        else:
            index = slot
        place.append(divmod(index, row_columns))
    return place, max(column for _, column in place) + 1, max(row for row, _ in place) + 1


def _left(column: int, per_node: int, cell: float) -> float:
    return column * cell + column // per_node * APART


def _cells(
    ranks: Sequence[RankStatus], place: Sequence[tuple[int, int]], per_node: int, cell: float
) -> Iterator[Element]:
    for rank, (row, column) in zip(ranks, place, strict=True):
        x, y, look = _left(column, per_node, cell), row * cell, LOOKS[rank.health][0]
        box = {"x": f"{x + 1:.1f}", "y": f"{y + 1:.1f}", "width": f"{cell - 3:.1f}", "height": f"{cell - 3:.1f}"}
        where = {"x": f"{x + cell / 2 - 0.5:.1f}", "y": f"{y + cell / 2 - 0.5:.1f}", "dy": ".35em"}
        label = node("text", str(rank.rank), **where, class_="inside") if cell >= 18 else None
        yield node("g", node("title", _words(rank)), node("rect", **box, rx=3, class_=f"cell {look}"), label)


def _strokes(
    ranks: Sequence[RankStatus], place: Sequence[tuple[int, int]], per_node: int, cell: float
) -> Iterator[Element]:
    """One path for each health, neighbours as one dashed stroke; and strips that say what a row holds."""
    for health, (look, _) in LOOKS.items():
        mine = [at for rank, at in zip(ranks, place, strict=True) if rank.health is health]
        path = "".join(
            f"M{_left(start, per_node, cell):.1f} {(row + 0.5) * cell:.1f}h{count * cell - 0.8:.2f}"
            for row, start, count in _runs(mine, per_node)
        )
        if path:
            strong = "" if health in (Health.WELL, Health.UNKNOWN) else " strong"
            dashes = f"{cell - 0.8:.2f} 0.8"
            yield node(
                "path",
                d=path,
                class_=f"stroke {look}{strong}",
                stroke_width=f"{cell - 0.8:.2f}",
                stroke_dasharray=dashes,
            )
    for row, members in _by_row(ranks, place).items():
        area = {"x": 0, "y": f"{row * cell:.1f}", "width": WIDTH, "height": f"{cell:.1f}"}
        yield node("rect", node("title", _row_words(members)), **area, class_="strip")


def _runs(places: Sequence[tuple[int, int]], per_node: int) -> Iterator[tuple[int, int, int]]:
    """Row, first column and length of neighbours in a row that no gap parts."""
    if not places:
        return
    at = np.array(places)
    broken = (np.diff(at[:, 0]) != 0) | (np.diff(at[:, 1]) != 1) | (at[1:, 1] % per_node == 0)
    for part in np.split(at, np.flatnonzero(broken) + 1):
        yield int(part[0, 0]), int(part[0, 1]), len(part)


def _by_row(ranks: Sequence[RankStatus], place: Sequence[tuple[int, int]]) -> dict[int, list[RankStatus]]:
    rows: dict[int, list[RankStatus]] = {}
    for rank, (row, _) in zip(ranks, place, strict=True):
        rows.setdefault(row, []).append(rank)
    return rows


def _row_words(members: Sequence[RankStatus]) -> str:
    counted = Counter(rank.health.value for rank in members)
    names = list(dict.fromkeys(rank.node for rank in members if rank.node))
    where = f", {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "") if names else ""
    ages = [rank.age_s for rank in members if rank.age_s is not None]
    oldest = f"; oldest heartbeat {duration(max(ages))} ago" if ages else ""
    healths = ", ".join(f"{count} {health}" for health, count in counted.items())
    return f"ranks {members[0].rank:,} to {members[-1].rank:,}{where}: {healths}{oldest}"


def _words(rank: RankStatus) -> str:
    said = [f"rank {rank.rank}" + (f" on {rank.node}" if rank.node else ""), rank.health.value]
    if rank.phase:
        said.append(rank.phase + (f", step {rank.step:,}" if rank.step is not None else ""))
    if rank.age_s is not None:
        said.append(f"heartbeat {duration(rank.age_s)} ago")
    if rank.busy_s is not None:
        said.append(f"{number(rank.busy_s)} s of processor time")
    if rank.rss_bytes is not None:
        said.append(f"{size(rank.rss_bytes)} of memory")
    return "\n".join(said)


def _listed(ranks: Sequence[RankStatus]) -> list[Element | str]:
    """Ranks that are not well, the worst first."""
    worst = list(Health)
    bad = [rank for rank in ranks if rank.health not in (Health.WELL, Health.UNKNOWN)]
    bad.sort(key=lambda rank: (-worst.index(rank.health), -(rank.age_s or 0.0)))
    if not bad:
        return []
    rows = [
        [
            f"{rank.rank:,}",
            rank.node or UNKNOWN,
            rank.health.value,
            rank.phase or UNKNOWN,
            UNKNOWN if rank.step is None else f"{rank.step:,}",
            UNKNOWN if rank.age_s is None else duration(rank.age_s),
            UNKNOWN if rank.rss_bytes is None else size(rank.rss_bytes),
        ]
        for rank in bad[:LISTED]
    ]
    more = [f"And {len(bad) - LISTED:,} more."] if len(bad) > LISTED else []
    return [table(["rank", "node", "health", "phase", "step", "heartbeat, ago", "memory"], rows, 4), *more]
