"""A persistent pool of gloo processes: workers import torch and Megatron once, and run job after job.

A job is a module-level function ``job(*arguments)``, called on every rank of a fresh process group; the results come
back in rank order. A job that raises on a rank fails the caller with every rank's traceback.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

#: Modules that the fork server imports once, before it makes workers.
PRELOAD = ["tests.parity.preload"]
#: Seconds that a job may take before its ranks count as hung.
TIMEOUT_S = 240.0


class JobFailed(AssertionError):
    """A rank raised or died."""


class Pool:
    """``run(world_size, job, *arguments)`` on the first ``world_size`` workers, which are made when first needed."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._workers: list[tuple[Any, Connection]] = []
        self._scratch = tempfile.TemporaryDirectory(prefix="stoker-pool-")
        self._jobs = 0

    def run(self, world_size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        self._jobs += 1
        store = str(Path(self._scratch.name) / f"job-{self._jobs}")
        chosen = self._workers[:world_size]
        for rank, (_, connection) in enumerate(chosen):
            connection.send((store, rank, world_size, job, arguments))
        return self._collect([connection for _, connection in chosen])

    def _collect(self, connections: list[Connection]) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        pending = dict(enumerate(connections))
        while pending and not failures:
            ready = wait(list(pending.values()), timeout=TIMEOUT_S)
            if not ready:
                failures[-1] = f"no answer from ranks {sorted(pending)} after {TIMEOUT_S:.0f} s"
            for rank in [rank for rank, connection in pending.items() if connection in ready]:
                try:
                    ok, value = pending.pop(rank).recv()
                except EOFError:
                    ok, value = False, "the process died"
                (results if ok else failures)[rank] = value
        if failures:
            # The other ranks may wait for ever in a collective: start afresh.
            self.close()
            self.__init__()  # type: ignore[misc]
            raise JobFailed("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return [results[rank] for rank in range(len(connections))]

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []
        self._scratch.cleanup()


def _work(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            store, rank, world_size, job, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
            result = (True, job(*arguments))
        except BaseException:
            result = (False, traceback.format_exc())
        if result[0]:
            dist.destroy_process_group()
        connection.send(result)
