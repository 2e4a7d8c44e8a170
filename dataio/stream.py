"""The data of a run, step by step: ``BlendedStream`` for training, ``SequentialStream`` for a pass over held-out text.

    data log + step --plan--> addresses of the global batch --read(part)--> tokens, targets, masks, boundaries

`plan` is arithmetic on the data log: any step at any time, on any rank, with the same result. `read` copies the windows
of one part. Neither knows of layouts, workers or micro-batches beyond the ``Part`` it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from dataio.blend import Blend
from dataio.log import DataLog
from dataio.order import Cursor, Order, Walk
from dataio.store import Store
from dataio.types import Batch, BatchPlan, Part
from stoker import formats
from stoker.errors import Refusal

FORMAT = "stoker.stream_state"
VERSION_READ = 1


def _require_data(log: DataLog, name: str, dataset_id: str, store: Store | None) -> None:
    where = log.path or "the data log"
    if store is None:
        raise Refusal(f"{where} draws from the source {name}, and no store is given for it; add its path to data.blend")
    if store.dataset_id != dataset_id:
        raise Refusal(
            f"{store.path}: not the data that {where} names as {name} (data set {store.dataset_id[:12]}, the log has "
            f"{dataset_id[:12]}); point {name} to the store of this run, or start another run"
        )
    if store.tokenizer != log.tokenizer:
        raise Refusal(
            f"{store.path}: made with the tokenizer {store.tokenizer.sha256[:12]}, and the run uses "
            f"{log.tokenizer.sha256[:12]}; prepare the store with the run's tokenizer"
        )


@dataclass(frozen=True)
class _Segment:
    """A segment of the log made ready: where each of its sources is read from."""

    from_step: int
    global_batch: int
    seq_len: int
    first_draw: int  # draws of the run before it, those passed over included
    blend: Blend
    walks: tuple[Walk, ...]
    sources: NDArray[np.int16]  # index in the stream's sources of each source of the blend


class BlendedStream:
    """The ``TokenStream`` of a run: the sources of `stores`, in the order that the data log states."""

    def __init__(self, log: DataLog, stores: Mapping[str, Store]) -> None:
        """Refuses a store that is missing from `stores`, or is not the data or the tokenizer that the log names."""
        names = dict.fromkeys(name for segment in log.standing for name in sorted(segment.blend))
        for segment in log.standing:
            for name, dataset_id in segment.datasets.items():
                _require_data(log, name, dataset_id, stores.get(name))
        self.log = log
        self._sources = tuple(names)
        self._stores = tuple(stores[name] for name in names)
        self._segments = self._prepare()

    @property
    def sources(self) -> tuple[str, ...]:
        return self._sources

    def _prepare(self) -> list[_Segment]:
        log = self.log
        orders = {
            name: Order(name, store.num_tokens, log.seed, log.block_tokens, log.group_blocks)
            for name, store in zip(self._sources, self._stores)
        }
        cursors = dict.fromkeys(self._sources, Cursor())
        prepared: list[_Segment] = []
        for segment in log.standing:
            first_draw = 0
            if prepared:
                before = prepared[-1]
                draws = (segment.from_step - before.from_step + segment.skip_batches) * before.global_batch
                first_draw = before.first_draw + draws
                for index, walk in enumerate(before.walks):
                    cursors[walk.order.name] = walk.advance(before.blend.count(index, draws))
            names = sorted(segment.blend)
            prepared.append(
                _Segment(
                    segment.from_step,
                    segment.global_batch,
                    segment.seq_len,
                    first_draw,
                    Blend(tuple(segment.blend[name] for name in names)),
                    tuple(Walk(orders[name], segment.seq_len, cursors[name]) for name in names),
                    np.array([self._sources.index(name) for name in names], np.int16),
                )
            )
        return prepared

    def plan(self, step: int) -> BatchPlan:
        """Addresses of the global batch of `step`."""
        if step < 0:
            raise IndexError(f"there is no step {step}")
        segment = self._segments[self.log.segment_at(step)]
        G = segment.global_batch
        first = (step - segment.from_step) * G
        drawn = segment.blend.sources(first, first + G)
        epoch, start, length = np.empty(G, np.int32), np.empty(G, np.int64), np.empty(G, np.int32)
        for index, walk in enumerate(segment.walks):
            low, high = (segment.blend.count(index, draws) for draws in (first, first + G))
            rows = drawn == index
            epoch[rows], start[rows], length[rows] = walk.windows(low, high)
        sample_id = segment.first_draw + first + np.arange(G)
        return BatchPlan(step, segment.seq_len, segment.sources[drawn], epoch, start, length, sample_id)

    def read(self, plan: BatchPlan, part: Part) -> Batch:
        """The tokens of one part of a plan."""
        return read_windows(self._stores, plan, part)

    def step_of(self, source: str, token: int, epoch: int = 0) -> tuple[int, int] | None:
        """(step, row) at which `token` of a source is a target in its `epoch`-th reading; None if it is passed over.

        Answers as the log stands: a later segment may still change what is to come. Token 0 is never a target.
        """
        for number, segment in enumerate(self._segments):
            names = [walk.order.name for walk in segment.walks]
            if source not in names or token < 1:
                continue
            index = names.index(source)
            window = segment.walks[index].locate(epoch, token - 1)
            if window is None:
                return None  # read or passed over before this segment; an earlier one would have returned it
            step, row = divmod(segment.blend.draw_of(index, window), segment.global_batch)
            step += segment.from_step
            if self.log.segment_at(step) == number:
                return step, row
        return None

    def progress(self, step: int) -> dict[str, dict[str, float]]:
        """Per source, what the steps before `step` read: `draws` of windows, and `epochs` (2.5: half of the third).

        Batches that were passed over count.
        """
        report: dict[str, dict[str, float]] = {name: {"draws": 0, "epochs": 0.0} for name in self._sources}
        last = self.log.segment_at(step)
        for number, segment in enumerate(self._segments[: last + 1]):
            draws = (step - segment.from_step) * segment.global_batch
            if number < last:
                draws = self._segments[number + 1].first_draw - segment.first_draw
            for index, walk in enumerate(segment.walks):
                drawn = segment.blend.count(index, draws)
                entry = report[walk.order.name]
                entry["draws"] += drawn
                entry["epochs"] = walk.order.epochs(walk.advance(drawn))
        return report

    def state_dict(self) -> dict[str, Any]:
        """All that `plan` depends on besides the step, by hash: below 2 KB whatever the number of sources.

        The log names the data set of every source, so its hash covers them too.
        """
        return {
            "format": formats.stamp(FORMAT, VERSION_READ),
            "seed": self.log.seed,
            "tokenizer_sha256": self.log.tokenizer.sha256,
            "segments": len(self.log.segments),
            "log_sha256": self.log.hash(),
        }

    def require_state(self, state: Mapping[str, Any], next_step: int, where: str = "checkpoint") -> None:
        """Refuse to go on at `next_step` from a state (of `where`) whose data this stream does not continue.

        The log may have grown since, for steps to come; what it had then must be unchanged.
        """
        formats.require(state, FORMAT, VERSION_READ, where)
        segments = state["segments"]
        if state["tokenizer_sha256"] != self.log.tokenizer.sha256:
            raise Refusal(
                f"{where}: trained with another tokenizer than the data log names; use the run's own tokenizer"
            )
        if state["seed"] != self.log.seed:
            raise Refusal(
                f"{where}: data seed {state['seed']}, and the data log has {self.log.seed}; a seed is for a run"
            )
        if segments > len(self.log.segments) or state["log_sha256"] != self.log.hash(segments):
            raise Refusal(
                f"{where}: its data log ({segments} segments) is not the beginning of {self.log.path or 'this one'}; "
                "restore the run's data_log.jsonl"
            )
        self.require_future(segments, next_step)

    def require_future(self, known: int, next_step: int) -> None:
        """Refuse a log whose lines after the first `known` hold from a step before `next_step`: that is history."""
        late = [segment.from_step for segment in self.log.segments[known:] if segment.from_step < next_step]
        if late:
            raise Refusal(
                f"{self.log.path or 'data log'}: an entry holds from step {min(late)}, which has begun; an entry can "
                f"hold from step {next_step} at the earliest: take that line out"
            )


class SequentialStream:
    """One pass over one store, front to back: a ``TokenStream`` for evaluation. Every target is read exactly once.

    ``num_steps`` steps of `global_batch` windows; rows beyond the last window are padding. `windows`: stop after so
    many (None: the whole store), however they fall into batches.
    """

    def __init__(self, store: Store, seq_len: int, global_batch: int, windows: int | None = None) -> None:
        if seq_len < 1 or global_batch < 1:
            raise Refusal(f"evaluation: seq_len={seq_len} and global_batch={global_batch} must be at least 1")
        self.store, self.seq_len, self.global_batch = store, seq_len, global_batch
        self.num_inputs = store.num_tokens - 1
        if windows is not None:
            self.num_inputs = min(self.num_inputs, windows * seq_len)
        self.num_steps = -(-self.num_inputs // (seq_len * global_batch))

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.store.source,)

    def plan(self, step: int) -> BatchPlan:
        """Addresses of the windows [step * G, (step + 1) * G)."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"there is no step {step} in the {self.num_steps} of this pass")
        G = self.global_batch
        sample_id = step * G + np.arange(G)
        start = np.minimum(sample_id * self.seq_len, self.num_inputs)
        length = np.minimum(self.num_inputs - start, self.seq_len).astype(np.int32)
        return BatchPlan(step, self.seq_len, np.zeros(G, np.int16), np.zeros(G, np.int32), start, length, sample_id)

    def read(self, plan: BatchPlan, part: Part) -> Batch:
        """The tokens of one part of a plan."""
        return read_windows((self.store,), plan, part)

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": formats.stamp("stoker.sequential_state", 1),
            "dataset_id": self.store.dataset_id,
            "seq_len": self.seq_len,
            "global_batch": self.global_batch,
        }


