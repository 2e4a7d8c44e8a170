"""Deterministic mode: a mode that asserts its preconditions (P5)."""

from __future__ import annotations

import os

from stoker.errors import Refusal

#: cuBLAS repeats itself only with one of these (NVIDIA cuBLAS documentation, "Results reproducibility").
WORKSPACES = (":4096:8", ":16:8")


def check(has_cuda: bool) -> None:
    """Raise Refusal where a precondition of deterministic mode does not hold in this process's environment."""
    if has_cuda and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in WORKSPACES:
        raise Refusal(
            "run.deterministic=true on CUDA needs the environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8 before the "
            "process starts: set it, or run.deterministic=false"
        )


def enter() -> None:
    """Make torch refuse what is not deterministic, in this process."""
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Memory is overwritten before it is read in everything that trains; filling it first would cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
