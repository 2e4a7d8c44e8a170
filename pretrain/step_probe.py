"""What ``stoker plan calibrate`` has its ranks do: measure what a device can, and train, one job after another.

    with Ranks(2, environment, Path("ranks.log")) as ranks:
        figures = ranks.measure(2, threads=1)
        ranks.train(2, 1, ["run.yaml", "train.lr=1e-3"])      # the trainer itself, as torchrun starts it

Processes stay, since importing torch and Megatron-core takes longer than the trainings do.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

#: Seconds that a job may take before its ranks count as hung.
TIMEOUT_S = 120.0
#: Seconds that one figure is measured for.
FIGURE_S = 0.15
#: Sides of the square products and bytes of the copies that are measured, on a CPU and on a GPU.
SIDES, COPIES = (1024, 8192), (2**26, 2**30)
#: Operations in a chain, to measure what one costs that does nothing.
CHAIN = 200
#: Bytes that all ranks together gather, and how often.
GATHERED, GATHERS = (2**12, 2**15, 2**18, 2**21, 2**24), 20
DTYPES = ("float32", "float64", "bfloat16")


@dataclass(frozen=True)
class Figures:
    """What a rank reached while the others did the same: ``flops`` of a large product by dtype, ``copy`` in bytes read
    and written a second, ``operation_s`` of one that does nothing, ``gather_s`` by the bytes of an all-gather."""

    flops: Mapping[str, float]
    copy: float
    operation_s: float
    gather_s: Mapping[int, float]

    def best(self, other: Figures) -> Figures:
        """The better of each: what else a machine does only slows it down."""
        return Figures(
            {dtype: max(rate, other.flops[dtype]) for dtype, rate in self.flops.items()},
            max(self.copy, other.copy),
            min(self.operation_s, other.operation_s),
            {size: min(took, other.gather_s[size]) for size, took in self.gather_s.items()},
        )

    def worst(self, other: Figures) -> Figures:
        """The worse of each: of several ranks, what all of them reach."""
        return Figures(
            {dtype: min(rate, other.flops[dtype]) for dtype, rate in self.flops.items()},
            min(self.copy, other.copy),
            max(self.operation_s, other.operation_s),
            {size: max(took, other.gather_s[size]) for size, took in self.gather_s.items()},
        )


class RankFailed(Exception):
    """A rank died, hung or refused; the text is what the ranks said last."""


class Ranks:
    """Processes on this machine; ``log`` takes what they print. On CUDA each has a GPU of its own."""

    def __init__(self, count: int, environment: Mapping[str, str], log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._log = log
        self._ranks: list[tuple[Any, Connection]] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, dict(environment), str(log)), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        self._answers(count)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()

    @property
    def processes(self) -> list[int]:
        return [process.pid for process, _ in self._ranks]

    def measure(self, ranks: int, threads: int) -> Figures:
        """The slowest rank's figures."""
        each: list[Figures] = self._run(ranks, threads, "measure")
        return reduce(Figures.worst, each)

    def train(self, ranks: int, threads: int, arguments: Sequence[str]) -> None:
        """``python -m pretrain`` with these arguments on so many ranks."""
        if any(self._run(ranks, threads, "train", list(arguments))):
            raise RankFailed(self._said())

    def _run(self, ranks: int, threads: int, job: str, *arguments: Any) -> list[Any]:
        world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        for rank, (_, connection) in enumerate(self._ranks[:ranks]):
            connection.send(({**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, threads, job, arguments))
        return self._answers(ranks)

    def _answers(self, ranks: int) -> list[Any]:
        pending = {connection: rank for rank, (_, connection) in enumerate(self._ranks[:ranks])}
        found: dict[int, Any] = {}
        while pending:
            ready = [connection for connection in wait(list(pending), TIMEOUT_S) if isinstance(connection, Connection)]
            if not ready:
                raise RankFailed(
                    f"no answer from ranks {sorted(pending.values())} in {TIMEOUT_S:.0f} s: {self._said()}"
                )
            for connection in ready:
                try:
                    found[pending.pop(connection)] = connection.recv()
                except EOFError:
                    raise RankFailed(f"a rank died: {self._said()}") from None
        return [found[rank] for rank in range(ranks)]

    def _said(self, lines: int = 5) -> str:
        return " | ".join(self._log.read_text(errors="replace").strip().splitlines()[-lines:])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _serve(connection: Connection, environment: Mapping[str, str], log: str) -> None:
    """A rank's life: jobs until the other end closes."""
    os.environ.update(environment)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(written, sys.stdout.fileno())
    os.dup2(written, sys.stderr.fileno())
    import torch

    from pretrain import loop, session  # noqa: F401 - with Megatron-core: the first training is not to wait for them
    from pretrain.run import main

    jobs: dict[str, Callable[..., Any]] = {"measure": measure, "train": main}
    connection.send(None)
    while True:
        try:
            world, threads, job, arguments = connection.recv()
        except EOFError:
            return
        os.environ.update(world)
        torch.set_num_threads(threads)
        connection.send(jobs[job](*arguments))
        gc.collect()


def measure() -> Figures:
    """The figures of this rank, all ranks of the environment at once."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")

    def best_s(call: Callable[[], Any], rounds: int | None = None) -> float:
        """The fastest of ``rounds`` calls, which all ranks make; without, of as many as there is time for."""
        call()
        dist.barrier()
        if rounds is not None:
            return min(seconds(call) for _ in range(rounds))
        found, stop = math.inf, time.perf_counter() + FIGURE_S
        while time.perf_counter() < stop:
            found = min(found, seconds(call))
        return found

    def seconds(call: Callable[[], Any]) -> float:
        if cuda:
            torch.cuda.synchronize()
        before = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - before

    def product_flops(dtype: str) -> float:
        side = SIDES[cuda]
        left = torch.ones(side, side, dtype=getattr(torch, dtype), device=device)
        out = torch.empty_like(left)
        return 2 * side**3 / best_s(lambda: torch.mm(left, left, out=out))

    def copy_rate() -> float:
        source = torch.ones(COPIES[cuda] // 4, device=device)
        target = torch.empty_like(source)
        return 2 * COPIES[cuda] / best_s(lambda: target.copy_(source))

    def operation_s() -> float:
        factor = torch.ones(8, device=device, requires_grad=True)

        def chain() -> None:
            value = factor
            for _ in range(CHAIN):
                value = value * factor
            value.sum().backward()

        return best_s(chain) / (3 * CHAIN)  # of an operation backward makes two

    def gather_s(size: int) -> float:
        ranks = dist.get_world_size()
        mine = torch.zeros(max(1, size // 4 // ranks), device=device)
        whole = torch.zeros(len(mine) * ranks, device=device)
        return best_s(lambda: dist.all_gather_into_tensor(whole, mine), rounds=GATHERS)

    try:
        sizes = GATHERED if dist.get_world_size() > 1 else ()
        return Figures(
            {dtype: product_flops(dtype) for dtype in DTYPES},
            copy_rate(),
            operation_s(),
            {size: gather_s(size) for size in sizes},
        )
    finally:
        dist.destroy_process_group()
