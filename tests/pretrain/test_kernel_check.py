"""A kernel that is wrong on this machine is refused before the run; what runs can be chosen, and is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import registry
from pretrain.kernel_check import check_kernels, used_kernels
from pretrain.spec import Dense, GatedDelta, Kda, LayerSpec, ModelSpec
from stoker.errors import Refusal

SPEC = ModelSpec(
    width=32,
    vocab_size=257,
    layers=(
        LayerSpec(GatedDelta(2, 4, key_dim=32, value_dim=32), Dense(24)),
        LayerSpec(Kda(2, key_dim=16, value_dim=24, gate_rank=4), Dense(24)),
    ),
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_forced", {})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_of_every_mixer_pass_at_the_models_own_dims(dtype: torch.dtype) -> None:
    check_kernels(SPEC, dtype, CPU, {})
    assert set(used_kernels(SPEC, dtype, CPU)) == {"gated_delta", "kda", "prologue", "epilogue"}


def test_a_forced_kernel_runs_and_one_that_is_not_there_is_refused() -> None:
    check_kernels(SPEC, torch.float32, CPU, {"gated_delta": "chunked"})
    assert used_kernels(SPEC, torch.float32, CPU)["gated_delta"] == "chunked"
    with pytest.raises(Refusal, match="no implementation 'fastest'"):
        check_kernels(SPEC, torch.float32, CPU, {"gated_delta": "fastest"})
    with pytest.raises(Refusal, match="'gated_dleta' is unknown"):
        check_kernels(SPEC, torch.float32, CPU, {"gated_dleta": "chunked"})


def test_a_wrong_kernel_is_refused_by_name_with_the_others_to_choose_from(monkeypatch: pytest.MonkeyPatch) -> None:
    right = registry.choose("kda", CPU, torch.float32, (16, 24))

    def wrong(*arguments: Any) -> Any:
        o, state = right.run(*arguments)
        return o * 1.001, state

    chain = [registry.Implementation("miscompiled", wrong), *registry.implementations("kda")]
    monkeypatch.setitem(registry._implementations, "kda", chain)
    with pytest.raises(Refusal, match=r"kernel kda \(miscompiled\) is wrong on cpu in float32.*chunked"):
        check_kernels(SPEC, torch.float32, CPU, {})
