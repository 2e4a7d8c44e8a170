"""Reading one step's folder: nothing is used before it is verified, and everything that is wrong is named."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from parallel.planning.layout import Coords, Layout
from pretrain import spec
from pretrain.checkpoint import folders
from pretrain.checkpoint.chunks import pieces
from pretrain.checkpoint.damage import Damage, Damaged
from pretrain.checkpoint.datafile import open_regular, reading
from pretrain.checkpoint.dtypes import storage_dtype
from pretrain.checkpoint.manifest import COMMIT, MANIFEST, MAX_JSON_BYTES, Manifest, Stored, read_committed
from pretrain.checkpoint.shards import dtype_name, flat, unflat, zeros
from stoker.errors import Refusal

_HASH_BLOCK_BYTES = 2**20


def read_manifest(root: Path, step: int) -> Manifest:
    """The manifest of a committed step. Raises Refusal where there is no such step, Damaged where it is not whole."""
    folder = folders.path(root, step)
    if not folder.is_dir():
        steps = ", ".join(map(str, folders.committed(root))) or "none"
        raise Refusal(f"{root} has no checkpoint of step {step}; committed steps: {steps}")
    return read_committed(read_whole(folder, COMMIT), read_whole(folder, MANIFEST), step)


def read_whole(folder: Path, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
    """A file's bytes. Raises Damaged if it is missing or larger than ``limit``."""
    with open_regular(folder, name) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise Damaged([Damage(name, None, None, f"{size} bytes, more than the {limit} it can have")])
        return file.read()


def read_sealed(folder: Path, manifest: Manifest, name: str) -> bytes:
    """A small file's bytes, verified. Raises Damaged, or Refusal for a name that the checkpoint does not have."""
    if name not in manifest.sealed:
        raise Refusal(f"{folder.name} has no file {name}; it has {', '.join(sorted(manifest.sealed))}")
    raw = read_whole(folder, name, limit=manifest.sealed[name].bytes)
    if hashlib.sha256(raw).hexdigest() != manifest.sealed[name].sha256:
        raise Damaged([_changed(name)])
    return raw


def sealed_damage(folder: Path, manifest: Manifest, name: str) -> list[Damage]:
    """Whether a small file is what the manifest says, read block by block."""
    try:
        with open_regular(folder, name) as file:
            digest = hashlib.sha256()
            while block := file.read(_HASH_BLOCK_BYTES):
                digest.update(block)
            return [] if digest.hexdigest() == manifest.sealed[name].sha256 else [_changed(name)]
    except Damaged as damaged:
        return damaged.found


def size_damage(folder: Path, manifest: Manifest, name: str) -> list[Damage]:
    """Whether a data file is there in its full size."""
    try:
        with open_regular(folder, name) as file:
            size = os.fstat(file.fileno()).st_size
    except Damaged as damaged:
        return damaged.found
    expected = manifest.data[name]
    return [] if size == expected else [Damage(name, None, None, f"{size} bytes where {expected} were written")]


def stray_damage(folder: Path, manifest: Manifest) -> list[Damage]:
    """Files of the folder that the checkpoint does not know."""
    known = {MANIFEST, COMMIT, *manifest.data, *manifest.sealed}
    return [Damage(name, None, None, "not part of the checkpoint") for name in sorted({*os.listdir(folder)} - known)]


def content_damage(folder: Path, manifest: Manifest, name: str) -> list[Damage]:
    """Everything wrong inside a data file."""
    with reading(folder, manifest) as reader:
        return list(reader.damage(name, manifest.extents()[name]))


def _changed(name: str) -> Damage:
    return Damage(name, None, None, f"its SHA-256 is not the one in {MANIFEST}")


def current_name(name: str) -> str:
    """The global name used today for a stored one; an optimizer slot (``optim.<slot>/<name>``) follows its tensor."""
    slot, slash, base = name.rpartition("/")
    return f"{slot}{slash}{spec.aliases.get(base, base)}"


def names(manifest: Manifest) -> dict[str, str]:
    """Today's global names -> the names under which the tensors are stored."""
    return {current_name(stored): stored for stored in sorted(manifest.tensors)}


def refuse_mismatch(
    manifest: Manifest, layouts: Mapping[str, Layout], coords: Coords, into: Mapping[str, torch.Tensor] | None
) -> None:
    """Raises Refusal where what is asked for is not what is stored, naming the tensor."""
    known = names(manifest)
    for name, layout in layouts.items():
        if name not in known:
            raise Refusal(f"tensor {name} is not in the checkpoint of step {manifest.step}")
        stored = manifest.tensors[known[name]]
        if layout.shape != stored.grid.shape:
            raise Refusal(f"tensor {name}: stored with shape {stored.grid.shape}, asked for with {layout.shape}")
        if into is not None and layout.holds(coords):
            if name not in into:
                raise Refusal(f"tensor {name}: asked for, and no tensor was given to load it into")
            _refuse_target(name, stored, layout.local_shape(coords), into[name])
    if into is not None and (extra := sorted(into.keys() - layouts.keys())):
        raise Refusal(f"tensor {extra[0]}: given to load into, without a layout")


def _refuse_target(name: str, stored: Stored, shape: tuple[int, ...], target: torch.Tensor) -> None:
    if (dtype := dtype_name(name, target)) != stored.dtype:
        raise Refusal(f"tensor {name}: stored as {stored.dtype}, asked for as {dtype}; convert it after loading")
    if tuple(target.shape) != shape:
        raise Refusal(f"tensor {name}: local shape {tuple(target.shape)} where its layout has {shape}")


def read_tensors(
    folder: Path,
    manifest: Manifest,
    layouts: Mapping[str, Layout],
    coords: Coords,
    into: Mapping[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """This rank's part of each tensor that it holds, every chunk that it touches verified; padding is zero.

    Raises Damaged with every chunk at fault; ``into`` is then partly overwritten.
    """
    known = names(manifest)
    tensors: dict[str, torch.Tensor] = {}
    damage: list[Damage] = []
    with reading(folder, manifest) as reader:
        for name, layout in layouts.items():
            if not layout.holds(coords):
                continue
            stored = manifest.tensors[known[name]]
            tensors[name] = into[name] if into is not None else zeros(stored.dtype, layout.local_shape(coords))
            target = tensors[name].detach()
            in_place = target.device.type == "cpu" and target.is_contiguous()
            local = flat(target if in_place else zeros(stored.dtype, target.shape))
            local[...] = 0
            for number, parts in pieces(layout, coords, stored.grid).items():
                try:
                    raw = reader.chunk(known[name], number)
                except Damaged as damaged:
                    damage += damaged.found
                    continue
                chunk = raw.view(storage_dtype(stored.dtype)).reshape(stored.grid.chunk)
                for piece in parts:
                    piece.of_local(local)[...] = piece.of_chunk(chunk)
            if not in_place:
                target.copy_(unflat(local, stored.dtype, target.shape))
    if damage:
        raise Damaged(damage)
    return tensors
