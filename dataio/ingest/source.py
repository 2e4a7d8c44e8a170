"""A source: where raw documents lie, how they are cut into units of work, and how a unit becomes a document file.

    for unit in units(source, recipe_folder):
        ingest(source, unit, documents, quarantine, lineage)

Memory of a unit is bounded by the document in hand and the row group being written, whatever its files hold: 180 MiB
were measured at the default `max_document_bytes` and documents of that size.
"""

from __future__ import annotations

import logging
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dataio import languages
from dataio.documents import Document, write_documents
from dataio.ingest import archive, html, jsonl, listing, parquet, tree, warc
from dataio.ingest.git import checkout, tracked
from dataio.ingest.options import Kind, Source
from dataio.ingest.quarantine import Quarantine
from dataio.ingest.records import Malformed, Outcome, Record, Skipped, checked, printable
from dataio.ingest.repositories import Repositories, Repository
from dataio.ingest.streams import Damaged, Hashed, expanded, local, opened
from dataio.stages import Counts, content_hash
from stoker import canonical
from stoker.errors import Refusal
from stoker.files import write_atomic

_log = logging.getLogger(__name__)

#: Changes when the same files would give other documents.
VERSION = 2
#: Files of one unit at most: its manifest names each of them.
_UNIT_FILES = 10_000


@dataclass(frozen=True, slots=True)
class InputFile:
    """`number`: in its source. `stamp`: changes when the contents do. `path`: within its root."""

    number: int
    url: str
    size: int
    stamp: str
    path: str
    kind: Kind
    repository: Repository | None = None


@dataclass(frozen=True)
class Unit:
    """What one task reads: a large file, or a run of small ones, numbered one after another."""

    number: int
    files: tuple[InputFile, ...]

    def inputs(self) -> dict[str, str]:
        """{what decides the documents: its stamp}: files, their numbers and paths, what was found out about their
        repositories, and what reads pages."""
        found = {file.url: file.stamp for file in self.files}
        found["first_file"] = str(self.files[0].number)
        found["paths"] = canonical.sha256([printable(file.path) for file in self.files])
        repositories = {file.repository for file in self.files if file.repository}
        if repositories:
            found["repositories"] = canonical.sha256(sorted(canonical.dumps(asdict(each)) for each in repositories))
        if any(file.kind in ("warc", "archive") or languages.of_path(file.path) == "html" for file in self.files):
            found["html"] = html.extractor()
        return found


def units(source: Source, base: Path) -> list[Unit]:
    """All that is to be read, cut into units; the same for the same files, in the order of `paths` and then of names.
    `base`: the folder that relative paths start from. Refuses a path that names nothing, or nothing that is wanted."""
    files: list[InputFile] = []
    seen: set[str] = set()
    for path in source.paths:
        before = len(files)
        for root in listing.roots(path, base):
            for file in _wanted(source, root):
                if file.url not in seen:
                    seen.add(file.url)
                    files.append(replace(file, number=len(files)))
        if len(files) == before:
            raise Refusal(
                f"source {source.name}: {path} holds no file that format {source.format}, include and exclude leave "
                "and no path before it named; correct them, or remove the path"
            )
    return [Unit(number, tuple(run)) for number, run in enumerate(_runs(files, source.unit_bytes))]


def contains(source: Source, base: Path, folder: Path) -> bool:
    """Whether files in `folder`, which need not be there yet, may be read as the source's own, whatever its format and
    `exclude` leave out. Local paths only."""
    return any(listing.reaches(path, base, folder) for path in source.paths)


def _wanted(source: Source, root: listing.Root) -> Iterator[InputFile]:
    """The files of a root that are to be read."""
    rule = source.rule("file")
    checkouts, listed = _checkouts(root) if rule == "git" else ({}, {})
    paths = [entry.path for entry in root.entries]
    repositories = Repositories(rule, root.name, paths, root.read, checkouts)
    for entry in root.entries:
        kind = source.kind(entry.path)
        if kind is None:
            continue
        repository = repositories.of(entry.path) if kind == "file" else None
        if source.format == "git" and repository is None:
            continue  # beside the checkouts
        names = listed.get(repository.folder) if repository else None
        if repository and names is not None and entry.path.removeprefix(repository.folder) not in names:
            continue
        yield InputFile(0, entry.url, entry.size, entry.stamp, entry.path, kind, repository)


def _checkouts(root: listing.Root) -> tuple[dict[str, Repository], dict[str, frozenset[str]]]:
    """The git checkouts in a root, by folder, and the files that each tracks, where its index can be read."""
    found: dict[str, Repository] = {}
    listed: dict[str, frozenset[str]] = {}
    for folder in root.checkouts:
        repository = checkout(Path(root.url, folder))
        if repository is not None:
            found[folder] = replace(repository, folder=folder)
            names = tracked(Path(root.url, folder))
            if names is None:
                _log.warning(
                    "%s: its index cannot be read; files that git does not track are taken too", repository.name
                )
            else:
                listed[folder] = names
    return found, listed


