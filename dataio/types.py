"""What a trainer asks of the data and what it gets: ``TokenStream``, ``BatchPlan``, ``Part``, ``Batch``.

Legend: ``G`` windows in the global batch, ``n`` windows in a part, ``T`` inputs in a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stoker.errors import Refusal


@dataclass(frozen=True)
class TokenizerId:
    """Which tokenizer made the tokens: SHA-256 of its tokenizer.json, its vocabulary size, its end-of-text token."""

    sha256: str
    vocab_size: int
    eos_id: int

    def __post_init__(self) -> None:
        if not 0 <= self.eos_id < self.vocab_size <= 2**31:
            raise Refusal(
                f"tokenizer: eos_id={self.eos_id} and vocab_size={self.vocab_size} do not fit together: "
                "the end-of-text token is one of the vocabulary, and ids fit int32"
            )


@dataclass(frozen=True)
class Part:
    """One data rank's share of a global batch: windows [dp_index * G / dp_size, (dp_index + 1) * G / dp_size).

    `micro_batch` is the size of a micro-batch in windows. The default is the whole batch in micro-batches of one.
    """

    dp_index: int = 0
    dp_size: int = 1
    micro_batch: int = 1
    cp_index: int = 0
    cp_size: int = 1

    def __post_init__(self) -> None:
        for axis in ("dp", "cp"):
            index, size = getattr(self, f"{axis}_index"), getattr(self, f"{axis}_size")
            if not 0 <= index < size:
                raise Refusal(f"part: {axis}_index={index} does not lie in [0, {axis}_size={size})")
        if self.micro_batch < 1:
            raise Refusal(f"part: micro_batch={self.micro_batch} must be at least one window")
        if self.cp_size != 1:
            raise Refusal(f"part: cp_size={self.cp_size}: windows are not cut along time yet; use cp_size=1")

    def rows(self, global_batch: int) -> slice:
        """This part's rows of the plan. Refuses a global batch that dp_size * micro_batch does not divide."""
        unit = self.dp_size * self.micro_batch
        if global_batch % unit:
            below, above = global_batch // unit * unit, -(-global_batch // unit) * unit
            nearest = f"{below} or {above}" if below else f"{above}"
            raise Refusal(
                f"global batch {global_batch} is not a multiple of dp_size={self.dp_size} x "
                f"micro_batch={self.micro_batch}; the nearest that is: {nearest}"
            )
        share = global_batch // self.dp_size
        return slice(self.dp_index * share, (self.dp_index + 1) * share)


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """Addresses of a global batch; no token has been read. One row is one window.

    A window of `length` inputs reads the tokens [start, start + length] of its store: length + 1 of them, the last as
    a target only. A length below `seq_len` (end of a block that an earlier sequence length cut unevenly, or of the
    source) is padded to `seq_len`; length 0 is a row of padding only.
    """

    step: int
    seq_len: int
    source: NDArray[np.int16]  # [G] index in the stream's `sources`
    epoch: NDArray[np.int32]  # [G] how often the source had been read whole before
    start: NDArray[np.int64]  # [G] first input, as a position in the source's tokens
    length: NDArray[np.int32]  # [G] inputs, 0..T
    sample_id: NDArray[np.int64]  # [G] number of the draw, counted over the whole run: never used twice

    @property
    def global_batch(self) -> int:
        return len(self.start)


@dataclass(frozen=True, eq=False)
class Batch:
    """One part of a global batch, in the order of the plan; arrays are C-contiguous.

    Every document ends with the end-of-text token, which is a target; the first token of a document is not. A segment
    is what attention, convolution and recurrent state may not leave: a document's part inside one window, or padding.
    """

    tokens: NDArray[np.int32]  # [n, T] inputs; 0 where padded
    targets: NDArray[np.int32]  # [n, T] the token that follows each input; 0 where padded
    loss_mask: NDArray[np.bool_]  # [n, T] the target counts: not padding, not masked, not first of its document
    positions: NDArray[np.int32]  # [n, T] index within the segment: 0 starts a segment
    doc_index: NDArray[np.int32]  # [n, T] documents counted from 0 in each window; -1 is padding
    cu_seqlens: list[NDArray[np.int32]]  # per micro-batch [segments + 1], over its micro_batch * T flattened tokens
    sample_id: NDArray[np.int64]  # [n] as in the plan
    source: NDArray[np.int16]  # [n] as in the plan

    @property
    def padding(self) -> NDArray[np.bool_]:
        """[n, T], true where there is no token."""
        return self.doc_index < 0


class TokenStream(Protocol):
    """A pure function of the step: what a run reads, in an order that no layout, worker or restart can change."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names behind `source` in plans and batches."""
        ...

    def plan(self, step: int) -> BatchPlan:
        """Addresses of the global batch of `step` (from 0), at any step and in any order, without reading a token."""
        ...

    def read(self, plan: BatchPlan, part: Part) -> Batch:
        """The tokens of one part: reads G / dp_size windows and nothing else. Refuses damaged data, naming the file."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What `plan` depends on besides the step: plain JSON below 2 KB, equal on every rank."""
        ...
