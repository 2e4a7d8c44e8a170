"""A worker that trains nothing: for tests of the agent, a start takes a tenth of a second.

It goes through the phases of steps, waits for its peers in each as a collective would, records what it did, and saves
after every step. ``DUMMY_PLAY`` names a folder with ``play.json``: ``{"steps", "faults": [{"rank", "step", "what",
"times"}]}``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "DUMMY_PLAY"
HERE = "tests.launch.supervise.dummy"
FOR_EVER_S = 3600


class Preempted(Exception):
    """Asked to end."""


class Play:
    def __init__(self, run_dir: Path) -> None:
        from pretrain.heartbeat import Heartbeat

        self.folder = Path(os.environ[VARIABLE])
        self.content = json.loads((self.folder / "play.json").read_text())
        self.run_dir = run_dir
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.attempt = int(os.environ["STOKER_ATTEMPT"])
        self.heartbeat = Heartbeat.from_environment()
        self.asked = False

    def run(self) -> int:
        from pretrain.attempt import ExitClass, record_exit

        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))
        path = self.run_dir / "attempts" / f"{self.attempt:04d}"
        self.heartbeat.at("start")
        self.strike("start")
        path.mkdir(exist_ok=True)
        self.heartbeat.at("load")
        print(f"rank {self.rank} of {self.size}", flush=True)
        try:
            for step in range(self.saved(), self.content["steps"]):
                self.step(step)
            ended = ExitClass.DONE, ""
        except Preempted as asked:
            ended = ExitClass.PREEMPTED, str(asked)
        except Exception as error:
            step = self.heartbeat.step
            record_exit(
                path,
                ExitClass.FAULT,
                str(error),
                self.rank,
                kind="exception",
                step=step,
                fingerprint=f"{error}, {step}",
            )
            print(f"Traceback: {error}", file=sys.stderr, flush=True)
            return 1
        finally:
            self.heartbeat.at("end")
        if self.rank == 0:
            record_exit(path, *ended)
        return ended[0].code

    def step(self, step: int) -> None:
        self.heartbeat.at("read", step)
        self.heartbeat.at("compute", step)
        self.strike(step)
        self.all_reduce(step)
        self.heartbeat.at("record", step)
        if self.rank == 0:
            with open(self.folder / "done", "a") as file:  # one write: whole or not at all, whenever it is killed
                file.write(f"{self.attempt} {step}\n")
        self.heartbeat.at("save", step + 1)
        if self.asked and not self.content.get("deaf"):
            raise Preempted(f"step {step + 1} is saved")

    def all_reduce(self, step: int) -> None:
        """Nobody goes on before all have come so far in this attempt, or were asked to end."""
        (self.folder / f"came_{self.attempt}_{self.rank}_{step}").touch()
        for peer in range(self.size):  # of one frame only, as a collective's is: stacks are looked at for it
            while not os.access(self.folder / f"came_{self.attempt}_{peer}_{step}", os.F_OK):
                time.sleep(0.002)
        time.sleep(self.content.get("step_s", 0.01))

    def saved(self) -> int:
        path = self.folder / "done"
        return 1 + int(path.read_text().split()[-1]) if path.exists() else 0

    def strike(self, step: int | str) -> None:
        for number, fault in enumerate(self.content.get("faults", ())):
            if fault["rank"] == self.rank and fault["step"] == step:
                struck = len(list(self.folder.glob(f"struck_{number}_*")))
                if struck < fault.get("times", 1):
                    (self.folder / f"struck_{number}_{struck}").touch()
                    strike(fault["what"], self)


def strike(what: str, play: Play) -> None:
    from pretrain.attempt import ExitClass, record_exit
    from pretrain.diagnosis import NO_DEVICE

    if what == "exception":
        raise RuntimeError("cosmic ray")
    if what == "interpreter locked":
        ctypes.PyDLL(None).sleep(FOR_EVER_S)
    elif what == "asleep":
        time.sleep(FOR_EVER_S)
    elif what == "child":
        command = [sys.executable, "-c", f"import time; time.sleep({FOR_EVER_S})"]
        child = subprocess.Popen(command)
        (play.folder / f"child_{play.rank}").write_text(str(child.pid))
        raise RuntimeError("a parent that forgot its child")
    elif what == "refuse":
        print("refused: no such thing", file=sys.stderr, flush=True)
        os._exit(2)
    elif what == "secret":
        print(f"the key is {os.environ['A_SECRET_KEY']}", flush=True)
        raise RuntimeError(f"the key {os.environ['A_SECRET_KEY']} is wrong")
    elif what.startswith("watchdog: "):
        where = "[rank0]:[E817 17:40:34.227531918 ProcessGroupNCCL.cpp:1515] [PG 0 (default_pg) Rank 0]"
        error = f"Process group watchdog thread terminated with exception: {what.removeprefix('watchdog: ')}\n"
        frames = "frame #1: c10d::ProcessGroupNCCL::ncclCommWatchdog() + 0x14d (0x7fbe in libtorch_cuda.so)\n" * 50
        os.write(2, f"{where} {error}{frames}".encode())
        os.abort()
    elif what == "device":  # it says so, later than those that it lost; and never ends
        time.sleep(0.3)
        known: dict[str, Any] = {"kind": "device", "step": play.heartbeat.step}
        path = play.run_dir / "attempts" / f"{play.attempt:04d}"
        record_exit(path, ExitClass.FAULT, "uncorrectable ECC error", play.rank, **known)
        play.heartbeat.at("end")
        time.sleep(FOR_EVER_S)
    elif what == "lost":  # another, as it says; and never ends
        record_exit(play.run_dir / "attempts" / f"{play.attempt:04d}", ExitClass.FAULT, "another rank is gone")
        play.heartbeat.at("end")
        time.sleep(FOR_EVER_S)
    elif what == "no device":
        print(f"rank {play.rank} {NO_DEVICE}: it is number 1 on a, which has 1", file=sys.stderr, flush=True)
        os._exit(1)
    elif what == "exit":
        print("going home", file=sys.stderr, flush=True)
        os._exit(7)
    else:
        os.kill(os.getpid(), signal.Signals[what])


def rank(arguments: list[str], play: Callable[[list[str]], int]) -> int:
    """The agent's worker, with ``play`` in place of training."""
    from launch.supervise import worker

    fake: Any = types.ModuleType("pretrain.run")
    fake.program = play
    sys.modules["pretrain.run"] = fake
    worker.prepare = lambda arguments: None
    return worker.main(arguments)


if __name__ == "__main__":
    sys.exit(rank(sys.argv[1:], lambda given: Play(Path(given[0])).run()))
