"""The README's `stoker` commands do what they say, run in the order and in the words in which a stranger finds them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dataio.demo import build

ROOT = Path(__file__).parents[2]
QUICK = ("doctor", "plan")


def commands() -> list[list[str]]:
    """Every `stoker ...` line of the README's shell blocks, without its comment."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("stoker ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run([sys.executable, "-m", "launch.cli", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"stoker {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_quick_commands_of_the_readme_run(tmp_path: Path) -> None:
    quick = [arguments for arguments in commands() if arguments[0] in QUICK]
    assert {arguments[0] for arguments in quick} == set(QUICK)
    for arguments in quick:
        assert run(arguments, tmp_path).strip()


@pytest.mark.verify
@pytest.mark.timeout(1800)
def test_all_commands_of_the_readme_run_in_order(tmp_path: Path) -> None:
    build(ROOT / "data" / "demo")
    (tmp_path / "data").symlink_to(ROOT / "data")
    for arguments in commands():
        run(arguments, tmp_path)
    assert (tmp_path / "runs" / "demo" / "report.html").stat().st_size > 10_000
