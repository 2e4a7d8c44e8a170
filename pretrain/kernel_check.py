"""Before a run: the kernels that its layers will call are tried on a few tokens, at the layers' head dims and dtype.

A kernel that is wrong on this machine (a miscompiled one, a driver that does not fit) is refused here, not noticed in
the loss curve. Takes some tenths of a second; the whole of it is ``python -m kernels.selfcheck``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from kernels import registry
from kernels.cases import Case, layer_cases
from kernels.selfcheck import compare
from pretrain.spec import GatedDelta, Kda, ModelSpec
from stoker.errors import Refusal


def check_kernels(spec: ModelSpec, dtype: torch.dtype, device: torch.device, forced: Mapping[str, str]) -> None:
    """Set ``forced``, {operator: implementation}, in the registry and try what will run.

    Refusal naming operator, implementation and error if one is off, or if ``forced`` names what there is not."""
    registry.prefer(forced)
    for case in _cases(spec, dtype):
        for row in compare(case, dtype, device):
            if not row.passed:
                others = [i.name for i in registry.implementations(row.op) if i.name != row.implementation]
                raise Refusal(
                    f"kernel {row.op} ({row.implementation}) is wrong on {device.type} in {row.dtype}: {row.output} is "
                    f"off by {row.error:.1e}, {row.bound:.1e} is admitted; see python -m kernels.selfcheck, or set "
                    f"run.kernels.{row.op} to another: {', '.join(others)}"
                )


def used_kernels(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """{operator: implementation that runs}."""
    return {case.op: registry.choose(case.op, device, dtype, case.shape).name for case in _cases(spec, dtype)}


def _cases(spec: ModelSpec, dtype: torch.dtype) -> Iterator[Case]:
    """Of every kind of delta layer in the model once."""
    for mixer in dict.fromkeys(layer.mixer for layer in spec.layers):
        if isinstance(mixer, GatedDelta):
            heads = mixer.num_qk_heads, mixer.num_v_heads
            yield from layer_cases("gated_delta", heads, (mixer.key_dim, mixer.value_dim), mixer.conv_width, dtype)
        elif isinstance(mixer, Kda):
            heads = mixer.num_heads, mixer.num_heads
            yield from layer_cases("kda", heads, (mixer.key_dim, mixer.value_dim), mixer.conv_width, dtype)
