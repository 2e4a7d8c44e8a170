"""A micro-batch as the model sees it: packed tokens of whole windows, and the global normalisers of the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.objective import Normalisers


@dataclass(frozen=True)
class MicroBatch:
    """``N = windows * T`` tokens, window after window.

    tokens, targets, positions int64 [N]; loss_mask bool [N], true where the target counts; valid bool [N], false on
    padding; document int64 [N], equal within a document of a window and different between documents of it;
    cu_seqlens int64 [S + 1], the documents' bounds, a window's start always one.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    loss_mask: torch.Tensor
    valid: torch.Tensor
    document: torch.Tensor
    cu_seqlens: torch.Tensor
    windows: int
    normalisers: Normalisers

    @property
    def window_tokens(self) -> int:
        return self.tokens.shape[0] // self.windows
