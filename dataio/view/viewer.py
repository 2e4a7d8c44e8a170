"""What is known of a document of a store: its tokens, and from the workspace that made it, origin, decisions, copies.

viewer = Viewer.open("out/stores/code")
for document in viewer.show(viewer.sample(20)): ...
viewer.show([viewer.at(123_456)])               from a token to the document, its file and its record
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream

from dataio.selection import FLAGS
from dataio.store import Store
from dataio.tokenizer import Tokenizer
from dataio.view.workspace import Member, Record, Workspace, with_copies
from stoker.errors import Refusal
from stoker.hashing import sha256_file

#: Tokens of a document that are shown, unless asked for more.
TOKENS = 1000


@dataclass(frozen=True)
class Piece:
    """The least run of tokens that is text by itself: one token, or several that share a character's bytes."""

    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Shown:
    """A document of a store. Tokens are [start, stop) of the store, of which `pieces` holds the first; `record` is what
    the workspace knows, None where there is none or the document is not in it."""

    source: str
    number: int
    start: int
    stop: int
    num_bytes: int
    id: str
    language: str | None
    weight: float
    flags: tuple[str, ...]
    masked: bool
    input_file: str | None
    row: int | None
    pieces: tuple[Piece, ...]
    record: Record | None = None
    copies: tuple[Member, ...] = field(default=())

    @property
    def num_pieced(self) -> int:
        """Tokens in `pieces`."""
        return sum(len(piece.tokens) for piece in self.pieces)


@dataclass(frozen=True)
class Dropped:
    """A document that was not kept: what the workspace knows of it, where it comes from, others of its cluster."""

    record: Record
    input_file: str | None
    row: int
    copies: tuple[Member, ...]


class Viewer:
    """A store with its tokenizer and, where it is there, the workspace it was made in."""

    def __init__(self, store: Store, tokenizer: Tokenizer, workspace: Workspace | None) -> None:
        self.store, self.tokenizer, self.workspace = store, tokenizer, workspace

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | None = None,
        workspace: str | os.PathLike[str] | None = None,
    ) -> Viewer:
        """Tokenizer and workspace are those given, or what lies beside the store or above it; without a workspace less
        is known. Refuses what is not a store, its tokenizer, or a workspace."""
        store = Store.open(path)
        place = _workspace_of(store.path) if workspace is None else Path(workspace)
        return cls(store, _tokenizer_of(store, tokenizer), None if place is None else Workspace(place))

    def at(self, position: int) -> int:
        """Number of the document that holds a token. Refuses a position outside the store."""
        if not 0 <= position < self.store.num_tokens:
            raise Refusal(f"{self.store.path} has tokens 0 to {self.store.num_tokens - 1}: {position} is none of them")
        return int(self.store.document_of(np.array([position]))[0])

    def sample(self, count: int, language: str | None = None) -> list[int]:
        """Numbers of `count` documents, or of all where there are fewer, evenly over the store. Refuses a language
        that the store has not."""
        count = min(count, self.store.num_documents)
        if language is None:
            return _evenly(self.store.num_documents, count).tolist()
        languages = self.store.languages
        if language not in languages:
            raise Refusal(f"{self.store.path} has no {language}: its languages are {', '.join(languages) or 'unknown'}")
        numbers = np.flatnonzero(self.store.doc_lang == languages.index(language))
        return numbers[_evenly(len(numbers), count)].tolist()

    def with_id(self, prefix: str) -> list[int]:
        """Numbers of the documents whose id begins with these hexadecimal digits. Refuses what is none."""
        digits = prefix.lower()
        if not digits or len(digits) > 32 or set(digits) - set("0123456789abcdef"):
            raise Refusal(f"{prefix!r} is not the beginning of an id: 1 to 32 hexadecimal digits")
        low, high = (int(digits.ljust(32, fill), 16) for fill in "0f")
        ids, words = self.store.doc_id, np.array([low >> 64, high >> 64], np.uint64)
        found = np.flatnonzero((ids[:, 0] >= words[0]) & (ids[:, 0] <= words[1]))
        return [number for number in found.tolist() if len(digits) <= 16 or low <= self._id(number) <= high]

    def show(self, numbers: Sequence[int], tokens: int = TOKENS, copies: bool = True) -> list[Shown]:
        """All that is known of documents, by their numbers, with at most `tokens` tokens of each. With `copies`, other
        members of their clusters of near-duplicates: that reads a column of all attribute files."""
        records = self._records(numbers)
        clustered = with_copies(self.workspace, [*records.values()]) if self.workspace and copies else []
        others = {record.place: members for record, members in clustered}
        return [
            self._shown(number, tokens, record, others.get(record.place, ()) if record else ())
            for number in numbers
            for record in [records.get(number)]
        ]

    def dropped(self, of_each: int) -> list[Dropped]:
        """Documents of this source that were not kept, `of_each` of every reason; see ``Workspace.dropped``."""
        if self.workspace is None:
            return []
        records = with_copies(self.workspace, self.workspace.dropped(self.store.source, of_each))
        return [
            Dropped(record, self._input_file(record.facts["file"]), record.facts["row"], tuple(copies))
            for record, copies in records
        ]

    def _input_file(self, number: int) -> str | None:
        names = self.store.input_files
        return names[number] if 0 <= number < len(names) else None

    def _shown(self, number: int, tokens: int, record: Record | None, copies: Sequence[Member]) -> Shown:
        store = self.store
        start, stop = (int(offset) for offset in store.arrays["doc_offsets"].rows(number, number + 2))
        file, row = self._row("doc_source_row", number).tolist()
        bits = int(self._row("doc_flags", number))
        return Shown(
            source=store.source,
            number=number,
            start=start,
            stop=stop,
            num_bytes=int(self._row("doc_bytes", number)),
            id=f"{self._id(number):032x}",
            language=store.language(number),
            weight=float(self._row("doc_weight", number)),
            flags=tuple(name for name, bit in FLAGS.items() if bits & bit),
            masked=bool(self._row("doc_masked", number)),
            input_file=self._input_file(file),
            row=row if row >= 0 else None,
            pieces=tuple(pieces(self.tokenizer.inner, store.read(start, min(stop, start + tokens)).tolist())),
            record=record,
            copies=tuple(copies),
        )

    def _records(self, numbers: Sequence[int]) -> dict[int, Record]:
        if self.workspace is None:
            return {}
        source = self.store.source
        rows = {number: _pair(self._row("doc_source_row", number)) for number in numbers}
        known = {pair: number for number, pair in rows.items() if pair[0] >= 0}
        others = {_pair(self._row("doc_id", number)): number for number, pair in rows.items() if pair[0] < 0}
        found = {known[pair]: record for pair, record in self.workspace.at_rows(source, known).items()}
        return found | {others[pair]: record for pair, record in self.workspace.with_ids(source, others).items()}

    def _id(self, number: int) -> int:
        high, low = _pair(self._row("doc_id", number))
        return high << 64 | low

    def _row(self, name: str, number: int) -> Any:
        """A document's value in a side array: no more of the array is read, however many documents there are."""
        return self.store.arrays[name].rows(number, number + 1)[0]


