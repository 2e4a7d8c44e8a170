"""Pairs of segments and their fold, as callers use them: :func:`segment_pairs`, :func:`fold`, :func:`reverse_fold`.

The pair needs no kernel of its own: the delta rule on K more value columns, with v = 0 and I as initial state there,
ends with M in those columns and B in the others; what it outputs there is how each token reads the entering state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels import registry
from kernels.gated_delta.op import gated_delta
from kernels.kda.op import kda
from kernels.precision import compute_dtype
from kernels.segment_scan import fold as folds
from kernels.segment_scan.reference import fold_reference, segment_pairs_reference
from stoker.errors import Refusal


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``gated_delta`` for g [N, Hv], ``kda`` for g [N, Hv, K]."""
    return (gated_delta if g.dim() == 2 else kda)(q, k, v, g, beta, cu_seqlens, initial_state, scale)


def segment_pairs(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """What each segment does to the state that enters it, ``S_out = M S_in + B``; differentiable.

    k [N, Hk, K]; v [N, Hv, V]; g (log decay, <= 0) [N, Hv] or, per key channel, [N, Hv, K]; beta [N, Hv]; cu_seqlens
    [S+1]. Returns M [S, Hv, K, K] and B [S, Hv, K, V] in float32 (float64 for float64 inputs), computed in that dtype
    whatever the inputs' own: M is multiplied with itself along a sequence. An empty segment gives (I, 0). Refusal as
    ``gated_delta`` and ``kda``.
    """
    chosen = registry.choose("segment_pairs", k.device, k.dtype, (k.shape[2], v.shape[2]))
    M, B = chosen.run(k, v, g, beta, cu_seqlens)
    return M, B


def affine_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """M and B of :func:`segment_pairs`, and read [N, Hv, K]: the output of a token is what it would be for the entering
    state zero plus ``read^T S_in``. ``dtype``: of the operands and of read; that of M and B, if None."""
    real = compute_dtype(k.dtype)
    dtype = dtype or real
    (Hv, V), K, S = v.shape[1:], k.shape[2], cu_seqlens.shape[0] - 1
    identity = pad(torch.eye(K, dtype=real, device=k.device), (V, 0)).expand(S, Hv, K, V + K)
    values = pad(v.to(dtype), (0, K))
    o, final = delta_rule(q.to(dtype), k.to(dtype), values, g, beta, cu_seqlens, identity, scale)
    # Copies: a view of o would keep its other columns alive until the backward.
    return final[..., V:].contiguous(), final[..., :V].contiguous(), o[..., V:].contiguous()


def _extended(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return affine_pass(k, k, v, g, beta, cu_seqlens)[:2]


def fold(M: Tensor, B: Tensor, first: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The states between consecutive pieces of sequences, from the pieces' pairs; differentiable in all but ``first``.

    M [P, H, K, K] and B [P, H, K, V] in order of the tokens, whoever computed them: of one rank, or of all ranks
    concatenated. first, integers [Q+1] from 0 to P: sequence s is made of the pieces [first[s], first[s+1]), possibly
    none. initial [Q, H, K, V] (zeros if None). Returns entering [P, H, K, V] (``initial`` for the first piece of a
    sequence) and final [Q, H, K, V]. Refusal if shapes disagree, if the pairs are not float32 or float64 alike, or if
    ``first`` does not rise from 0 to P.

    >>> entering, final = fold(*segment_pairs(k, v, g, beta, pieces.bounds), pieces.first)
    """
    _check(M, B, first, initial)
    chosen = registry.choose("segment_fold", B.device, B.dtype, tuple(B.shape[2:]))
    entering, final = chosen.run(M, B, first, None if initial is None else initial.to(B.dtype))
    return entering, final


def reverse_fold(
    M: Tensor,
    dlocal: Tensor,
    first: Tensor,
    dfinal: Tensor | None = None,
    run: Callable[..., tuple[Tensor, Tensor]] = fold,
) -> tuple[Tensor, Tensor]:
    """Cotangents of the states between pieces: dS_in = M^T dS_out + dlocal, from the last piece to the first.

    dlocal [P, H, K, V]: what each piece's own outputs give to its entering state; dfinal [Q, H, K, V]. Returns
    dleaving [P, H, K, V], of the state that leaves each piece, and dinitial [Q, H, K, V]. It is :func:`fold` of the
    list read backwards; ``run``: the implementation to use."""
    last = len(M) - first.flip(0)
    dleaving, dinitial = run(M.flip(0).mT, dlocal.flip(0), last, None if dfinal is None else dfinal.flip(0))
    return dleaving.flip(0), dinitial.flip(0)


def _check(M: Tensor, B: Tensor, first: Tensor, initial: Tensor | None) -> None:
    P, H, K, V = B.shape
    expected = {"M": (M, (P, H, K, K)), "initial": (initial, (first.shape[0] - 1, H, K, V))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise Refusal(f"fold: {name} has shape {tuple(tensor.shape)}, B and first ask for {shape}")
    if not M.dtype == B.dtype == compute_dtype(B.dtype):
        raise Refusal(
            f"fold: M is {M.dtype} and B is {B.dtype}, they must be float32 or float64 alike: M is multiplied with "
            "itself along the sequence, keep pairs as segment_pairs returns them"
        )


@torch.library.custom_op("stoker::segment_fold", mutates_args=())
def segment_fold(
    M: Tensor, B: Tensor, first: Tensor, initial: Tensor | None, block: int | None
) -> tuple[Tensor, Tensor]:
    """:func:`fold` by ``folds.two_level`` in blocks of ``block`` pieces, by ``folds.sequential`` if None."""
    bounds = first.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(M) or bounds != sorted(bounds):
        raise Refusal(
            f"fold: first={bounds[:8]}{'...' if len(bounds) > 8 else ''} must rise from 0 to the number of pieces, "
            f"{len(M)}: pass the first piece of every sequence and the end of the last"
        )
    if block is None:
        return folds.sequential(M, B, first, initial)
    return folds.two_level(M, B, first, initial, block)


@segment_fold.register_fake
def _(M: Tensor, B: Tensor, first: Tensor, initial: Tensor | None, block: int | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(B), B.new_empty(first.shape[0] - 1, *B.shape[1:])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    M, _, first, initial, ctx.block = inputs
    ctx.save_for_backward(M, first, output[0])
    ctx.has_initial = initial is not None


def _backward(ctx: Any, dentering: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    M, first, entering = ctx.saved_tensors
    dB, dinitial = reverse_fold(M, dentering, first, dfinal, partial(segment_fold, block=ctx.block))
    dM = dB @ entering.mT if ctx.needs_input_grad[0] else None
    return dM, dB, None, dinitial if ctx.has_initial else None, None


segment_fold.register_autograd(_backward, setup_context=_save_for_backward)


def _two_level(M: Tensor, B: Tensor, first: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    return segment_fold(M, B, first, initial, max(1, math.isqrt(len(M))))


registry.register("segment_pairs", registry.Implementation("extended", _extended))
registry.register("segment_pairs", registry.Implementation("reference", segment_pairs_reference))
registry.register(
    "segment_fold",
    registry.Implementation(
        "sequential",
        partial(segment_fold, block=None),
        cost={"cuda": "one small product per piece of the longest sequence, and a host read of first"},
    ),
)
registry.register("segment_fold", registry.Implementation("two_level", _two_level))
registry.register("segment_fold", registry.Implementation("reference", fold_reference))
