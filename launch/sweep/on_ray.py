"""Slots on a Ray cluster, every node of which sees the sweep's folder under the same path and has the same software."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.sweep.ledger import Ledger, Trial
from launch.sweep.slots import Ended, Pipe
from stoker.errors import Refusal

#: A file in the sweep's folder, for a run on another machine: what it is asked to do, ``end`` or ``kill``.
ASKED = "asked"
#: Seconds between looks at that file.
LOOK_S = 0.5


class RaySlots:
    """Runs as tasks of the cluster that ``ray start`` made, as many at a time as ``count`` or as it has room for.

    A run that is lost with its node ends as killed, and the scheduler starts it again.
    """

    def __init__(self, ledger: Ledger, count: int | None = None, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise Refusal(f"Ray is not installed ({error}): `pip install 'stoker[ray]'`, or --on local") from None
        self._ray, self._ledger, self._joined = ray, ledger, not ray.is_initialized()
        if self._joined:
            try:
                ray.init(address=address or "auto", logging_level="WARNING")
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise Refusal(
                    f"no Ray cluster can be reached ({error}): run `ray start --head` here and `ray start --address` "
                    "on the other machines, or use --on local"
                ) from None
        definition = ledger.definition
        self._wanted = {"CPU": float(definition.ranks * ledger.threads), "GPU": float(definition.gpus or 0)}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        rooms = [
            int(min(node.get(name, 0) // amount for name, amount in self._wanted.items() if amount)) for node in nodes
        ]
        if sum(rooms) == 0:
            self.close()
            raise Refusal(
                f"no node of the Ray cluster has {self._wanted['CPU']:g} cores and {self._wanted['GPU']:g} GPUs for a "
                "run: lower ranks, gpus or OMP_NUM_THREADS"
            )
        self.count = min(count or sum(rooms), sum(rooms))
        (ledger.root / ASKED).mkdir(parents=True, exist_ok=True)
        self._running: dict[Any, int] = {}

    def start(self, trial: Trial) -> None:
        self._file(trial.number).unlink(missing_ok=True)
        options = {"num_cpus": self._wanted["CPU"], "num_gpus": self._wanted["GPU"], "max_retries": 0}
        root, environment = self._ledger.root.absolute(), {"OMP_NUM_THREADS": str(self._ledger.threads)}
        place = (str(root), str(self._ledger.log(trial).absolute()), str(self._file(trial.number).absolute()))
        reference = self._ray.remote(**options)(execute).remote(trial.number, *place, os.getcwd(), environment)
        self._running[reference] = trial.number

    def wait(self, timeout_s: float) -> list[Ended]:
        if not self._running:
            time.sleep(timeout_s)
            return []
        done, _ = self._ray.wait(list(self._running), timeout=timeout_s)
        return [self._outcome(reference, self._running.pop(reference)) for reference in done]

    def _outcome(self, reference: Any, number: int) -> Ended:
        try:
            return Ended(number, int(self._ray.get(reference)))
        except self._ray.exceptions.RayError as error:
            return Ended(
                number, -9, f"lost with its worker or node: {type(error).__name__}: {str(error).splitlines()[0]}"
            )

    def ask_to_end(self, number: int) -> None:
        self._file(number).write_text("end")

    def kill(self, number: int) -> None:
        self._file(number).write_text("kill")

    def close(self) -> None:
        for reference in getattr(self, "_running", {}):
            self._ray.cancel(reference, force=True)  # the run ends with the worker
        if self._joined:
            self._ray.shutdown()

    def _file(self, number: int) -> Path:
        return self._ledger.root / ASKED / f"{number:04d}"


def execute(number: int, root: str, log: str, asked: str, folder: str, environment: Mapping[str, str]) -> int:
    """On a node: one run in a process of its own, which ends with this worker; its exit code."""
    if not Path(root).is_dir():
        return 2
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.sweep.task", root, str(number), str(os.getpid())],
        cwd=folder if Path(folder).is_dir() else None,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    pipe, told = Pipe(os.dup(process.stdout.fileno()), Path(log)), ""
    process.stdout.close()
    while True:
        try:
            return process.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            pipe.read()
            wanted = Path(asked).read_text() if Path(asked).exists() else ""
            if wanted != told:
                (process.kill if wanted == "kill" else process.terminate)()
                told = wanted
        finally:
            if process.returncode is not None:
                pipe.close()