def _runs(files: Sequence[InputFile], unit_bytes: int) -> Iterator[list[InputFile]]:
    """Consecutive files of at most `unit_bytes` together; a larger file is alone."""
    run: list[InputFile] = []
    size = 0
    for file in files:
        if run and (size + file.size > unit_bytes or len(run) == _UNIT_FILES):
            yield run
            run, size = [], 0
        run.append(file)
        size += file.size
    if run:
        yield run


def ingest(source: Source, unit: Unit, out: Path, quarantine: Path, lineage: Path) -> Counts:
    """Write the documents of a unit, samples of what is malformed (``quarantine.py``), and what was read, as JSON
    {url: [bytes, xxh3-128 of the contents]}.

    Counts: documents, bytes_in (as stored), bytes_out (text), malformed.<kind>, skipped.<kind>. Refuses a file that
    cannot be opened, or has changed since it was listed; anything else wrong with one is counted.
    """
    reading = _Reading(source, out.parent)
    documents = write_documents(out, reading.documents(unit))
    for path, text in ((quarantine, reading.quarantine.text()), (lineage, canonical.dumps(reading.lineage))):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    counts = {**reading.counts, **reading.quarantine.counts}
    bytes_in = sum(size for size, _ in reading.lineage.values())
    return {
        "documents": documents,
        "bytes_in": bytes_in,
        "bytes_out": reading.bytes_out,
        **dict(sorted(counts.items())),
    }


class _Reading:
    """One pass over the files of a unit, and what was met on the way."""

    def __init__(self, source: Source, scratch: Path) -> None:
        self.source, self.scratch = source, scratch
        self.quarantine, self.counts = Quarantine(), Counter[str]()
        self.lineage: dict[str, tuple[int, str]] = {}
        self.bytes_out = 0

    def documents(self, unit: Unit) -> Iterator[Document]:
        for file in unit.files:
            for outcome in self._outcomes(file):
                document = self._document(file, outcome) if isinstance(outcome, Record) else outcome
                if isinstance(document, Malformed):
                    self.quarantine.add(file.url, document)
                elif isinstance(document, Skipped):
                    self.counts[f"skipped.{document.why}"] += 1
                else:
                    yield document

    def _outcomes(self, file: InputFile) -> Iterator[Outcome]:
        """What the reader of the file's kind yields; damage ends the file, not the unit."""
        if file.kind in ("parquet", "archive"):
            with local(file.url, self.scratch) as path:
                self._note(file, path.stat().st_size, content_hash(path))
                yield from _to_the_damage(self._in_place(file, path))
        else:
            with opened(file.url) as raw:
                yield from _to_the_damage(self._in_order(file, raw))
                self._note(file, *raw.finish())

    def _in_place(self, file: InputFile, path: Path) -> Iterator[Outcome]:
        source = self.source
        if file.kind == "parquet":
            return parquet.read(path, source.fields)
        name = tree.uncompressed_name(posixpath.basename(file.path))
        name = name.removesuffix(posixpath.splitext(name)[1])
        return archive.read(
            path, name, source.rule("archive"), source.takes_member, source.extracts_html, source.max_document_bytes
        )

    def _in_order(self, file: InputFile, raw: Hashed) -> Iterator[Outcome]:
        stream, most = expanded(raw), self.source.max_document_bytes
        if file.kind == "jsonl":
            yield from jsonl.read(stream, self.source.fields, most)
        elif file.kind == "warc":
            yield from warc.read(stream, most)
        else:
            data = stream.read(most + 1)
            yield tree.document(0, data, file.path, file.repository, self.source.extracts_html, most)

    def _document(self, file: InputFile, record: Record) -> Document | Malformed | Skipped:
        found = checked(record, self.source.max_document_bytes)
        if not isinstance(found, tuple):
            return found
        text, size = found
        self.bytes_out += size
        return Document(
            text,
            self.source.name,
            record.path or printable(file.path),
            file.number,
            record.row,
            repository=record.repository,
            revision=record.revision,
            language=record.language or self.source.language,
            licence=record.licence or self.source.licence,
            timestamp=record.timestamp,
            metadata=record.metadata,
        )

    def _note(self, file: InputFile, size: int, contents: str) -> None:
        if size != file.size:
            raise Refusal(f"{file.url}: has {size} bytes and had {file.size} when it was listed; run the command again")
        self.lineage[file.url] = (size, contents)


def _to_the_damage(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    try:
        yield from outcomes
    except Damaged as damage:
        yield Malformed(None, damage.why, b"", str(damage)[:200])
