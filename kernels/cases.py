"""The cases on which every operator is checked: one function per operator, gathered in :data:`CASES`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from kernels.decode.op import decode
from kernels.epilogue.op import Activation, epilogue
from kernels.gated_delta.op import gated_delta
from kernels.kda.op import kda
from kernels.precision import compute_dtype
from kernels.prologue.op import prologue
from kernels.samples import Decay, cu_seqlens_of, epilogue_inputs, fold_inputs, gated_delta_inputs, prologue_inputs
from kernels.segment_scan.op import fold, segment_pairs
from kernels.segment_scan.split import split_delta


@dataclass(frozen=True)
class Case:
    """``call(**inputs, **constants)`` gives ``outputs``, and is differentiated by every input if ``differentiable``.
    ``shape``: what the operator hands to ``registry.choose``."""

    op: str
    name: str
    call: Callable[..., Any]
    inputs: dict[str, Tensor]
    constants: dict[str, Any]
    outputs: tuple[str, ...]
    shape: tuple[int, ...]
    differentiable: bool = True


#: Dims (K, V) that only torch runs, and those that the compiled kernels are built for.
ODD, BUILT, BUILT_WIDE = (16, 24), (64, 64), (128, 128)


def _dims(short: bool) -> Sequence[tuple[int, int]]:
    return (BUILT,) if short else (ODD, BUILT)


def _lengths(short: bool) -> list[int]:
    return [65, 1, 30] if short else [130, 1, 63, 64, 65]


def _decays(per_channel: bool) -> str:
    return "decay per channel" if per_channel else "decay per head"


def _delta_cases(
    op: str, call: Callable[..., Any], per_channel: bool, dtype: torch.dtype, short: bool
) -> Iterator[Case]:
    lengths = _lengths(short)
    decays: Sequence[Decay] = ("trained", "extreme") if short else ("trained", "none", "extreme")
    every = [((2, 2), ODD), ((1, 3), ODD), ((1, 3), BUILT), ((2, 2), BUILT_WIDE)]
    for (Hk, Hv), (K, V) in [((1, 2), BUILT)] if short else every:
        for decay in decays:
            inputs = gated_delta_inputs(lengths, (Hk, Hv), (K, V), dtype, decay, per_channel=per_channel)
            constants = {"cu_seqlens": cu_seqlens_of(lengths)}
            name = f"heads {Hk}/{Hv}, K={K}, V={V}, decay {decay}"
            yield Case(op, name, call, inputs, constants, ("o", "final_state"), (K, V))


def _pairs_cases(dtype: torch.dtype, short: bool) -> Iterator[Case]:
    lengths, K, V = [*_lengths(short), 0], 16, 24
    for per_channel in (False, True):
        inputs = gated_delta_inputs(lengths, (2, 4), (K, V), dtype, per_channel=per_channel)
        inputs = {name: inputs[name] for name in ("k", "v", "g", "beta")}
        constants = {"cu_seqlens": cu_seqlens_of(lengths)}
        yield Case("segment_pairs", _decays(per_channel), segment_pairs, inputs, constants, ("M", "B"), (K, V))


def _fold_cases(dtype: torch.dtype, short: bool) -> Iterator[Case]:
    if dtype == compute_dtype(dtype):
        K, V, first = 16, 24, cu_seqlens_of([5, 0, 1, 12])
        inputs, outputs = fold_inputs(18, 4, 3, (K, V), dtype), ("entering", "final")
        yield Case("segment_fold", "18 pieces of 4 sequences", fold, inputs, {"first": first}, outputs, (K, V))


def _split_cases(dtype: torch.dtype, short: bool) -> Iterator[Case]:
    lengths, K, V = _lengths(short), 16, 24
    for per_channel in (False, True):
        inputs = gated_delta_inputs(lengths, (2, 4), (K, V), dtype, per_channel=per_channel)
        constants = {"cu_seqlens": cu_seqlens_of(lengths), "piece_tokens": 64}
        outputs = ("o", "final_state")
        yield Case("split_delta", _decays(per_channel), split_delta, inputs, constants, outputs, (K, V))


def _decode_cases(dtype: torch.dtype, short: bool) -> Iterator[Case]:
    """Sequences of the first, third and last state of a pool; the pool afterwards is an output."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        pool = state.clone()
        return decode(q, k, v, g, beta, pool, slots), pool

    for tokens in (1,) if short else (1, 3):
        for per_channel in (False, True):
            for dims in _dims(short):
                inputs = gated_delta_inputs([tokens] * 3, (2, 4), dims, dtype, per_channel=per_channel)
                pool = gated_delta_inputs([0] * 5, (2, 4), dims, dtype)["initial_state"]
                batch = {name: x.unflatten(0, (3, tokens)) for name, x in inputs.items() if name != "initial_state"}
                constants = {"slots": torch.tensor([4, 0, 2])}
                name = f"{tokens} tokens, K={dims[0]}, {_decays(per_channel)}"
                yield Case("decode", name, call, batch | {"state": pool}, constants, ("o", "state"), dims, False)


