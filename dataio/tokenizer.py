"""Byte-level BPE for code and prose: train one, load one, and turn documents into tokens.

What the vocabulary is made for:

* every byte is a token, so any text encodes and decodes to itself; there is no unknown token and no normalisation;
* each digit is a token of its own: numbers are read by place, not by which digit groups were frequent;
* white space runs are split off before a word, all but the last space, so indentation is few tokens and the word after
  it is the same token as anywhere else; line breaks are runs of their own;
* `<|endoftext|>`, token 0, ends every document and begins none. Inside a text these characters are text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from dataio.types import TokenizerId
from stoker.errors import Refusal
from stoker.files import write_atomic

END_OF_TEXT = "<|endoftext|>"

#: Words with the one character before them, digits one by one, runs of signs, line breaks, other white space.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]+|[^\S\r\n]+(?!\S)|\s+"


class Tokenizer:
    """A tokenizer.json opened for use; see ``Tokenizer.load``."""

    def __init__(self, inner: tokenizers.Tokenizer, identity: TokenizerId) -> None:
        self._inner, self.id = inner, identity
        # Otherwise a document that merely mentions <|endoftext|> would be cut in two by it.
        inner.encode_special_tokens = True

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Open a tokenizer.json (`tokenizers` library). Refuses one that is missing, damaged or without end-of-text."""
        path = Path(path)
        try:
            content = path.read_bytes()
            inner = tokenizers.Tokenizer.from_buffer(content)
        except FileNotFoundError:
            raise Refusal(f"{path}: there is no tokenizer here; run `make data` or give the path of one") from None
        except Exception as error:  # the library raises nothing narrower
            raise Refusal(f"{path}: not a tokenizer.json that can be read ({error})") from None
        eos_id = inner.token_to_id(END_OF_TEXT)
        if eos_id is None:
            raise Refusal(f"{path}: the vocabulary has no {END_OF_TEXT}, with which every document ends")
        identity = TokenizerId(hashlib.sha256(content).hexdigest(), inner.get_vocab_size(), eos_id)
        return cls(inner, identity)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without end-of-text: a prompt."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """(tokens of all documents in a row: uint16 if ids fit, or uint32; tokens of each), end-of-text included."""
        dtype = np.uint16 if self.id.vocab_size <= 2**16 else np.uint32
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        documents = [np.array([*encoding.ids, self.id.eos_id], dtype) for encoding in encodings]
        lengths = np.array([len(document) for document in documents], np.int64)
        return np.concatenate(documents) if documents else np.empty(0, dtype), lengths

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        """Text of tokens; end-of-text shows as its name, bytes that are not UTF-8 as U+FFFD."""
        return self._inner.decode([int(token) for token in tokens], skip_special_tokens=False)


def train(texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str]) -> Tokenizer:
    """Train on `texts`, write tokenizer.json to `path` and load it. The same texts in order give the same file.

    Refuses texts too few for `vocab_size`.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise Refusal(f"tokenizer: vocab_size={vocab_size} must exceed the {len(alphabet)} bytes and {END_OF_TEXT}")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
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
