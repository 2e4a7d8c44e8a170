"""``python -m launch.launching.node`` whose ranks keep a history.

    python -m tests.faults.node LAUNCH.json [preflight]

Without ``preflight`` all nodes count as fit: it has tests of its own, and takes longer than what is tried here.
"""

from __future__ import annotations

import sys
from unittest.mock import patch

from launch.launching import node
from launch.supervise import processes
from tests.faults import rank


def main(arguments: list[str]) -> int:
    processes.MODULE = rank.HERE
    if "preflight" in arguments[1:]:
        return node.main(arguments[:1])
    with patch.object(node, "_fit", lambda config, job, here: here.hosts):
        return node.main(arguments[:1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
