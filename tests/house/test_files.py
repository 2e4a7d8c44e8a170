"""Files are whole or not there, whenever the writer dies."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker import canonical
from stoker.errors import Refusal
from stoker.files import append_line, read_jsonl, write_atomic
from tests.house.sources import HOME

DIES_IN = """
import os, signal, sys
from stoker.files import write_atomic
die = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[1], die)
write_atomic(sys.argv[2], "new" * 100_000)
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_writer_killed_before_the_rename_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "config.yaml"
    write_atomic(path, "old")
    died = subprocess.run([sys.executable, "-c", DIES_IN, moment, str(path)], cwd=HOME, timeout=60)
    assert died.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    write_atomic(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["plan.json"]


def test_the_mode_asked_for_is_the_mode_of_the_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "private", "x", mode=0o600)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


records = st.lists(st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=40), max_size=3), max_size=6)


@given(written=records, cut=st.integers(min_value=0, max_value=1000))
def test_a_log_cut_at_any_byte_keeps_every_whole_line_and_can_be_continued(
    tmp_path_factory: pytest.TempPathFactory, written: list[dict], cut: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    lines = [canonical.dumps(record) for record in written]
    for line in lines:
        append_line(path, line)
    path.touch()
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    whole = data.count(b"\n")

    assert read_jsonl(path) == written[:whole]
    assert path.read_bytes() == data, "a reader repairs nothing in a file that another process may be writing"
    append_line(path, canonical.dumps({"after": 1}), durable=True)
    assert read_jsonl(path) == [*written[:whole], {"after": 1}]


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 20_000])
def test_a_torn_line_of_any_length_is_cut_off_before_the_next_one(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data_log.jsonl"
    append_line(path, '{"a":1}')
    with open(path, "a") as file:
        file.write("x" * size)
    append_line(path, '{"b":2}')
    assert path.read_text() == '{"a":1}\n{"b":2}\n'


@pytest.mark.parametrize("line", ["{", "[1]", "", "\0\0\0"])
def test_a_damaged_line_inside_a_log_is_refused_by_file_and_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"a":1}}\n{line}\n{{"b":2}}\n')
    with pytest.raises(Refusal, match=r"metrics\.jsonl, line 2"):
        read_jsonl(path)


def test_a_record_of_two_lines_is_not_appended(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one line"):
        append_line(tmp_path / "log", "a\nb")
    assert not (tmp_path / "log").exists()
