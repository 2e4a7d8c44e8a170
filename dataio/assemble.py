"""From the tokens of many document files to one store, in the final order: three steps that many processes can share.

    plan_shards   where each document of the order lies, and which tokens of the store it becomes    one task
    write_shard   gathers the tokens of one shard file                                               a task for each
    commit        side arrays and manifest; shards are linked in, not copied                         one task

Units are the parts that a source is worked on in. Unit u has a document file, an attribute file of the last stage (its
columns `reason`: null if kept, `weight`, `language`, `flags`), and a folder of its tokens, `encoded[u]`:

    tokens.npy    [tokens] documents one after another, each with its end-of-text
    lengths.npy   [rows] int64, tokens of each document of the unit; 0: it was dropped
    bytes.npy     [rows] int64, bytes of its text as it was encoded

`order` is an array file [documents, 2] of (unit, row): each document that has tokens, once.

Memory is one shard of tokens, one unit's lengths and a few MB; what has a row for each document (48 bytes in the plan,
53 in the store) is worked on through maps. The same inputs give the same bytes, whoever writes which shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np

from dataio import document_arrays, maps, shards
from dataio.checks import LEAF_ROWS, Leaves
from dataio.manifest import SIDE_ARRAYS, About, partial_folder, seal
from dataio.shards import FileEntry, Grid, Profile, Written
from dataio.stages import Counts
from dataio.store import CHUNK_TOKENS, token_grid, write_document_array
from dataio.types import TokenizerId
from stoker import canonical
from stoker.errors import Refusal
from stoker.files import write_atomic

#: Changes when the same tokens would give another store.
VERSION = 1
#: Documents planned at a time.
BLOCK = 1 << 18


@dataclass(frozen=True)
class Form:
    """The form that a store is written in. A shard holds a multiple of `LEAF_ROWS` tokens, so a task can hash it."""

    tokenizer: TokenizerId
    profile: Profile = "hot"
    chunk_tokens: int = CHUNK_TOKENS
    shard_chunks: int | None = None

    def __post_init__(self) -> None:
        if self.grid(0).shard % LEAF_ROWS:
            raise Refusal(f"a shard of {self.grid(0).shard} tokens must be a multiple of {LEAF_ROWS}")

    def grid(self, tokens: int) -> Grid:
        return token_grid(self.tokenizer, tokens, self.chunk_tokens, self.shard_chunks, self.profile)


# A plan is a folder of array files: `offsets` [documents + 1] first token of each document in the store; `unit` and
# `start` [documents] where its tokens come from; `ranks` [rows of all units] the place of each row in the order, -1
# if it was dropped.


def plan_outputs(plan: str) -> list[str]:
    """Files that `plan_shards` writes to the folder `plan`."""
    return [f"{plan}/{name}.npy" for name in ("offsets", "unit", "start", "ranks")]


def plan_shards(order: Path, encoded: Sequence[Path], plan: Path) -> Counts:
    """Work out where the tokens of each document go. Refuses an order that is not one of all documents with tokens."""
    places = maps.load(order)
    sizes = [len(maps.load(folder / "lengths.npy", mapped=False)) for folder in encoded]
    bases = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    total, documents = int(bases[-1]), len(places)
    if places.ndim != 2 or places.shape[1] != 2:
        raise Refusal(f"{order}: not an array of (unit, row); run the order stage again")
    with maps.ArrayFiles(plan) as files:
        ranks = files.new("ranks", (total,), np.int64)
        lengths, starts = files.new("lengths", (total,), np.int64), files.new("starts", (total,), np.int64)
        with_tokens = 0
        for folder, low, high in zip(encoded, bases, bases[1:]):
            of_unit = maps.load(folder / "lengths.npy", mapped=False)
            with_tokens += int(np.count_nonzero(of_unit))
            lengths[low:high], starts[low:high], ranks[low:high] = of_unit, np.cumsum(of_unit) - of_unit, -1
        offsets = files.new("offsets", (documents + 1,), np.int64)
        from_unit, start = files.new("unit", (documents,), np.int32), files.new("start", (documents,), np.int64)
        for low in range(0, documents, BLOCK):
            high = min(low + BLOCK, documents)
            unit, row = np.array(places[low:high]).T
            if min(unit.min(), row.min()) < 0 or unit.max() >= len(sizes) or (row >= np.diff(bases)[unit]).any():
                raise Refusal(f"{order}: has a document that is in no unit; run the order stage again")
            at = bases[unit] + row
            if (ranks[at] >= 0).any() or len(np.unique(at)) != len(at) or (lengths[at] < 1).any():
                raise Refusal(f"{order}: has a document twice, or one without tokens; run the order stage again")
            ranks[at] = np.arange(low, high)
            offsets[low + 1 : high + 1] = offsets[low] + np.cumsum(lengths[at])
            from_unit[low:high], start[low:high] = unit, starts[at]
        if with_tokens != documents:
            raise Refusal(f"{order}: has {documents} of {with_tokens} documents with tokens; run the order stage again")
        tokens = int(offsets[-1])
        files.keep("ranks", "offsets", "unit", "start")
    return {"documents": documents, "tokens": tokens}


def num_shards(plan: Path, form: Form) -> int:
    """Shard files of a planned store. Refuses one of fewer than two tokens."""
    tokens = int(maps.load(plan / "offsets.npy")[-1])
    if tokens < 2:
        raise Refusal(f"{plan}: {tokens} tokens are left; a store needs an input and a target: look at the filters")
    return form.grid(tokens).num_shards


def shard_outputs(folder: str, number: int) -> list[str]:
    """Files that `write_shard` writes to `folder`."""
    return [f"{folder}/{number}", f"{folder}/{number}.json"]


def write_shard(plan: Path, encoded: Sequence[Path], form: Form, number: int, out: Path) -> Counts:
    """Gather the tokens of shard `number`; write it, and what ``commit`` must know of it, to `out`.

    Refuses tokens that are not of the form's tokenizer, and a document that does not end with end-of-text.
    """
    offsets = maps.load(plan / "offsets.npy")
    grid = form.grid(int(offsets[-1]))
    low, high = grid.rows(number)
    first, last = (int(at) for at in np.searchsorted(offsets, (low, high - 1), side="right") - 1)
    begin, end = offsets[first : last + 1] - low, offsets[first + 1 : last + 2] - low
    unit, start = (maps.load(plan / f"{name}.npy")[first : last + 1] for name in ("unit", "start"))
    tokens = np.empty(high - low, grid.stored)
    # Unit by unit, and in each from front to back: one file is open at a time, and read ahead.
    by_unit = np.lexsort((start, unit))
    for chosen in np.split(by_unit, np.flatnonzero(np.diff(unit[by_unit])) + 1):
        path = encoded[int(unit[chosen[0]])] / "tokens.npy"
        values = maps.load(path)
        if values.dtype != grid.stored or len(values) < int((start + end - begin)[chosen].max()):
            raise Refusal(f"{path}: not {grid.dtype}, or shorter than lengths.npy says; run the encode stage again")
        _gather(values, start[chosen], begin[chosen], end[chosen], tokens)
        ends = end[chosen] - 1
        if (tokens[ends[ends < len(tokens)]] != form.tokenizer.eos_id).any():
            raise Refusal(f"{path}: a document does not end with end-of-text ({form.tokenizer.eos_id}); encode again")
    if int(tokens.max()) >= form.tokenizer.vocab_size:
        raise Refusal(f"{out}, shard {number}: a token outside the vocabulary of {form.tokenizer.vocab_size}")
    leaves = Leaves()
    leaves.update(tokens)
    leaves.close()
    entry = shards.write_shard(out / str(number), grid, shards.cut(tokens, grid.chunk), durable=True)
    about = {"size": entry.file.size, "sha256": entry.file.sha256, "leaves": leaves.digests.hex()}
    about["units"] = entry.units.astype("<u4").tobytes().hex()
    write_atomic(out / f"{number}.json", canonical.dumps(about))
    return {"documents": int((begin >= 0).sum()), "tokens": high - low, "bytes_in": tokens.nbytes}


def commit(
    plan: Path,
    written_shards: Path,
    encoded: Sequence[Path],
    documents: Sequence[Path],
    selected: Sequence[Path],
    form: Form,
    source: str,
    path: Path,
    recipe: str | None = None,
    inputs: Mapping[str, str] | None = None,
    input_files: Sequence[str] = (),
) -> Counts:
    """Make the store `path` of what ``write_shard`` left in `written_shards`; a store that is there is replaced when
    the new one is whole. `recipe`, `inputs`, `input_files`: see ``About``."""
    offsets = maps.load(plan / "offsets.npy")
    count, grid = len(offsets) - 1, form.grid(int(offsets[-1]))
    folder = partial_folder(path)
    try:
        written = {"tokens": _link_shards(written_shards, grid, folder / "tokens")}
        written["doc_offsets"] = write_document_array(folder, "doc_offsets", offsets, form.profile)
        with maps.ArrayFiles(plan) as files:
            arrays = {name: files.new(name, (count, *side.columns), side.dtype) for name, side in SIDE_ARRAYS.items()}
            ranks = maps.load(plan / "ranks.npy")
            languages, licences = document_arrays.fill(arrays, ranks, encoded, documents, selected)
            for name, values in arrays.items():
                written[name] = write_document_array(folder, name, values, form.profile)
            text_bytes = int(arrays["doc_bytes"].sum())
        about = About(
            source=source,
            tokenizer=form.tokenizer,
            documents=count,
            bytes=text_bytes,
            languages=languages,
            licences=licences,
            inputs=dict(inputs or {}),
            recipe=recipe,
            input_files=list(input_files),
        )
        seal(folder, path, about, written, form.profile, replace=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"documents": count, "tokens": grid.shape[0], "bytes_in": text_bytes}


def _link_shards(source: Path, grid: Grid, folder: Path) -> Written:
    """The shards under their names in the store: second names of the same files, which nobody writes again."""
    files: dict[str, FileEntry] = {}
    units, leaves = [], bytearray()
    (folder / "c").mkdir(parents=True)
    for number in range(grid.num_shards):
        shard, about = source / str(number), _read_about(source / f"{number}.json")
        if not shard.is_file() or shard.stat().st_size != about["size"]:
            raise Refusal(f"{shard}: missing, or not as it was written; run the stage that writes shards again")
        try:
            os.link(shard, folder / grid.key(number))
        except OSError:  # a file system without links
            shutil.copyfile(shard, folder / grid.key(number))
        files[grid.key(number)] = FileEntry(about["size"], about["sha256"])
        units.append(np.frombuffer(bytes.fromhex(about["units"]), "<u4"))
        leaves += bytes.fromhex(about["leaves"])
    return shards.finish_array(folder, grid, files, units, bytes(leaves))


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(path.read_bytes())
        return about
    except (OSError, ValueError) as error:
        raise Refusal(f"{path}: cannot be read ({error}); run the stage that writes shards again") from None


@numba.njit(nogil=True, cache=True)
def _gather(values, starts, begins, ends, out):  # type: ignore[no-untyped-def]
    """out[begins[j] : ends[j]] = values[starts[j] :], as far as it lies in `out`."""
    for index in range(len(starts)):
        low, high = max(begins[index], 0), min(ends[index], len(out))
        shift = starts[index] - begins[index]
        source, target = values[low + shift : high + shift], out[low:high]
        for element in range(len(source)):
            target[element] = source[element]
