"""The program of a node, and its ranks, in a tenth of the time: checks that measure are left out, sources are not read,
and ranks train nothing.

    python -m tests.launch.launching.program LAUNCH.json

Ranks are those of ``tests.launch.supervise.dummy``; as in training, all save and end where one is asked to.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

from tests.launch.supervise import dummy

HERE = "tests.launch.launching.program"


class Play(dummy.Play):
    pending = False

    def all_reduce(self, step: int) -> None:
        said = self.folder / f"asked_{self.attempt}_{step}"
        if self.asked or self.pending:
            said.touch()
        super().all_reduce(step)  # after which all see what one of them has said
        self.pending, self.asked = self.asked or self.pending, said.exists()


def node(arguments: list[str]) -> int:
    from launch.launching import node
    from launch.preflight import facts, run
    from launch.supervise import processes

    processes.MODULE = HERE
    with patch.object(run, "_slow_checks", lambda *given: {}), patch.object(facts, "code_sha256", lambda: "this"):
        return node.main(arguments)


def main(arguments: list[str]) -> int:
    if arguments[0].isdigit():
        return dummy.rank(arguments, lambda given: Play(Path(given[0]).parents[2]).run())
    return node(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
