"""Decoding as models call it: :func:`decode`, dispatched by ``kernels.registry``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import registry
from kernels.decode import native
from kernels.decode.chunked import decode_chunked
from kernels.decode.reference import decode_reference
from stoker.errors import Refusal


@torch.no_grad()
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The next T tokens of B sequences under the gated delta rule, or KDA, with ``state`` **updated in place**.

    q, k [B, T, Hk, K]; v [B, T, Hv, V]; g (log decay, <= 0) [B, T, Hv], or [B, T, Hv, K] for KDA; beta [B, T, Hv];
    value head h reads query-key head h // (Hv / Hk). state [P, Hv, K, V], any float dtype, rounded to it once, after
    the last token. slots int [B]: the state of each sequence, all different (P = B and the identity if None). scale
    multiplies q (K^-0.5 if None). Returns o [B, T, Hv, V] in v's dtype; computed in float32, or float64. No gradient.
    Refusal if shapes disagree and, on CPU, if a slot is outside the pool or taken twice.

    >>> o = decode(q, k, v, g, beta, pool, slots=torch.tensor([3, 0]))
    """
    _check(q, k, v, g, beta, state, slots)
    chosen = registry.choose("decode", q.device, q.dtype, (k.shape[3], v.shape[3]))
    o: Tensor = chosen.run(q, k, v, g, beta, state, slots, k.shape[3] ** -0.5 if scale is None else scale)
    return o


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor | None) -> None:
    B, T, Hv, V = v.shape
    Hk, K = k.shape[2:]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "q": (q, (B, T, Hk, K)),
        "k": (k, (B, T, Hk, K)),
        "g": (g, (B, T, Hv, K)[: g.dim()]),
        "beta": (beta, (B, T, Hv)),
        "state": (state, (B if slots is None else state.shape[0], Hv, K, V)),
        "slots": (slots, (B,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise Refusal(f"decode: {name} has shape {tuple(tensor.shape)}, v and k ask for {shape}")
    if Hv % Hk:
        raise Refusal(f"decode: {Hv} value heads are not a multiple of {Hk} query-key heads")


def torch_operator(name: str, run: Callable[..., Tensor]) -> torch.library.CustomOpDef:
    """Registers ``stoker::<name>`` with its fake. ``run`` has the signature of ``decode_chunked``."""

    @torch.library.custom_op(f"stoker::{name}", mutates_args=("state",))
    def operator(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        slots: Tensor | None,
        scale: float,
    ) -> Tensor:
        if slots is not None and slots.device.type == "cpu":
            used = slots.tolist()
            if len(set(used)) < len(used) or not all(0 <= slot < len(state) for slot in used):
                raise Refusal(f"decode: slots {used} must be different places of a pool of {len(state)} states")
        return run(q, k, v, g, beta, state, slots, scale).contiguous()

    @operator.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        return v.new_empty(v.shape)

    return operator


for _name, _run, _supports in native.backends():
    registry.register("decode", registry.Implementation(_name, torch_operator(f"decode_{_name}", _run), _supports))
registry.register("decode", registry.Implementation("chunked", torch_operator("decode_chunked", decode_chunked)))
registry.register("decode", registry.Implementation("reference", decode_reference))
