"""A rank's process: imports what training needs, waits for the word, and becomes a rank. The agent starts it:

    python -m launch.supervise.worker PARENT HEARTBEAT [TERMINAL]

The first line of standard input is a JSON array, the arguments of ``python -m pretrain``; by the second,
``{"environment": {...}, "stacks": path, "terminal": bool}``, it becomes a rank. In between it is a warm spare: no
process group, no CUDA context; its first beat says that it is ready. It ends with its agent, however that ends.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
from collections.abc import Sequence

from pretrain.heartbeat import VARIABLE, Heartbeat

#: prctl(2).
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    parent, heartbeat, *terminal = (int(argument) for argument in arguments)
    _end_with(parent)
    asked: list[int] = []  # to end, while it was still importing
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the agent's business
    os.environ[VARIABLE] = f"/proc/self/fd/{heartbeat}"
    run_arguments = json.loads(sys.stdin.readline() or "[]")
    prepare(run_arguments)
    Heartbeat.from_environment().at("start")
    if not (line := sys.stdin.readline()):
        return 0
    word = json.loads(line)
    os.environ.update(word["environment"])
    if word["terminal"] and terminal:
        os.dup2(terminal[0], sys.stdout.fileno())
    try:
        stacks = open(word["stacks"], "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    except OSError:  # a disk that is full costs the stacks, not the rank
        stacks = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR2, stacks)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:  # there is nothing to save yet
        signal.raise_signal(signal.SIGTERM)
    from pretrain.run import program

    return program(run_arguments)


def prepare(arguments: Sequence[str]) -> None:
    from pretrain.rehearsal import rehearse

    rehearse(arguments)


def _end_with(parent: int) -> None:
    """Be killed when the agent ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before this was said
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
