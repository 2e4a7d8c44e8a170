"""The data log: what a run has read and is to read, as an append-only file of segments.

`data_log.jsonl` holds a header (seed, tokenizer, block size: fixed for the run) and then one segment a line, each with
the step from which it holds. Changing the blend, the sequence length or the global batch, and passing over batches that
did harm, is to append a segment; nothing is ever rewritten, and no segment may hold from a step that has begun. A
segment takes the place of earlier lines that were to hold from its step or a later one: so a plan is changed. The
order of the data is a function of this log and the step alone.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataio.blend import quantise
from dataio.order import BLOCK_TOKENS, GROUP_BLOCKS, require_seq_len
from dataio.types import TokenizerId
from stoker import canonical, formats
from stoker.errors import Refusal
from stoker.files import append_line, parse_jsonl, write_atomic

FORMAT = "stoker.data_log"
VERSION_READ = 1


@dataclass(frozen=True)
class Segment:
    """What holds from `from_step` on. `blend` is drawn by these integers; `datasets` says which data the names mean.

    `skip_batches` batches of the segment before, from its end, are passed over and never read.
    """

    from_step: int
    seq_len: int
    global_batch: int  # windows
    blend: Mapping[str, int]
    datasets: Mapping[str, str]  # name -> dataset_id of its store
    skip_batches: int = 0

    def __post_init__(self) -> None:
        if self.from_step < 0 or self.skip_batches < 0:
            raise Refusal(f"data log: from_step={self.from_step}, skip_batches={self.skip_batches}: both count from 0")
        if self.global_batch < 1:
            raise Refusal(f"data log: global_batch={self.global_batch} must be at least one window")
        if not self.blend or set(self.blend) != set(self.datasets):
            raise Refusal(
                f"data log: blend of {sorted(self.blend)} but data for {sorted(self.datasets)}; they must agree"
            )

    @classmethod
    def of(
        cls,
        from_step: int,
        seq_len: int,
        global_batch: int,
        weights: Mapping[str, float],
        datasets: Mapping[str, str],
        skip_batches: int = 0,
    ) -> Segment:
        """A segment from weights of any scale; see ``blend.quantise``."""
        names = sorted(weights)
        kept = {name: datasets[name] for name in names if name in datasets}
        return cls(from_step, seq_len, global_batch, quantise({n: weights[n] for n in names}), kept, skip_batches)


@dataclass(frozen=True)
class DataLog:
    """Header and segments. The value is immutable; the file only grows (``append``)."""

    seed: int
    tokenizer: TokenizerId
    segments: tuple[Segment, ...]
    block_tokens: int = BLOCK_TOKENS
    group_blocks: int = GROUP_BLOCKS
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        standing = self.standing
        if not standing or standing[0].from_step != 0 or standing[0].skip_batches:
            raise Refusal(f"{self.path or 'data log'}: the first segment must hold from step 0 and skip nothing")
        for segment in self.segments:
            require_seq_len(segment.seq_len, self.block_tokens)

    @property
    def standing(self) -> tuple[Segment, ...]:
        """The segments that hold, in order of their steps: those that no later line took the place of."""
        standing: list[Segment] = []
        for segment in self.segments:
            while standing and standing[-1].from_step >= segment.from_step:
                standing.pop()
            standing.append(segment)
        return tuple(standing)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> DataLog:
        """Read a log. Refuses one that is missing, damaged or newer; a torn last line was never appended."""
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            raise Refusal(f"{path}: there is no data log; a run writes it when it starts") from None
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes, path: str | os.PathLike[str]) -> DataLog:
        """As ``open``, of what was read from `path` before."""
        path = Path(path)
        lines = parse_jsonl(content, path)
        if not lines:
            raise Refusal(f"{path}: the data log is empty; remove it to start the run again")
        header, *segments = lines
        formats.require(header, FORMAT, VERSION_READ, path)
        try:
            return cls(
                header["seed"],
                TokenizerId(**header["tokenizer"]),
                tuple(Segment(**segment) for segment in segments),
                header["block_tokens"],
                header["group_blocks"],
                path,
            )
        except (KeyError, TypeError) as error:
            raise Refusal(f"{path}: damaged ({error} in a line); restore it from a copy of the run") from None

    def write(self, path: str | os.PathLike[str]) -> DataLog:
        """Start the file of a run with this log, and return the log with its path. Refuses an existing file. A run that
        is killed meanwhile has either no log or this one."""
        path = Path(path)
        if path.exists():
            raise Refusal(f"{path}: the run has a data log already; open it, or choose another run directory")
        write_atomic(path, "".join(f"{line}\n" for line in self._lines()))
        return DataLog(self.seed, self.tokenizer, self.segments, self.block_tokens, self.group_blocks, path)

    def append(self, segment: Segment, next_step: int) -> DataLog:
        """The log with one more segment, written to its file if it has one.

        `next_step` is the first step that has not begun. A segment that holds from an earlier one is refused: what that
        step read is history.
        """
        where = self.path or "data log"
        if segment.from_step < next_step:
            raise Refusal(
                f"{where}: step {segment.from_step} has begun; an entry can hold from step {next_step} at the earliest"
            )
        longer = DataLog(
            self.seed, self.tokenizer, (*self.segments, segment), self.block_tokens, self.group_blocks, self.path
        )
        if self.path is not None:
            if DataLog.open(self.path) != self:
                raise Refusal(f"{self.path}: the file is not the log that was read; open it again before appending")
            append_line(self.path, longer._lines()[-1], durable=True)
        return longer

    def segment_at(self, step: int) -> int:
        """Index in ``standing`` of the segment that holds at `step`."""
        return bisect_right([segment.from_step for segment in self.standing], step) - 1

    def hash(self, num_segments: int | None = None) -> str:
        """SHA-256 of the log up to its first `num_segments` segments (default: all): what a checkpoint remembers."""
        return canonical.sha256(self._lines()[: None if num_segments is None else num_segments + 1])

    def _lines(self) -> list[str]:
        header: dict[str, Any] = {
            "format": formats.stamp(FORMAT, VERSION_READ),
            "seed": self.seed,
            "tokenizer": vars(self.tokenizer),
            "block_tokens": self.block_tokens,
            "group_blocks": self.group_blocks,
        }
        return [canonical.dumps(header)] + [canonical.dumps(dict(vars(segment))) for segment in self.segments]
