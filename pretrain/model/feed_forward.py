"""Dense SwiGLU feed-forward (arXiv 2002.05202), width split over tensor ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.model.batch import MicroBatch
from pretrain.model.build import Build
from pretrain.model.stream import Stream


class SwiGLU(nn.Module):
    """Partial sums [N, D] of down(silu(gate(x)) * up(x)) for x [N, D]."""

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = (build.parameter(f"{prefix}.{f}.weight") for f in ("gate", "up", "down"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class DenseFeedForward(nn.Module):
    """normed stream [n, D] -> branch output on the stream [n, D]."""

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__()
        self.swiglu = SwiGLU(build, prefix)
        self._stream = Stream(build.groups)

    def forward(self, x: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, None]:
        return self._stream.write(self.swiglu(self._stream.read(x))), None
