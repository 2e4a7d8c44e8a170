"""Array files that are larger than memory: read and written through maps, which the machine can give back."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stoker.errors import Refusal
from stoker.files import sync_directory


def load(path: Path, mapped: bool = True) -> NDArray[Any]:
    """An array file. Refuses one that is missing or damaged."""
    try:
        return np.asarray(np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise Refusal(f"{path}: cannot be read as an array ({error}); run its stage again") from None


class ArrayFiles:
    """Array files being written in a folder: whole under their names once kept; what is not kept is removed.

    >>> with ArrayFiles(folder) as files:
    ...     files.new("ranks", (5,), np.int64)[:] = 1
    ...     files.keep("ranks")
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays: dict[str, NDArray[Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def new(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Zeros, to be filled."""
        path = self._partial(name)
        if 0 in shape:  # cannot be mapped
            with open(path, "wb") as file:
                np.save(file, np.empty(shape, dtype))
            self._arrays[name] = np.empty(shape, dtype)
        else:
            self._arrays[name] = np.lib.format.open_memmap(path, "w+", dtype, shape)
        return np.asarray(self._arrays[name])

    def keep(self, *names: str) -> None:
        for name in names:
            array = self._arrays.pop(name)
            if isinstance(array, np.memmap):
                array.flush()
            with open(self._partial(name), "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._partial(name), self._folder / f"{name}.npy")
        sync_directory(self._folder)

    def _partial(self, name: str) -> Path:
        return self._folder / f".{name}.partial"

    def __enter__(self) -> ArrayFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name in self._arrays:
            self._partial(name).unlink(missing_ok=True)
