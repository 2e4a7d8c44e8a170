"""Micro-batches whose activations a pipeline rank holds, at every moment that could be the worst."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from parallel.planning.schedule import warm_up


@dataclass(frozen=True, eq=False)
class Flight:
    """``counts [pp, moments, vpp]``: micro-batches that each chunk of a rank holds between a forward pass, of chunk
    ``forward [pp, moments]``, and the backward pass that follows, of chunk ``backward [pp, moments]``."""

    counts: np.ndarray
    forward: np.ndarray
    backward: np.ndarray


def flight(pp: int, vpp: int, micro_batches: int, group: int, zero_bubble: bool = False) -> Flight:
    """Of 1F1B, or interleaved 1F1B with ``group`` micro-batches a turn, as Megatron-core runs them. ``zero_bubble``:
    ZB-H1, in which every rank holds as many as the first (arXiv 2401.10241, section 2.1).

    Where a forward pass runs joined with a backward pass, to hide the exchange of experts, one fills as the other
    empties: it has started one pass earlier and holds as many.
    """
    # After the longest warm-up a schedule repeats itself from turn to turn, until the last one, which may be shorter.
    turns = warm_up(pp, micro_batches, vpp, group) // (group * vpp) + 2
    if micro_batches > turns * group:
        micro_batches = micro_batches % group + turns * group
    return _flight(pp, vpp, micro_batches, group, zero_bubble)


@lru_cache(maxsize=4096)
def _flight(pp: int, vpp: int, micro_batches: int, group: int, zero_bubble: bool) -> Flight:
    sizes = [min(group, micro_batches - first) for first in range(0, micro_batches, group)]
    forwards = np.concatenate([np.repeat(np.arange(vpp), size) for size in sizes])
    ranks = []
    for rank in range(pp):
        warm = warm_up(pp, micro_batches, vpp, group, 0 if zero_bubble else rank)
        ranks.append(_moments(forwards, min(warm, len(forwards) - 1), vpp))
    longest = max(map(len, ranks))
    table = np.stack([np.pad(rank, ((0, longest - len(rank)), (0, 0)), mode="edge") for rank in ranks])
    return Flight(table[..., :vpp].astype(float), table[..., vpp], table[..., vpp + 1])


def _moments(forwards: np.ndarray, warm: int, vpp: int) -> np.ndarray:
    """Rows (counts of each chunk, chunk run forward, chunk run back) of the moments after ``warm`` forward passes."""
    backwards = vpp - 1 - forwards
    started, ended = (np.cumsum(order[:, None] == np.arange(vpp), axis=0) for order in (forwards, backwards))
    ended = np.concatenate([np.zeros((1, vpp), dtype=int), ended])
    moments = len(forwards) - warm
    return np.column_stack([started[warm:] - ended[:moments], forwards[warm:], backwards[:moments]])
