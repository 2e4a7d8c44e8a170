"""Processes of runs: one does not outlive the one that started it, even where that is killed with -9."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with(parent: int) -> None:
    """From now on this process is killed when its parent ends. ``parent``: its process, as the parent itself has it; if
    that is gone already, this process ends here."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def is_stopped(pid: int) -> bool:
    """The process was stopped (SIGSTOP), and not by a debugger, which is there for a purpose."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False
