"""CheckpointStore: save by every rank, load under any layout, verified or not at all.

A save goes temporary folder -> every byte durable -> manifest -> COMMIT -> rename, so a reader sees the old state or
the new one. A load checks the CRC of every chunk that it touches; damage is named, all ranks agree on it, and together
they fall back to the newest checkpoint that is good.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.planning.layout import Coords, Layout
from pretrain.checkpoint import folders, loading, saving
from pretrain.checkpoint.damage import Damage, Damaged
from pretrain.checkpoint.manifest import (
    COMMIT,
    MANIFEST,
    MAX_JSON_BYTES,
    META,
    REFS,
    Manifest,
    Sealed,
    Stored,
    commit_record,
    refuse_file_name,
)
from pretrain.checkpoint.peers import Peers
from pretrain.checkpoint.zarrmap import reference_map
from stoker import canonical
from stoker.errors import Refusal

log = logging.getLogger(__name__)

#: Coordinates of the one rank that holds all of every tensor.
ALONE = dict.fromkeys(("tp", "cp", "dp", "pp", "etp", "ep", "edp"), 0)
#: Tensors that ``CheckpointStore.read`` reads together, bytes; a larger one is read alone.
READ_BYTES = 256 * 2**20


class SaveHandle:
    """A save that was begun. ``poll()`` says whether it has ended, ``error`` how: None, or why nothing was committed
    (the checkpoints that were there still are). A save that failed does not stop a run by itself."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error = error

    def poll(self) -> bool:
        return True

    def wait(self) -> None:
        """Return when the step is committed. Raises the error of a save that failed."""
        if self.error is not None:
            raise self.error


