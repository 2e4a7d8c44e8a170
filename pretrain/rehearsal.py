"""What takes time at every start of a run and does not depend on the attempt, done ahead by a process that waits.

Nothing is written, no process group formed and no CUDA context made. What fails here is passed over: the start itself
will say why.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from dataio.stream import BlendedStream
from dataio.types import Part
from pretrain.attempt import environment, lock_sha256
from pretrain.config import RunConfig, load
from pretrain.data import first_log, open_stores
from pretrain.guard import require_own_rooms

#: What a run imports once it is sure that it begins.
MODULES = ("pretrain.loop", "pretrain.run", "pretrain.session")


def rehearse(arguments: Sequence[str]) -> None:
    """Ready this process to become a rank of ``python -m pretrain`` with these arguments: modules, compiled functions
    and kernels are loaded, hashes and versions known."""
    with suppress(Exception):
        _import()
        require_own_rooms()
        lock_sha256()
        environment()
        config = load(arguments[0], arguments[1:])
        _kernels(config)
        _data(config)


def _import() -> None:
    for module in MODULES:
        import_module(module)
    from parallel.engine import seam

    seam.install()


def _kernels(config: RunConfig) -> None:
    import torch

    from pretrain.kernel_check import check_kernels

    if not torch.cuda.is_available():
        check_kernels(config.model_spec(), getattr(torch, config.run.dtype), torch.device("cpu"), config.run.kernels)


def _data(config: RunConfig) -> None:
    """One micro-batch of the run's own."""
    stores = open_stores(config)
    stream = BlendedStream(first_log(config, stores), stores)
    size = config.train.micro_batch
    stream.read(stream.plan(0), Part(0, config.train.global_batch // size, size, 0, 1))
