"""What a recipe says of a source: where it lies, how it is read, and which of its files are documents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from dataio import languages
from dataio.ingest import listing, tree
from dataio.ingest.fields import Fields, Strings
from dataio.ingest.repositories import Rule
from stoker.sections import Section

Format = Literal["auto", "jsonl", "parquet", "warc", "text", "code", "git", "archive"]
Kind = Literal["jsonl", "parquet", "warc", "file", "archive"]

_ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".warc": "warc",
    ".wet": "warc",
    ".tar": "archive",
    ".tgz": "archive",
    ".tbz2": "archive",
    ".txz": "archive",
    ".zip": "archive",
    ".whl": "archive",
    ".crate": "archive",
}


class Source(Section):
    """One corpus. A file that no format or pattern takes is left out; links are not followed."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", description="names folders and what is drawn from")
    format: Format = Field(
        default="auto",
        description="auto: by each file's name. text: files of prose. code: files of prose and of code. git: the same, "
        "of those that a checkout tracks. The others: every file is one of records, or an archive of files",
    )
    paths: Strings = Field(min_length=1, description="folders, files, patterns (**) and URLs, in this order")
    fields: Fields = Field(default=Fields(), description="keys of JSON lines and columns of Parquet files")
    language: str | None = Field(default=None, description="of documents that state none, and whose name tells none")
    licence: str | None = Field(default=None, description="SPDX expression for documents that state none")
    include: Strings = Field(default=(), description="patterns of paths to take, in place of what the format takes")
    exclude: Strings = Field(default=(), description="patterns of paths to leave out; in archives too")
    repository: Rule | None = Field(
        default=None,
        description="what a repository is; null: git for git, root for archives, nearest for code, else none",
    )
    html: Literal["text", "source"] | None = Field(
        default=None,
        description="whether a page becomes its text or stays as it is; null: source in code, git and archives",
    )
    max_document_bytes: int = Field(
        default=8 << 20, ge=1, le=1 << 28, description="bytes; longer documents are skipped"
    )
    max_malformed: float = Field(default=0.01, ge=0, le=1, description="share of records that may be malformed")
    unit_bytes: int = Field(default=64 << 20, ge=1, description="bytes of small files that make a unit")

    @field_validator("paths")
    @classmethod
    def _named_and_without_password(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if not path.strip():
                raise ValueError('an empty path names nothing; write "." for the folder that paths start from')
            if "://" in path and "@" in path.split("://")[1].split("/")[0]:
                raise ValueError("a URL may hold no user or password, which would be written beside the documents")
        return paths

    def kind(self, path: str) -> Kind | None:
        """How a file is read, by its path; None if it is not."""
        if self._excluded(path):
            return None
        if self.format == "archive":
            return "archive"  # what to include is said of its members
        if self.include and not self._included(path):
            return None
        if self.format == "auto":
            return _kind_of(path) or ("file" if self.include else None)
        if self.format in ("jsonl", "parquet", "warc"):
            return self.format  # type: ignore[return-value]  # a Format that is a Kind
        return "file" if self.include or self._is_document(path) else None

    def takes_member(self, path: str) -> bool:
        """Whether a file in an archive is a document."""
        if self._excluded(path):
            return False
        chosen = self.format == "archive" and self.include
        return self._included(path) if chosen else languages.of_path(path) is not None

    def rule(self, kind: Kind) -> Rule:
        """What a repository is in files of a kind."""
        if self.repository is not None:
            return self.repository
        if kind == "archive":
            return "root"
        rules: dict[str, Rule] = {"git": "git", "code": "nearest"}
        return rules.get(self.format, "none")

    @property
    def extracts_html(self) -> bool:
        if self.html is not None:
            return self.html == "text"
        return self.format not in ("code", "git", "archive")

    def _is_document(self, path: str) -> bool:
        language = languages.of_path(tree.uncompressed_name(path))
        return language is not None if self.format in ("code", "git") else language in languages.PROSE

    def _included(self, path: str) -> bool:
        return listing.matches(self.include, path)

    def _excluded(self, path: str) -> bool:
        return listing.matches(self.exclude, path)


def _kind_of(path: str) -> Kind | None:
    name = path.rsplit("/", 1)[-1].lower()
    plain = tree.uncompressed_name(name)
    if plain != name and plain.endswith(".json"):
        return "jsonl"  # what is worth compressing is a file of records
    ending = plain[plain.rfind(".") :] if "." in plain else ""
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    return "file" if languages.of_path(plain) else None
