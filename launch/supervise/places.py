"""Which node takes which place of a launch: place p runs ranks p*R to (p+1)*R - 1 of R a node."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

#: Faults of a node's own after which another takes its place, where one is there.
TOO_MANY_FAULTS = 2


class Role(Protocol):
    """``domain``: the NVLink domain of a node, None where a domain is one node; ``spare``: it waits for a place."""

    @property
    def domain(self) -> int | None: ...
    @property
    def spare(self) -> bool: ...


def assign(
    roles: Sequence[Role], ready: Collection[int], before: Mapping[int, int], faults: Mapping[int, int]
) -> dict[int, int] | None:
    """``{place: node}`` for every place, or None where the nodes that are ``ready`` do not fill them.

    Places are those of the nodes that are no spares, in order. A node keeps the place that it had ``before``; an empty
    one goes to the node that it was meant for, else to a spare. A place stays in its NVLink domain, whose ranks talk
    over it. A node with ``TOO_MANY_FAULTS`` serves only where nobody else is left.
    """
    homes = [index for index, role in enumerate(roles) if not role.spare]
    sound = {node for node in ready if faults.get(node, 0) < TOO_MANY_FAULTS}
    chosen: dict[int, int] = {}
    for trusted in (sound, set(ready)):
        empty = [place for place in range(len(homes)) if place not in chosen]
        free = trusted - set(chosen.values())
        for place in empty:
            if (owner := keeps_of(place, homes, before)) in free:
                chosen[place] = owner
        waiting = sorted(  # those that had a place and are not chosen have lost it to another
            trusted - set(chosen.values()), key=lambda node: (not roles[node].spare, faults.get(node, 0), node)
        )
        for place in empty:
            if place in chosen:
                continue
            domain = roles[homes[place]].domain
            if (node := next((node for node in waiting if roles[node].domain == domain), None)) is not None:
                chosen[place] = node
                waiting.remove(node)
    return chosen if len(chosen) == len(homes) else None


def keeps_of(place: int, homes: Sequence[int], before: Mapping[int, int]) -> int:
    """The node that a place belongs to."""
    return before.get(place, homes[place])