def read_windows(stores: Sequence[Store], plan: BatchPlan, part: Part) -> Batch:
    """Read the rows of `part` (n windows of T) from `stores`, indexed by the plan's `source`."""
    rows = part.rows(plan.global_batch)
    source, start, length = plan.source[rows], plan.start[rows], plan.length[rows]
    n, T = len(start), plan.seq_len
    read = np.zeros((n, T + 1), np.int32)
    loss_mask = np.zeros((n, T), np.bool_)
    positions = np.empty((n, T), np.int32)
    doc_index = np.empty((n, T), np.int32)
    for number in np.unique(source):
        store, chosen = stores[number], np.flatnonzero(source == number)
        starts, lengths = start[chosen], length[chosen].astype(np.int64)
        read[chosen] = store.gather(starts, np.where(lengths > 0, lengths + 1, 0), T + 1)
        documents, doc_offsets, doc_masked = store.documents_of(starts, lengths)
        _annotate(chosen, starts, lengths, documents, doc_offsets, doc_masked, loss_mask, positions, doc_index)
    padded = doc_index < 0
    return Batch(
        tokens=np.where(padded, 0, read[:, :-1]),
        targets=np.where(padded, 0, read[:, 1:]),
        loss_mask=loss_mask,
        positions=positions,
        doc_index=doc_index,
        cu_seqlens=[
            _boundaries(positions[first : first + part.micro_batch]) for first in range(0, n, part.micro_batch)
        ],
        sample_id=plan.sample_id[rows],
        source=source,
    )


def _boundaries(positions: NDArray[np.int32]) -> NDArray[np.int32]:
    """[segments + 1] where segments begin in the flattened rows, and their end."""
    return np.append(np.flatnonzero(positions.ravel() == 0), positions.size).astype(np.int32)


@numba.njit(nogil=True, cache=True)
def _annotate(rows, starts, lengths, documents, doc_offsets, doc_masked, loss_mask, positions, doc_index):  # type: ignore[no-untyped-def]
    """Fill `loss_mask`, `positions` and `doc_index` [*, T] at `rows` for the inputs [starts, starts + lengths).

    `documents`: the document of each window's first input.
    """
    T = positions.shape[1]
    for j in range(len(rows)):
        row, document, index, position = rows[j], documents[j], 0, 0
        for t in range(lengths[j]):
            token = starts[j] + t
            if token == doc_offsets[document + 1]:
                document += 1
                position = 0
                index += 1
            positions[row, t] = position
            doc_index[row, t] = index
            loss_mask[row, t] = token + 1 != doc_offsets[document + 1] and not doc_masked[document]
            position += 1
        for t in range(lengths[j], T):
            positions[row, t] = t - lengths[j]
            doc_index[row, t] = -1
