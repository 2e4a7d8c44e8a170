"""Encoding: tokens of each row are those of its text as it is trained on, and nothing of a dropped one."""

from __future__ import annotations

import base64
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from dataio import documents, encode, tokenizer
from dataio.documents import Document, ParquetFile, write_documents
from dataio.encode import Texts
from dataio.filters.redact import replacement
from dataio.selection import FLAGS, SELECTED
from dataio.tokenizer import END_OF_TEXT, Tokenizer
from stoker.errors import Refusal
from tests.dataio.test_tokenizer import texts

SPAN = pa.struct([("start", pa.int32()), ("stop", pa.int32())])
SUBSTRING = pa.schema([pa.field("substring", pa.list_(SPAN))])
SECRET = pa.struct([("start", pa.int32()), ("stop", pa.int32()), ("kind", pa.string())])
REDACTIONS = pa.schema([pa.field("redactions", pa.list_(SECRET))])

#: text, language, reason, cuts, secrets, repository
Row = tuple[str, str, str | None, list[tuple[int, int]] | None, list[tuple[int, int, str]] | None, str | None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.train(texts(), 320, path)
    return path


@pytest.fixture(autouse=True)
def groups_of_seven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "GROUP_DOCUMENTS", 7)


def rows(count: int, seed: int = 0) -> list[Row]:
    draw = random.Random(seed)
    found: list[Row] = [
        ("é🙂", "fr", None, [(0, 2)], [(2, 6, "email")], None),
        ("all", "en", None, [(0, 3)], None, None),
    ]
    for i in range(count - len(found)):
        text = draw.choice(texts()) + f" {i} {END_OF_TEXT} 漢字 key=abcd"
        size = len(text.encode())
        cuts = sorted((at, at + 5) for at in draw.sample(range(0, 60, 10), draw.choice((0, 0, 2)))) or None
        secrets = [(size - 4, size, "aws_key")] if draw.random() < 0.3 else None
        reason = "near.copy" if draw.random() < 0.3 else None
        found.append((text, draw.choice(("python", "en")), reason, cuts, secrets, draw.choice((None, "me/it\nx"))))
    return found[:count]


def unit(folder: Path, held: list[Row], header: str | None = None) -> Texts:
    write_documents(
        folder / "unit.parquet",
        [Document(row[0], "s", f"a/{i}.py", 0, i, repository=row[5]) for i, row in enumerate(held)],
    )

    def attributes(name: str, schema: pa.Schema, columns: list[list[Any]]) -> Path:
        with ParquetFile(folder / f"{name}.parquet", schema) as file:
            for at in range(0, len(held), 7):
                arrays = [pa.array(column[at : at + 7], of.type) for column, of in zip(columns, schema)]
                file.write(pa.table(arrays, schema=schema))
        return folder / f"{name}.parquet"

    named = [[dict(zip(("start", "stop", "kind"), span)) for span in row[4]] if row[4] else None for row in held]
    cuts = [[dict(zip(("start", "stop"), span)) for span in row[3]] if row[3] else None for row in held]
    flags = [FLAGS["code"] * (row[1] == "python") for row in held]
    select = [[row[2] for row in held], [1.0] * len(held), [row[1] for row in held], flags]
    return Texts(
        folder / "unit.parquet",
        attributes("select", SELECTED, select),
        attributes("redact", REDACTIONS, [named]),
        attributes("substring", SUBSTRING, [cuts]),
        header,
    )


def as_trained_on(row: Row, header: str) -> str:
    """By the definition, byte by byte."""
    found = bytearray()
    for at, byte in enumerate(row[0].encode()):
        found += b"".join(replacement(kind).encode() for start, _, kind in row[4] or [] if start == at)
        inside = [*(row[3] or []), *((a, b) for a, b, _ in row[4] or [])]
        found += b"" if any(a <= at < b for a, b in inside) else bytes([byte])
    return (header if found and row[1] == "python" else "") + found.decode()


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("header", [None, "# {repository}/{path} {{{language}}}\n"])
def test_every_kept_row_has_the_tokens_of_its_text_and_no_other_has_any(
    count: int, header: str | None, trained: Path, tmp_path: Path
) -> None:
    held = rows(count)
    counts = encode.encode(unit(tmp_path, held, header), trained, tmp_path / "out")
    tokens, lengths, sizes = (np.load(tmp_path / "out" / name) for name in encode.FILES)
    assert (tokens.dtype, lengths.dtype, sizes.dtype) == (np.uint16, np.int64, np.int64)
    assert len(lengths) == len(sizes) == count == counts["documents"]
    reference, ends = Tokenizer.load(trained), np.cumsum(lengths)
    for i, row in enumerate(held):
        of_row = tokens[ends[i] - lengths[i] : ends[i]].tolist()
        if row[2] is not None:
            assert lengths[i] == sizes[i] == 0
            continue
        repository = (row[5] or "").replace("\n", " ")
        text = as_trained_on(row, f"# {repository}/a/{i}.py {{{row[1]}}}\n" if header else "")
        assert of_row == [*reference.encode(text), reference.id.eos_id]
        assert sizes[i] == len(text.encode())
    kept = [row for row in held if row[2] is None]
    assert counts["kept"] == len(kept) and counts["tokens"] == len(tokens) == lengths.sum()
    assert counts["bytes"] == sizes.sum() and counts["bytes_in"] == sum(len(row[0].encode()) for row in held)
    assert counts.get("redacted", 0) == sum(len(row[4] or []) for row in kept)
    assert counts.get("cut_bytes", 0) == sum(b - a for row in kept for a, b in row[3] or [])
    assert counts.get("emptied", 0) == (count >= 2)


