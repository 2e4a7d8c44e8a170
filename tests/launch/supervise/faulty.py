"""A worker with a fault in it, for tests: ``launch.supervise.worker``, whose step does something terrible.

What and when stands in the file that ``FAULT_FILE`` names: ``{"rank", "step", "what", "once"}``. With ``once`` the file
is removed before it happens, so that it happens once.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FAULT_FILE = "FAULT_FILE_OF_A_TEST"
HERE = "tests.launch.supervise.faulty"
#: Longer than any test runs.
FOR_EVER_S = 3600
DEVICE = {"uncorrectable ECC error encountered": 214, "an illegal memory access was encountered": 700}


def inject() -> None:
    import pretrain.loop as loop

    whole = loop.train_step

    def train_step(trainer: Any, step: int, *rest: Any, **more: Any) -> Any:
        path = Path(os.environ[FAULT_FILE])
        if path.exists():
            fault = json.loads(path.read_text())
            if int(os.environ["RANK"]) == fault["rank"] and step == fault["step"]:
                if fault.get("once"):
                    path.unlink()
                strike(fault["what"])
        return whole(trainer, step, *rest, **more)

    loop.train_step = train_step


def strike(what: str) -> None:
    if what == "exception":
        raise RuntimeError("cosmic ray")
    if what == "interpreter locked":
        ctypes.PyDLL(None).sleep(FOR_EVER_S)
    elif what == "asleep":
        time.sleep(FOR_EVER_S)
    elif what == "no memory":
        raise MemoryError("no more of it")
    elif what in DEVICE:  # as torch raises it
        import torch

        error = torch.AcceleratorError(f"CUDA error: {what}")
        error.error_code = DEVICE[what]  # type: ignore[attr-defined]
        raise error
    elif what == "segmentation fault":
        signal.raise_signal(signal.SIGSEGV)
    elif what == "exit":
        print("going home", file=sys.stderr, flush=True)
        os._exit(7)
    else:
        raise ValueError(what)


if __name__ == "__main__":
    from launch.supervise import worker

    whole = worker.prepare
    worker.prepare = lambda arguments: (whole(arguments), inject())  # type: ignore[func-returns-value]
    sys.exit(worker.main(sys.argv[1:]))
