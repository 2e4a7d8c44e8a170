"""The data log only grows, and only into the future."""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dataio.log import DataLog, Segment
from stoker.errors import Refusal
from tests.dataio.synthetic import TOKENIZER


def segment(from_step: int, **changes: object) -> Segment:
    return replace(Segment.of(from_step, 64, 6, {"a": 2, "b": 1}, {"a": "1" * 64, "b": "2" * 64}), **changes)


def test_a_log_reads_back_equal_and_grows_on_disk(tmp_path: Path) -> None:
    log = DataLog(3, TOKENIZER, (segment(0),)).write(tmp_path / "data_log.jsonl")
    assert DataLog.open(log.path) == log
    longer = log.append(segment(10, seq_len=128), next_step=10).append(segment(12, skip_batches=2), next_step=11)
    assert DataLog.open(log.path) == longer
    assert longer.hash() != log.hash() == longer.hash(1)
    assert [longer.segment_at(step) for step in (0, 9, 10, 11, 12, 500)] == [0, 0, 1, 1, 2, 2]


def test_p3_an_entry_for_a_step_that_has_begun_is_refused(tmp_path: Path) -> None:
    log = DataLog(3, TOKENIZER, (segment(0),)).write(tmp_path / "data_log.jsonl")
    before = log.path.read_bytes()
    with pytest.raises(Refusal, match=r"step 9 has begun; an entry can hold from step 10"):
        log.append(segment(9), next_step=10)
    assert log.path.read_bytes() == before


def test_a_later_line_takes_the_place_of_what_was_to_hold_from_its_step_on(tmp_path: Path) -> None:
    log = DataLog(3, TOKENIZER, (segment(0),)).write(tmp_path / "data_log.jsonl")
    log = log.append(segment(20), next_step=10).append(segment(100), next_step=10)
    again = log.append(segment(20, seq_len=128), next_step=20)
    assert again.standing == (segment(0), segment(20, seq_len=128))
    assert DataLog.open(log.path) == again and len(again.segments) == 4
    assert again.append(segment(15), next_step=10).standing == (segment(0), segment(15))


def test_two_writers_do_not_overwrite_each_other(tmp_path: Path) -> None:
    log = DataLog(3, TOKENIZER, (segment(0),)).write(tmp_path / "data_log.jsonl")
    log.append(segment(10), next_step=5)
    with pytest.raises(Refusal, match="open it again"):
        log.append(segment(11), next_step=5)
    with pytest.raises(Refusal, match="already"):
        log.write(tmp_path / "data_log.jsonl")


@pytest.mark.parametrize("call", range(6))
def test_a_run_that_is_killed_as_it_begins_its_log_has_all_of_it_or_none(tmp_path: Path, call: int) -> None:
    path = tmp_path / "data_log.jsonl"
    log = DataLog(3, TOKENIZER, (segment(0), segment(7)))
    if (child := os.fork()) == 0:
        calls = itertools.count()

        def watch(event: str, _: object) -> None:
            if event in ("open", "os.rename", "os.link") and next(calls) == call:
                os._exit(9)

        sys.addaudithook(watch)
        log.write(path)
        os._exit(0)
    os.waitpid(child, 0)
    if not path.exists():
        log.write(path)
    assert DataLog.open(path) == log


def test_a_torn_last_line_was_never_appended(tmp_path: Path) -> None:
    log = DataLog(3, TOKENIZER, (segment(0),)).write(tmp_path / "data_log.jsonl")
    longer = log.append(segment(10), next_step=5)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-20])
    assert DataLog.open(log.path) == log
    assert log.append(segment(10), next_step=5) == longer
    assert log.path.read_bytes() == whole


def test_p7_logs_that_are_damaged_newer_or_inconsistent_are_refused(tmp_path: Path) -> None:
    path = DataLog(3, TOKENIZER, (segment(0),)).write(tmp_path / "data_log.jsonl").path
    header, first = path.read_text().splitlines()
    newer = json.dumps(json.loads(header) | {"format": {"name": "stoker.data_log", "version": 99}})
    unknown = json.dumps(json.loads(first) | {"shuffle": True})
    for lines, message in (
        ([newer, first], "newer"),
        ([header, unknown], "damaged"),
        ([header, "{}", first], "damaged"),
        ([header], "from step 0"),
        ([], "empty"),
    ):
        path.write_text("".join(line + "\n" for line in lines))
        with pytest.raises(Refusal, match=message):
            DataLog.open(path)
    with pytest.raises(Refusal, match="no data log"):
        DataLog.open(tmp_path / "nowhere.jsonl")
    with pytest.raises(Refusal, match="does not divide"):
        DataLog(3, TOKENIZER, (segment(0, seq_len=1000),))
    with pytest.raises(Refusal, match="must agree"):
        Segment.of(0, 64, 6, {"a": 1}, {"b": "1" * 64})
