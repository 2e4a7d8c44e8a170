"""P4, P5: a run that is killed as it begins, at any change to its directory, begins again by the same command."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import load
from tests.launch.tiny import fixed, tiny

OVERRIDES = ("run.steps=2", "checkpoint.every=1", "log.every=100")
#: Changes to files, as the interpreter announces them before it makes them.
CHANGES = ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "os.chmod")
WRITES = os.O_WRONLY | os.O_RDWR
DIED, FAILED = 9, 99


def run_and_die(path: Path, name: str, at: int | None = None) -> tuple[int, int]:
    """A run of one rank, in a fork that dies before its change number ``at``: its exit code, and how many changes it
    had begun."""
    arguments = [str(path), *OVERRIDES, f"run.name={name}"]
    root = str(load(str(path), arguments[1:]).run_dir)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        changes = 0

        def watch(event: str, details: Sequence[Any]) -> None:
            nonlocal changes
            if event not in CHANGES or not str(details[0]).startswith(root):
                return
            if event == "open" and not details[2] & WRITES:
                return
            if changes == at:
                os._exit(DIED)
            changes += 1
            os.write(writer, b".")

        code = FAILED
        with contextlib.suppress(BaseException):
            sys.addaudithook(watch)
            code = _alone(arguments)
        os._exit(code)
    os.close(writer)
    begun = 0
    while told := os.read(reader, 4096):
        begun += len(told)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), begun


def _alone(arguments: list[str]) -> int:
    import pretrain.run

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    return pretrain.run.main(arguments)


@pytest.mark.verify
@pytest.mark.timeout(1800)
def test_p5_a_run_that_is_killed_at_any_change_of_its_directory_begins_again(tmp_path: Path) -> None:
    import pretrain.run  # noqa: F401 - before the forks, which then need not

    path = tiny(tmp_path)
    assert run_and_die(path, "whole")[0] == 0
    whole = fixed(tmp_path / "runs" / "whole")
    for at in count():
        name = f"cut-{at}"
        code, begun = run_and_die(path, name, at)
        if code == 0:  # it has made fewer changes than that
            assert begun == at > 30
            return
        assert (code, begun) == (DIED, at)
        assert run_and_die(path, name)[0] == 0, at
        assert fixed(tmp_path / "runs" / name) == whole, at
