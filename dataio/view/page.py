"""One HTML file to look through documents with: it opens from disk, loads nothing, and is small enough to send.

Everything that comes from data is in one block of JSON, of which the page's script makes text and nothing but text. The
page's policy lets that one script run, by its hash, and allows no other and no connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dataio.view.shown import DOCUMENT, decisions, one_line, origin, said, visible, why
from dataio.view.viewer import Dropped, Shown, Viewer
from dataio.view.workspace import TEXT, Member, Record
from stoker.files import write_atomic
from stoker.version import VERSION

#: Documents of each store, and of each reason to drop any.
SAMPLE, DROPPED = 200, 5
#: Tokens on a page, about 12 bytes each, and of one document at most.
PAGE_TOKENS, DOCUMENT_TOKENS = 400_000, 2000


def write_page(
    out: Path,
    viewers: Sequence[Viewer],
    sample: int = SAMPLE,
    dropped: int = DROPPED,
    language: str | None = None,
) -> Path:
    """Write a page of a sample of each store's documents and, where the workspace is there, of those that were dropped
    for each reason. The same stores give the same page."""
    chosen = [viewer.sample(sample, language) for viewer in viewers]
    tokens = min(DOCUMENT_TOKENS, PAGE_TOKENS // max(1, sum(map(len, chosen))))
    kept = [document for viewer, numbers in zip(viewers, chosen) for document in viewer.show(numbers, tokens)]
    gone = [document for viewer in viewers if language is None for document in viewer.dropped(dropped)]
    write_atomic(out, page(viewers, kept, gone))
    return out


def page(viewers: Sequence[Viewer], kept: Sequence[Shown], dropped: Sequence[Dropped]) -> bytes:
    """The page as a file."""
    data = {
        "stores": [_store(viewer) for viewer in viewers],
        "documents": [*map(_kept, kept), *map(_dropped, dropped)],
        "version": VERSION,
    }
    script = _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "style": _part("page.css"),
        "script": script,
        "data": _inert(data),
    }
    # In one pass: what replaces a mark is not looked through for others.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _part("page.html")).encode()


def _part(name: str) -> str:
    return (files("dataio.view") / name).read_text("utf-8")


def _inert(data: Any) -> str:
    """JSON in which no character ends an element of HTML, or begins one."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _store(viewer: Viewer) -> dict[str, Any]:
    store = viewer.store
    return {
        "source": one_line(store.source),
        "dataset": store.dataset_id[:12],
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "bytes": store.num_bytes,
        "vocabulary": store.tokenizer.vocab_size,
    }


def _kept(document: Shown) -> dict[str, Any]:
    facts = [
        ("from", origin(document)),
        ("weight", f"{document.weight:.4g}"),
        ("flags", ", ".join(document.flags)),
        ("targets", "none: masked" if document.masked else ""),
        *_facts(document.record),
    ]
    return {
        "source": one_line(document.source),
        "number": document.number,
        "id": document.id,
        "language": one_line(document.language or "unknown"),
        "start": document.start,
        "stop": document.stop,
        "bytes": document.num_bytes,
        "path": _path(document.record),
        "facts": [[name, one_line(value)] for name, value in facts if value],
        "why": one_line(why(document.record)) if document.record else "the workspace that made it is not here",
        "stages": decisions(document.record) if document.record else [],
        "copies": [_copy(member) for member in document.copies],
        "size": said(document.record.stages.get("near", {}).get("near_size")) if document.record else "–",
        "tokens": [list(piece.tokens) for piece in document.pieces],
        "texts": [visible(piece.text) for piece in document.pieces],
    }


def _dropped(document: Dropped) -> dict[str, Any]:
    record = document.record
    select = record.stages["select"]
    return {
        "source": one_line(record.source),
        "id": record.facts["id"].hex(),
        "language": one_line(str(select.get("language") or record.facts.get("language") or "unknown")),
        "bytes": record.facts.get("bytes"),
        "path": _path(record),
        "dropped": one_line(str(record.reason)),
        "facts": [
            ["from", one_line(origin(document) or "")],
            *([name, value] for name, value in _facts(record)),
        ],
        "why": one_line(why(record)),
        "stages": decisions(record),
        "copies": [_copy(member) for member in document.copies],
        "size": said(record.stages.get("near", {}).get("near_size")),
        "text": visible(record.text or ""),
        "cut": len(record.text or "") == TEXT,
    }


def _facts(record: Record | None) -> list[tuple[str, str]]:
    return [(name, said(record.facts[name])) for name in DOCUMENT if record and name in record.facts and name != "path"]


def _path(record: Record | None) -> str:
    return one_line(str(record.facts.get("path", ""))) if record else ""


def _copy(member: Member) -> dict[str, Any]:
    return {"source": one_line(member.source), "id": member.id, "path": one_line(member.path), "kept": member.kept}
