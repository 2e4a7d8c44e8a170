"""All that this machine can measure, in one list of rows."""

from __future__ import annotations

import torch

from kernels.bench.cpu import cpu_rows
from kernels.bench.gpu import gpu_rows
from kernels.bench.rows import Row
from kernels.bench.shapes import TARGETS


def run(rounds: int = 9, tokens: int = 2048, quick: bool = False, device: str | None = None) -> list[Row]:
    """On a GPU its rows alone; elsewhere those of the processor, and the GPU's targets as not measured.

    ``rounds``, ``tokens``: of the processor's rows. ``quick``: of the GPU's the targets first, and what is not measured
    within four minutes not at all. ``device``: cuda where there is one, else cpu.
    """
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        return gpu_rows(quick)
    why = f"not measured: no CUDA device is visible to torch {torch.__version__}"
    missing = [
        Row(target.op, f"{target.shape}, {target.phase}", target.peer, None, target.ms, None, why) for target in TARGETS
    ]
    return cpu_rows(rounds, tokens) + missing
