"""The large presets build: every tensor of the spec, allocated once, on the meta device."""

from __future__ import annotations

import pytest
import torch

from pretrain.config import preset
from pretrain.model.chunk import build_chunks, named_tensors
from pretrain.restore import alone

LARGE = ["hybrid-1b", "hybrid-moe-30b-a3b", "hybrid-moe-235b-a22b", "kda-moe-48b-a3b"]


@pytest.mark.parametrize("name", LARGE)
def test_a_large_preset_builds_with_the_tensors_of_its_spec(name: str) -> None:
    spec = preset(name).model_spec()
    (model,), builds = build_chunks(spec, alone(len(spec.layers)), torch.bfloat16, torch.device("meta"))
    tensors = named_tensors(builds)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: parameter.shape for name, parameter in spec.parameters().items()
    }
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.num_parameters
    kept_wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert kept_wide == {name for name, parameter in spec.parameters().items() if parameter.dtype == "high"}
