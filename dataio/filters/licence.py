"""Which documents may be used: a file's own header first, and where it states nothing what its source states."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from dataio.documents import ParquetFile, read_groups
from dataio.filters.rules import utf8
from dataio.languages import is_code
from dataio.licences import PERMISSIVE, normalise, permissive, stated
from dataio.licences.expressions import names
from dataio.licences.headers import HEAD_CHARACTERS
from dataio.stages import Counts
from stoker.sections import Section

VERSION = 1
SCHEMA = pa.schema([pa.field("licence_header", pa.string())])  # SPDX expression of the first lines; null: none stated
COLUMNS = ("language", "licence")
MEASURED: frozenset[str] = frozenset()
#: What is read of a text: a character of UTF-8 has four bytes at most.
_HEAD_BYTES = 4 * HEAD_CHARACTERS


class Options(Section):
    """The policy. Changing it measures nothing again."""

    allowed: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """SPDX identifiers of licences that may be used, with or without exceptions; None: `licences.PERMISSIVE`."""
    denied: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Of those allowed, identifiers that may not be used all the same."""
    unknown_code: Literal["drop", "keep"] = "drop"
    """Code of which no licence is known: it is nobody's to use."""
    unknown_prose: Literal["drop", "keep"] = "keep"
    """Prose of which no licence is known, as nearly all of the web."""

    @field_validator("allowed", "denied")
    @classmethod
    def _identifiers(cls, said: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if said is None:
            return None
        found = {name: normalise(name) for name in said}
        wrong = [name for name, known in found.items() if known is None or len(names(known)) != 1]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: not one licence; give an SPDX identifier, https://spdx.org/licenses")
        return tuple(known for known in found.values() if known is not None)


def measure(documents: Path, attributes: Path, options: Options) -> Counts:
    """Write what the first lines of every document state as its licence."""
    count = size = found = 0
    with ParquetFile(attributes, SCHEMA) as file:
        for group in read_groups(documents, ["text"]):
            content, starts = utf8(group["text"])
            heads = zip(starts[:-1].tolist(), np.minimum(starts[1:], starts[:-1] + _HEAD_BYTES).tolist())
            headers = [stated(content[start:stop].tobytes().decode("utf-8", "ignore")) for start, stop in heads]
            file.write(pa.table([pa.array(headers, pa.string())], schema=SCHEMA))
            count += group.num_rows
            size += int(starts[-1])
            found += group.num_rows - headers.count(None)
    return {"documents": count, "stated": found, "bytes_in": size}


def judge(table: pa.Table, options: Options) -> list[str | None]:
    """``licence_unknown`` where none is stated and the kind of document needs one; ``licence_not_allowed`` where the
    policy leaves no way to use it."""
    allowed = frozenset(PERMISSIVE if options.allowed is None else options.allowed) - set(options.denied)
    drop = {True: options.unknown_code == "drop", False: options.unknown_prose == "drop"}
    rows = zip(*(table[name].to_pylist() for name in ("licence_header", "licence", "language")))
    return [_reason(final(header, licence), is_code(language), allowed, drop) for header, licence, language in rows]


def final(header: str | None, licence: str | None) -> str | None:
    """The licence of a document, from its header and from what its source states of it.

    >>> final(None, "MIT License"), final("GPL-3.0-only", "MIT"), final("LicenseRef-BSD", "BSD-2-Clause")
    ('MIT', 'GPL-3.0-only', 'BSD-2-Clause')
    """
    known = None if licence is None else normalise(licence)
    # "BSD, see LICENSE": the source knows which.
    if header is None or (header == "LicenseRef-BSD" and known is not None and known.startswith("BSD-")):
        return known
    return header


def _reason(licence: str | None, code: bool, allowed: frozenset[str], drop: dict[bool, bool]) -> str | None:
    if licence is None:
        return "licence_unknown" if drop[code] else None
    return None if permissive(licence, allowed) else "licence_not_allowed"