class CheckpointStore:
    """The checkpoints of one run, in ``root``.

    ``process_group``: the gloo group of all ranks of the run, or None for this process alone. ``save``, ``load``,
    ``verify``, ``prune`` and ``abandon_after`` are collective over it; the rest only reads.
    """

    def __init__(self, root: Path, process_group: dist.ProcessGroup | None = None) -> None:
        self.root = Path(root)
        self._peers = Peers(process_group)

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return folders.committed(self.root)

    def latest(self) -> int | None:
        """The newest committed step."""
        return max(self.steps(), default=None)

    def save(
        self,
        step: int,
        tensors: saving.Tensors,
        meta: Mapping[str, Any],
        coords: Coords,
        attempt: int,
        extra_files: Mapping[str, bytes] | None = None,
    ) -> SaveHandle:
        """Collective. Save the state after ``step`` consumed batches.

        ``tensors``: ``{global name: (Layout, this rank's tensor)}`` of what this rank holds, on any device; of replicas
        the owner's is written. ``meta``: JSON, the same on every rank. ``extra_files``: small and opaque, those of
        rank 0 are kept. ``attempt``: grows with every launch of the run; an older one is fenced off.
        Raises Refusal, on all ranks, for arguments that do not fit together and for an attempt that is over, before
        anything is written; and for a manifest too large to be read again, when nothing of the step is kept. A disk
        that fails is ``SaveHandle.error``, on all ranks too.
        """
        peers = self._peers
        with peers.together():
            mine = saving.entries(tensors, coords)
            meta_json = canonical.dumps(dict(meta)).encode()
            for name in extra_files or {}:
                refuse_file_name(name)
        self._refuse_difference("step", step)
        self._refuse_difference("attempt", attempt)
        self._refuse_difference("meta (its SHA-256)", hashlib.sha256(meta_json).hexdigest())
        known, everyone = saving.catalog(peers, mine, coords)
        working = folders.working(self.root, step, attempt)
        try:
            with peers.together():
                if peers.rank == 0:
                    folders.begin(self.root, step, attempt)
            stored, data = saving.write_data(peers, working, known, everyone, tensors)
            with peers.together():
                if peers.rank == 0:
                    sealed = {META: meta_json, **(extra_files or {})}
                    self._seal(working, step, attempt, stored, data, sealed)
                    folders.commit(self.root, step, attempt)
        except (OSError, Refusal) as error:
            if peers.rank == 0:
                shutil.rmtree(working, ignore_errors=True)
            if isinstance(error, Refusal):
                raise
            log.error("checkpoint of step %d failed, nothing of it is kept: %s", step, error)
            return SaveHandle(error)
        return SaveHandle()

    def _refuse_difference(self, what: str, value: Any) -> None:
        told = self._peers.gather(value)
        if odd := [rank for rank, other in enumerate(told) if other != told[0]]:
            raise Refusal(f"{what} of rank {odd[0]} is {told[odd[0]]}, of rank 0 {told[0]}; a save takes one for all")

    def _seal(
        self,
        working: Path,
        step: int,
        attempt: int,
        stored: Mapping[str, Stored],
        data: Mapping[str, int],
        files: Mapping[str, bytes],
    ) -> None:
        attributes = {"step": step, "attempt": attempt}
        final = folders.final(self.root, step).absolute()
        files = {**files, REFS: reference_map(final, stored, attributes)}
        for name, content in files.items():
            _write_durably(working / name, content)
        sealed = {name: Sealed(len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
        manifest = Manifest(step, attempt, self._peers.size, stored, data, sealed)
        raw = manifest.to_json()
        if len(raw) > MAX_JSON_BYTES:
            raise Refusal(
                f"{MANIFEST} of step {step} would have {len(raw)} bytes, and no more than {MAX_JSON_BYTES} are read: "
                f"{len(stored)} tensors have too many chunks for one checkpoint"
            )
        _write_durably(working / MANIFEST, raw)
        _write_durably(working / COMMIT, commit_record(manifest, raw))

    def load(
        self,
        step: int | None,
        layouts: Mapping[str, Layout],
        coords: Coords,
        into: Mapping[str, torch.Tensor] | None = None,
        ignore: Collection[str] = (),
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Collective. This rank's part of every tensor of ``layouts`` that it holds, and the meta.

        ``step`` None: the newest checkpoint that is good; damaged ones on the way are renamed ``.quarantined``, which
        only the run that writes here may do. A step: that one, or Refusal if it is damaged.
        ``into``: tensors to fill, of the stored dtype and local shape, on any device; without it they are made on the
        CPU. Elements that no global element fills (padding) are zero. After an exception ``into`` holds anything.
        Every stored tensor must be asked for by some rank, except names that begin with one of ``ignore``.
        Raises Refusal, on all ranks, for a tensor that is missing, unasked for, or of another shape or dtype.
        """
        if step is not None:
            try:
                return self._load(step, layouts, coords, into, ignore)
            except Damaged as damaged:
                raise Refusal(
                    f"checkpoint of step {step} is damaged ({damaged}); choose another of {self.steps()}, or leave the "
                    "step open to take the newest that is good"
                ) from damaged
        # A folder without COMMIT under a final name has lost it: it is among them, to be named and set aside.
        for candidate in reversed(self._agreed(folders.found)):
            try:
                return self._load(candidate, layouts, coords, into, ignore)
            except Damaged as damaged:
                self._quarantine(candidate, damaged)
        raise Refusal(f"{self.root} holds no checkpoint that is committed and whole")

    def _agreed(self, look: Callable[[Path], list[int]]) -> list[int]:
        """Collective: steps as rank 0 sees them."""
        with self._peers.together():
            steps = look(self.root)
        return [int(step) for step in self._peers.gather(steps)[0]]

    def _quarantine(self, step: int, damaged: Damaged) -> None:
        with self._peers.together():
            if self._peers.rank == 0:
                aside = folders.set_aside(self.root, step, "quarantined")
                log.error("checkpoint of step %d is damaged, now %s: %s", step, aside.name, damaged)

    def _load(
        self,
        step: int,
        layouts: Mapping[str, Layout],
        coords: Coords,
        into: Mapping[str, torch.Tensor] | None,
        ignore: Collection[str],
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        folder = folders.path(self.root, step)
        manifest = self._manifest_together(step)
        with self._peers.together():
            meta = json.loads(loading.read_sealed(folder, manifest, META))
            _raise_any(self._shallow_damage(folder, manifest))
        with self._peers.together():
            loading.refuse_mismatch(manifest, layouts, coords, into)
        self._refuse_unasked(manifest, layouts, ignore)
        with self._peers.together():
            tensors = loading.read_tensors(folder, manifest, layouts, coords, into)
        return tensors, meta

    def _manifest_together(self, step: int) -> Manifest:
        with self._peers.together():
            manifest = loading.read_manifest(self.root, step)
        return manifest

    def _refuse_unasked(self, manifest: Manifest, layouts: Mapping[str, Layout], ignore: Collection[str]) -> None:
        """Collective: Refusal for a stored tensor that no rank asks for. A rank tells one bit a tensor."""
        names = sorted(loading.names(manifest))
        asked = sum(1 << i for i, name in enumerate(names) if name in layouts)
        asked = reduce(or_, (int(mask, 16) for mask in self._peers.gather(f"{asked:x}")))
        for i, name in enumerate(names):
            if not asked >> i & 1 and not name.startswith(tuple(ignore)):
                raise Refusal(f"tensor {name} of the checkpoint is asked for by no rank; is this another model?")

    def _shallow_damage(self, folder: Path, manifest: Manifest) -> list[Damage]:
        """This rank's share of what is quick to check: the small files, and the sizes of the large ones."""
        return [
            damage
            for check, names in ((loading.sealed_damage, manifest.sealed), (loading.size_damage, manifest.data))
            for name in self._share(names)
            for damage in check(folder, manifest, name)
        ]

    def _share(self, names: Collection[str]) -> list[str]:
        return sorted(names)[self._peers.rank :: self._peers.size]

    def verify(self, step: int) -> list[Damage]:
        """Collective. Read every byte of a checkpoint; what is wrong, or nothing. Refusal if there is no such step."""
        folder = folders.path(self.root, step)
        try:
            manifest = self._manifest_together(step)
            with self._peers.together():
                damage = self._shallow_damage(folder, manifest)
                for name in self._share(manifest.data):
                    damage += loading.content_damage(folder, manifest, name)
                if self._peers.rank == 0:
                    damage += loading.stray_damage(folder, manifest)
                _raise_any(damage)
        except Damaged as damaged:
            return damaged.found
        return []

    def manifest(self, step: int) -> Manifest:
        """What a checkpoint holds: names, shapes, dtypes, chunk CRCs. Raises Refusal, also for a damaged one."""
        try:
            return loading.read_manifest(self.root, step)
        except Damaged as damaged:
            raise Refusal(f"checkpoint of step {step} is damaged: {damaged}") from damaged

    def file(self, step: int, name: str) -> bytes:
        """An extra file of a checkpoint, verified. Raises Refusal where there is none or it is damaged."""
        try:
            return loading.read_sealed(folders.path(self.root, step), self.manifest(step), name)
        except Damaged as damaged:
            raise Refusal(f"checkpoint of step {step} is damaged: {damaged}") from damaged

    def meta(self, step: int) -> dict[str, Any]:
        """The meta of a checkpoint, verified; needs no layout. Raises Refusal as ``file`` does."""
        return dict(json.loads(self.file(step, META)))

    def read(self, step: int, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """All of each tensor, by stored name, in this order (None: all of them), on the CPU, verified; several share
        one reading. Not collective. Raises Refusal, also for a damaged checkpoint, when it comes to the damage."""
        manifest, folder = self.manifest(step), folders.path(self.root, step)
        for group in _groups(manifest, manifest.tensors if names is None else names):
            layouts = {loading.current_name(name): Layout(manifest.tensors[name].grid.shape) for name in group}
            try:
                tensors = loading.read_tensors(folder, manifest, layouts, ALONE, None)
            except Damaged as damaged:
                raise Refusal(f"checkpoint of step {step} is damaged: {damaged}") from damaged
            yield from zip(group, tensors.values(), strict=True)

    def fence(self, attempt: int) -> None:
        """Call once when an attempt begins, on one rank: from now on no save of an older attempt commits."""
        folders.fence(self.root, attempt)

    def prune(self, keep_last: int, keep_every: int | None = None) -> list[int]:
        """Collective. Delete committed steps but the newest ``keep_last`` and the multiples of ``keep_every``.

        The newest is read back first; if it is damaged, nothing is deleted and Refusal says so. Returns what went.
        """
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise Refusal(f"keep_last={keep_last}, keep_every={keep_every}: keep at least one, and every 1st or more")
        steps = self._agreed(folders.committed)
        doomed = [step for step in steps[:-keep_last] if keep_every is None or step % keep_every]
        if doomed and (damage := self.verify(steps[-1])):
            raise Refusal(f"nothing pruned: the newest checkpoint, step {steps[-1]}, is damaged: {Damaged(damage)}")
        with self._peers.together():
            if self._peers.rank == 0:
                for step in doomed:
                    folders.remove(self.root, step)
        return doomed

    def abandon_after(self, step: int) -> list[int]:
        """Collective. The run goes back to ``step``: later steps are renamed ``.abandoned``, or the next resume would
        take one of them for its own. Returns them."""
        later = [other for other in self._agreed(folders.committed) if other > step]
        with self._peers.together():
            if self._peers.rank == 0:
                for other in later:
                    folders.set_aside(self.root, other, "abandoned")
        return later


def _groups(manifest: Manifest, names: Iterable[str]) -> Iterator[list[str]]:
    """Names in runs of at most ``READ_BYTES`` of stored chunks, or of one."""
    group: list[str] = []
    size = 0
    for name in names:
        stored = manifest.tensors[name]
        num_bytes = stored.chunk_bytes * len(stored.chunks)
        if group and size + num_bytes > READ_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    if group:
        yield group


def _raise_any(damage: list[Damage]) -> None:
    if damage:
        raise Damaged(damage)


def _write_durably(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
