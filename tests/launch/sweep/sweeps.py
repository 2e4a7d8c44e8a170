"""Sweeps for tests: the file, its ledger, and the processes that they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from launch.sweep import definition, ledger, planning
from launch.sweep.forks import ForkSlots
from launch.sweep.ledger import Ledger
from stoker.yaml_core import dump_yaml
from tests.launch.tiny import tiny

LAYERS = ("attention/dense",)
#: Seconds after which a test that waits has failed.
PATIENCE_S = 120.0


def write(folder: Path, **keys: Any) -> Path:
    """A sweep's file in ``folder``, of the tiny run there; ``keys`` of the file."""
    common = folder / "tiny.yaml" if (folder / "tiny.yaml").exists() else tiny(folder, LAYERS)
    path = folder / "sweep.yaml"
    path.write_text(dump_yaml({"name": "sweep", "dir": str(folder / "runs"), "config": str(common), **keys}))
    return path


def planned(folder: Path, **keys: Any) -> Ledger:
    """The ledger of such a sweep, written."""
    found = planning.plan(definition.load(write(folder, **keys)), threads=1)
    found.write()
    return found


def again(folder: Path) -> Ledger:
    return ledger.read(folder / "runs" / "sweep")


def forks(found: Ledger, trainer: str, count: int = 2) -> ForkSlots:
    return ForkSlots(found, count, {"OMP_NUM_THREADS": "1"}, f"tests.launch.sweep.trainers:{trainer}")


PROGRAM = """
import sys
from pathlib import Path
from launch.sweep.run import sweep
found = sweep(Path(sys.argv[1]), int(sys.argv[2]), trainer=sys.argv[3])
print({outcome.value: count for outcome, count in found.counts.items()})
sys.exit(found.code)
"""


def command(path: Path, jobs: int = 2, trainer: str = "pretrain.run:main") -> subprocess.Popen[str]:
    """The command as a process of its own, which can be killed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path), str(jobs), trainer],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """What ``condition`` says once it says something; fails after ``patience_s``."""
    deadline = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s until {what}"
        time.sleep(0.02)
    return found


def family(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    """A process's descendants."""
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    """None of them runs any more; one that nobody has waited for yet counts as gone."""
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)