def _prologue_cases(dtype: torch.dtype, short: bool) -> Iterator[Case]:
    lengths, Hk, Hv, outputs = _lengths(short), 2, 4, ("q", "k", "v", "g", "beta")
    every = [(width, dims) for width in (1, 2, 4) for dims in _dims(short)]
    for width, dims in [(4, BUILT)] if short else every:
        for per_channel in (False, True):
            inputs = prologue_inputs(lengths, (Hk, Hv), dims, dtype, width, per_channel=per_channel)
            constants = {"cu_seqlens": cu_seqlens_of(lengths), "num_qk_heads": Hk}
            name = f"{width} taps, K={dims[0]}, {_decays(per_channel)}"
            yield Case("prologue", name, prologue, inputs, constants, outputs, (*dims, width))


def _epilogue_cases(dtype: torch.dtype, short: bool) -> Iterator[Case]:
    for _, V in _dims(short):
        inputs = epilogue_inputs(sum(_lengths(short)), 3, V, dtype)
        for activation in get_args(Activation):
            constants = {"eps": 1e-6, "activation": activation}
            yield Case("epilogue", f"{activation}, V={V}", epilogue, inputs, constants, ("y",), (V,))


def layer_cases(
    op: str, heads: tuple[int, int], dims: tuple[int, int], width: int, dtype: torch.dtype
) -> Iterator[Case]:
    """A few tokens through a layer's operators, at its head dims and with fewer heads (2 value heads a key head
    at most): ``op`` is gated_delta or kda, ``width`` the taps of its convolution."""
    per_channel, lengths = op == "kda", [65, 1, 30]
    Hk, Hv = 1, 2 if heads[0] < heads[1] else 1
    constants: dict[str, Any] = {"cu_seqlens": cu_seqlens_of(lengths)}
    delta = gated_delta_inputs(lengths, (Hk, Hv), dims, dtype, "extreme", per_channel=per_channel)
    yield Case(op, "the model's", kda if per_channel else gated_delta, delta, constants, ("o", "final_state"), dims)
    pro = prologue_inputs(lengths, (Hk, Hv), dims, dtype, width, per_channel=per_channel)
    outputs = ("q", "k", "v", "g", "beta")
    yield Case("prologue", "the model's", prologue, pro, {**constants, "num_qk_heads": Hk}, outputs, (*dims, width))
    activation = "sigmoid" if per_channel else "silu"
    epi = epilogue_inputs(sum(lengths), Hv, dims[1], dtype)
    yield Case("epilogue", "the model's", epilogue, epi, {"eps": 1e-6, "activation": activation}, ("y",), dims[1:])


#: One function per operator: (dtype, short) -> its cases.
CASES: tuple[Callable[[torch.dtype, bool], Iterator[Case]], ...] = (
    partial(_delta_cases, "gated_delta", gated_delta, False),
    partial(_delta_cases, "kda", kda, True),
    _pairs_cases,
    _fold_cases,
    _split_cases,
    _decode_cases,
    _prologue_cases,
    _epilogue_cases,
)
