"""A small language model of mixers alone, which learns a noisy permutation of its tokens: enough to train on kernels.

Weights are float32 and rounded to the dtype of the computation at every use; the run is a function of its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.epilogue.op import epilogue
from kernels.gated_delta.op import gated_delta
from kernels.kda.op import kda
from kernels.prologue.op import prologue
from kernels.samples import cu_seqlens_of

VOCABULARY, WIDTH, HEADS, DIM, TAPS = 257, 128, (1, 2), 64, 4
LENGTHS, LAYERS, LR = (200, 1, 119, 192), ("gated_delta", "kda", "gated_delta"), 3e-3


@dataclass(frozen=True)
class Curve:
    """Losses, step by step, and the norm of every weight's gradient at the first of them."""

    losses: list[float]
    gradient_norms: dict[str, float]


def train(device: torch.device, dtype: torch.dtype, steps: int) -> Curve:
    weights = {name: x.to(device).requires_grad_() for name, x in _initial().items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=LR)
    generator, cu_seqlens = torch.Generator().manual_seed(2), cu_seqlens_of(LENGTHS).to(device)
    following = torch.randperm(VOCABULARY, generator=generator)
    losses, norms = [], {}
    for step in range(steps):
        tokens = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=generator)
        noise = torch.randint(VOCABULARY, tokens.shape, generator=generator)
        targets = torch.where(torch.rand(tokens.shape, generator=generator) < 0.9, following[tokens], noise)
        logits = _logits(
            {name: x if _float32(name) else x.to(dtype) for name, x in weights.items()}, tokens.to(device), cu_seqlens
        )
        loss = F.cross_entropy(logits.float(), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            norms = {name: x.grad.norm().item() for name, x in weights.items() if x.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    return Curve(losses, norms)


def _float32(name: str) -> bool:
    return name.endswith(("A_log", "dt_bias"))


def _initial() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    Hk, Hv = HEADS
    weights = {"embed": (VOCABULARY, WIDTH), "head": (VOCABULARY, WIDTH)}
    for layer, op in enumerate(LAYERS):
        decays = Hv * DIM if op == "kda" else Hv
        rows = {"q": Hk * DIM, "k": Hk * DIM, "v": Hv * DIM, "a": decays, "b": Hv, "z": Hv * DIM}
        weights |= {f"{layer}.{name}": (of, WIDTH) for name, of in rows.items()} | {f"{layer}.o": (WIDTH, Hv * DIM)}
        weights |= {f"{layer}.{name}_conv": (rows[name], TAPS) for name in "qkv"}
    drawn = {name: torch.randn(shape, generator=generator) * shape[1] ** -0.5 for name, shape in weights.items()}
    for layer, op in enumerate(LAYERS):
        drawn[f"{layer}.A_log"] = torch.linspace(0, 2, Hv)
        drawn[f"{layer}.dt_bias"] = torch.full((Hv * DIM if op == "kda" else Hv,), -4.0)
        drawn[f"{layer}.norm"] = torch.ones(DIM)
    return drawn


def _logits(w: dict[str, Tensor], tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    x = w["embed"][tokens] * WIDTH**0.5
    for layer, op in enumerate(LAYERS):
        of = {name.partition(".")[2]: value for name, value in w.items() if name.startswith(f"{layer}.")}
        h = F.rms_norm(x, (WIDTH,))
        projected = [F.linear(h, of[name]) for name in ("q", "k", "v", "a", "b")]
        gates = [of[name] for name in ("q_conv", "k_conv", "v_conv", "A_log", "dt_bias")]
        o, _ = (kda if op == "kda" else gated_delta)(*prologue(*projected, *gates, cu_seqlens, HEADS[0]), cu_seqlens)
        z = F.linear(h, of["z"]).view_as(o)
        x = x + F.linear(epilogue(o, z, of["norm"], 1e-6, "silu").flatten(1), of["o"])
    return F.linear(F.rms_norm(x, (WIDTH,)), w["head"])
