"""What several ranks hold alike must be alike: fingerprints of every such tensor, compared by one small gather.

Which ranks hold the same is read from the tensor's Layout: those that agree on every axis which cuts it. A difference
is named by tensor and rank, and ends the attempt: a state that disagrees is neither trained nor saved.

What it cannot see: a fault in the range that a rank alone updates (ZeRO-1), which its replicas copy and so share; and
one in a replica's copy that the next gather of weights overwrites before it is looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from parallel.planning.layout import Coords, Layout
from pretrain.attempt import Fault
from pretrain.checkpoint.peers import Peers
from pretrain.guards.findings import Finding
from pretrain.guards.fingerprint import fingerprint, folded

if TYPE_CHECKING:
    from pretrain.trainer import Trainer


class Mismatch(Fault):
    """Replicas differ. Raised on every rank alike."""

    def __init__(self, finding: Finding) -> None:
        super().__init__("mismatch", finding.text, finding.rank, finding.step)
        self.finding = finding


class ReplicaCheck:
    """``every``: steps between comparisons, None for none; ``exact``: ranks that do the same arithmetic on the same
    numbers get the same bits. Where they need not, only what was copied or reduced between ranks is compared."""

    def __init__(self, trainer: Trainer, every: int | None, exact: bool) -> None:
        self._trainer, self._every, self._exact = trainer, every, exact
        self._peers = Peers(trainer.groups.control)
        plan = trainer.groups.plan
        self._coords = [plan.coords(rank) for rank in range(plan.world_size)]
        self._shared: dict[tuple[str, ...], bool] = {}

    def due(self, step: int) -> bool:
        return self._every is not None and (step + 1) % self._every == 0

    def before_update(self, step: int) -> None:
        """If it is due: compare what the step was computed with, before anything moves."""
        if self.due(step):
            self.compare(step)

    def before_save(self, done: int) -> None:
        """Compare the state after ``done`` steps, which is about to be kept."""
        if self._every is not None:
            self.compare(done - 1)

    def compare(self, step: int) -> None:
        """Collective. Raises Mismatch on every rank if any two replicas of a tensor differ."""
        if self._peers.size == 1:
            return
        alike = self._fingerprints()
        labels = list(alike)
        sums = [folded(torch.stack(list(named.values()))) for named in alike.values()]
        folds = torch.stack(sums).tolist() if sums else []
        told = self._peers.gather(dict(zip(labels, folds, strict=True)))
        differing = sorted({label for label in set().union(*told) if len(_values(told, label)) > 1})
        if differing:
            raise Mismatch(self._name(step, alike, differing))

    def _fingerprints(self) -> dict[str, dict[str, torch.Tensor]]:
        """``{label: {name: fingerprint}}`` of this rank: ranks with one label hold the same under it."""
        alike: dict[str, dict[str, torch.Tensor]] = {}
        for name, layout, tensor in self._trainer.tensors():
            axes = self._cut(layout)
            if self._is_shared(axes):
                alike.setdefault(_label(axes, self._trainer.groups.coords), {})[name] = fingerprint(tensor)
        return {label: dict(sorted(named.items())) for label, named in sorted(alike.items())}

    def _cut(self, layout: Layout) -> tuple[str, ...]:
        """Axes on which ranks hold different parts of a tensor."""
        cut = {split.axis for split in layout.splits}
        if layout.flat is not None:
            cut |= {layout.flat.axis, "cp"}
        if layout.flat is not None or len(layout.stages) == 1:
            cut.add("pp")
        return tuple(sorted(cut if self._exact else cut | {"tp", "etp", "ep"}))

    def _is_shared(self, axes: tuple[str, ...]) -> bool:
        """Whether another rank holds the same."""
        if axes not in self._shared:
            counts = Counter(_label(axes, coords) for coords in self._coords)
            self._shared[axes] = counts[_label(axes, self._trainer.groups.coords)] > 1
        return self._shared[axes]

    def _name(self, step: int, alike: dict[str, dict[str, torch.Tensor]], differing: Sequence[str]) -> Finding:
        """Which tensor differs first, by name, and on whose side the fault is."""
        mine = {f"{label} {name}": int(value) for label in differing for name, value in alike.get(label, {}).items()}
        told = self._peers.gather(mine)
        found = sorted(key for key in set().union(*told) if len(_values(told, key)) > 1)
        label, name = found[0].split(" ", 1)
        held = {rank: values[found[0]] for rank, values in enumerate(told) if found[0] in values}
        guilty, how = _minority(held), "the others agree"
        if guilty is None:
            guilty, how = self._against_masters(name, label), "it differs from the owner's master"
        more = f" and {len(found) - 1} more tensors" if len(found) > 1 else ""
        ranks = ", ".join(map(str, guilty or sorted(held)))
        blame = f"rank {ranks}: {how}" if guilty and len(guilty) == 1 else f"ranks {ranks}: {how}"
        if guilty is None:
            blame = f"ranks {ranks}, and nothing says which of them is right"
        text = f"replicas of {name}{more} differ on {blame}"
        rank = guilty[0] if guilty is not None and len(guilty) == 1 else None
        return Finding(step, "mismatch", text, rank, {"tensor": name, "tensors": len(found)})

    def _against_masters(self, name: str, label: str) -> list[int] | None:
        """Ranks whose copy of a weight is not what its owner's optimizer has, piece by piece; None where nobody has
        more than the copies themselves."""
        peers, trainer = self._peers, self._trainer
        copy = trainer.parameters.get(name)
        if copy is not None and _label(self._cut(trainer.layouts[name]), trainer.groups.coords) != label:
            copy = None
        owned = [] if copy is None else list(self._owned(name))
        told = peers.gather([[low, high, int(value)] for low, high, value in owned])
        wrong = False
        for rank, pieces in enumerate(told):
            for low, high, value in pieces:
                if copy is not None and (trainer.replicas.zero == 1 or rank == trainer.groups.rank):
                    wrong |= int(fingerprint(copy.detach().reshape(-1)[low:high])) != value
        return [rank for rank, differs in enumerate(peers.gather(wrong)) if differs] or None

    def _owned(self, name: str) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Ranges of a weight that this rank updates, and the fingerprint of its master, rounded as the weight is; none
        where the weight is its own master (float32), and what befalls the one befalls the other."""
        optimizer = self._trainer.optimizer
        for shard, master in zip(optimizer.shards, optimizer.masters, strict=True):
            if shard.name == name and master.dtype != shard.weight.dtype:
                flat = shard.layout.flat
                first = 0 if flat is None else self._trainer.groups.coords[flat.axis] * flat.shard - flat.offset
                low = max(first, 0)
                yield low, low + shard.weight.numel(), fingerprint(master.to(shard.weight.dtype))


def _label(axes: Sequence[str], coords: Coords) -> str:
    return ",".join(f"{axis}{coords[axis]}" for axis in axes) or "all"


def _values(told: Sequence[dict[str, Any]], key: str) -> set[Any]:
    return {values[key] for values in told if key in values}


def _minority(held: dict[int, Any]) -> list[int] | None:
    """Ranks that differ from what more than half of them hold; None where there is no such half."""
    value, count = Counter(held.values()).most_common(1)[0]
    return [rank for rank in held if held[rank] != value] if 2 * count > len(held) else None
