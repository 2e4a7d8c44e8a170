"""Peers of the benchmarks of data, each used as its own documentation shows. What is not installed is left out, with
the reason; none of them is needed for anything else.

A sketch peer takes texts and makes a signature of 128 permutations of each from sets of five words in a row.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from numpy.typing import NDArray

from dataio.bench_corpus import SHINGLE_WORDS, WORD
from dataio.store import Store

PERMUTATIONS = 128

Tool = TypeVar("Tool", bound=Callable[..., object])
Sketch = Callable[[Sequence[str]], object]
Encode = Callable[[Sequence[str]], object]
#: Windows of tokens: (first token of each, tokens of each) -> [n, tokens].
Windows = Callable[[NDArray[np.int64], int], NDArray[Any]]


def usable(
    peers: Mapping[str, Callable[..., Tool]], arguments: Sequence[Any], warm: Sequence[Any]
) -> tuple[dict[str, Tool], dict[str, str]]:
    """({name and version: the peer made of `arguments`}, {name: why it is left out}); each was called with `warm` once.

    Whatever a peer raises leaves it out, and is told: it is not what is measured here.
    """
    tools, absent = {}, {}
    for distribution, make in peers.items():
        try:
            import_module(distribution)
        except ImportError:
            absent[distribution] = "not installed: pip install 'stoker[bench]'"
            continue
        named = f"{distribution} {metadata.version(distribution)}"
        try:
            tool = make(*arguments)
            tool(*warm)
        except Exception as error:
            absent[named] = f"fails: {type(error).__name__}: {error}"
        else:
            tools[named] = tool
    return tools, absent


def _shingles(text: str) -> set[str]:
    words = [word.lower() for word in WORD.findall(text)]
    return {" ".join(words[at : at + SHINGLE_WORDS]) for at in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def _rensa() -> Sketch:
    import rensa

    def sketch(texts: Sequence[str]) -> object:
        made = []
        for text in texts:
            sketched = rensa.RMinHash(num_perm=PERMUTATIONS, seed=42)
            sketched.update(list(_shingles(text)))
            made.append(sketched)
        return made

    return sketch


def _datasketch() -> Sketch:
    import xxhash
    from datasketch import MinHash

    def sketch(texts: Sequence[str]) -> object:
        made = []
        for text in texts:
            sketched = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=xxhash.xxh32_intdigest)
            sketched.update_batch([shingle.encode() for shingle in _shingles(text)])
            made.append(sketched)
        return made

    return sketch


def _datatrove() -> Sketch:
    """Its defaults, 14 x 8 hashes and the word splitter for English, without what it writes."""
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(n_grams=SHINGLE_WORDS, hash_config=HashConfig(precision=64))
    step = MinhashDedupSignature(output_folder=tempfile.gettempdir(), config=config, language="en")
    return lambda texts: [step.get_signature(step.get_shingles(text)) for text in texts]


SKETCHES: dict[str, Callable[[], Sketch]] = {"rensa": _rensa, "datasketch": _datasketch, "datatrove": _datatrove}


def _tokenizers(path: Path) -> Encode:
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.encode_special_tokens = True
    return lambda texts: [found.ids for found in inner.encode_batch_fast(list(texts), add_special_tokens=False)]


def _tiktoken(path: Path) -> Encode:
    """The same vocabulary as ranks: a token's bytes, and its number for the order of merges."""
    import tiktoken

    content = json.loads(path.read_text("utf-8"))
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    byte_of = _bytes_of_characters()
    ranks = {
        bytes(byte_of[character] for character in token): number
        for token, number in content["model"]["vocab"].items()
        if token not in special
    }
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    encoding = tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return lambda texts: [encoding.encode_ordinary(text) for text in texts]


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet of bytes: printable ones are themselves, the others, in order, the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


TOKENIZERS: dict[str, Callable[[Path], Encode]] = {"tokenizers": _tokenizers, "tiktoken": _tiktoken}


def memmap(path: Path, store: Store) -> Windows:
    """One flat file of tokens under numpy, its windows stacked: what a loader without a format does."""
    tokens = np.memmap(path, np.uint16 if store.tokenizer.vocab_size <= 2**16 else np.uint32, "r")
    return lambda starts, width: np.stack([tokens[start : start + width] for start in starts.tolist()]).astype(np.int32)


def _zarr(store: Store) -> Windows:
    import zarr

    tokens: Any = zarr.open_array(str(store.path / "tokens"), mode="r")
    return lambda starts, width: np.stack([tokens[start : start + width] for start in starts.tolist()]).astype(np.int32)


def _tensorstore(store: Store) -> Windows:
    import tensorstore

    place = {"driver": "file", "path": f"{(store.path / 'tokens').absolute()}/"}
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 512 << 20}})
    tokens = tensorstore.open({"driver": "zarr3", "kvstore": place}, context=context, read=True).result()

    def windows(starts: NDArray[np.int64], width: int) -> NDArray[Any]:
        reads = [tokens[start : start + width].read() for start in starts.tolist()]
        return np.stack([read.result() for read in reads]).astype(np.int32)

    return windows


STORES: dict[str, Callable[[Store], Windows]] = {"zarr": _zarr, "tensorstore": _tensorstore}
