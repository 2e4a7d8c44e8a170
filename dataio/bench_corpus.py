"""What the benchmarks of data run on: source code and documentation of installed packages, with copies among them that
were changed in known ways, so that it is known how alike each is to its original."""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

SUFFIXES = {".py", ".md", ".rst", ".txt"}
#: Texts with fewer words are left out, since a single word changes much of them, and so are longer texts.
MIN_WORDS, MAX_CHARACTERS = 80, 60_000
SHINGLE_WORDS = 5

WORD = re.compile(r"\w+")
_SPLIT = re.compile(r"(\w+)")
_HEADER = (
    "Copyright the authors of this file. Permission is granted to use, copy, change and distribute it for any purpose, "
    "with or without fee, as long as this notice is kept. It comes without warranty of any kind.\n\n"
)


@dataclass(frozen=True)
class Copy:
    """The text number `text` was made from number `of`; `jaccard` of their sets of shingles."""

    text: int
    of: int
    change: str
    jaccard: float


@dataclass(frozen=True)
class Corpus:
    """Texts in random order, and which of them are changed copies of which."""

    texts: Sequence[str]
    copies: Sequence[Copy]
    num_bytes: int

    def parts(self, num_bytes: int, count: int) -> list[list[str]]:
        """`count` lists of different texts, each of about so many bytes."""
        texts, found = iter(self.texts), []
        for _ in range(count):
            size, part = 0, list[str]()
            while size < num_bytes and (text := next(texts, None)) is not None:
                size += len(text.encode())
                part.append(text)
            found.append(part)
        return found


def build(num_bytes: int, copied_share: float, seed: int) -> Corpus:
    """About `num_bytes` of different texts and changed copies of `copied_share` of them, a function of the seed and of
    what is installed. Where too little is, the corpus is smaller."""
    originals = list(_installed(num_bytes))
    generator = random.Random(seed)
    vocabulary = [word for text in originals[:200] for word in WORD.findall(text)]
    texts, made = list(originals), []
    for number, of in enumerate(generator.sample(range(len(originals)), int(copied_share * len(originals)))):
        change = list(CHANGES)[number % len(CHANGES)]
        text = CHANGES[change](originals[of], generator, vocabulary)
        if text != originals[of]:  # nothing is found by finding what did not change
            made.append((len(texts), of, change, jaccard(originals[of], text)))
            texts.append(text)
    order = list(range(len(texts)))
    generator.shuffle(order)
    place = {number: position for position, number in enumerate(order)}
    copies = [Copy(place[text], place[of], change, similar) for text, of, change, similar in made]
    return Corpus([texts[number] for number in order], copies, sum(len(text.encode()) for text in texts))


def shingles(text: str) -> set[tuple[str, ...]]:
    """What the similarity of texts is defined by: five words in a row, in lower case."""
    words = [word.lower() for word in WORD.findall(text)]
    return {tuple(words[at : at + SHINGLE_WORDS]) for at in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def jaccard(a: str, b: str) -> float:
    """Of two texts' sets of shingles: those of both over those of either."""
    x, y = shingles(a), shingles(b)
    return len(x & y) / len(x | y)


def _installed(num_bytes: int) -> Iterator[str]:
    """Different texts of installed packages, half of the bytes code and half prose as far as there is any, in an order
    that the hashes of their paths decide."""
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    names = {path: str(path.relative_to(root)) for root in roots for path in root.rglob("*") if _is_text(path)}
    left, seen = {"code": num_bytes / 2, "prose": num_bytes / 2}, set[str]()
    for path in sorted(names, key=lambda path: xxhash.xxh3_64_intdigest(names[path].encode())):
        kind = "code" if path.suffix == ".py" else "prose"
        if left[kind] <= 0:
            continue
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) <= MAX_CHARACTERS and text not in seen and len(WORD.findall(text)) >= MIN_WORDS:
            seen.add(text)
            left[kind] -= len(text.encode())
            yield text


def _is_text(path: Path) -> bool:
    return path.suffix in SUFFIXES or path.name == "METADATA"


def _substituted(share: float) -> Callable[[str, random.Random, Sequence[str]], str]:
    def change(text: str, generator: random.Random, vocabulary: Sequence[str]) -> str:
        parts = _SPLIT.split(text)
        for at in range(1, len(parts), 2):
            if generator.random() < share:
                parts[at] = generator.choice(vocabulary)
        return "".join(parts)

    return change


def _halves_swapped(text: str, *_: object) -> str:
    lines = text.split("\n")
    return "\n".join(lines[len(lines) // 2 :] + lines[: len(lines) // 2])


CHANGES: dict[str, Callable[[str, random.Random, Sequence[str]], str]] = {
    "white space": lambda text, *_: re.sub(r"[ \t]+", " ", text).replace("\n", "\n\n"),
    "upper case": lambda text, *_: text.upper(),
    "header": lambda text, *_: _HEADER + text,
    "halves swapped": _halves_swapped,
    "truncated to 85 %": lambda text, *_: text[: int(len(text) * 0.85)],
    "truncated to 60 %": lambda text, *_: text[: int(len(text) * 0.6)],
    **{f"{share:.1%} of words": _substituted(share) for share in (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.08)},
}
