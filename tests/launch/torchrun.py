"""``python -m pretrain`` under torchrun itself, without Stoker's supervisor."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def command(arguments: Sequence[str], ranks: int) -> list[str]:
    """The command line; ``torchrun`` as a module, so that it is this environment's."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*torchrun, "-m", "pretrain", *arguments]
