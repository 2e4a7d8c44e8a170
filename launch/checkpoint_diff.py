"""Two checkpoints compared tensor by tensor, whatever layouts wrote them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pretrain.checkpoint.store import CheckpointStore


def compare(a: CheckpointStore, step_a: int, b: CheckpointStore, step_b: int) -> Iterator[str]:
    """A line for each difference, and one that counts what is equal. Chunks depend on the tensor only, so tensors with
    equal checksums are taken as equal and not read. Raises Refusal where one that is read is damaged."""
    mine, theirs = a.manifest(step_a).tensors, b.manifest(step_b).tensors
    differ: list[str] = []
    same = 0
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            yield f"{name}: only in {a.root.parent if name in mine else b.root.parent}, step {step_a}/{step_b}"
            continue
        x, y = mine[name], theirs[name]
        if (x.grid.shape, x.dtype) != (y.grid.shape, y.dtype):
            yield f"{name}: {x.dtype} {list(x.grid.shape)} and {y.dtype} {list(y.grid.shape)}"
        elif [chunk.crc for chunk in x.chunks] == [chunk.crc for chunk in y.chunks]:
            same += 1
        else:
            differ.append(name)
    for (name, x_values), (_, y_values) in zip(a.read(step_a, differ), b.read(step_b, differ), strict=True):
        yield f"{name}: {distance(x_values, y_values)}"
    yield f"{same} of {len(mine.keys() | theirs.keys())} tensors are equal by checksum"


def distance(x: torch.Tensor, y: torch.Tensor) -> str:
    """How far two tensors are apart, in words: the measure of P4, max |x - y| / max |x|."""
    difference, largest = (x.double() - y.double()).abs().max().item(), x.double().abs().max().item()
    relative = f"{difference / largest:.3g}" if largest else "unknown, the first is zero"
    return f"max |difference| {difference:.3g}, over max |value| {relative}"
