"""Text from a run: sampling with recurrent state and key/value cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.data import TOKENIZER
from pretrain.model.chunk import Chunk
from pretrain.model.decode import Decoder
from pretrain.restore import restore
from stoker.errors import Refusal

EOS = "<|endoftext|>"


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_p`` keeps the likeliest tokens whose probabilities reach it. Each prompt draws
    from a generator of its own, so that it does not depend on what is generated beside it."""

    max_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise Refusal(f"max_tokens={self.max_tokens} must be at least 1")
        if self.temperature < 0:
            raise Refusal(f"temperature={self.temperature} must be 0 (greedy) or more")
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
    continued = sample(restored.model, encoded, sampling, eos=tokenizer.token_to_id(EOS))
    return [tokenizer.decode(ids) for ids in continued]


def sample(model: Chunk, prompts: list[list[int]], sampling: Sampling, eos: int | None) -> list[list[int]]:
    """New tokens after each prompt, up to ``max_tokens`` or the end-of-text token, which is not returned."""
    decoder = Decoder(model)
    generators = [torch.Generator().manual_seed(sampling.seed + index) for index in range(len(prompts))]
    logits = decoder.prefill(prompts)
    new: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for position in range(sampling.max_tokens):
        tokens = [choose(row, sampling, generator) for row, generator in zip(logits.cpu(), generators, strict=True)]
        ended = [done or token == eos for done, token in zip(ended, tokens, strict=True)]
        for sequence, token, done in zip(new, tokens, ended, strict=True):
            if not done:
                sequence.append(token)
        if all(ended) or position + 1 == sampling.max_tokens:
            break
        logits = decoder.step(torch.tensor(tokens, device=logits.device))
    return new


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from ``logits [vocabulary]``."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits.double() / sampling.temperature).softmax(-1)
    ordered, indices = probabilities.sort(descending=True, stable=True)
    # A token is kept while those before it have not reached top_p; the likeliest always is.
    ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0
    return int(indices[torch.multinomial(ordered, 1, generator=generator)])
