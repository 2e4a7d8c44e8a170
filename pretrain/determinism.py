"""Deterministic mode: a mode that asserts its preconditions (P5)."""

from __future__ import annotations

import os

import torch

from stoker.errors import Refusal


def enter() -> None:
    """Make torch refuse what is not deterministic, in this process.

    On CUDA, cuBLAS needs CUBLAS_WORKSPACE_CONFIG before its first use (NVIDIA cuBLAS documentation, "Results
    reproducibility"). Raises Refusal where a precondition does not hold.
    """
    if torch.cuda.is_available():
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
            raise Refusal(
                "run.deterministic=true on CUDA needs the environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8 "
                "before the process starts: set it, or run.deterministic=false"
            )
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # Memory is overwritten before it is read in everything that trains; filling it first would cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
