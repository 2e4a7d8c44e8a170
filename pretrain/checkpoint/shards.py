"""Tensors of a rank as flat arrays of their storage dtype, the form in which their bytes are cut into chunks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from pretrain.checkpoint.dtypes import STORAGE
from stoker.errors import Refusal


def dtype_name(name: str, tensor: torch.Tensor) -> str:
    """The logical dtype of a tensor; ``name`` is for the message. Raises Refusal for one that has no stored form."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in STORAGE:
        raise Refusal(f"tensor {name}: {dtype} cannot be stored; known dtypes are {', '.join(sorted(STORAGE))}")
    return dtype


def flat(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a tensor, row-major; shares its memory if it is a contiguous CPU tensor."""
    storage = getattr(torch, STORAGE[str(tensor.dtype).removeprefix("torch.")])
    return tensor.detach().cpu().contiguous().reshape(-1).view(storage).numpy()


def unflat(array: np.ndarray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of ``flat``; shares the memory of ``array``."""
    return torch.from_numpy(array).view(getattr(torch, dtype)).reshape(shape)


def zeros(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=getattr(torch, dtype))


class Shards:
    """A rank's tensors by name; the last one asked for is kept, so that a tensor on a GPU is copied once for all of
    its chunks and one at a time."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._last: tuple[str, np.ndarray] | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        if self._last is None or self._last[0] != name:
            self._last = (name, flat(self._tensors[name]))
        return self._last[1]
