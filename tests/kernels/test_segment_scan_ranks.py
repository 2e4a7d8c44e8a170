"""The delta rule over a packed stream that lies on several ranks: every rank computes the pairs of its own pieces and
one gather of pairs, forward, and of cotangents, backward, makes the whole exact."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.samples import cu_seqlens_of, gated_delta_inputs
from kernels.segment_scan.op import affine_pass, delta_rule, fold, reverse_fold
from kernels.segment_scan.split import segment_products
from kernels.tolerance import error
from tests.parity.pool import Pool

F64 = torch.float64
#: Tokens of each document and of each rank.
CASES = {
    "boundaries inside ranks": ([70, 5, 130, 20, 41], [100, 66, 100]),
    "boundaries at rank edges": ([100, 66, 40, 60], [100, 66, 100]),
    "one document over all": ([266], [65, 1, 200]),
    "a rank inside one document, empty documents": ([30, 0, 200, 0, 36], [50, 100, 116]),
    "a rank without a token": ([150, 116], [150, 0, 116]),
    "the last rank without a token": ([266], [150, 116, 0]),
    "one rank": ([70, 5, 65], [140]),
    "two ranks": ([64, 130, 1], [128, 67]),
    "six ranks": ([64, 3, 63, 130, 6], [64, 65, 1, 66, 35, 35]),
    "eight ranks, packed": ([40, 0, 129, 1, 96], [33, 7, 64, 65, 1, 31, 0, 65]),
    "eight ranks, one document": ([520], [65] * 8),
}
#: What a rank has to share, in order -> what all ranks shared, concatenated along the pieces.
Rank = Generator[Tensor, Tensor, dict[str, Tensor]]


def sample(lengths: Sequence[int], per_channel: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs whose states last over all ranks, and cotangents of o and the final states."""
    x = gated_delta_inputs(lengths, (1, 2), (8, 5), F64, "none")
    x["beta"] *= 0.05
    x["g"] -= 0.01
    if per_channel:
        x["g"] = x["g"].unsqueeze(-1) * torch.arange(8, dtype=F64)
    generator = torch.Generator().manual_seed(3)
    do, dfinal = (torch.randn(x[name].shape, generator=generator, dtype=F64) for name in ("v", "initial_state"))
    return x, do, dfinal


def cut_at(lengths: Sequence[int], rank_tokens: Sequence[int]) -> tuple[list[list[int]], Tensor]:
    """Boundaries of every rank's pieces (documents clipped to its tokens), and the first piece of every document in the
    list of all ranks' pieces."""
    ends = np.cumsum(lengths)
    of_rank = [
        [lo, *(int(end) for end in ends if lo < end < hi), hi] for lo, hi in pairwise([0, *accumulate(rank_tokens)])
    ]
    starts = [start for bounds in of_rank for start in bounds[:-1]]
    return of_rank, torch.tensor([0, *np.searchsorted(starts, ends[:-1]), len(starts)])


def program(rank: int, lengths: Sequence[int], rank_tokens: Sequence[int], per_channel: bool) -> Rank:
    """What one rank does, from its own tokens only: outputs, final states and gradients, by name."""
    x, do, dfinal = sample(lengths, per_channel)
    of_rank, first = cut_at(lengths, rank_tokens)
    bounds = torch.tensor(of_rank[rank])
    tokens = slice(int(bounds[0]), int(bounds[-1]))
    before = sum(len(other) - 1 for other in of_rank[:rank])
    pieces, bounds = slice(before, before + len(bounds) - 1), bounds - bounds[0]
    leaves = [x[name][tokens].requires_grad_() for name in ("q", "k", "v", "g", "beta")]

    with torch.no_grad():
        M, B, read = affine_pass(*leaves, bounds)
    pairs = yield torch.cat((M, B), -1)
    M_all, B_all = pairs.split((M.shape[-1], B.shape[-1]), -1)
    entering, final = fold(M_all, B_all, first, x["initial_state"])
    mine = entering[pieces].requires_grad_()
    o, leaving = delta_rule(*leaves, bounds, mine)
    dlocal = yield segment_products(read, do[tokens], bounds)
    dleaving, dinitial = reverse_fold(M_all, dlocal, first, dfinal)
    *gradients, _ = torch.autograd.grad((o, leaving), (*leaves, mine), (do[tokens], dleaving[pieces]))
    of_tokens = dict(zip(("o", "dq", "dk", "dv", "dg", "dbeta"), (o.detach(), *gradients), strict=True))
    return of_tokens | {"final": final, "dinitial_state": dinitial}


def whole(lengths: Sequence[int], per_channel: bool) -> dict[str, Tensor]:
    """The same from one call on one rank."""
    x, do, dfinal = sample(lengths, per_channel)
    leaves = {name: value.requires_grad_() for name, value in x.items()}
    o, final = delta_rule(**leaves, cu_seqlens=cu_seqlens_of(lengths))
    gradients = torch.autograd.grad((o, final), list(leaves.values()), (do, dfinal))
    return {"o": o, "final": final, **{f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}}


def worst_error(results: Sequence[dict[str, Tensor]], expected: dict[str, Tensor]) -> float:
    """Tokens of the ranks concatenated, states as each rank has them, against the whole."""
    errors = []
    for name, value in expected.items():
        if name in ("final", "dinitial_state"):
            errors += [error(result[name], value) for result in results]
        else:
            errors.append(error(torch.cat([result[name] for result in results]), value))
    return max(errors)


@pytest.mark.parametrize("per_channel", [False, True], ids=["scalar", "channel"])
@pytest.mark.parametrize("case", CASES)
def test_ranks_together_equal_one(case: str, per_channel: bool) -> None:
    """Ranks in lockstep in one process, float64, 1e-12: outputs, final states and every gradient."""
    lengths, rank_tokens = CASES[case]
    ranks = [program(rank, lengths, rank_tokens, per_channel) for rank in range(len(rank_tokens))]
    pairs = torch.cat([next(rank) for rank in ranks])
    shared = [rank.send(pairs) for rank in ranks]
    results = [_finish(rank, torch.cat(shared)) for rank in ranks]
    assert worst_error(results, whole(lengths, per_channel)) <= 1e-12


def _finish(rank: Rank, last: Tensor) -> dict[str, Tensor]:
    with pytest.raises(StopIteration) as stopped:
        rank.send(last)
    results: dict[str, Tensor] = stopped.value.value
    return results


def job(lengths: Sequence[int], rank_tokens: Sequence[int], per_channel: bool) -> float:
    """On every rank of a process group: :func:`program`, its gathers made by gloo."""
    import torch.distributed as dist

    def gather(value: Any) -> list[Any]:
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    rank = program(dist.get_rank(), lengths, rank_tokens, per_channel)
    cotangents = rank.send(torch.cat(gather(next(rank))))
    return worst_error(gather(_finish(rank, torch.cat(gather(cotangents)))), whole(lengths, per_channel))


def test_processes_equal_one() -> None:
    """One to eight processes over gloo, packed and dense, boundaries inside ranks and at their edges."""
    pool = Pool()
    try:
        for lengths, rank_tokens in CASES.values():
            for per_channel in (False, True):
                assert max(pool.run(len(rank_tokens), job, lengths, rank_tokens, per_channel)) <= 1e-12
    finally:
        pool.close()