def _pair(values: NDArray[Any]) -> tuple[int, int]:
    first, second = values.tolist()
    return first, second


def _evenly(total: int, count: int) -> NDArray[np.int64]:
    """`count` of the numbers up to `total`, or all, evenly."""
    return np.linspace(0, max(0, total - 1), min(count, total)).round().astype(np.int64)


def pieces(tokenizer: tokenizers.Tokenizer, tokens: Iterable[int]) -> Iterator[Piece]:
    """Tokens with the text of each, joined where only several together are text. What is left over at the end, since
    tokens were cut off within a character, is U+FFFD."""
    stream, held = DecodeStream(skip_special_tokens=False), list[int]()
    for token in tokens:
        held.append(token)
        text = stream.step(tokenizer, token)
        if text is not None:
            yield Piece(tuple(held), text)
            held = []
    if held:
        yield Piece(tuple(held), "\ufffd")


def _workspace_of(store: Path) -> Path | None:
    """The workspace of a store in its ``stores``, as ``stoker data prepare`` leaves it."""
    folder = store.absolute().parent.parent
    return folder if store.absolute().parent.name == "stores" and (folder / "documents").is_dir() else None


def _tokenizer_of(store: Store, given: str | os.PathLike[str] | None) -> Tokenizer:
    """The tokenizer that a store was made with: the one given, or of that name and hash beside it or above."""
    folders = (store.path, *store.path.absolute().parents)
    for place in [Path(given)] if given else [folder / "tokenizer.json" for folder in folders]:
        if place.is_file() and sha256_file(place) == store.tokenizer.sha256:
            return Tokenizer.load(place)
    where = given or f"in a folder above {store.path}"
    raise Refusal(f"the tokenizer of {store.path} ({store.tokenizer.sha256[:12]}) is not {where}: give its path")
