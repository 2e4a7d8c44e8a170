"""What a module needs to make its tensors: the spec, where each tensor lies, dtypes and groups."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from parallel.engine.groups import Groups
from parallel.planning.layout import Layout
from pretrain.spec import ModelSpec, Parameter


@dataclass
class Build:
    """Hands out uninitialised local tensors by global name and remembers them.

    ``parameters`` and ``state`` (no gradient: router bias, counters) map global names to local tensors of
    ``layout.allocated_shape``.
    """

    spec: ModelSpec
    layouts: dict[str, Layout]
    groups: Groups
    dtype: torch.dtype
    device: torch.device
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._specs = self.spec.parameters()

    def dtype_of(self, parameter: Parameter) -> torch.dtype:
        if parameter.dtype == "int64":
            return torch.int64
        return high(self.dtype) if parameter.dtype == "high" else self.dtype

    def parameter(self, name: str) -> nn.Parameter:
        tensor = self._empty(name)
        self.parameters[name] = nn.Parameter(tensor)
        return self.parameters[name]

    def buffer(self, name: str) -> torch.Tensor:
        self.state[name] = self._empty(name)
        return self.state[name]

    def _empty(self, name: str) -> torch.Tensor:
        shape = self.layouts[name].allocated_shape
        return torch.empty(shape, dtype=self.dtype_of(self._specs[name]), device=self.device)

    @property
    def sequence_parallel(self) -> bool:
        return self.groups.plan.sequence_parallel


def high(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, gates, router and loss: float32, or float64 in a float64 run."""
    return torch.promote_types(dtype, torch.float32)
