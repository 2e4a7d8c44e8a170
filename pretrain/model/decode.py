"""Decoding with state: recurrent state for delta rules, a key/value cache for softmax layers.

One process holds the whole model. ``prefill`` reads the prompts as packed documents; ``step`` then takes one token a
sequence. Shapes: ``B`` sequences, ``N`` packed prompt tokens, ``D`` width, ``L`` tokens cached so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F

from kernels.decode.op import decode
from kernels.prologue.decode import prologue_step
from pretrain.model.attention import SoftmaxAttention, attend
from pretrain.model.batch import MicroBatch
from pretrain.model.chunk import Chunk, Layer
from pretrain.model.gated_delta import GatedDeltaMixer
from pretrain.model.kda import KdaMixer
from pretrain.objective import Normalisers


class MixerCache(Protocol):
    """A mixer's memory of what every sequence has read."""

    def prefill(self, x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """x [N, D], normed -> branch output [N, D]; remembers each document of ``batch`` as a sequence."""
        ...

    def step(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [B, D], positions [B] -> branch output [B, D]."""
        ...


class DeltaCache:
    """Of a delta rule: state [B, Hv, K, V] and the last W - 1 inputs of each convolution [B, C, W - 1], constant in the
    length read."""

    def __init__(self, mixer: GatedDeltaMixer | KdaMixer) -> None:
        self._mixer = mixer
        self._state = torch.empty(0)
        self._windows = self._state, self._state, self._state

    def prefill(self, x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        projected, before = self._mixer.project(x), self._mixer.spec.conv_width - 1
        q, k, v = (_last_rows(rows, batch.cu_seqlens, before).mT for rows in projected[:3])
        self._windows = q, k, v
        out, self._state = self._mixer.mix(projected, batch.cu_seqlens)
        return self._mixer.finish(out, x)

    def step(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        mixer = self._mixer
        entered = prologue_step(*mixer.project(x), *mixer.prologue_weights, self._windows, mixer.num_qk_heads)
        q, k, v, g, beta = (tensor[:, None] for tensor in entered)
        out = decode(q, k, v, g, beta, self._state)
        return mixer.finish(out[:, 0], x)


class AttentionCache:
    """Keys and values [B, L, G, K] of everything read, right-aligned in time; ``lengths [B]`` are the valid ones."""

    def __init__(self, mixer: SoftmaxAttention) -> None:
        self._mixer = mixer
        self._keys = self._values = torch.empty(0)
        self._valid = torch.empty(0, dtype=torch.bool)

    def prefill(self, x: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        q, k, v = self._mixer.project(x, batch.positions)
        lengths = batch.cu_seqlens.diff()
        L = int(lengths.max())
        self._keys, self._values = (_last_rows(rows, batch.cu_seqlens, L) for rows in (k, v))
        self._valid = torch.arange(L, device=x.device) >= (L - lengths)[:, None]
        return self._mixer.finish(attend(q, k, v, batch), x)

    def step(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q, k, v = self._mixer.project(x, positions)
        self._keys, self._values = (
            torch.cat([cached, new[:, None]], 1) for cached, new in ((self._keys, k), (self._values, v))
        )
        self._valid = torch.cat([self._valid, self._valid.new_ones(len(x), 1)], 1)
        out = F.scaled_dot_product_attention(
            q[:, :, None],
            self._keys.transpose(1, 2),
            self._values.transpose(1, 2),
            attn_mask=self._valid[:, None, None],
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return self._mixer.finish(out[:, :, 0], x)


@dataclass
class _CachedLayer:
    layer: Layer
    cache: MixerCache

    def read(self, x: torch.Tensor, mixed: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        x = x + mixed
        return x + self.layer.ffn(self.layer.ffn_norm(x), batch)[0]


class Decoder:
    """A whole model (one chunk, no parallelism) with its state over ``B`` sequences."""

    def __init__(self, model: Chunk) -> None:
        assert model.embedding is not None and model.head is not None and model.final_norm is not None
        self._embedding, self._norm, self._head = model.embedding, model.final_norm, model.head
        self._layers = [_CachedLayer(layer, _cache(layer)) for layer in model.layers if isinstance(layer, Layer)]
        self._positions = torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Read the prompts, none empty; logits [B, vocabulary] of the token after each."""
        batch = packed(prompts, self._head.weight.device)
        x = self._embedding(batch.tokens)
        for cached in self._layers:
            x = cached.read(x, cached.cache.prefill(cached.layer.mixer_norm(x), batch), batch)
        self._positions = batch.cu_seqlens.diff()
        return self._logits(x[batch.cu_seqlens[1:] - 1])

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B], one more of each sequence; logits [B, vocabulary] of the next."""
        batch = packed([[token] for token in tokens.tolist()], tokens.device)
        x = self._embedding(tokens)
        for cached in self._layers:
            x = cached.read(x, cached.cache.step(cached.layer.mixer_norm(x), self._positions), batch)
        self._positions = self._positions + 1
        return self._logits(x)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return self._head(self._norm(x))


def _cache(layer: Layer) -> MixerCache:
    if isinstance(layer.mixer, SoftmaxAttention):
        return AttentionCache(layer.mixer)
    assert isinstance(layer.mixer, GatedDeltaMixer | KdaMixer)
    return DeltaCache(layer.mixer)


def packed(documents: list[list[int]], device: torch.device) -> MicroBatch:
    """Documents as one window, nothing to predict."""
    lengths = torch.tensor([len(document) for document in documents])
    tokens = torch.tensor([token for document in documents for token in document], device=device)
    positions = torch.cat([torch.arange(int(length)) for length in lengths]).to(device)
    document = torch.repeat_interleave(torch.arange(len(documents)), lengths).to(device)
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    return MicroBatch(
        tokens=tokens,
        targets=torch.zeros_like(tokens),
        positions=positions,
        loss_mask=nothing,
        valid=~nothing,
        document=document,
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).to(device),
        windows=1,
        normalisers=Normalisers(targets=1, routed=len(tokens), windows=1),
    )


def _last_rows(rows: torch.Tensor, cu_seqlens: torch.Tensor, count: int) -> torch.Tensor:
    """[B, count, ...]: the last ``count`` rows of each segment of ``rows [N, ...]``, zeros before a shorter one."""
    out = rows.new_zeros(len(cu_seqlens) - 1, count, *rows.shape[1:])
    for index, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        kept = min(count, stop - start)
        out[index, count - kept :] = rows[stop - kept : stop]
    return out
