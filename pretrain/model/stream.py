"""How a branch of a layer reads and writes the residual stream under tensor parallelism.

The stream ``x [n, D]`` is either equal on every tensor rank (n = N tokens) or, with sequence parallelism, split by
tokens (n = N / tp). A tensor-parallel branch reads all N tokens and leaves partial sums of all N.
"""

from __future__ import annotations

import torch

from parallel.engine import collectives
from parallel.engine.groups import Groups


class Stream:
    def __init__(self, groups: Groups) -> None:
        self._tp = groups["tp"]
        self._split = groups.plan.sequence_parallel

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Stream -> all N tokens, to be multiplied with weights that are split over ``tp``."""
        return collectives.gather_rows(x, self._tp) if self._split else collectives.replicate_in(x, self._tp)

    def write(self, partial: torch.Tensor) -> torch.Tensor:
        """Partial sums of all N tokens -> stream."""
        reduce = collectives.reduce_scatter_rows if self._split else collectives.reduce_out
        return reduce(partial, self._tp)

    def own_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Stream -> the N / tp tokens that this rank alone works on."""
        return x if self._split else collectives.split_rows(x, self._tp)

    def merge_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The way back from ``own_tokens``."""
        return x if self._split else collectives.collect_rows(x, self._tp)

    def rows(self, total: int) -> slice:
        """Which of ``total`` tokens ``own_tokens`` keeps."""
        size = total // self._tp.size()
        return slice(self._tp.rank() * size, (self._tp.rank() + 1) * size)
