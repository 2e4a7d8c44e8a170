"""What the rules for prose compare, measured in one pass over a text and one over its repeated words.

character  a code point; white space is never counted, so shares of characters are shares of what can be seen
column     what a character is wide: two where East Asian type is (UAX 11), so Korean words are no shorter than others
word       what stands between white space; a character of a script written without spaces is a word of its own.
           Two are the same if they differ in nothing but the case of ASCII letters
line       the words between two line feeds; a line without a word is none
paragraph  the lines between two lines without a word
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from dataio.filters.characters import BULLET, CLOSING, ENDING, LETTER, SPACE, TERMINAL, UNSPACED, WIDE, decoded, kinds
from dataio.filters.repetition import DUPLICATE_NGRAMS, SPREAD, TOP_NGRAMS, Units, repeated_words, seen_before

#: What is counted of a text. `top_characters`, `duplicate_characters`: for every length of a sequence.
_COUNTS = """characters columns letters listed_letters unspaced words alpha_words sentences hashes ellipses newlines
    curly_brackets lorem_ipsum lines bullet_lines ellipsis_lines terminal_lines short_lines javascript_lines
    policy_lines duplicate_lines duplicate_line_chars paragraphs duplicate_paragraphs duplicate_paragraph_chars
    stop_words"""
COUNTED = np.dtype(
    [
        *((name, np.int64) for name in _COUNTS.split()),
        ("top_characters", np.int64, (len(TOP_NGRAMS),)),
        ("duplicate_characters", np.int64, (len(DUPLICATE_NGRAMS),)),
    ]
)
#: Values that are one count over another.
RATIOS = {
    "unspaced_share": ("unspaced", "characters"),
    "mean_word_length": ("columns", "words"),
    "hash_share": ("hashes", "words"),
    "ellipsis_share": ("ellipses", "words"),
    "bullet_line_share": ("bullet_lines", "lines"),
    "ellipsis_line_share": ("ellipsis_lines", "lines"),
    "alpha_word_share": ("alpha_words", "words"),
    "duplicate_line_share": ("duplicate_lines", "lines"),
    "duplicate_line_char_share": ("duplicate_line_chars", "characters"),
    "duplicate_paragraph_share": ("duplicate_paragraphs", "paragraphs"),
    "duplicate_paragraph_char_share": ("duplicate_paragraph_chars", "characters"),
    "terminal_line_share": ("terminal_lines", "lines"),
    "short_line_share": ("short_lines", "lines"),
    "newlines_per_word": ("newlines", "words"),
    "javascript_line_share": ("javascript_lines", "lines"),
    "policy_line_share": ("policy_lines", "lines"),
}

#: {phrase: (kind, place of a letter in it that is rare)}; C4 drops lines of the last two kinds, pages of the first.
_LOREM, _JAVASCRIPT, _POLICY = 1, 2, 4
PHRASES = {
    "lorem ipsum": (_LOREM, 7),
    "javascript": (_JAVASCRIPT, 0),
    "terms of use": (_POLICY, 7),
    "privacy policy": (_POLICY, 3),
    "cookie policy": (_POLICY, 3),
    "uses cookies": (_POLICY, 8),
    "use of cookies": (_POLICY, 10),
    "use cookies": (_POLICY, 7),
}
#: Of every language eight words that hardly any of its texts are without: English as Gopher lists them, the others
#: chosen for being frequent and short.
STOP_WORDS = {
    "en": "the be to of and that have with",
    "de": "der die und in den von zu das",
    "fr": "de la le et les des en un",
    "es": "de la que el en y los se",
    "pt": "de a que o e do da em",
    "it": "di e il la che in per un",
    "nl": "de van het een en in is dat",
    "sv": "och i att det som en på är",
    "da": "og i at det er en til af",
    "no": "og i det er på en til som",
    "fi": "ja on ei se että oli hän mutta",
    "hu": "a az és hogy nem is egy ez",
    "pl": "i w na z do się nie jest",
    "cs": "a se na je v že to s",
    "sk": "a sa na je v že to s",
    "ro": "de și în a la cu pe din",
    "hr": "i u je na se da za su",
    "tr": "ve bir bu da de için ile çok",
    "id": "dan yang di dengan untuk dari pada ini",
    "vi": "và của là có được trong cho không",
    "ca": "de la i que el en a les",
    "ru": "и в не на что с по как",
    "uk": "і в не на що з та до",
    "bg": "на и да в за се от не",
    "el": "και το να του η της με για",
}
#: Letters below this code point are Latin, Greek or Cyrillic, which all the lists are in.
_LISTED_ALPHABETS_END = 0x530
_SLOT_BITS = 10
_SLOTS = 1 << _SLOT_BITS

#: What `kinds`, `_phrases` and `_stop_words` return, together.
Tables = tuple[NDArray[Any], ...]
_OFFSET, _PRIME = 0xCBF29CE484222325, 0x100000001B3


@cache
def _phrases() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """Phrases as rows of bytes; length, kind and place of the rare letter of each; which bytes are such letters."""
    rows = np.zeros((len(PHRASES), max(map(len, PHRASES))), np.uint8)
    facts = np.empty((len(PHRASES), 3), np.int64)
    rare = np.zeros(256, np.bool_)
    for row, (phrase, (kind, place)) in enumerate(PHRASES.items()):
        rows[row, : len(phrase)] = [*phrase.encode()]
        facts[row] = len(phrase), kind, place
        rare[[ord(phrase[place]), ord(phrase[place].upper())]] = True
    return rows, facts, rare


def _hash(word: str) -> int:
    """FNV-1a, as `_scan` computes it."""
    value = _OFFSET
    for byte in word.encode():
        value = (value ^ byte) * _PRIME % 2**64
    return value


@cache
def _stop_words() -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.bool_]]:
    """All stop words once: a hash table of their hashes (0 where it is free) and of their numbers, and which languages
    have them: [languages, words]."""
    numbers = {
        word: number for number, word in enumerate(sorted({w for ws in STOP_WORDS.values() for w in ws.split()}))
    }
    hashes, places = np.zeros(_SLOTS, np.uint64), np.zeros(_SLOTS, np.int64)
    for word, number in numbers.items():
        slot = _hash(word) * SPREAD % 2**64 >> 64 - _SLOT_BITS
        while hashes[slot]:
            slot = (slot + 1) % _SLOTS
        hashes[slot], places[slot] = _hash(word), number
    has = np.zeros((len(STOP_WORDS), len(numbers)), np.bool_)
    for language, words in enumerate(STOP_WORDS.values()):
        has[language, [numbers[word] for word in words.split()]] = True
    return hashes, places, has


def prose_values(
    text: NDArray[np.uint8], offsets: NDArray[np.int64], short_line_columns: int
) -> dict[str, NDArray[np.float64]]:
    """{value: [n]} of n texts in UTF-8 that lie at [offsets[i], offsets[i + 1]); NaN where there is nothing to measure.

    Memory: 16 bytes for every byte of the longest text, up to 40 where its words are single letters.
    """
    counted = np.zeros(len(offsets) - 1, COUNTED)
    _count(text, offsets, short_line_columns, (kinds(), *_phrases()), _stop_words(), counted)
    counts = {name: counted[name].astype(np.float64) for name in COUNTED.names or ()}
    values = {name: _ratio(counts[part], counts[whole]) for name, (part, whole) in RATIOS.items()}
    for place, n in enumerate(TOP_NGRAMS):
        # Occurrences may overlap: "a a a" has "a a" twice.
        share = _ratio(counts["top_characters"][:, place], counts["characters"])
        values[f"top_{n}gram_share"] = np.minimum(share, 1)
    for place, n in enumerate(DUPLICATE_NGRAMS):
        share = _ratio(counts["duplicate_characters"][:, place], counts["characters"])
        values[f"duplicate_{n}gram_share"] = share
    values |= {name: counts[name] for name in ("words", "sentences", "curly_brackets", "lorem_ipsum")}
    listed = 2 * counts["listed_letters"] >= counts["letters"]
    return values | {"stop_words": np.where(listed, counts["stop_words"], np.nan)}


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


@numba.njit(nogil=True, cache=True)
def _count(
    text: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    short_line_columns: int,
    character_tables: Tables,
    stop_tables: Tables,
    counted: NDArray[np.void],
) -> None:
    longest = 0
    for document in range(len(offsets) - 1):
        longest = max(longest, offsets[document + 1] - offsets[document])
    most = longest // 2 + 2  # words of a text, and lines
    words, lines, paragraphs = [(np.empty(most, np.uint64), np.empty(most, np.int32)) for _ in range(3)]
    table = np.empty(4 * most, np.int32), np.empty(4 * most, np.uint64)
    scratch = np.empty((5, most), np.int32)
    for document in range(len(offsets) - 1):
        found = counted[document]
        content = text[offsets[document] : offsets[document + 1]]
        _scan(content, short_line_columns, character_tables, stop_tables, words, lines, paragraphs, found)
        found.duplicate_lines, found.duplicate_line_chars = seen_before(lines, found.lines, table)
        found.duplicate_paragraphs, found.duplicate_paragraph_chars = seen_before(paragraphs, found.paragraphs, table)
        repeated_words(words, found.words, scratch, table, found.top_characters, found.duplicate_characters)


@numba.njit(inline="always")
def _is_letter(byte: np.uint8) -> np.bool_:
    return 0x61 <= byte | np.uint8(0x20) <= 0x7A


@numba.njit(inline="always")
def _lower(byte: np.uint8) -> np.uint8:
    return byte | np.uint8(0x20) if 0x41 <= byte <= 0x5A else byte


@numba.njit(nogil=True, cache=True)
def _phrase_at(text: NDArray[np.uint8], at: int, phrases: NDArray[np.uint8], facts: NDArray[np.int64]) -> int:
    """Kind of the phrase whose rare letter is at a place, in any case; 0 where there is none."""
    for number in range(len(facts)):
        length, kind, place = facts[number]
        start = at - place
        if start < 0 or start + length > len(text):
            continue
        k = 0
        while k < length and _lower(text[start + k]) == phrases[number, k]:
            k += 1
        if k == length:
            return kind
    return 0


@numba.njit(nogil=True, cache=True)
def _scan(
    text: NDArray[np.uint8],
    short_line_columns: int,
    character_tables: Tables,
    stop_tables: Tables,
    words: Units,
    lines: Units,
    paragraphs: Units,
    found: Any,
) -> None:
    """Fill words, lines and paragraphs with hashes and characters, and `found` with what is counted in passing."""
    kind_of, phrases, phrase_facts, rare = character_tables
    stop_hashes, stop_numbers, stop_lists = stop_tables
    stop_seen = np.zeros(stop_lists.shape[1], np.bool_)
    num_words = num_lines = num_paragraphs = 0
    characters = all_columns = letters = listed_letters = unspaced = 0
    alpha_words = sentences = hashes = ellipses = newlines = brackets = lorem = 0
    bullet_lines = ellipsis_lines = terminal_lines = short_lines = javascript_lines = policy_lines = 0

    inside = alone = has_letter = ended = False  # of a word; `alone`: a character that is one
    word, length, first_code, first_kind = np.uint64(0), 0, 0, 0
    line, line_length, line_first_word, columns, last_columns = np.uint64(_OFFSET), 0, num_words, 0, 0
    line_phrases = dots = 0
    bullet = adjacent = False
    last_kind = 0
    paragraph, paragraph_length = np.uint64(_OFFSET), 0

    at = 0
    while at <= len(text):
        code, size = decoded(text, at) if at < len(text) else (10, 1)
        kind = kind_of[code] if code < len(kind_of) else 0
        if inside and (alone or kind & (SPACE | UNSPACED)):
            words[0][num_words], words[1][num_words] = word, length
            if num_words == line_first_word:
                dash = first_code in (0x2A, 0x2B, 0x2D, 0x2013, 0x2014)
                bullet = (first_kind & BULLET) != 0 or (dash and length == 1)
            num_words += 1
            alpha_words += has_letter
            sentences += ended and has_letter
            line = (line ^ word) * np.uint64(SPREAD)
            line ^= line >> np.uint64(29)
            slot = word * np.uint64(SPREAD) >> np.uint64(64 - _SLOT_BITS)
            while stop_hashes[slot]:
                if stop_hashes[slot] == word:
                    stop_seen[stop_numbers[slot]] = True
                    break
                slot = (slot + np.uint64(1)) % np.uint64(_SLOTS)
            inside = False
        if kind & SPACE:
            adjacent = False
            columns += 1
            if code == 10:
                newlines += at < len(text)
                if num_words > line_first_word:
                    lines[0][num_lines], lines[1][num_lines] = line, line_length
                    num_lines += 1
                    bullet_lines += bullet
                    ellipsis_lines += dots >= 3
                    terminal_lines += (last_kind & ENDING) != 0
                    short_lines += last_columns <= short_line_columns
                    javascript_lines += (line_phrases & _JAVASCRIPT) != 0
                    policy_lines += (line_phrases & _POLICY) != 0
                    paragraph = (paragraph ^ line) * np.uint64(SPREAD)
                    paragraph ^= paragraph >> np.uint64(29)
                    paragraph_length += line_length
                if paragraph_length and (num_words == line_first_word or at == len(text)):
                    paragraphs[0][num_paragraphs], paragraphs[1][num_paragraphs] = paragraph, paragraph_length
                    num_paragraphs += 1
                    paragraph, paragraph_length = np.uint64(_OFFSET), 0
                line, line_length, line_first_word, columns, line_phrases = np.uint64(_OFFSET), 0, num_words, 0, 0
            at += size
            continue

        if not inside:
            inside, has_letter, ended = True, False, False
            word, length, first_code, first_kind = np.uint64(_OFFSET), 0, code, kind
            alone = (kind & UNSPACED) != 0
            if line_length == 0:
                columns = 0
        for place in range(at, at + size):
            word = (word ^ np.uint64(_lower(text[place]))) * np.uint64(_PRIME)
        length += 1
        characters += 1
        line_length += 1
        width = 2 if kind & WIDE else 1
        all_columns += width
        columns += width
        last_columns, last_kind = columns, kind
        if kind & LETTER:
            has_letter = True
            letters += 1
            listed_letters += code < _LISTED_ALPHABETS_END
            ended = False
        elif kind & TERMINAL:
            ended = True
        else:
            ended = ended and (kind & CLOSING) != 0
            hashes += code == 0x23
            brackets += code == 0x7B
        unspaced += (kind & UNSPACED) != 0
        if code == 0x2E:
            dots = dots + 1 if adjacent else 1
            ellipses += dots % 3 == 0
            adjacent = True
        else:
            dots = 3 if code == 0x2026 else 0
            ellipses += code == 0x2026
            adjacent = False
        if size == 1 and rare[code]:
            phrase = _phrase_at(text, at, phrases, phrase_facts)
            lorem += phrase == _LOREM
            line_phrases |= phrase
        at += size

        # Most of a text is this: letters of ASCII in the middle of a word.
        start = at
        while at < len(text) and not alone and _is_letter(text[at]) and not rare[text[at]]:
            word = (word ^ np.uint64(text[at] | np.uint8(0x20))) * np.uint64(_PRIME)
            at += 1
        if at > start:
            has_letter, ended, adjacent, dots, last_kind = True, False, False, 0, LETTER
            length += at - start
            characters += at - start
            letters += at - start
            listed_letters += at - start
            line_length += at - start
            columns += at - start
            all_columns += at - start
            last_columns = columns

    found.characters, found.columns, found.unspaced = characters, all_columns, unspaced
    found.letters, found.listed_letters = letters, listed_letters
    found.words, found.alpha_words, found.sentences, found.newlines = num_words, alpha_words, sentences, newlines
    found.hashes, found.ellipses, found.curly_brackets, found.lorem_ipsum = hashes, ellipses, brackets, lorem
    found.lines, found.bullet_lines, found.ellipsis_lines = num_lines, bullet_lines, ellipsis_lines
    found.terminal_lines, found.short_lines = terminal_lines, short_lines
    found.javascript_lines, found.policy_lines, found.paragraphs = javascript_lines, policy_lines, num_paragraphs
    for language in range(len(stop_lists)):
        found.stop_words = max(found.stop_words, (stop_lists[language] & stop_seen).sum())
