"""Files that are one document each: of text and code trees, of checkouts, and members of archives."""

from __future__ import annotations

import posixpath

from dataio import languages
from dataio.ingest import html
from dataio.ingest.records import Malformed, Outcome, Record, Skipped, printable, text_of
from dataio.ingest.repositories import Repository

_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")


def uncompressed_name(path: str) -> str:
    """A path without the ending that says how the file is compressed."""
    stem, ending = posixpath.splitext(path)
    return stem if ending.lower() in _COMPRESSED else path


def document(
    row: int, data: bytes, path: str, repository: Repository | None, extract_html: bool, max_bytes: int
) -> Outcome:
    """The document of a file's first `max_bytes` + 1 bytes. `path`: within its root; the document's is within its
    repository. With `extract_html` a page becomes its text; else it stays what its author wrote."""
    if len(data) > max_bytes:
        return Skipped("too_long")
    language = languages.of_path(uncompressed_name(path))
    text: str | Malformed | Skipped
    if extract_html and language == "html":
        text = html.text_of(row, data)
    else:
        text = text_of(row, data)
    if not isinstance(text, str):
        return text
    shown = printable(path)
    if repository is None:
        return Record(row, text, path=shown, language=language)
    return Record(
        row,
        text,
        path=shown.removeprefix(repository.folder),
        language=language,
        licence=repository.licence,
        repository=repository.name,
        revision=repository.revision,
    )
