"""Format stamps, nearest words, checksums, progress and the version."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker import hashing, progress
from stoker.errors import Refusal
from stoker.formats import require, stamp
from stoker.nearest import nearest
from tests.house.sources import HOME


def test_a_stamp_is_read_back_and_older_versions_are_readable() -> None:
    assert require({"format": stamp("stoker.store", 1), "x": 1}, "stoker.store", 3, "manifest.json") == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"format": stamp("stoker.store", 4)}, "version 4 by a newer release.*up to 3.*upgrade"),
        ({"format": stamp("stoker.run", 1)}, "'stoker.run' file where 'stoker.store' was expected"),
        ({}, "no readable format stamp"),
        ({"format": {"name": "stoker.store"}}, "no readable format stamp"),
        ({"format": {"name": "stoker.store", "version": "1"}}, "no readable format stamp"),
        ({"format": {"name": "stoker.store", "version": True}}, "no readable format stamp"),
        ({"format": {"name": "stoker.store", "version": 0}}, "no readable format stamp"),
        ([1], "no readable format stamp"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused_by_path(content: Any, says: str) -> None:
    with pytest.raises(Refusal, match=f"manifest.json: .*{says}"):
        require(content, "stoker.store", 3, Path("manifest.json"))


@pytest.mark.parametrize(
    ("word", "meant"),
    [("warmup_stps", "warmup_steps"), ("Warmup-Steps", "warmup_steps"), ("lr", "lr"), ("zzz", None), ("", None)],
)
def test_the_nearest_word_is_named_and_a_far_one_is_not(word: str, meant: str | None) -> None:
    assert nearest(word, ["lr", "warmup_steps", "decay_steps"]) == meant


def crc32c_bit_by_bit(data: bytes) -> int:
    """CRC-32C from its polynomial, reflected (RFC 3720, appendix B.4)."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


@given(a=st.binary(max_size=65), b=st.binary(max_size=65))
def test_crc32c_is_the_polynomial_and_continues_over_any_buffer(a: bytes, b: bytes) -> None:
    assert hashing.crc32c(b"123456789") == 0xE3069283
    assert (
        hashing.crc32c(a + b) == crc32c_bit_by_bit(a + b) == hashing.crc32c(bytearray(b), hashing.crc32c(memoryview(a)))
    )


def test_crc32c_reads_the_bytes_of_an_array_and_refuses_one_with_gaps() -> None:
    array = np.arange(500, dtype=np.float32).reshape(5, 100)
    assert hashing.crc32c(array) == hashing.crc32c(array.tobytes())
    with pytest.raises(ValueError, match="contiguous"):
        hashing.crc32c(array[:, ::2])


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert hashing.sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "speaks"), [(io.StringIO, False), (Terminal, True)])
def test_progress_speaks_to_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], speaks: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(progress.track(range(65), "counting")) == list(range(65))
    assert ("counting" in sys.stderr.getvalue()) == speaks


def commit_seen_from(folder: Path) -> str:
    program = "from stoker.version import code_commit; print(code_commit())"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-P", "-c", program]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_commit_is_that_of_our_own_checkout_and_dirt_shows(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.check_output(["git", "-C", str(tmp_path), *identity, *arguments], text=True).strip()

    shutil.copytree(HOME / "stoker", tmp_path / "stoker", ignore=shutil.ignore_patterns("__pycache__"))
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "x")
    assert commit_seen_from(tmp_path) == git("rev-parse", "HEAD")
    with open(tmp_path / "stoker" / "errors.py", "a") as file:
        file.write("\n")
    assert commit_seen_from(tmp_path) == git("rev-parse", "HEAD") + "+dirty"

    inner = tmp_path / "site-packages"
    shutil.copytree(tmp_path / "stoker", inner / "stoker")
    assert commit_seen_from(inner) == "None", "the commit of a project around us is not ours"
