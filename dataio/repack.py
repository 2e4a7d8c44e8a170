"""The same store in another form: hot to train from, cold to keep and to send; or an old one in today's format.

What it holds is not changed, so `dataset_id` is not either, and the copy is refused if it came out another. (A store
of version 1 was identified by its files. It gets the id of its contents, and a run that was begun on it goes on with
the old one only.)
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dataio.checks import Leaves, root
from dataio.manifest import About, partial_folder, require_absent, seal
from dataio.shards import Profile, ShardWriter, Written
from dataio.store import CHUNK_TOKENS, Store, token_grid, write_document_array
from stoker.errors import Refusal
from stoker.progress import progress


def repack(
    store: Store,
    out: str | os.PathLike[str],
    profile: Profile,
    chunk_tokens: int = CHUNK_TOKENS,
    shard_chunks: int | None = None,
) -> Store:
    """Write `store` to `out` in `profile`, and open it. Memory: one shard of tokens.

    Refuses damage in `store`, naming the file, and an `out` that exists.
    """
    path = Path(out)
    require_absent(path)
    folder = partial_folder(path)
    try:
        grid = token_grid(store.tokenizer, 0, chunk_tokens, shard_chunks, profile)
        written = {"tokens": _copy_tokens(store, ShardWriter(folder / "tokens", grid))}
        for name, array in store.arrays.items():
            if name != "tokens":
                written[name] = write_document_array(folder, name, array.whole(), profile)
        _require_same(store, written)
        manifest = store.manifest
        about = About(
            store.source,
            store.tokenizer,
            documents=store.num_documents,
            bytes=store.num_bytes,
            languages=store.languages,
            licences=manifest["licences"],
            inputs=manifest["inputs"],
            recipe=manifest.get("recipe"),
            input_files=store.input_files,
        )
        seal(folder, path, about, written, profile)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Store.open(path)


def _copy_tokens(store: Store, writer: ShardWriter) -> Written:
    tokens = store.arrays["tokens"]
    step = max(tokens.grid.chunk, CHUNK_TOKENS)
    with progress(f"repacking {store.source}", store.num_tokens) as advance:
        for low in range(0, store.num_tokens, step):
            rows = tokens.rows(low, min(low + step, store.num_tokens))
            writer.append(rows)
            advance(len(rows))
    return writer.close()


def _require_same(store: Store, written: dict[str, Written]) -> None:
    """What was written is what the manifest says was there; of version 1, which does not say, what is there."""
    for name, copy in written.items():
        if name in (entries := store.manifest.get("arrays", {})):
            expected = entries[name]["content"]
        else:
            leaves, array = Leaves(), store.arrays[name]
            for low in range(0, array.grid.shape[0], CHUNK_TOKENS):
                leaves.update(array.rows(low, min(low + CHUNK_TOKENS, array.grid.shape[0])))
            leaves.close()
            expected = root(leaves.digests)
        if root(copy.leaves) != expected:
            raise Refusal(f"{store.path}: {name} was not read as it was written; run `stoker data verify` on it")
