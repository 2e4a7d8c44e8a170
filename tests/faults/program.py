"""``stoker train`` whose ranks keep a history.

python -m tests.faults.program RANKS CONFIG [section.key=value ...]
"""

from __future__ import annotations

import sys

from launch.local import train
from launch.supervise import processes
from stoker.errors import Refusal
from tests.faults import rank


def main(arguments: list[str]) -> int:
    processes.MODULE = rank.HERE
    ranks, source, *overrides = arguments
    try:
        return train(source, overrides, int(ranks))
    except Refusal as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
