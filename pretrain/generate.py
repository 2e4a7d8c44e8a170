"""Text from a run: sampling with recurrent state and key/value cache."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.data import TOKENIZER
from pretrain.model.chunk import Chunk
from pretrain.model.decode import Decoder
from pretrain.restore import restore
from stoker.errors import Refusal


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_p`` keeps the likeliest tokens whose probabilities reach it. Each prompt draws
    from a generator of its own, seeded by ``seed`` and its tokens, so that neither its place nor what is generated
    beside it matters."""

    max_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise Refusal(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise Refusal(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise Refusal(f"top_p={self.top_p} must lie in (0, 1]")


def generate(
    run_dir: Path,
    prompts: list[str],
    *,
    step: int | None = None,
    max_tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[str]:
    """The continuation of each prompt, from the checkpoint of ``step`` or the newest, with the tokenizer in it."""
    from tokenizers import Tokenizer

    sampling = Sampling(max_tokens, temperature, top_p, seed)
    restored = restore(run_dir, step)
    tokenizer = Tokenizer.from_str(restored.file(TOKENIZER).decode())
    encoded = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise Refusal(f"prompt {prompt!r} has no tokens: give at least one character")
    meta = restored.store.meta(restored.step)
    continued = sample(restored.model, encoded, sampling, meta["eos_id"], tokenizer.get_vocab_size())
    return [tokenizer.decode(ids) for ids in continued]


def sample(
    model: Chunk, prompts: list[list[int]], sampling: Sampling, eos: int | None, vocab_size: int | None = None
) -> list[list[int]]:
    """New tokens after each prompt, up to ``max_tokens`` or the end-of-text token, which is not returned.

    ``vocab_size``: of the tokenizer, where the model's is larger; ids beyond it are never chosen.
    """
    decoder = Decoder(model)
    generators = [torch.Generator().manual_seed(_seed(sampling.seed, prompt)) for prompt in prompts]
    logits = decoder.prefill(prompts)
    new: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for position in range(sampling.max_tokens):
        rows = logits.cpu()[:, :vocab_size]
        tokens = [choose(row, sampling, generator) for row, generator in zip(rows, generators, strict=True)]
        ended = [done or token == eos for done, token in zip(ended, tokens, strict=True)]
        for sequence, token, done in zip(new, tokens, ended, strict=True):
            if not done:
                sequence.append(token)
        if all(ended) or position + 1 == sampling.max_tokens:
            break
        logits = decoder.step(torch.tensor(tokens, device=logits.device))
    return new


def _seed(seed: int, prompt: list[int]) -> int:
    digest = hashlib.sha256(f"stoker.generate/{seed}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from ``logits [vocabulary]``."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.double() / sampling.temperature).softmax(-1)
    ordered, indices = probabilities.sort(descending=True, stable=True)
    # A token is kept while those before it have not reached top_p; the likeliest always is.
    ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0
    return int(indices[torch.multinomial(ordered, 1, generator=generator)])
