"""What the supervisor writes: logs line by line, its journal, and exit.json, none of which a fault may spoil."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.supervise import causes, journal, logs
from launch.supervise.node import Alone, reserved_port
from pretrain.attempt import Exit, ExitClass, read_exit, record_exit
from pretrain.rundir import attempt_path
from stoker.errors import Refusal


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), max_size=60), cut=st.data())
def test_a_line_is_whole_in_the_log_however_its_bytes_come(
    text: str, cut: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "rank_00000.log"
    data = f"{text}\nbegun".encode()
    at = cut.draw(st.integers(0, len(data)))
    log = logs.RankLog(path, show_out=False)
    log.take("out", data[:at])
    log.take("out", data[at:])
    log.close()
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    stamps = [re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00) out (.*)", line, re.S) for line in lines]
    assert [found and found[2] for found in stamps] == [text, "begun"] or "***" in "".join(lines)


def test_a_log_that_cannot_be_written_costs_its_lines_and_no_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be")
    log = logs.RankLog(tmp_path / "logs" / "rank_00000.log", show_out=True)
    log.take("out", b"hello\n")
    log.take("err", b"x" * (logs.LONGEST_LINE + 1))
    log.close()
    said = capfd.readouterr()
    assert said.out == "hello\n" and "cannot be written" in said.err and len(log.last_errors) == 1


def test_one_line_an_event_with_secrets_masked_and_a_listener_that_fails_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary-canary")
    heard: list[dict[str, Any]] = []

    def fails(line: dict[str, Any]) -> None:
        heard.append(line)
        raise OSError("no network")

    with journal.Journal(tmp_path, [fails]) as writer:
        writer.write("fault", attempt=2, rank=1, kind="signal", text="canary-canary is gone", seconds=0.5)
        writer.write("end")
    lines = journal.read(tmp_path)
    assert [line["event"] for line in lines] == ["fault", "end"] and lines == heard
    assert (lines[0]["rank"], lines[0]["seconds"], lines[0]["text"]) == (1, 0.5, "*** is gone")
    assert journal.read(tmp_path / "nowhere") == [] and journal.read_ranks(tmp_path) is None


def test_p7_ranks_json_that_is_damaged_or_newer_is_refused(tmp_path: Path) -> None:
    for text in ("{", '{"format": {"name": "ranks", "version": 2}}'):
        (tmp_path / journal.RANKS).write_text(text)
        with pytest.raises(Refusal, match=r"ranks\.json"):
            journal.read_ranks(tmp_path)


KILLED = causes.killed(1, 9, 4, "a", no_memory=False)
SAID = {
    "by nobody": (None, KILLED, "signal"),
    "by one that lost it": ((ExitClass.FAULT, "another rank is gone", None), KILLED, "signal"),
    "by the guilty one": ((ExitClass.FAULT, "KeyError", 0), causes.fault("unknown", "lost"), "KeyError"),
    "as no fault": ((ExitClass.PREEMPTED, "saved", None), causes.PREEMPTED, "saved"),
    "as done, and then it was killed": ((ExitClass.DONE, "", None), KILLED, "signal"),
}


@pytest.mark.parametrize("how", SAID)
def test_exit_json_names_the_guilty_one_whoever_wrote_first(how: str, tmp_path: Path) -> None:
    said, found, stands = SAID[how]
    path = attempt_path(tmp_path, 1)
    if said is not None:
        path.mkdir(parents=True)
        record_exit(path, *said)
    causes.record(tmp_path, 1, found)
    ended = read_exit(path)
    assert ended is not None and stands in (ended.kind, ended.cause)
    assert [entry.name for entry in path.iterdir()] == ["exit.json"]


def test_an_exit_torn_by_a_rank_that_was_killed_is_replaced(tmp_path: Path) -> None:
    path = attempt_path(tmp_path, 1)
    path.mkdir(parents=True)
    (path / "exit.json").write_text("{")
    causes.record(tmp_path, 1, KILLED)
    assert read_exit(path) == Exit(ExitClass.FAULT, "rank 1 was killed by SIGKILL", 1, "signal", 4, "a")


def test_a_rank_that_blames_itself_takes_the_place_of_one_that_only_lost_it(tmp_path: Path) -> None:
    assert record_exit(tmp_path, ExitClass.FAULT, "another rank is gone")
    assert record_exit(tmp_path, ExitClass.FAULT, "KeyError", 1, kind="exception", step=3, host="a", fingerprint="f")
    assert not record_exit(tmp_path, ExitClass.FAULT, "ValueError", 0)
    assert read_exit(tmp_path) == Exit(ExitClass.FAULT, "KeyError", 1, "exception", 3, "a", "f")


def test_a_device_that_failed_takes_the_place_of_the_errors_that_it_caused_elsewhere_and_keeps_it(
    tmp_path: Path,
) -> None:
    assert record_exit(tmp_path, ExitClass.FAULT, "ncclInternalError", 0, kind="exception", step=3)
    assert record_exit(tmp_path, ExitClass.FAULT, "ECC error", 2, kind="device", step=3, host="a")
    assert not record_exit(tmp_path, ExitClass.FAULT, "ncclInternalError", 1, kind="exception", step=3)
    assert not record_exit(tmp_path, ExitClass.FAULT, "illegal address", 3, kind="device", step=3)
    assert read_exit(tmp_path) == Exit(ExitClass.FAULT, "ECC error", 2, "device", 3, "a")


def test_version_1_of_exit_json_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "exit.json").write_text(
        '{"format": {"name": "exit", "version": 1}, "class": "stopped", "cause": "step 7", "rank": null}'
    )
    assert read_exit(tmp_path) == Exit(ExitClass.STOPPED, "step 7", None, kind="verdict")


def test_the_port_of_an_attempt_is_given_to_nobody_else_and_can_be_listened_on() -> None:
    with reserved_port() as reservation:
        address = reservation.getsockname()
        others = [socket.socket() for _ in range(64)]
        for other in others:
            other.bind(("127.0.0.1", 0))
        assert address not in [other.getsockname() for other in others]
        with socket.socket(socket.AF_INET6) as store:  # as the store listens: on every address, for reuse
            store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            store.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            store.bind(("::", address[1]))
            store.listen()
            socket.create_connection(address, timeout=5).close()
        for other in others:
            other.close()


def test_a_lone_node_numbers_its_attempt_after_those_that_were(tmp_path: Path) -> None:
    attempt_path(tmp_path, 6).mkdir(parents=True)
    (tmp_path / "format.json").write_text('{"format": {"name": "run", "version": 1}}')
    node = Alone(tmp_path, 3, 1)
    met = node.meet(lambda: False)
    assert not hasattr(met, "again") and met.attempt == 7 and met.restarts == 0  # type: ignore[union-attr]
    environment = met.environment(2, 3)  # type: ignore[union-attr]
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["STOKER_ATTEMPT"]) == ("2", "3", "7")
    decision = node.agree(KILLED, 4)
    node.close(decision)
    assert decision.again and os.path.exists(attempt_path(tmp_path, 7) / "exit.json")
