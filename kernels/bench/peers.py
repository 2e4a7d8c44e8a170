"""Other people's code on our problems. A peer that is not installed, or fails, says so by its exception.

Each is called as its own documentation has it for a batch of equal sequences. flash-linear-attention (FLA) hands calls
on to other packages where they are installed: it is timed on Triton alone and as it comes, and told by its log which.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus

from kernels.bench.problems import DELTA_RULES, EPS, Outputs, Problem

#: Switches of FLA 0.6.0 for the back ends it may hand gated delta and KDA to.
FLA_BACKENDS = ("FLA_FLASH_QLA", "FLA_FLASH_KDA", "FLA_TILELANG", "FLA_INTRACARD_CP")


@dataclass(frozen=True)
class Peer:
    """``make(problem)`` returns what is timed, inside of ``around(notes)``, which may add to the notes of its rows."""

    name: str
    make: Callable[[Problem], Callable[[], Outputs]]
    around: Callable[[list[str]], AbstractContextManager[Any]] = lambda notes: nullcontext()


@contextmanager
def _triton_alone(notes: list[str]) -> Iterator[None]:
    """FLA 0.6.0 refuses its own backward on Hopper under Triton 3.4 to 3.7.0, which miscompile it for K=64 (its issue
    640). For times, and at K=128 where it was found right, that guard is lifted, and said to be."""
    import_module("fla")
    chunk_o = import_module("fla.ops.common.chunk_o")
    guarded = chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1
    if guarded:
        notes.append(f"its guard against Triton {import_module('triton').__version__} on Hopper is lifted")
    with patch.dict(os.environ, dict.fromkeys(FLA_BACKENDS, "0")), patch.object(chunk_o, "TRITON_ABOVE_3_7_1", True):
        yield


_dispatched: list[str] = []


@contextmanager
def _as_dispatched(notes: list[str]) -> Iterator[None]:
    """FLA tells once in a process which back end takes a function; what it does not tell of runs on Triton."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if " -> " in text and "rejected" not in text:
                _dispatched.append(text.rpartition("] ")[2])

    logger, listener = logging.getLogger("fla.backends"), Listener()
    before = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(listener)
        notes.append(f"dispatched: {'; '.join(_dispatched) or 'nothing, Triton ran'}")


def _fla(problem: Problem) -> Callable[[], Outputs]:
    module, function = {
        "gated_delta": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
        "kda": ("fla.ops.kda", "chunk_kda"),
    }[problem.op]
    return _batched(problem, getattr(import_module(module), function))


def _flash_qla(problem: Problem) -> Callable[[], Outputs]:
    return _batched(problem, import_module("flash_qla").chunk_gated_delta_rule)


def _transformers(problem: Problem) -> Callable[[], Outputs]:
    model, function = {
        "gated_delta": ("qwen3_next", "torch_chunk_gated_delta_rule"),
        "kda": ("kimi_linear", "chunk_kimi_delta_attention"),
    }[problem.op]
    return _batched(problem, getattr(import_module(f"transformers.models.{model}.modeling_{model}"), function))


def _batched(problem: Problem, rule: Callable[..., Any]) -> Callable[[], Outputs]:
    q, k, v, g, beta = (problem.batched(name) for name in ("q", "k", "v", "g", "beta"))
    return lambda: rule(q, k, v, g=g, beta=beta)[0].flatten(0, 1)


def _cudnn(problem: Problem) -> Callable[[], Outputs]:
    function = {"gated_delta": "gated_delta_net", "kda": "kimi_delta_attention"}[problem.op]
    rule, inputs = getattr(import_module("cudnn.linear_attention"), function), problem.inputs

    def call() -> Tensor:
        result = rule(**inputs, cu_seqlens=problem.cu_seqlens)
        o: Tensor = result if isinstance(result, Tensor) else result[0]
        return o

    return call


