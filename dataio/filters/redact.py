"""Addresses of people and machines, and keys to what is theirs: where they stand, and what goes in their place.

Found are what `KINDS` names, by form alone. An address spelled out ("jane at wanadoo"), a name, a telephone
number and a password that is a plain word are not. Places are bytes of the text in UTF-8, at character boundaries;
texts are rewritten when tokens are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, field_validator

from dataio.documents import ParquetFile, read_groups
from dataio.filters.redact_checks import Span, check
from dataio.filters.redact_forms import FORMS
from dataio.filters.redact_scan import candidates
from dataio.filters.rules import utf8
from dataio.stages import Counts
from stoker.sections import Section

VERSION = 1
#: From the surest to the least sure: of two that overlap the surer one holds.
KINDS = (
    "private_key",
    *dict.fromkeys(form.kind for form in FORMS if form.kind != "secret"),
    "url_password",
    "secret",
    "email",
    "ipv6",
    "ipv4",
)
#: Addresses for documentation (RFC 2606, RFC 5737, RFC 3849), so that what parsed still does. None of them is found.
_REPLACEMENTS = {"email": "user@example.com", "ipv4": "192.0.2.1", "ipv6": "2001:db8::1"}
_SPAN = pa.struct([("start", pa.int32()), ("stop", pa.int32()), ("kind", pa.string())])
SCHEMA = pa.schema([pa.field("redactions", pa.list_(_SPAN), nullable=False), pa.field("text_bytes", pa.int64())])
COLUMNS: tuple[str, ...] = ()
MEASURED = frozenset(["kinds"])


class Options(Section):
    """What is taken out, and of how much a document is dropped."""

    kinds: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        KINDS, description="kinds that are found and replaced, of `KINDS`"
    )
    max_per_kb: float | None = Field(
        5.0,
        gt=0,
        description="redactions per 1,000 bytes of text: beyond, it is a list of addresses or keys; None: off",
    )
    at_least: int = Field(
        20, ge=1, description="redactions below which `max_per_kb` is not asked: a short text has few"
    )

    @field_validator("kinds")
    @classmethod
    def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := set(kinds) - set(KINDS):
            raise ValueError(f"{', '.join(sorted(wrong))}: not found by anything; there are {', '.join(KINDS)}")
        return kinds


def measure(documents: Path, attributes: Path, options: Options) -> Counts:
    """Write the places of what has to go from every document, and the bytes of its text."""
    count = size = 0
    found = dict.fromkeys(options.kinds, 0)
    with ParquetFile(attributes, SCHEMA) as file:
        for group in read_groups(documents, ["text"]):
            content, starts = utf8(group["text"])
            spans = find(content, starts, options.kinds)
            for _, _, kind in spans:
                found[kind] += 1
            file.write(pa.table([_lists(spans, starts), pa.array(np.diff(starts))], schema=SCHEMA))
            count += group.num_rows
            size += int(starts[-1])
    return {
        "documents": count,
        "bytes_in": size,
        **{f"found.{kind}": number for kind, number in found.items() if number},
    }


def find(content: NDArray[np.uint8], starts: NDArray[np.int64], kinds: Sequence[str] = KINDS) -> list[Span]:
    """Places in `content` of what has to go, sorted, none over another: (first byte, end, kind). The documents lie one
    after another and begin at `starts`, the last of which is where the last one ends.

    >>> text = b"mail jane.doe@wanadoo.fr or look at 93.184.216.34"
    >>> find(np.frombuffer(text, np.uint8), np.array([0, len(text)]))
    [(5, 24, 'email'), (36, 49, 'ipv4')]
    """
    view = content.data
    places = candidates(content, starts)
    of = np.searchsorted(starts, places[:, 1], "right")
    rows = zip(*places.T.tolist(), starts[of - 1].tolist(), starts[of].tolist())
    spans = [span for row in rows if (span := check(view, *row)) and span[2] in kinds]
    taken: list[Span] = []
    for span in sorted(spans):
        if taken and span[0] < taken[-1][1]:
            taken[-1] = min(taken[-1], span, key=lambda one: (KINDS.index(one[2]), one[0] - one[1]))
        else:
            taken.append(span)
    return taken


def judge(table: pa.Table, options: Options) -> list[str | None]:
    """``too_many_secrets`` where redactions are dense."""
    if options.max_per_kb is None:
        return [None] * table.num_rows
    numbers = pc.list_value_length(table["redactions"]).to_numpy()
    dense = (numbers >= options.at_least) & (numbers * 1000 > options.max_per_kb * table["text_bytes"].to_numpy())
    return ["too_many_secrets" if many else None for many in dense.tolist()]


def replacement(kind: str) -> str:
    """What stands for a redaction of a kind: an address that is nobody's, or the kind's name in angle brackets.

    >>> replacement("email"), replacement("github_token")
    ('user@example.com', '<GITHUB_TOKEN>')
    """
    return _REPLACEMENTS.get(kind, f"<{kind.upper()}>")


def _lists(spans: list[Span], starts: NDArray[np.int64]) -> pa.ListArray:
    """Of every document its own, counted from its first byte."""
    first = np.array([span[0] for span in spans], np.int64)
    stop = np.array([span[1] for span in spans], np.int64)
    begin = starts[np.searchsorted(starts, first, "right") - 1]
    columns = [pa.array((first - begin).astype(np.int32)), pa.array((stop - begin).astype(np.int32))]
    values = pa.StructArray.from_arrays([*columns, pa.array([span[2] for span in spans], pa.string())], fields=[*_SPAN])
    return pa.ListArray.from_arrays(pa.array(np.searchsorted(first, starts).astype(np.int32)), values)
