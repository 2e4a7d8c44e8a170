"""The README tells the truth: its files exist and its commands are commands."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec

import pytest

from launch.cli import main
from tests.house.sources import HOME

README = (HOME / "README.md").read_text()
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (HOME / "Makefile").read_text(), re.MULTILINE))


def commands() -> list[list[str]]:
    """Every line of the ``sh`` blocks and every command in a sentence, split as a shell would, comments left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:stoker|make|torchrun|python) [^`]+)`", README)
    lines = [shlex.split(line, comments=True) for line in (*"\n".join(blocks).splitlines(), *inline)]
    return [words for words in lines if words]


def test_every_path_in_the_readme_exists() -> None:
    named = {*re.findall(r"`(\w[\w./-]*/[\w.-]*)`", README), *re.findall(r"\]\(([^)#:]+)\)", README)}
    missing = sorted(path for path in named if not (HOME / path).exists() and not path.startswith(("data/", "runs/")))
    assert named and not missing, missing


def test_the_reading_path_begins_with_the_step() -> None:
    steps = re.findall(r"^\d+\. `([\w/]+\.py)`", README, re.MULTILINE)
    assert steps and steps[0] == "pretrain/loop.py"


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_in_the_readme_is_one(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    match words:
        case ["make", *arguments]:
            assert {word for word in arguments if "=" not in word} <= MAKE_TARGETS
        case ["stoker", *arguments]:
            with pytest.raises(SystemExit) as ended:
                main([*arguments, "--help"])
            said = capsys.readouterr()
            assert ended.value.code == 0, said.err
            assert "Usage: stoker" in said.out
        case ["python" | "torchrun", *arguments] if "-m" in arguments:
            assert find_spec(arguments[arguments.index("-m") + 1]) is not None
        case _:
            pytest.fail(f"nobody tests this command: {words}")