def _torch_prologue(problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
    (Hk, Hv), x = problem.shape.heads, problem.inputs

    def convolved(name: str, heads: int) -> Tensor:
        weight = x[f"{name}_conv"]
        channels, taps = weight.shape
        rows = problem.batched(name).mT
        y = conv1d(rows, weight.unsqueeze(1), padding=taps - 1, groups=channels)[..., : rows.shape[-1]]
        return silu(y).mT.flatten(0, 1).unflatten(-1, (heads, -1))

    def unit(y: Tensor) -> Tensor:
        return y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)

    def call() -> tuple[Tensor, ...]:
        rate = x["A_log"].exp().repeat_interleave(x["a"].shape[1] // Hv)
        g = -rate * softplus(x["a"].float() + x["dt_bias"])
        g = g if g.shape[1] == Hv else g.unflatten(-1, (Hv, -1))
        q, k = unit(convolved("q", Hk)), unit(convolved("k", Hk))
        return q, k, convolved("v", Hv), g, x["b"].float().sigmoid()

    return call


def _torch_epilogue(o: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    normed = o.float() * torch.rsqrt(o.float().square().mean(-1, keepdim=True) + EPS)
    return (weight * normed.to(o.dtype) * silu(z.float())).to(o.dtype)


def _torch_layer(problem: Problem) -> Callable[[], Outputs]:
    before, x = _torch_prologue(problem), problem.inputs

    def call() -> Tensor:
        q, k, v, g, beta = before()
        o, _ = DELTA_RULES[problem.op](q, k, v, g, beta, problem.cu_seqlens)
        return _torch_epilogue(o, x["z"], x["weight"])

    return call


def _fla_layer(problem: Problem) -> Callable[[], Outputs]:
    """Convolutions, then gates and unit lengths in the core's own kernels, then the gated norm."""
    convolve = import_module("fla.modules.causal_conv1d").causal_conv1d
    norm = import_module("fla.modules.norm.fused_norm_gate").rms_norm_gated
    module, function = {
        "gated_delta": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
        "kda": ("fla.ops.kda", "chunk_kda"),
    }[problem.op]
    rule, (Hk, Hv), x = getattr(import_module(module), function), problem.shape.heads, problem.inputs

    def call() -> Tensor:
        q, k, v = (
            convolve(problem.batched(name), weight=x[f"{name}_conv"], activation="silu")[0].unflatten(-1, (heads, -1))
            for name, heads in (("q", Hk), ("k", Hk), ("v", Hv))
        )
        a = problem.batched("a")
        gate = {"use_gate_in_kernel": True, "A_log": x["A_log"], "dt_bias": x["dt_bias"]}
        inside = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, **gate}
        g = a.unflatten(-1, (Hv, -1)) if problem.op == "kda" else a
        o = rule(q, k, v, g=g, beta=problem.batched("b"), **inside)[0].flatten(0, 1)
        y: Tensor = norm(o, x["z"], x["weight"], None, activation="swish", eps=EPS)
        return y

    return call


def _recurrent_step(problem: Problem) -> Callable[[], Outputs]:
    model = import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    x = dict(problem.inputs)
    state = x.pop("state")
    rule = model.torch_recurrent_gated_delta_rule
    return lambda: rule(*x.values(), initial_state=state, output_final_state=True)[0]


_FLA_TRITON = Peer("FLA on Triton alone", _fla, _triton_alone)
_FLA = Peer("FLA as it dispatches", _fla, _as_dispatched)
_CUDNN = Peer("cuDNN front end", _cudnn)
_TRANSFORMERS = Peer("transformers, in torch unless it finds a kernel", _transformers)
_LAYER = (
    Peer("ours between an unfused prologue and epilogue in torch", _torch_layer),
    Peer("FLA's layer on Triton alone", _fla_layer, _triton_alone),
    Peer("FLA's layer as it dispatches", _fla_layer, _as_dispatched),
)
#: By operator, and by operator and " layer".
PEERS: dict[str, tuple[Peer, ...]] = {
    "gated_delta": (_FLA_TRITON, _FLA, Peer("FlashQLA", _flash_qla), _CUDNN, _TRANSFORMERS),
    "kda": (_FLA_TRITON, _FLA, _CUDNN, _TRANSFORMERS),
    "prologue": (Peer("unfused torch", _torch_prologue),),
    "epilogue": (Peer("unfused torch", lambda problem: lambda: _torch_epilogue(**problem.inputs)),),
    "decode": (Peer("transformers, in torch unless it finds a kernel", _recurrent_step),),
    "gated_delta layer": _LAYER,
    "kda layer": _LAYER,
}
