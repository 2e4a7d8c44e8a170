"""Embedding and head with the vocabulary split over tensor ranks, unevenly where it does not divide."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from parallel.planning.layout import Layout
from pretrain.model.build import Build
from pretrain.model.stream import Stream


class Vocabulary:
    """The token ids ``[start, stop)`` whose rows this rank holds; rows beyond are padding of the allocation."""

    def __init__(self, layout: Layout, coords: dict[str, int]) -> None:
        slices = layout.slices(coords)
        self.start, self.stop = (slices[0].start[0], slices[0].stop[0]) if slices else (0, 0)

    @property
    def rows(self) -> int:
        return self.stop - self.start


class Embedding(nn.Module):
    """tokens [N] -> stream [n, D]."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.weight = build.parameter("embed.weight")
        self._mine = Vocabulary(build.layouts["embed.weight"], build.groups.coords)
        self._stream = Stream(build.groups)
        self._whole = build.groups.size("tp") == 1

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._whole:
            return F.embedding(tokens, self.weight)
        foreign = (tokens < self._mine.start) | (tokens >= self._mine.stop)
        rows = F.embedding((tokens - self._mine.start).masked_fill(foreign, 0), self.weight)
        return self._stream.write(rows.masked_fill(foreign[:, None], 0))


class Head(nn.Module):
    """stream [n, D] -> this rank's logits [N, vocabulary rows]; ``weight`` is the embedding's if tied."""

    def __init__(self, build: Build, name: str, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = build.parameter(name) if weight is None else weight
        self.vocabulary = Vocabulary(build.layouts[name], build.groups.coords)
        self._stream = Stream(build.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self._stream.read(x), self.weight[: self.vocabulary.rows])
