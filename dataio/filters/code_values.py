"""What the rules for code compare, measured in one pass.

line         what line feeds separate; the last one counts if it is not empty
token        a run of letters, digits and ``_``, of any script; one with a digit first is a number
encoded run  at least 64 characters of base64, hexadecimal or escapes, one of sixteen at least a digit (StarCoder 2's
             pattern with backslashes; without the digits long paths and lists of words would be runs too)
number run   at least 16 numbers with nothing but white space, brackets, quotes and ``, . ; + - \\`` between
comment      what follows a mark that a line begins with; a mark after code is not looked for
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from dataio.filters.characters import LETTER, SPACE, decoded, kinds

#: Characters of the shortest encoded run, and how many of its characters there are to a digit at most.
ENCODED_CHARACTERS, CHARACTERS_PER_DIGIT = 64, 16
RUN_NUMBERS = 16
#: What is counted of a text.
_COUNTS = """characters visible letters alphanumerics lines newlines longest_line tokens numbers comment_characters
    encoded longest_encoded in_number_runs"""
COUNTED = np.dtype([(name, np.int64) for name in _COUNTS.split()])
#: How comments are marked, and where: to the end of the line, or from one mark to another.
COMMENTS = {
    "// /*…*/": "c, c++, c#, cuda, d, dart, go, glsl, gradle, groovy, hlsl, java, javascript, kotlin, less, "
    "objective-c, objective-c++, protocol buffer, qml, rust, sass, scala, scss, solidity, svelte, swift, "
    "systemverilog, thrift, typescript, verilog, vue, zig",
    "#": "awk, bitbake, cmake, coffeescript, crystal, cython, dockerfile, elixir, graphql, ignore list, ini, julia, "
    "kconfig, makefile, meson, nim, perl, pip requirements, puppet, python, r, raku, ruby, shell, starlark, tcl, "
    "toml, yaml",
    "# // /*…*/": "hcl, nix, php",
    "# <#…#>": "powershell",
    "/*…*/": "css",
    "-- /*…*/": "sql",
    "--[[…]] --": "lua",
    "-- {-…-}": "agda, elm, haskell, idris",
    "-- /-…-/": "lean",
    "--": "ada, applescript, vhdl",
    "; #|…|#": "common lisp, racket, scheme",
    ";": "assembly, clojure, emacs lisp, llvm",
    ";; (;…;)": "webassembly",
    "%": "erlang, matlab, postscript, prolog, tex",
    "(*…*)": "ocaml, standard ml",
    "// (*…*)": "f#",
    "// {…} (*…*)": "pascal",
    "!": "fortran",
    "<!--…-->": "html+django, svg, xml",
    '"': "vim script",
    "'": "visual basic",
    "dnl #": "m4",
    "rem ::": "batchfile",
}
#: Marks of one language and bytes of a mark, at most.
_MARKS, _MARK_BYTES = 3, 4
Tables = tuple[NDArray[Any], ...]
_NO_STYLE = len(COMMENTS)
_STYLES = {language: number for number, languages in enumerate(COMMENTS.values()) for language in languages.split(", ")}
_SEPARATORS = b",.;+-()[]{}'\"\\"
_ENCODED = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\\\n"


def comment_style(language: str | None) -> int:
    """Number of the way in which a language marks comments."""
    return _STYLES.get(language or "", _NO_STYLE)


@cache
def _tables() -> Tables:
    """Kinds of characters; which bytes may stand in an encoded run, and between numbers of a run; marks of comments:
    [style, mark, first or last, bytes], with zeros at the end."""
    encoded, between = np.zeros(256, np.bool_), np.zeros(256, np.bool_)
    encoded[[*_ENCODED]] = True
    between[[*_SEPARATORS]] = True
    marks = np.zeros((len(COMMENTS) + 1, _MARKS, 2, _MARK_BYTES + 1), np.uint8)
    for style, spelled in enumerate(COMMENTS):
        for number, mark in enumerate(spelled.split(" ")):
            for side, part in enumerate(mark.split("…")):
                marks[style, number, side, : len(part)] = [*part.encode()]
    return kinds(), encoded, between, marks


def code_values(
    text: NDArray[np.uint8], offsets: NDArray[np.int64], styles: NDArray[np.int64]
) -> dict[str, NDArray[np.int64]]:
    """{count: [n]} of n texts in UTF-8 that lie at [offsets[i], offsets[i + 1]), comments marked in `styles`.

    Memory: that of the counts.
    """
    counted = np.zeros(len(offsets) - 1, COUNTED)
    _count(text, offsets, styles, _tables(), counted)
    return {name: counted[name] for name in COUNTED.names or ()}


@numba.njit(nogil=True, cache=True)
def _count(
    text: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    styles: NDArray[np.int64],
    tables: Tables,
    counted: NDArray[np.void],
) -> None:
    for document in range(len(offsets) - 1):
        content = text[offsets[document] : offsets[document + 1]]
        _scan(content, tables[:3], tables[3][styles[document]], counted[document])


@numba.njit(nogil=True, cache=True)
def _has(text: NDArray[np.uint8], at: int, mark: NDArray[np.uint8]) -> int:
    """Bytes of the mark, if it stands here in any case of its letters; otherwise 0."""
    size = 0
    while mark[size]:
        if at + size >= len(text):
            return 0
        byte = text[at + size]
        if byte != mark[size] and not (0x41 <= byte <= 0x5A and byte + 0x20 == mark[size]):
            return 0
        size += 1
    return size


@numba.njit(nogil=True, cache=True)
def _scan(text: NDArray[np.uint8], tables: Tables, marks: NDArray[np.uint8], found: Any) -> None:
    kind_of, in_encoded, between_numbers = tables
    characters = visible = letters = alphanumerics = lines = newlines = tokens = numbers = comment_characters = 0
    line = longest_line = 0
    inside = False  # of a token
    run_start = run_end = run_numbers = in_number_runs = 0  # in characters
    run = run_digits = encoded = longest_encoded = 0
    blank = True  # nothing visible on the line yet
    comment_end = -1  # place in the text that a comment reaches to
    block = -1  # mark whose end is looked for

    at = 0
    while at < len(text):
        code, size = decoded(text, at)
        kind = kind_of[code] if code < len(kind_of) else 0
        digit = 0x30 <= code <= 0x39
        space = (kind & SPACE) != 0

        if kind & LETTER or digit or code == 0x5F:
            if not inside:
                inside = True
                tokens += 1
                numbers += digit
                if digit:
                    run_start = characters if run_numbers == 0 else run_start
                    run_numbers += 1
                else:
                    in_number_runs += run_end - run_start if run_numbers >= RUN_NUMBERS else 0
                    run_numbers = 0
            if run_numbers:
                run_end = characters + 1
        else:
            inside = False
            if run_numbers and not (space or (size == 1 and between_numbers[code])):
                in_number_runs += run_end - run_start if run_numbers >= RUN_NUMBERS else 0
                run_numbers = 0

        if size == 1 and in_encoded[code]:
            run += 1
            run_digits += digit
        elif run:
            if run >= ENCODED_CHARACTERS and run_digits * CHARACTERS_PER_DIGIT >= run:
                encoded += run
                longest_encoded = max(longest_encoded, run)
            run = run_digits = 0

        if not space:
            if blank and block < 0 and at >= comment_end:
                for number in range(_MARKS):
                    width = _has(text, at, marks[number, 0])
                    if width and marks[number, 1, 0]:
                        block, comment_end = number, at + width
                        break
                    if width:
                        comment_end = len(text)  # until the line ends
                        break
            if block >= 0 and at >= comment_end:
                width = _has(text, at, marks[block, 1])
                if width:
                    block, comment_end = -1, at + width
            comment_characters += block >= 0 or at < comment_end
            blank = blank and (block >= 0 or at < comment_end)
            visible += 1
        letters += (kind & LETTER) != 0
        alphanumerics += (kind & LETTER) != 0 or digit
        characters += 1
        if code == 10:
            lines += 1
            newlines += 1
            longest_line = max(longest_line, line)
            line = 0
            blank = True
            if comment_end == len(text) and block < 0:
                comment_end = at
        else:
            line += 1
        at += size

        # Most of a text is this: letters of ASCII in the middle of a token.
        start = at
        while inside and at < len(text) and 0x61 <= text[at] | np.uint8(0x20) <= 0x7A:
            at += 1
        count = at - start
        if count:
            characters += count
            run_end = characters
            run += count
            comment_characters += count if block >= 0 or start < comment_end else 0
            visible += count
            letters += count
            alphanumerics += count
            line += count

    if run >= ENCODED_CHARACTERS and run_digits * CHARACTERS_PER_DIGIT >= run:
        encoded += run
        longest_encoded = max(longest_encoded, run)
    if run_numbers >= RUN_NUMBERS:
        in_number_runs += run_end - run_start
    found.characters, found.visible, found.letters, found.alphanumerics = characters, visible, letters, alphanumerics
    found.lines, found.newlines, found.longest_line = lines + (line > 0), newlines, max(longest_line, line)
    found.tokens, found.numbers, found.comment_characters = tokens, numbers, comment_characters
    found.encoded, found.longest_encoded, found.in_number_runs = encoded, longest_encoded, in_number_runs
