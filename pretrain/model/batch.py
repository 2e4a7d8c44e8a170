"""A micro-batch as the model sees it: packed tokens of whole windows, and the global normalisers of the step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
    def attention_mask(self) -> torch.Tensor | None:
        """bool [windows, 1, T, T], true where a token may look: itself and what is before it in its document. None
        where every window is one document, and causal is all there is to say."""
        if len(self.cu_seqlens) - 1 == self.windows:
            return None
        document = self.document.view(self.windows, 1, -1)
        return (document[..., :, None] == document[..., None, :]).tril()
