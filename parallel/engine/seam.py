"""The one seam to Megatron-core: which corrections its modules need on this machine, and proof that they still do.

Megatron-core has no CPU path. On a host without CUDA the seam gives the Megatron modules that Stoker uses a view of
``torch`` in which the device "cuda" is the CPU; nobody else's ``torch`` changes, and nothing is installed on a CUDA
host. Each correction names what it works around and probes Megatron's source, so that one that is no longer needed
fails loudly instead of rotting.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from stoker.errors import Refusal

#: Versions of megatron-core that the parity suite was run against; any other is announced.
CHECKED_VERSIONS = ("0.16.1",)


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Correction:
    """Something of a Megatron module that Stoker works around. ``because`` is text that its source holds as long as
    there is something to work around; ``note`` says what would go wrong and what is done instead."""

    module: str
    because: str
    note: str


#: Wrong numbers without an error, on every device. What is done about each stands where the note says.
CORRECTIONS = (
    Correction(
        "megatron.core.model_parallel_config",
        "batch_p2p_comm: bool = True",
        "batched transfers give wrong gradients in the interleaved schedule at pp=2 (row 9 of the CPU trial): "
        "pipeline.py asks for overlapped, unbatched ones",
    ),
    Correction(
        "megatron.core.distributed.distributed_data_parallel",
        "getattr(param, 'allreduce', True)",
        "expert tensors count as dense for ep=1 and drift apart under tp > etp (row 13): replicas.py marks every one",
    ),
    Correction(
        "megatron.core.distributed.param_and_grad_buffer",
        "_coalescing_manager",
        "buffers of several dtypes are gathered in one call, which gloo corrupts: replicas.py gathers each by itself",
    ),
    Correction(
        "megatron.core.distributed.finalize_model_grads",
        "_update_router_expert_bias(model, config)",
        "the router bias moves before any verdict on the step: replicas.py reduces gradients and nothing else",
    ),
)

CPU_CORRECTIONS = (
    Correction(
        "megatron.core.tensor_parallel.mappings",
        "device=torch.cuda.current_device()",
        "gathers and reduce-scatters allocate on the current CUDA device",
    ),
    Correction(
        "megatron.core.distributed.param_and_grad_buffer",
        "device=torch.cuda.current_device()",
        "parameter and gradient buffers are allocated on the current CUDA device",
    ),
    Correction(
        "megatron.core.pipeline_parallel.p2p_communication",
        "device=torch.cuda.current_device()",
        "receive buffers are allocated on the current CUDA device; batched transfers end in torch.cuda.synchronize()",
    ),
    Correction(
        "megatron.core.pipeline_parallel.schedules",
        'device="cuda"',
        'every schedule counts tokens in a tensor on the literal device "cuda"',
    ),
)


class _CpuCuda(types.SimpleNamespace):
    """What the corrected modules ask of ``torch.cuda``."""

    def __init__(self) -> None:
        super().__init__(
            current_device=lambda: torch.device("cpu"),
            synchronize=lambda *_: None,
            is_available=lambda: False,
        )


class _CpuTorch(types.ModuleType):
    """``torch`` with the device "cuda" read as the CPU; every other name is torch's own."""

    cuda = _CpuCuda()

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)


@lru_cache(maxsize=1)
def install() -> tuple[Correction, ...]:
    """Import Megatron-core, probe every correction and install what this machine needs, once per process; returns the
    corrections at work.

    Raises Refusal when the installed Megatron-core no longer holds what a correction corrects.
    """
    quieten()
    import megatron.core

    version = megatron.core.__version__
    if version not in CHECKED_VERSIONS:
        _log.warning(
            "megatron-core %s: the parity suite was run against %s; run `make verify` before you trust this one",
            version,
            ", ".join(CHECKED_VERSIONS),
        )
    on_cpu = () if torch.cuda.is_available() else CPU_CORRECTIONS
    modules = {correction: _probed(correction, version) for correction in (*CORRECTIONS, *on_cpu)}
    view = _CpuTorch()
    for correction in on_cpu:
        modules[correction].torch = view
    return tuple(modules)


def _probed(correction: Correction, version: str) -> Any:
    """The module that a correction is about, if there is still something to correct."""
    module = importlib.import_module(correction.module)
    if correction.because not in inspect.getsource(module):
        raise Refusal(
            f"megatron-core {version}: {correction.module} no longer holds `{correction.because}` ({correction.note}); "
            f"install {' or '.join(CHECKED_VERSIONS)}, or look again at parallel/engine/seam.py"
        )
    return module


def quieten() -> None:
    """Keep Megatron's import from printing a dozen lines about optional packages: `stoker doctor` says it once."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", message=r".*(Apex|Transformer ?Engine|transformer_engine).*")
    # torch 2.13 renamed collectives that Megatron-core calls by their older names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def device() -> torch.device:
    """The device of this rank: its CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def lazily(load: Callable[[], Any]) -> Callable[[], Any]:
    """A Megatron name that is imported after `install`, at first use."""

    @lru_cache(maxsize=1)
    def name() -> Any:
        install()
        return load()

    return name
