"""Ranks on devices: every rack or host with its trays and GPUs, coloured by who talks to whom on an axis. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement

from parallel.planning.drawings import AXIS_MEANING, ranks_text
from parallel.planning.pictures.shapes import (
    CHARACTER,
    LINE,
    PALETTE,
    WIDTH,
    Box,
    Key,
    Picture,
    cell,
    key_row,
    key_width,
    svg,
    text,
)
from parallel.planning.placement import Placement, extent

#: Devices and domains that a picture shows of a larger world.
MAX_DEVICES, MAX_DOMAINS = 288, 16
#: Architecture of a machine that a run did not name.
UNNAMED = "unnamed"
#: Groups that the table lists.
GROUPS = 24
#: Pixels: a device's height and least width, the gap between them, around the devices of a domain, between domains.
HEIGHT, LEAST, GAP, PAD, APART = 22, 24, 3, 8, 14
#: Devices of a host in one row.
COLUMNS = 8
OUTLINE = {"stroke-width": "2.5"}


def rack_picture(placement: Placement, axis: str) -> Picture:
    """Devices of one colour are a group of ``axis``; that of rank 0 has a thick outline."""
    plan, domain, shown = placement.plan, placement.topology.domain, domains_shown(placement, axis)
    one, devices = _domain_word(placement), _devices(placement)
    degree = plan.degree(axis)
    num_groups = plan.world_size // degree
    notes = []
    if len(shown) < placement.domains:
        first = {placement.domain(rank) for rank in _members(placement, axis, 0)}
        theirs = f"{'those' if first <= set(shown) else 'some'} of the group of rank 0"
        drawn = f"{len(shown)} of {placement.domains:,} {one}s, among them {theirs}"
        notes.append(f"Drawn: {drawn}. The others are filled in the same way.")
    reach = f"reach over more than one {one}: part of what they send goes over the network"
    notes.append(f"Groups of {axis} {reach if placement.crossing(axis) else f'stay inside a {one}'}.")
    groups = (_members(placement, axis, index) for index in range(min(num_groups, GROUPS)))
    rows = [(str(index), ranks_text(list(ranks))) for index, ranks in enumerate(groups)]
    if num_groups > GROUPS:
        rows.append(("...", f"{num_groups - GROUPS:,} more"))
    if domain.size > domain.per_host:
        devices = f"{domain.size // domain.per_host} trays of {devices}"
    return Picture(
        f"{axis} groups on {placement.topology.name}",
        f"{num_groups:,} group{'s' * (num_groups != 1)} of {degree}; {AXIS_MEANING[axis]}; a {one} has {devices}",
        _drawing(placement, axis, shown),
        notes=tuple(notes),
        head=("group", "ranks"),
        rows=tuple(rows),
        words=2,
    )


def domains_shown(placement: Placement, axis: str) -> list[int]:
    """Domains that ``rack_picture`` draws: those of the group of rank 0, and the first of the others."""
    most = min(MAX_DOMAINS, max(1, MAX_DEVICES // placement.topology.domain.size))
    of_group = (placement.domain(rank) for rank in _members(placement, axis, 0))
    return sorted(list(dict.fromkeys([*of_group, *range(placement.domains)]))[:most])


def _devices(placement: Placement) -> str:
    """What a host holds, in words."""
    count = placement.topology.domain.per_host
    if _device_word(placement) == "process":
        return "one process" if count == 1 else f"{count} processes"
    return f"{count} {placement.topology.device.name}{'s' * (count != 1)}"


def _device_word(placement: Placement) -> str:
    """A rank of a CPU, or of a machine that nobody named, is a process: which cores it has is not known."""
    return "process" if placement.topology.device.architecture in ("cpu", UNNAMED) else "device"


def _domain_word(placement: Placement) -> str:
    return "rack" if placement.topology.rack_scale else "host"


def _members(placement: Placement, axis: str, group: int) -> range:
    """Ranks of a group; groups are counted as in ``ParallelPlan.group``."""
    degree, block = placement.plan.degree(axis), extent(placement.plan, axis)
    stride = block // degree
    first = group // stride * block + group % stride
    return range(first, first + block, stride)


def _group(placement: Placement, axis: str, rank: int) -> int:
    block = extent(placement.plan, axis)
    stride = block // placement.plan.degree(axis)
    return rank // block * stride + rank % stride


def _drawing(placement: Placement, axis: str, shown: Sequence[int]) -> Element:
    domain, one = placement.topology.domain, _domain_word(placement)
    width = max(LEAST, len(str(placement.plan.world_size - 1)) * CHARACTER + 6) + GAP
    columns = min(domain.per_host, COLUMNS)
    host_rows = -(-domain.per_host // columns)
    rows = domain.size // domain.per_host * host_rows
    box_width, box_height = columns * width + 2 * PAD - GAP, rows * (HEIGHT + GAP) + 2 * PAD - GAP
    aside = len("tray 17  ") * CHARACTER if rows > host_rows else 2
    per_line = max(1, min(len(shown), int((WIDTH - aside + APART) // (box_width + APART))))
    line = LINE + box_height + APART
    lines = -(-len(shown) // per_line)
    hatch = f"spare-{axis}"
    keys = _keys(placement, axis, hatch)
    width_px = aside + max(per_line * (box_width + APART) - APART, key_width(keys)) + 2
    drawing = svg(width_px, lines * line + LINE + 4, f"devices by {axis} group")
    _define_hatch(drawing, hatch)
    for place, index in enumerate(shown):
        x, y = aside + place % per_line * (box_width + APART), place // per_line * line
        text(drawing, x, y + LINE / 2, f"{one} {index}")
        frame = {"x": f"{x:.1f}", "y": f"{y + LINE:.1f}", "width": f"{box_width:.1f}", "height": f"{box_height:.1f}"}
        SubElement(drawing, "rect", {**frame, "rx": "6", "fill": "none", "class": "axis"})
        for host in range(domain.size // domain.per_host):
            top = y + LINE + PAD + host * host_rows * (HEIGHT + GAP)
            if rows > host_rows and place % per_line == 0:
                text(drawing, aside - 8, top + HEIGHT / 2, f"tray {host}", anchor="end")
            for device in range(domain.per_host):
                at = (x + PAD + device % columns * width, top + device // columns * (HEIGHT + GAP), width - GAP, HEIGHT)
                _device(drawing, at, placement, axis, (index, host, device), hatch)
    key_row(drawing, aside, lines * line, keys)
    return drawing


def _keys(placement: Placement, axis: str, hatch: str) -> list[Key]:
    keys: list[Key] = [("cell c0", OUTLINE, "the group of rank 0")]
    others = placement.plan.world_size // placement.plan.degree(axis) - 1
    if others:
        again = f", colours come again after {PALETTE}" * (others >= PALETTE)
        keys.append(("cell c1", {}, f"other groups{again}" if others > 1 else "the other group"))
    if _spares(placement):
        keys.append(("axis", {"fill": f"url(#{hatch})"}, "spare"))
    usable = placement.topology.domain.size - _spares(placement)
    if placement.plan.world_size < placement.domains * usable:
        keys.append(("cell end", {}, "not used"))
    return keys


def _device(
    drawing: Element,
    box: Box,
    placement: Placement,
    axis: str,
    place: tuple[int, int, int],
    hatch: str,
) -> None:
    rank = placement.rank(*place)
    domain, host, device = place
    shape, one = placement.topology.domain, _domain_word(placement)
    tray = f"tray {host} of " if shape.size > shape.per_host else ""
    where = f"{_device_word(placement)} {device} of {tray}{one} {domain}"
    if rank is None and host * shape.per_host + device >= shape.size - _spares(placement):
        cell(drawing, box, "axis", "", f"{where}: a spare", fill=f"url(#{hatch})")
    elif rank is None:
        cell(drawing, box, "cell end", "", f"{where}: not used")
    else:
        group, coords = _group(placement, axis, rank), placement.plan.coords(rank)
        told = ", ".join(f"{name} {at}" for name, at in coords.items() if placement.plan.degree(name) > 1)
        members = ranks_text(list(_members(placement, axis, group)))
        outline = OUTLINE if group == 0 else {}
        words = f"rank {rank}, {where}: {told or 'the only rank'}; its {axis} group: {members}"
        cell(drawing, box, f"cell c{group % PALETTE}", str(rank), words, **outline)


def _spares(placement: Placement) -> int:
    """Devices of each domain that are kept aside: none where one domain holds all ranks."""
    return placement.topology.spares if placement.domains > 1 else 0


def _define_hatch(drawing: Element, name: str) -> None:
    size = {"width": "6", "height": "6", "patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
    pattern = SubElement(SubElement(drawing, "defs"), "pattern", {"id": name, **size})
    SubElement(pattern, "path", {"d": "M0 3H6", "class": "line thin c7"})