def test_tokens_and_bytes_are_counted_by_language(trained: Path, tmp_path: Path) -> None:
    held = rows(40)
    counts = encode.encode(unit(tmp_path, held), trained, tmp_path)
    lengths, sizes = np.load(tmp_path / "lengths.npy"), np.load(tmp_path / "bytes.npy")
    for name in ("en", "fr", "python"):
        of = np.array([row[1] == name for row in held])
        assert (counts[f"tokens/{name}"], counts[f"bytes/{name}"]) == (lengths[of].sum(), sizes[of].sum())


def test_the_same_documents_give_the_same_files(trained: Path, tmp_path: Path) -> None:
    texts = unit(tmp_path, rows(20), "{path}\n")
    for name in ("a", "b"):
        encode.encode(texts, trained, tmp_path / name)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(encode.FILES)
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in encode.FILES)


def test_a_vocabulary_beyond_65536_is_written_in_32_bits(trained: Path, tmp_path: Path) -> None:
    vocabulary = json.loads(trained.read_text())["model"]["vocab"]
    characters = {character: byte for byte, character in enumerate(tokenizer._byte_characters())}
    ranks = {bytes(characters[c] for c in token): i for token, i in vocabulary.items() if token != END_OF_TEXT}
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (tmp_path / "x.tiktoken").write_text("\n".join(lines))
    large = tokenizer.adopt(
        tmp_path / "x.tiktoken", tmp_path / "large.json", tokenizer.PATTERN, {END_OF_TEXT: 70_000, "<|fim|>": 65_535}
    )
    assert large.id.vocab_size == 70_001
    encode.encode(unit(tmp_path, rows(9)), tmp_path / "large.json", tmp_path / "out")
    tokens, lengths = np.load(tmp_path / "out" / "tokens.npy"), np.load(tmp_path / "out" / "lengths.npy")
    assert tokens.dtype == np.uint32
    assert (tokens[np.cumsum(lengths)[lengths > 0] - 1] == 70_000).all() and (tokens == 70_000).sum() == len(
        lengths[lengths > 0]
    )


def test_p7_spans_of_another_text_are_refused_and_nothing_is_written(trained: Path, tmp_path: Path) -> None:
    held = rows(30)
    held[25] = ("short", "en", None, [(2, 9)], None, None)
    with pytest.raises(Refusal, match=r"unit\.parquet: rows from 21: bytes 2 to 9 are no characters"):
        encode.encode(unit(tmp_path, held), trained, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "header",
    [
        "{path",
        "{url}",
        "{path.__class__}",
        "{}",
        "{0}",
        "{path:{x}}",
        "{path:d}",
        "{path:>9}",
        "{path!r}",
        "}",
        "{path!}",
    ],
)
def test_p7_a_header_that_names_or_formats_something_else_is_refused(header: str) -> None:
    with pytest.raises(Refusal, match=r"order\.header"):
        Texts(Path("a"), Path("b"), header=header)


def test_a_recipe_is_checked_for_its_header_without_what_makes_tokens() -> None:
    program = "import sys, dataio.header; print({'numba', 'tokenizers', 'pyarrow'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"set()\n"


def test_a_sample_is_by_id_and_nested_and_a_tokenizer_is_trained_on_it(trained: Path, tmp_path: Path) -> None:
    held = [(f"{text} {i}", "en", None, None, None, None) for i, text in enumerate(texts() * 4)]
    whole = unit(tmp_path, held)
    found: dict[float, list[str]] = {}
    for share in (0.0, 0.3, 0.6, 1.0):
        counts = encode.sample(whole, share, tmp_path / "sample.parquet")
        groups = documents.read_groups(tmp_path / "sample.parquet")
        found[share] = list(itertools.chain.from_iterable(group["text"].to_pylist() for group in groups))
        assert (counts["kept"], counts["documents"]) == (len(found[share]), len(held))
        expected = [row[0] for row in held if _number(row[0]) < share * 2**64]
        assert found[share] == expected
    assert found[0.0] == [] and len(found[1.0]) == len(held) and 30 < len(found[0.3]) < 90
    encode.train([tmp_path / "sample.parquet"] * 2, 320, tmp_path / "a.json")
    assert Tokenizer.load(tmp_path / "a.json").id.vocab_size == 320


def _number(text: str) -> int:
    return int.from_bytes(xxhash.xxh3_128_digest(text.encode())[:8], "big")
