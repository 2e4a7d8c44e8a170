"""What every test may rely on: one thread, no network, repeatable examples, GPU cases skipped with their reason."""

from __future__ import annotations

import os

# Before the first import of torch or numba, in this process and in every one that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Two shared cores make times uneven: examples have no deadline. The suite repeats its examples, verify seeks new ones.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("verify", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("suite")


#: Folders whose tests start runs and look at the clock.
ALONE = [Path(__file__).parent / folder for folder in ("faults", "launch")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(folder in item.path.parents for folder in ALONE):
            item.add_marker(pytest.mark.alone)
    needing = [item for item in items if item.get_closest_marker("gpu")]
    reason = _no_gpu() if needing else None
    if reason is not None:
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else f"no CUDA device is visible to torch {torch.__version__}"
