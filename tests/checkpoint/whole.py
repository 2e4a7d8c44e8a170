"""A small checkpoint of one process in which everything occurs that a data file can hold: chunks on pages with gaps
before them, packed chunks, several chunks of a tensor; and ways to damage it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from parallel.planning.layout import Layout
from pretrain.checkpoint import manifest as format_
from pretrain.checkpoint.store import CheckpointStore
from tests.checkpoint.state import Tensors, plan

COORDS = plan(1).coords(0)
#: Chunks of this size start on pages.
PAGED_CHUNK_BYTES = 80_000
STEPS = (5, 6)


def state(step: int) -> Tensors:
    make = torch.Generator().manual_seed(step)
    return {
        "embed.weight": torch.randn(257, 300, generator=make),  # 4 chunks of 78000 bytes
        "layers.0.mixer.q.weight": torch.randn(65, 500, generator=make).bfloat16(),  # one of 65000, packed
        "layers.1.mixer.q.weight": torch.randn(130, 500, generator=make).bfloat16(),
        "final_norm.weight": torch.randn(63, generator=make),
        "optim.exp_avg/final_norm.weight": torch.randn(63, generator=make),
        "optim.exp_avg_sq/final_norm.weight": torch.randn(63, generator=make),
    }


LAYOUTS = {name: Layout(tuple(tensor.shape)) for name, tensor in state(0).items()}


def build(root: Path) -> None:
    """Two steps; chunk size is the caller's business."""
    for step in STEPS:
        tensors = {name: (LAYOUTS[name], tensor) for name, tensor in state(step).items()}
        handle = CheckpointStore(root).save(step, tensors, {"step": step}, COORDS, 1, {"tokenizer.json": b'{"a":1}'})
        handle.wait()


def copy(source: Path, target: Path) -> Path:
    """A copy to damage; returns the folder of its newest step."""
    shutil.copytree(source, target, symlinks=True)
    return target / f"step_{STEPS[-1]:08d}"


def flip(file: Path, byte: int, bit: int = 0) -> None:
    with open(file, "r+b") as opened:
        opened.seek(byte)
        value = opened.read(1)[0]
        opened.seek(byte)
        opened.write(bytes([value ^ 1 << bit]))


def forge(folder: Path, edit: Callable[[Any], None]) -> None:
    """Edit a manifest and let COMMIT vouch for it: what an attacker would do, or a wrong writer."""
    content = json.loads((folder / format_.MANIFEST).read_bytes())
    edit(content)
    raw = json.dumps(content).encode()
    (folder / format_.MANIFEST).write_bytes(raw)
    record = json.loads((folder / format_.COMMIT).read_bytes())
    del record["crc32c"]
    record["manifest_sha256"] = hashlib.sha256(raw).hexdigest()
    (folder / format_.COMMIT).write_bytes(format_._commit(record))
