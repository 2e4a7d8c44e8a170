"""Quality of prose by the published rules: Gopher's, C4's and FineWeb's, each a measured value and a threshold.

Gopher: Rae et al., "Scaling Language Models", 2021 (arXiv 2112.11446), A.1.1. C4: Raffel et al., "Exploring the Limits
of Transfer Learning", JMLR 21, 2020, 2.2. FineWeb: Penedo et al., 2024 (arXiv 2406.17557), 3.6. What a word, a line and
a sequence of words is stands in prose_values.py. Two things differ from the papers: C4 edits texts, while here lines
that it would remove are counted; and characters are counted without white space.

Chinese, Japanese, Thai and other scripts without spaces have no words to count, and Thai no full stops: where the share
of such scripts is more than `spaced_below`, the rules about words and ends of sentences are not asked, the others are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataio.filters.prose_values import STOP_WORDS, prose_values
from dataio.filters.rules import Values, judge_bounds, utf8, write_attributes
from dataio.languages import PROSE
from dataio.stages import Counts
from stoker.sections import Section

VERSION = 1


class Options(Section):
    """Thresholds, None switches a rule off. Shares are of 1."""

    short_line_columns: int = Field(30, gt=0, description="columns of the longest short line (FineWeb: characters)")
    spaced_below: float = Field(
        0.1, ge=0, le=1, description="share of characters of scripts without spaces, above which no words are counted"
    )

    min_words: int | None = Field(50, description="words (Gopher)")
    max_words: int | None = Field(100_000, description="words (Gopher)")
    min_mean_word_length: float | None = Field(3, description="columns (Gopher: characters)")
    max_mean_word_length: float | None = Field(10, description="columns (Gopher: characters)")
    max_hash_share: float | None = Field(0.1, description="'#' per word (Gopher)")
    max_ellipsis_share: float | None = Field(0.1, description="'...' and '…' per word (Gopher)")
    max_bullet_line_share: float | None = Field(0.9, description="lines that begin with a bullet (Gopher)")
    max_ellipsis_line_share: float | None = Field(0.3, description="lines that end with an ellipsis (Gopher)")
    min_alpha_word_share: float | None = Field(0.8, description="words with a letter (Gopher)")
    min_stop_words: int | None = Field(
        2, description="different ones of a language's eight, of the language that has most (Gopher, there English)"
    )

    max_duplicate_line_share: float | None = Field(0.3, description="lines that came before (Gopher)")
    max_duplicate_paragraph_share: float | None = Field(0.3, description="paragraphs that came before (Gopher)")
    max_duplicate_line_char_share: float | None = Field(
        0.01, description="characters in lines that came before (FineWeb; Gopher: 0.2)"
    )
    max_duplicate_paragraph_char_share: float | None = Field(
        0.2, description="characters in paragraphs that came before (Gopher)"
    )
    max_top_2gram_share: float | None = Field(0.20, description="characters in the most frequent 2 words (Gopher)")
    max_top_3gram_share: float | None = Field(0.18, description="characters in the most frequent 3 words (Gopher)")
    max_top_4gram_share: float | None = Field(0.16, description="characters in the most frequent 4 words (Gopher)")
    max_duplicate_5gram_share: float | None = Field(0.15, description="characters in 5 words seen before (Gopher)")
    max_duplicate_6gram_share: float | None = Field(0.14, description="characters in 6 words seen before (Gopher)")
    max_duplicate_7gram_share: float | None = Field(0.13, description="characters in 7 words seen before (Gopher)")
    max_duplicate_8gram_share: float | None = Field(0.12, description="characters in 8 words seen before (Gopher)")
    max_duplicate_9gram_share: float | None = Field(0.11, description="characters in 9 words seen before (Gopher)")
    max_duplicate_10gram_share: float | None = Field(0.10, description="characters in 10 words seen before (Gopher)")

    min_terminal_line_share: float | None = Field(
        0.12, description="lines that end with . ! ? or a quotation mark (FineWeb; C4 keeps no other lines)"
    )
    max_short_line_share: float | None = Field(0.67, description="lines of `short_line_columns` at most (FineWeb)")
    max_newlines_per_word: float | None = Field(0.3, description="line feeds per word (FineWeb)")
    min_sentences: int | None = Field(3, description="words with a letter that end with . ! or ? (C4)")
    max_curly_brackets: int | None = Field(0, description="'{' (C4)")
    max_lorem_ipsum: int | None = Field(0, description="'lorem ipsum' in any case (C4)")
    max_javascript_line_share: float | None = Field(
        0.2, description="lines that say 'javascript' (C4 removes them; the share is ours)"
    )
    max_policy_line_share: float | None = Field(
        0.2, description="lines that say 'privacy policy', 'use cookies', ... (C4 removes them; the share is ours)"
    )


#: Options that decide what is measured; all others only what is made of it.
MEASURED = frozenset({"short_line_columns"})
_PER_WORD = ("hash_share", "ellipsis_share", "sentences", "terminal_line_share")
_INTEGERS = ("words", "stop_words", "sentences", "curly_brackets", "lorem_ipsum")
_BOUNDED = dict.fromkeys(name[4:] for name in Options.model_fields if name.startswith(("min_", "max_")))
#: Beside the documents, null for code: ``words`` and the like as counts, ``..._share`` and means as they say.
SCHEMA = pa.schema(
    [pa.field(name, pa.int32() if name in _INTEGERS else pa.float32()) for name in ("unspaced_share", *_BOUNDED)]
)
COLUMNS = ("language",)
#: Rules that need words between spaces and sentences that end with a mark.
_OF_WORDS = frozenset(
    f"{side}_{column}"
    for side in ("min", "max")
    for column in _BOUNDED
    if "word" in column or "gram" in column or column in _PER_WORD
)


def measure(documents: Path, attributes: Path, options: Options) -> Counts:
    """Write the values of every document that is not code."""

    def values(group: pa.Table) -> Values:
        return prose_values(*utf8(group["text"]), options.short_line_columns)

    return write_attributes(documents, attributes, SCHEMA, ["text"], code=False, values=values)


def judge(table: pa.Table, options: Options) -> list[str | None]:
    """Of every document the rule that drops it, or None. Stop words are not asked for in a natural language that the
    source states and that has no list."""
    unspaced = table["unspaced_share"].to_numpy() > options.spaced_below
    exempt = dict.fromkeys(_OF_WORDS, unspaced)
    listed = [
        language in STOP_WORDS or language in PROSE or language is None for language in table["language"].to_pylist()
    ]
    exempt["min_stop_words"] = unspaced | ~np.array(listed, np.bool_)
    return judge_bounds(table, options, exempt)
