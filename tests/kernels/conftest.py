"""Shared by the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch fills every uninitialised tensor with NaN, so reading one shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def with_gradients() -> Callable[..., dict[str, Tensor]]:
    """(function, inputs by name, other arguments) -> every output and gradient by name, for fixed cotangents."""

    def compute(function: Callable[..., Outputs], inputs: dict[str, Tensor], *rest: Tensor) -> dict[str, Tensor]:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        named = dict(leaves)
        result = function(**named, cu_seqlens=rest[0])
        outputs = result if isinstance(result, tuple) else (result,)
        generator = torch.Generator().manual_seed(7)
        cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        results = {f"output {index}": x.detach() for index, x in enumerate(outputs)}
        return results | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}

    return compute
