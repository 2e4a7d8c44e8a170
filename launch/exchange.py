"""Checkpoints to other formats and back: a self-contained zarr group, and Hugging Face folders."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from dataio.types import TokenizerId
from parallel.planning.layout import Coords, Layout
from pretrain.checkpoint.store import CheckpointStore
from stoker.errors import Refusal
from stoker.hashing import sha256_file


def export_zarr(store: CheckpointStore, step: int, out: Path) -> None:
    """Every tensor as a zarr v3 array under its global name, checksummed; bfloat16 as uint16, its name an attribute.

    The folder appears when it is whole. Raises Refusal where it exists, and for a damaged checkpoint.
    """
    import zarr

    from pretrain.checkpoint.shards import flat

    _refuse_existing(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        group = zarr.create_group(str(partial), attributes={"step": step, "meta": store.meta(step)})
        tensors = store.manifest(step).tensors
        for name, values in store.read(step, tensors):
            stored = tensors[name]
            group.create_array(
                name,
                data=flat(values).reshape(stored.grid.shape),
                chunks=stored.grid.chunk,
                compressors=zarr.codecs.Crc32cCodec(),
                attributes={"dtype": stored.dtype},
            )
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export_hf(store: CheckpointStore, step: int, out: Path) -> None:
    """The weights as a folder that transformers loads, with the run's tokenizer. Raises Refusal for a model that
    transformers cannot state."""
    from pretrain.data import TOKENIZER
    from pretrain.exchange import hf
    from pretrain.restore import restore
    from stoker.files import write_atomic

    _refuse_existing(out)
    restored = restore(store.root.parent, step)
    hf.write(out, restored.spec, restored.tensors)
    if TOKENIZER in store.manifest(step).sealed:
        write_atomic(out / TOKENIZER, store.file(step, TOKENIZER))


def import_hf(source: str, overrides: Sequence[str], folder: Path, drop: tuple[str, ...]) -> str:
    """Make the run of a configuration begin from a Hugging Face folder: its checkpoint of step 0, with fresh moments.
    Runs in this process, so the model and its optimizer fit in its memory. Says what was done.

    Masters of a bfloat16 run take the values that the folder has, not their rounding. Raises Refusal where the folder's
    model or tokenizer is not the configuration's, and where the run has begun already.
    """
    from pretrain.attempt import ExitClass
    from pretrain.config import load
    from pretrain.data import open_stores
    from pretrain.exchange import hf
    from pretrain.restore import alone
    from pretrain.run import World, validate
    from pretrain.rundir import begin
    from pretrain.session import Session

    config = load(source, [*overrides, "parallel=auto"])
    theirs, weights = hf.read(folder, drop)
    spec = config.model_spec()
    refuse_other_model(spec, theirs, folder)
    start = validate(config, World(rank=0, size=1, local_rank=0), announce=_silent)
    assert start is not None
    note = compare_tokenizer(folder, next(iter(open_stores(config).values())).tokenizer)
    if start.resume_step is not None:
        raise Refusal(f"{config.run_dir} has begun: it holds step {start.resume_step}. Choose another run.name")
    alone(len(spec.layers))
    attempt = begin(start, config, config.plan(1, announce=_silent))
    try:
        session = Session(config, 0, attempt.number, None)
        for name, layout, tensor in session.trainer.tensors():
            source = name.removeprefix("optim.master/")
            if source in weights:  # a router bias that they lack stays at zero
                fill(tensor, layout, session.groups.coords, weights[source])
        session.save(0)
        attempt.finish(ExitClass.DONE, f"imported {folder}")
    finally:
        attempt.close()
    return f"{config.run_dir}: step 0 holds the weights of {folder}; stoker train goes on from it{note}"


def fill(tensor: torch.Tensor, layout: Layout, coords: Coords, values: torch.Tensor) -> None:
    """Set this rank's part of a tensor, contiguous, from the values of all of it; rounds to the tensor's dtype."""
    local = tensor.view(-1)
    for piece in layout.slices(coords):
        box = tuple(slice(start, stop) for start, stop in zip(piece.start, piece.stop))
        local[piece.offset : piece.offset + piece.numel].copy_(values[box].reshape(-1))


def compare_tokenizer(folder: Path, ours: TokenizerId) -> str:
    """Raise Refusal where a folder's tokenizer.json is not the one that the stores were made with: its tokens would
    mean other text. A remark where there is none to compare."""
    from pretrain.data import TOKENIZER

    path = folder / TOKENIZER
    if not path.is_file():
        return f"\n{folder} holds no {TOKENIZER}: that the model knows the tokens of the stores could not be checked"
    if (theirs := sha256_file(path)) != ours.sha256:
        raise Refusal(
            f"{path} (SHA-256 {theirs[:12]}) is not the tokenizer of the stores ({ours.sha256[:12]}): prepare the "
            "stores with it"
        )
    return ""


def refuse_other_model(ours: Any, theirs: Any, folder: Path, where: str = "model") -> None:
    """Raise Refusal naming the first field in which two specs differ. How a model is trained may differ: first values,
    and a router's balance; but a bias that theirs was trained with is not to be dropped."""
    free = {"init_std", "bias_update_rate", "balance_loss", "z_loss"}
    if type(ours) is not type(theirs):
        raise Refusal(f"{where}: the configuration has {type(ours).__name__}, {folder} has {type(theirs).__name__}")
    for field in fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        name = f"{where}.{field.name}"
        if field.name == "bias_update_rate" and mine is None and other is not None:
            raise Refusal(f"{name}: {folder} has router biases, the configuration has none: set it, 0 keeps them")
        if field.name in free or mine == other:
            continue
        if isinstance(mine, tuple) and len(mine) == len(other):
            for index, (x, y) in enumerate(zip(mine, other)):
                refuse_other_model(x, y, folder, f"{name}[{index}]")
        elif hasattr(mine, "__dataclass_fields__"):
            refuse_other_model(mine, other, folder, name)
        else:
            raise Refusal(f"{name}: the configuration has {mine!r}, {folder} has {other!r}; make them agree")


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise Refusal(f"{out} exists already: give a folder that is not there")


def _silent(text: str) -> None:
    """A world of one, whatever the configuration leaves open."""
