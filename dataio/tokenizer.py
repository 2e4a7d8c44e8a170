"""Byte-level BPE for code and prose: train one, adopt or load one, and turn texts into tokens.

What a vocabulary trained here is made for:

* every byte is a token, so any text encodes and decodes to itself; there is no unknown token and no normalisation;
* each digit is a token of its own: numbers are read by place, not by which digit groups were frequent;
* white space runs are split off before a word, all but the last space, so indentation is few tokens and the word after
  it is the same token as anywhere else; line breaks are runs, with the signs before them (``):\n``);
* `<|endoftext|>`, token 0, ends every document and begins none. Inside a text these characters are text.

All of it goes through the `tokenizers` library, which defines what is right; ``backends.py`` does the same faster.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from dataio.probes import probes
from dataio.types import TokenizerId
from stoker.errors import Refusal
from stoker.files import write_atomic

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
#: What ends a document in the vocabularies of others, and is looked for in this order.
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")

#: Words with the one character before them, digits one by one, signs with the line breaks after them, line breaks,
#: other white space. It is Qwen2's (in its tokenizer.json), because the fast back ends know it: a pattern of one's own
#: is split by a general engine, at a third of the speed.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: A tiktoken file holds ranks alone. The patterns of OpenAI's (tiktoken_ext/openai_public.py) by the name of the file,
#: without the possessive quantifiers there, which change no match and mean something else to `tokenizers`.
TIKTOKEN_PATTERNS = {
    "r50k_base": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k_base": PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
    "o200k_base": "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ]
    ),
}


class Tokenizer:
    """A tokenizer.json opened for use; see ``Tokenizer.load``."""

    def __init__(self, inner: tokenizers.Tokenizer, identity: TokenizerId) -> None:
        self.inner, self.id = inner, identity
        # Otherwise a document that merely mentions <|endoftext|> would be cut in two by it.
        inner.encode_special_tokens = True
        # Files made for fine-tuning may carry these, and long documents would lose their ends.
        inner.no_truncation()
        inner.no_padding()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Open a tokenizer.json (`tokenizers` library). Refuses one that is missing, damaged or without end-of-text."""
        try:
            return cls._of(Path(path).read_bytes(), path)
        except FileNotFoundError:
            raise Refusal(f"{path}: there is no tokenizer here; run `make data` or give the path of one") from None
        except OSError as error:
            raise Refusal(f"{path}: cannot be read ({error}); give the path of a tokenizer.json") from None

    @classmethod
    def _of(cls, content: bytes, path: str | os.PathLike[str]) -> Tokenizer:
        try:
            inner = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise Refusal(f"{path}: not a tokenizer.json that can be read ({error})") from None
        vocabulary = inner.get_vocab()
        eos_id = next((vocabulary[name] for name in ENDS_OF_TEXT if name in vocabulary), None)
        if eos_id is None:
            raise Refusal(f"{path}: the vocabulary has no {END_OF_TEXT}, with which every document ends")
        # Ids may have gaps: what counts is the largest.
        identity = TokenizerId(hashlib.sha256(content).hexdigest(), max(vocabulary.values()) + 1, eos_id)
        return cls(inner, identity)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without end-of-text: a prompt."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """(tokens of all documents in a row: uint16 if ids fit, or uint32; tokens of each), end-of-text included."""
        dtype = token_dtype(self.id)
        encodings = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        documents = [np.array([*encoding.ids, self.id.eos_id], dtype) for encoding in encodings]
        lengths = np.array([len(document) for document in documents], np.int64)
        return np.concatenate(documents) if documents else np.empty(0, dtype), lengths

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        """Text of tokens; end-of-text shows as its name, bytes that are not UTF-8 as U+FFFD."""
        return self.inner.decode([int(token) for token in tokens], skip_special_tokens=False)

    def special_names(self) -> list[str]:
        """Of the tokens that are in the vocabulary whatever the texts were: end-of-text, roles, tools."""
        return [token.content for token in self.inner.get_added_tokens_decoder().values()]

    def require_lossless(self, path: str | os.PathLike[str]) -> bool:
        """Refuse a tokenizer, that of the file `path`, whose tokens do not give texts back: tried on ``probes``.

        Whether they come back byte for byte; False: in Unicode's normal form C, as with Qwen's. It is let pass, for it
        is by definition another spelling of the same characters, and what such models were trained on.
        """
        same = True
        for text in probes(self.special_names()):
            try:
                back = self.decode(self.encode(text))
            except Exception as error:  # the library raises nothing narrower
                raise Refusal(f"{path}: does not encode {text[:24]!r} ({error}); {_LOSSLESS}") from None
            if back == text:
                continue
            if back != unicodedata.normalize("NFC", text):
                at = next((i for i, (a, b) in enumerate(zip(text, back)) if a != b), min(len(text), len(back)))
                lost, instead = (some[max(0, at - 4) : at + 12] for some in (text, back))
                raise Refusal(f"{path}: loses what a text holds: {lost!r} comes back as {instead!r}; {_LOSSLESS}")
            same = False
        return same


_LOSSLESS = (
    "give a tokenizer that any text comes back from, such as a byte-level BPE without a normalizer, or train one"
)


def token_dtype(identity: TokenizerId) -> type[np.uint16] | type[np.uint32]:
    """What tokens are stored as: uint16 if every id fits, or uint32."""
    return np.uint16 if identity.vocab_size <= 2**16 else np.uint32


def train(texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str]) -> Tokenizer:
    """Train on `texts`, write tokenizer.json to `path` and load it. The same texts in order give the same file.

    Refuses texts too few for `vocab_size`.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise Refusal(f"tokenizer: vocab_size={vocab_size} must exceed the {len(alphabet)} bytes and {END_OF_TEXT}")
    inner = _byte_level(models.BPE(), PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    if inner.get_vocab_size() != vocab_size:
        raise Refusal(
            f"tokenizer: the texts have pairs for {inner.get_vocab_size()} tokens only; "
            f"give more text or ask for fewer than vocab_size={vocab_size}"
        )
    write_atomic(path, inner.to_str(pretty=True))
    return Tokenizer.load(path)


def adopt(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    pattern: str | None = None,
    special_tokens: Mapping[str, int] | None = None,
) -> Tokenizer:
    """Write someone else's tokenizer to `path` as tokenizer.json and load it: a copy, or made of a tiktoken file.

    Refuses, and writes nothing, where ``Tokenizer.load`` does or texts would lose something.

    A tiktoken file (``.tiktoken``, ``tiktoken.model``) is lines of a token in base64 and its rank. What it does not
    hold is given here: the `pattern` that splits texts, unless its name is in `TIKTOKEN_PATTERNS`, and the ids of
    special tokens, where end-of-text is not simply the next id.
    """
    source = Path(source)
    try:
        content = source.read_bytes()
    except OSError as error:
        raise Refusal(
            f"{source}: cannot be read ({error}); give the path of a tokenizer.json or tiktoken file"
        ) from None
    if source.suffix == ".tiktoken" or source.name == "tiktoken.model":
        pattern = pattern or TIKTOKEN_PATTERNS.get(source.stem)
        if pattern is None:
            raise Refusal(
                f"{source}: a tiktoken file does not say how texts are split; give its pattern "
                f"(known by name: {', '.join(TIKTOKEN_PATTERNS)})"
            )
        content = _of_ranks(_ranks(source, content), pattern, special_tokens or {}).to_str(pretty=True).encode()
    if not Tokenizer._of(content, source).require_lossless(source):
        logger.warning(
            "%s: changes texts to Unicode's normal form C before it encodes them; where accents were written on their "
            "own, tokens give back other bytes than the documents have",
            source,
        )
    write_atomic(path, content)
    return Tokenizer.load(path)


def _byte_level(model: models.Model, pattern: str) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    return inner


def _ranks(source: Path, content: bytes) -> dict[bytes, int]:
    """{token: rank} of a tiktoken file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split() if line.strip() else (b"", b"0")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise Refusal(
                f"{source}, line {number}: not a token in base64 and a rank; is it a tiktoken file?"
            ) from None
    ranks.pop(b"", None)
    if any(bytes([byte]) not in ranks for byte in range(256)) or len({*ranks.values()}) != len(ranks):
        raise Refusal(f"{source}: not every byte is a token, or two tokens have one rank; is it a tiktoken file?")
    return ranks


def _of_ranks(ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int]) -> tokenizers.Tokenizer:
    """tiktoken joins the two neighbours whose join has the least rank. As merges: every way to cut a token in two, in
    the order of ranks."""
    characters = _byte_characters()
    names = {
        token: "".join(characters[byte] for byte in token) for token in sorted(ranks, key=lambda token: ranks[token])
    }
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in names
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    specials = {END_OF_TEXT: max(ranks.values()) + 1} if not special_tokens else dict(special_tokens)
    vocabulary = {name: ranks[token] for token, name in names.items()} | specials
    # A whole word that is a token is taken as it is, whether or not merges lead to it.
    inner = _byte_level(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True), pattern)
    inner.add_special_tokens([*specials])
    return inner


def _byte_characters() -> list[str]:
    """The visible character that stands for each byte in a tokenizer.json (GPT-2's encoder.py): itself where it has
    one, the others from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]
