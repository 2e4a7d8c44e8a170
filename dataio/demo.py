"""The demo corpus: ``python -m dataio.demo OUT`` makes real token stores from this machine, without a network.

    OUT/tokenizer.json         byte-level BPE trained on the training text
    OUT/train/code, prose      token stores
    OUT/heldout/code, prose    one document in twenty-five, by its hash: no document is in both
    OUT/corpus.json            documents, bytes and tokens, licences, what was dropped and why, entropy

The result is a function of what is installed. A second run finds the same inputs and does nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dataio import baseline, harvest, tokenizer
from dataio.harvest import Candidate, Document
from dataio.store import Store, StoreWriter
from dataio.tokenizer import Tokenizer
from stoker import canonical, formats
from stoker.errors import Refusal
from stoker.files import write_atomic
from stoker.hashing import sha256_file
from stoker.progress import track

FORMAT = "stoker.demo_corpus"
#: Bytes of text taken for each source: a few minutes of training on two cores see less than one epoch of it.
SOURCE_BYTES = 12_000_000
VOCAB_SIZE = 4096
#: Text the tokenizer is trained on, half code and half prose.
TOKENIZER_BYTES = 10_000_000
#: No distribution gives more than this share of a source.
LARGEST_SHARE = 0.2
HELD_OUT_ONE_IN = 25


def build(out: Path, source_bytes: int = SOURCE_BYTES, vocab_size: int = VOCAB_SIZE) -> dict[str, Any]:
    """Make the corpus in `out` and return its report; return the report at once if `out` is made of the same inputs.

    An older corpus is replaced when the new one is whole. Refuses a machine with too little text, and an `out` that
    holds anything else.
    """
    found, dropped = harvest.candidates()
    inputs = _fingerprint(found, source_bytes, vocab_size)
    report = _existing(out)
    if report is not None and report["inputs"] == inputs:
        return report

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        report = _build(partial, found, dropped, source_bytes, vocab_size) | {"inputs": inputs}
        write_atomic(partial / "corpus.json", json.dumps(report, indent=1))
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _existing(out: Path) -> dict[str, Any] | None:
    """The report of the corpus in `out`, None if there is none, or it is incomplete or of another version."""
    if out.exists() and not (out / "corpus.json").is_file() and any(out.iterdir()):
        raise Refusal(f"{out}: holds something that is not a demo corpus; remove it or choose another folder")
    try:
        report: dict[str, Any] = json.loads((out / "corpus.json").read_text())
        formats.require(report, FORMAT, 1, out / "corpus.json")
        for name in report["stores"]:
            Store.open(out / name)
        Tokenizer.load(out / "tokenizer.json")
    except (OSError, ValueError):  # missing, damaged or newer: all of it is made again
        return None
    return report


def _fingerprint(found: Sequence[Candidate], *options: int) -> str:
    """Hash of what the corpus is made from: names, sizes and times of files, options, and the code that makes it."""
    hasher = xxhash.xxh3_128()
    for candidate in found:
        stat = candidate.path.stat() if candidate.path and candidate.path.exists() else None
        size = (stat.st_size, stat.st_mtime_ns) if stat else (len(candidate.text or ""), 0)
        hasher.update(f"{candidate.distribution}/{candidate.name} {size}\n".encode())
    code = [sha256_file(str(module.__file__)) for module in (harvest, tokenizer, sys.modules[__name__])]
    return canonical.sha256([hasher.hexdigest(), options, code])


def _build(
    folder: Path, found: Sequence[Candidate], dropped: Counter[str], source_bytes: int, vocab_size: int
) -> dict[str, Any]:
    seen: set[int] = set()
    code = _collect([c for c in found if c.kind == "code"], source_bytes, seen, dropped, "code")
    # Documents before docstrings: there are few, and they are the better prose.
    prose_candidates = sorted((c for c in found if c.kind != "code"), key=lambda c: c.kind != "document")
    prose = _collect(prose_candidates, source_bytes, seen, dropped, "prose")
    splits = {
        f"{split}/{source}": [document for document in documents if _held_out(document) == (split == "heldout")]
        for split in ("train", "heldout")
        for source, documents in (("code", code), ("prose", prose))
    }
    empty = [name for name, documents in splits.items() if not documents]
    if empty:
        raise Refusal(f"too little text on this machine for {', '.join(empty)}: install Stoker's dependencies first")

    text = [*_head(splits["train/code"]), *_head(splits["train/prose"])]
    trained = tokenizer.train(text, vocab_size, folder / "tokenizer.json")
    stores = {name: _write(folder / name, documents, trained) for name, documents in splits.items()}
    train = [store for name, store in stores.items() if name.startswith("train/")]
    return {
        "format": formats.stamp(FORMAT, 1),
        "tokenizer": vars(trained.id),
        "stores": {name: _describe(store) for name, store in stores.items()},
        "unigram_entropy": baseline.unigram(train).entropy,
        "distributions": _distributions([*code, *prose]),
        "dropped": dict(dropped),
    }


def _collect(
    candidates: Sequence[Candidate], budget: int, seen: set[int], dropped: Counter[str], name: str
) -> list[Document]:
    """Documents of candidates, up to `budget` bytes, in keyed random order; `seen` are the hashes of what is taken."""
    documents: list[Document] = []
    taken: Counter[str] = Counter()
    for number, candidate in enumerate(track(candidates, f"reading {name}")):
        if taken.total() >= budget:
            dropped[f"{name}: enough without it"] += len(candidates) - number
            break
        if taken[candidate.distribution] >= LARGEST_SHARE * budget:
            dropped[f"{name}: enough of this distribution"] += 1
            continue
        document = harvest.read(candidate)
        if isinstance(document, str):
            dropped[f"{name}: {document}"] += 1
        elif (identity := _normalised_hash(document)) in seen:
            dropped[f"{name}: exact duplicate"] += 1
        else:
            seen.add(identity)
            taken[candidate.distribution] += len(document.text.encode())
            documents.append(document)
    return sorted(documents, key=lambda d: xxhash.xxh3_128_intdigest(d.text.encode(), seed=1))


def _normalised_hash(document: Document) -> int:
    """Equal for texts that differ only in letter case and white space."""
    return xxhash.xxh3_128_intdigest(" ".join(document.text.casefold().split()).encode())


def _held_out(document: Document) -> bool:
    return _normalised_hash(document) % HELD_OUT_ONE_IN == 0


def _head(documents: Sequence[Document]) -> Iterator[str]:
    """Texts from the front, up to half of `TOKENIZER_BYTES`."""
    left = TOKENIZER_BYTES // 2
    for document in documents:
        if left <= 0:
            return
        left -= len(document.text)
        yield document.text


def _write(path: Path, documents: Sequence[Document], trained: Tokenizer) -> Store:
    licences: dict[str, dict[str, int]] = defaultdict(lambda: {"documents": 0, "bytes": 0})
    path.parent.mkdir(exist_ok=True)
    with StoreWriter(path, path.name, trained.id) as writer:
        for first in track(range(0, len(documents), 256), f"tokens of {path.parent.name}/{path.name}"):
            batch = documents[first : first + 256]
            tokens, lengths = trained.encode_batch([document.text for document in batch])
            raw = [document.text.encode() for document in batch]
            ids = np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, raw)), ">u8").reshape(-1, 2)
            writer.append(tokens, lengths, np.array([len(data) for data in raw]), ids)
            for document, data in zip(batch, raw):
                licences[document.licence]["documents"] += 1
                licences[document.licence]["bytes"] += len(data)
        return writer.commit(licences)


def _describe(store: Store) -> dict[str, Any]:
    return {
        "documents": store.num_documents,
        "bytes": store.num_bytes,
        "tokens": store.num_tokens,
        "bytes_per_token": store.num_bytes / store.num_tokens,
        "unigram_entropy": baseline.unigram([store]).entropy,
        "dataset_id": store.dataset_id,
        "licences": store.manifest["licences"],
    }


def _distributions(documents: Sequence[Document]) -> dict[str, dict[str, Any]]:
    report: dict[str, dict[str, Any]] = {}
    for document in sorted(documents, key=lambda d: d.distribution):
        entry = report.setdefault(document.distribution, {"licence": document.licence, "documents": 0, "characters": 0})
        entry["documents"] += 1
        entry["characters"] += len(document.text)
    return report


def _print(report: dict[str, Any], out: Path) -> None:
    print(f"demo corpus in {out}: {report['tokenizer']['vocab_size']} tokens in the vocabulary")
    for name, store in report["stores"].items():
        print(
            f"  {name:14} {store['documents']:6,} documents {store['bytes'] / 1e6:6.2f} MB "
            f"{store['tokens'] / 1e6:6.3f} M tokens  {store['bytes_per_token']:.2f} bytes per token  "
            f"unigram entropy {store['unigram_entropy']:.3f} nats"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dataio.demo", description="Make the demo corpus from this machine."
    )
    parser.add_argument("out", type=Path, help="folder to make it in")
    parser.add_argument("--megabytes", type=float, default=SOURCE_BYTES / 1e6, help="text of each source (default 12)")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="tokens in the vocabulary (default 4096)")
    options = parser.parse_args(arguments)
    try:
        report = build(options.out, int(options.megabytes * 1e6), options.vocab_size)
    except Refusal as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2
    _print(report, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
