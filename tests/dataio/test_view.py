"""Looking at a store: every token with its text, its document, its file and row; and nothing that a text can act on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dataio import documents
from dataio.dedup.near import ATTRIBUTES
from dataio.documents import Document, ParquetFile, read_groups, write_documents
from dataio.selection import FLAGS, SELECTED
from dataio.store import Store, StoreWriter
from dataio.tokenizer import Tokenizer, train
from dataio.view import page as pages
from dataio.view.page import write_page
from dataio.view.shown import one_line, said, visible, why
from dataio.view.terminal import draw
from dataio.view.viewer import Viewer, pieces
from dataio.view.workspace import Workspace
from stoker.errors import Refusal
from tests.dataio import synthetic

#: What would act on a page, on a terminal or on a reader's eye.
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)> & &amp; &#60;b&#62; \"'`",
    "<!-- --><![CDATA[ ]]> {{data}} {{script}} </style></title>",
    "\x1b[2J\x1b]0;title\x07\x9b31m \x08\x7f\r",
    "safe‮txt.exe\u2028next​ zero\ufeff\U000e0041",
    "日本語のテキスト 👩\u200d👩\u200d👧 é́́ \x00 end",
    '{"json": "\\u003c", "a": [1, null]}\\',
]
TEXTS = [
    *(f"{text}\n" for text in HOSTILE),
    *(f"def function_{i}():\n\treturn {i}  # line\n" * 3 for i in range(40)),
]
DROPPED = {3: "prose.short", 11: "near.copy", 12: "near.copy", 13: "near.copy", 14: "near.copy", 20: "code.generated"}
CLUSTER = {row: b"\x07" * 16 for row in (10, 11, 12, 13, 14)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train(TEXTS, 300, path)
    return path


def made(number: int, text: str) -> Document:
    """From two input files; its names are as hostile as its text."""
    name = f"{number}/{HOSTILE[number % len(HOSTILE)]}"
    file, row = divmod(number, 30)
    return Document(text, "code", name, file, row, repository=name, language="python", metadata=json.dumps({"k": name}))


@pytest.fixture(scope="module")
def output(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a recipe would leave: two units, attributes of two stages, a store of what was kept in another order."""
    folder = tmp_path_factory.mktemp("output")
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    all_documents = [made(number, text) for number, text in enumerate(TEXTS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "GROUP_DOCUMENTS", 7)
        for unit, part in enumerate((range(25), range(25, len(TEXTS)))):
            path = folder / f"documents/code/{unit:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_documents(path, [all_documents[number] for number in part])
            near = [(CLUSTER.get(n), 5 if n in CLUSTER else 1, n not in CLUSTER or n == 10) for n in part]
            language = ["python"] * len(part)
            selected = [(DROPPED.get(n), 0.5 if n == 10 else 1.0, language[0], FLAGS["code"]) for n in part]
            beside(path, folder / f"attributes/near/code/{unit:05d}.parquet", ATTRIBUTES, near)
            beside(path, folder / f"attributes/select/code/{unit:05d}.parquet", SELECTED, selected)
    kept = [number for number in reversed(range(len(TEXTS))) if number not in DROPPED]
    write_store(folder / "stores/code", Tokenizer.load(tokenizer), [all_documents[number] for number in kept])
    return folder


def beside(path: Path, to: Path, schema: pa.Schema, rows: Sequence[Sequence[Any]]) -> None:
    at = 0
    with ParquetFile(to, schema) as file:
        for group in read_groups(path, ["id"]):
            columns = zip(*rows[at : at + group.num_rows])
            file.write(pa.table([pa.array(c, entry.type) for c, entry in zip(columns, schema)], schema=schema))
            at += group.num_rows


def write_store(path: Path, tokenizer: Tokenizer, held: Sequence[Document], rows: bool = True) -> Store:
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens, lengths = tokenizer.encode_batch([document.text for document in held])
    ids = np.frombuffer(b"".join(document.id for document in held), ">u8").reshape(-1, 2)
    with StoreWriter(path, "code", tokenizer.id) as writer:
        writer.append(
            tokens,
            lengths,
            np.array([document.bytes for document in held]),
            ids,
            source_row=np.array([(document.file, document.row) for document in held]) if rows else None,
            weight=np.array([0.5 if document.row == 10 and document.file == 0 else 1 for document in held]),
            languages=[document.language for document in held],
            flags=np.full(len(held), FLAGS["code"]),
        )
        return writer.commit(input_files=["s3://raw/a.jsonl.gz", HOSTILE[0]] if rows else [])


@given(st.text(max_size=40))
def test_the_pieces_of_a_text_are_the_text_and_hold_every_token(tokenizer: Path, text: str) -> None:
    inner = Tokenizer.load(tokenizer)
    tokens = inner.encode(text)
    found = list(pieces(inner.inner, tokens))
    assert "".join(piece.text for piece in found) == text
    assert [token for piece in found for token in piece.tokens] == tokens
    assert all(len(piece.tokens) == 1 for piece in found if piece.text.isascii())


def test_tokens_that_end_within_a_character_are_told(tokenizer: Path) -> None:
    inner = Tokenizer.load(tokenizer)
    tokens = inner.encode("a" + "\U0001f40d")
    found = list(pieces(inner.inner, tokens[:-1]))
    assert found[-1].text == "\ufffd" and [t for piece in found for t in piece.tokens] == tokens[:-1]


def test_every_token_leads_to_its_document_its_file_and_its_row(output: Path) -> None:
    viewer = Viewer.open(output / "stores/code")
    store = viewer.store
    for position in (0, 1, 500, store.num_tokens - 1, *store.doc_offsets[1:4].tolist()):
        (shown,) = viewer.show([viewer.at(position)], tokens=10**6)
        assert shown.start <= position < shown.stop
        assert shown.record is not None and shown.row is not None
        number = int(shown.record.facts["path"].partition("/")[0])
        assert "".join(piece.text for piece in shown.pieces) == TEXTS[number] + "<|endoftext|>"
        assert shown.num_pieced == shown.stop - shown.start
        assert shown.id == made(number, TEXTS[number]).id.hex()
        assert (["s3://raw/a.jsonl.gz", HOSTILE[0]].index(str(shown.input_file)), shown.row) == divmod(number, 30)
        assert shown.record.place == ("code", f"{number >= 25:05d}", number if number < 25 else number - 25)
        assert shown.language == "python" and shown.flags == ("code",) and shown.weight == (0.5 if number == 10 else 1)
        assert why(shown.record) == "kept: near had nothing against it"
    for position in (-1, store.num_tokens):
        with pytest.raises(Refusal, match=rf"has tokens 0 to {store.num_tokens - 1}: {position} is none"):
            viewer.at(position)


def test_a_document_is_shown_with_the_other_members_of_its_cluster(output: Path) -> None:
    viewer = Viewer.open(output / "stores/code")
    (number,) = viewer.with_id(made(10, TEXTS[10]).id.hex())
    (shown,) = viewer.show([number])
    assert [(copy.row, copy.kept) for copy in shown.copies] == [(row, False) for row in (11, 12, 13, 14)]
    assert [copy.id for copy in shown.copies] == [made(row, TEXTS[row]).id.hex() for row in (11, 12, 13, 14)]
    assert viewer.show([number], copies=False)[0].copies == ()


def test_documents_are_found_by_the_beginning_of_their_id(output: Path) -> None:
    viewer = Viewer.open(output / "stores/code")
    ids = [f"{int(high):016x}{int(low):016x}" for high, low in viewer.store.doc_id]
    for length in (1, 2, 15, 16, 17, 32):
        prefix = ids[5][:length]
        assert viewer.with_id(prefix.upper()) == [n for n, name in enumerate(ids) if name.startswith(prefix)]
    assert viewer.with_id("0" * 32) == []
    for wrong in ("", "xyz", "0" * 33, "-1"):
        with pytest.raises(Refusal, match="1 to 32 hexadecimal digits"):
            viewer.with_id(wrong)


def test_a_sample_is_even_and_of_one_language_if_asked(output: Path) -> None:
    viewer = Viewer.open(output / "stores/code")
    last = viewer.store.num_documents - 1
    assert viewer.sample(3) == [0, last // 2, last] or viewer.sample(3) == [0, last // 2 + 1, last]
    assert viewer.sample(10**9) == viewer.sample(10**9, "python") == list(range(last + 1))
    with pytest.raises(Refusal, match="has no cobol: its languages are python"):
        viewer.sample(3, "cobol")


def test_dropped_documents_are_chosen_by_their_ids_and_the_most_frequent_reason_is_first(output: Path) -> None:
    found = Workspace(output).dropped("code", 2)
    copies = sorted(made(row, TEXTS[row]).id for row, reason in DROPPED.items() if reason == "near.copy")[:2]
    assert [record.reason for record in found] == ["near.copy", "near.copy", "code.generated", "prose.short"]
    assert [record.facts["id"] for record in found[:2]] == copies
    assert found[3].text == TEXTS[3]


def test_a_store_without_rows_or_workspace_is_shown_with_what_is_known(
    output: Path, tokenizer: Path, tmp_path: Path
) -> None:
    held = [made(number, TEXTS[number]) for number in (9, 30)]
    write_store(tmp_path / "code", Tokenizer.load(tokenizer), held, rows=False)
    for workspace, known in ((None, False), (output, True)):
        shown = Viewer.open(tmp_path / "code", tokenizer, workspace).show([0, 1])
        assert [document.record is not None for document in shown] == [known, known]
        assert [document.row for document in shown] == [None, None]
    assert shown[1].record is not None and shown[1].record.place == ("code", "00001", 5)
    with pytest.raises(Refusal, match=r"the tokenizer of .* is not in a folder above"):
        Viewer.open(tmp_path / "code")
    with pytest.raises(Refusal, match="no prepared documents here"):
        Viewer.open(tmp_path / "code", tokenizer, tmp_path)


def test_attributes_of_other_rows_are_refused_by_name(output: Path, tmp_path: Path) -> None:
    shutil.copytree(output, tmp_path / "copy")
    near = tmp_path / "copy/attributes/near/code"
    shutil.copy(near / "00001.parquet", near / "00000.parquet")
    viewer = Viewer.open(tmp_path / "copy/stores/code")
    with pytest.raises(Refusal, match=r"near/code/00000\.parquet: its rows are not those of its documents"):
        viewer.show(viewer.sample(99))
    (near / "00000.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(Refusal, match=r"near/code/00000\.parquet: cannot be read"):
        viewer.show(viewer.sample(99))


def test_a_store_without_a_tokenizer_of_its_hash_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    synthetic.store(tmp_path / "other", [[1, 2, 3]])
    with pytest.raises(Refusal, match="give its path"):
        Viewer.open(tmp_path / "other", tokenizer)


class _Elements(HTMLParser):
    """Elements and attributes of a page, as another parser finds them, and what is in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts.append(data)


@pytest.fixture
def made_page(output: Path, tmp_path: Path) -> str:
    write_page(tmp_path / "page.html", [Viewer.open(output / "stores/code")])
    return (tmp_path / "page.html").read_text("utf-8")


def test_nothing_in_the_data_becomes_markup_or_a_script_of_the_page(made_page: str) -> None:
    """The page of hostile texts has the elements of an empty page, and its data block holds every text."""
    empty = pages.page([], [], []).decode()
    page, nothing = _Elements(made_page), _Elements(empty)
    assert page.tags == nothing.tags and page.attributes == nothing.attributes
    assert len(page.scripts) == 2 and page.scripts[1] == nothing.scripts[1]
    assert not re.search("[<>&\u2028\u202e\x1b]", page.scripts[0])
    data = json.loads(page.scripts[0])
    shown = {document["id"]: document for document in data["documents"]}
    for number, text in enumerate(TEXTS):
        found = shown.pop(made(number, text).id.hex())
        if number in DROPPED:
            assert found["dropped"] == DROPPED[number] and found["text"] == visible(text)
            assert f"s3://raw/a.jsonl.gz, record {number};" in found["facts"][0][1]
        else:
            assert "".join(found["texts"]) == visible(text + "<|endoftext|>")
    assert not shown
    for sink in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "srcdoc", "http"):
        assert sink not in page.scripts[1], sink


def test_a_page_is_bounded_and_says_what_it_left_out(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "PAGE_TOKENS", 120)
    write_page(tmp_path / "small.html", [Viewer.open(output / "stores/code")], sample=6, dropped=1)
    data = json.loads(_Elements((tmp_path / "small.html").read_text()).scripts[0])
    kept = [document for document in data["documents"] if "tokens" in document]
    assert len(kept) == 6 and all(sum(map(len, document["tokens"])) <= 20 for document in kept)
    assert len(data["documents"]) == 6 + len({*DROPPED.values()})


def test_the_same_stores_give_the_same_page(output: Path, tmp_path: Path) -> None:
    first, second = (
        write_page(tmp_path / name, [Viewer.open(output / "stores/code")]).read_bytes() for name in ("a.html", "b.html")
    )
    assert first == second


@pytest.mark.parametrize("colour", ["truecolor", None])
def test_a_terminal_gets_no_character_that_acts(output: Path, colour: Any) -> None:
    viewer = Viewer.open(output / "stores/code")
    to = StringIO()
    console = Console(file=to, force_terminal=colour is not None, color_system=colour, width=100)
    draw(viewer.show(viewer.sample(99)), console)
    said_by_rich = re.sub(r"\x1b\[[0-9;]*m", "", to.getvalue())
    assert visible(said_by_rich) == said_by_rich
    assert (said_by_rich == to.getvalue()) == (colour is None)
    assert (
        "⟨U+001B⟩[2J" in said_by_rich and "⟨U+202E⟩" in said_by_rich and "s3://raw/a.jsonl.gz, record 7" in said_by_rich
    )


def test_a_document_that_is_cut_off_is_told_in_a_terminal(output: Path) -> None:
    viewer, to = Viewer.open(output / "stores/code"), StringIO()
    (shown,) = viewer.show([0], tokens=5)
    draw([replace(shown, source="[bold]markup[/bold]")], Console(file=to, width=100))
    assert f"… and {shown.stop - shown.start - 5:,} tokens more" in to.getvalue()
    assert "[bold]markup[/bold] 0" in to.getvalue()


def test_values_are_one_line_and_bounded() -> None:
    for value in ("x" * 10**6, "a\nb\tc\x1b", b"\x00" * 500, [{"start": 1, "stop": 2}] * 10**4, float("nan"), 1 << 80):
        text = said(value)
        assert "\n" not in text and len(text) <= 8 * 240 and visible(text) == text
    assert one_line("a\nb", 2) == "a…" and one_line("ab", 2) == "ab"
