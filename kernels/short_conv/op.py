"""The short convolution as models call it: :func:`short_conv`, dispatched by ``kernels.registry``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import registry
from kernels.short_conv import chunked
from kernels.short_conv.reference import short_conv_reference
from stoker.errors import Refusal


def short_conv(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """SiLU of a causal depthwise convolution; taps never cross a segment's first token. Differentiable in x and weight.

    x [N, C]; weight [C, W], last column on the current token; cu_seqlens int32 or int64 [S+1], from 0 to N.
    Returns [N, C] in x's dtype. Refusal if shapes disagree or cu_seqlens does not rise from 0 to N.

    >>> y = short_conv(x, weight, torch.tensor([0, 700, 2048]))
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[0]:
        raise Refusal(
            f"short_conv: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "they must be [tokens, channels] and [channels, taps]"
        )
    chosen = registry.choose("short_conv", x.device, x.dtype, tuple(weight.shape))
    y: Tensor = chosen.run(x, weight, cu_seqlens)
    return y


@torch.library.custom_op("stoker::short_conv_chunked", mutates_args=())
def short_conv_chunked(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """See ``chunked.forward``."""
    return chunked.forward(x, weight, cu_seqlens)


@short_conv_chunked.register_fake
def _(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("stoker::short_conv_chunked_backward", mutates_args=())
def short_conv_chunked_backward(dy: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """See ``chunked.backward``."""
    return chunked.backward(dy, x, weight, cu_seqlens)


@short_conv_chunked_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    dx, dweight = short_conv_chunked_backward(dy, *ctx.saved_tensors)
    return dx, dweight, None


short_conv_chunked.register_autograd(_backward, setup_context=_save_for_backward)

registry.register(
    "short_conv",
    registry.Implementation(
        "chunked",
        short_conv_chunked,
        cost={"cuda": "blocks of torch calls, no CUDA kernel yet: many small launches and a host read of cu_seqlens"},
    ),
)
registry.register("short_conv", registry.Implementation("reference", short_conv_reference))
