"""``stoker logs``: one stream in order of time, and errors with the first and guilty one first."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.commands_watch import logs
from launch.watch.errors import error_lines
from launch.watch.logs import follow_lines, log_lines
from stoker.errors import Refusal
from tests.launch.watch.runs import FakeRun

TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "loop.py", line 3, in train',
    "    step()",
    "ValueError: the guilty one",
]
PEER = "rank {}: another rank is gone (Connection closed by peer [127.0.0.1]:{})"


def err(at: float, *texts: str) -> list[tuple[float, str, str]]:
    return [(at, "err", text) for text in texts]


@pytest.fixture
def failed(tmp_path: Path) -> FakeRun:
    """Ranks 0 to 3: rank 2 raises, and the others lose it; rank 0's words come first, as a fast reporter's do."""
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.log(1, 0, [(1, "out", "step 10/100"), *err(5.1, PEER.format(0, 4001)), (5.2, "out", "bye")])
    run.log(1, 1, err(5.3, "warning: something old", PEER.format(1, 4002)))
    run.log(1, 2, err(5.2, *TRACEBACK))
    run.log(1, 3, err(5.4, PEER.format(3, 4003)))
    run.end(1, **{"class": "fault", "cause": "ValueError: the guilty one", "rank": 2, "kind": "exception", "step": 11})
    return run


def test_lines_of_all_ranks_are_one_stream_in_order_of_time(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.log(1, 0, [(0.1, "out", "a"), (0.5, "out", "d")])
    run.log(1, 1, [(0.2, "err", "b"), (0.2, "err", "c"), (0.9, "out", "e")])
    found = list(log_lines(run.root))
    assert [line.rsplit("  ", 1)[1] for line in found] == list("abcde")
    assert "  rank 1  err  b" in found[1]
    assert [line[-1] for line in log_lines(run.root, rank=1)] == list("bce")


def test_lines_longer_than_a_piece_and_lines_without_a_time_stay_where_they_are(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.log(1, 0, [(0.1, "out", "x" * 200_000), (0.3, "out", "z")])
    with open(run.root / "logs" / "0001" / "rank_00000.log", "a") as file:
        file.write("no time\n2026-torn")
    run.log(1, 1, [(0.2, "out", "y")])
    found = list(log_lines(run.root))
    assert [line[-1] for line in found] == ["x", "y", "z", "e"]
    assert found[0].count("x") == 200_000


def test_what_a_rank_prints_does_not_act_on_the_terminal_or_show_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "CANARY-0123456789")
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.log(1, 0, [(0.1, "out", "\x1b[2Jkey CANARY-0123456789")])
    (line,) = log_lines(run.root)
    assert "\x1b" not in line and "CANARY" not in line


def test_errors_begin_with_the_guilty_rank_and_like_ones_are_told_together(failed: FakeRun) -> None:
    found = list(error_lines(failed.root))
    text = "\n".join(found)
    assert found[0] == "attempt 1: fault (exception), rank 2, step 11"
    assert text.index("rank 2, to blame") < text.index("ranks 0 to 1, 3,")
    assert [line.strip() for line in found if "ValueError" in line] == ["ValueError: the guilty one"] * 2
    assert "another rank is gone" in text and text.count("another rank is gone") == 1
    assert "something old" not in text and "step 10/100" not in text


def test_chained_tracebacks_are_one_error_and_what_follows_is_none(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    chain = [*TRACEBACK, "", "During handling of the above exception, another exception occurred:", "", *TRACEBACK]
    run.log(1, 0, err(1, "before", *chain, "after"))
    run.end(1, **{"class": "fault", "cause": "x", "rank": 0})
    text = "\n".join(error_lines(run.root))
    assert text.count("rank 0, to blame") == 1 and text.count("Traceback") == 2
    assert "before" not in text and "after" not in text.replace("During handling", "")


def test_a_killed_rank_is_told_by_its_last_words_and_its_stack(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.log(1, 1, err(1, "the last thing it said"))
    (run.root / "logs" / "0001" / "stack_00001.txt").write_text('Thread 0x1:\n  File "a.py", line 1 in all_reduce\n')
    run.end(1, **{"class": "fault", "cause": "no progress", "rank": 1, "kind": "hang"})
    text = "\n".join(error_lines(run.root))
    assert "the last thing it said" in text and "in all_reduce" in text and "attempt 1: fault (hang), rank 1" in text


def test_the_log_that_torchrun_left_is_told(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    (run.attempt(1) / "torchrun.log").write_text("Root Cause\nrank 0\n")
    assert list(log_lines(run.root)) == ["Root Cause", "rank 0"]
    run.end(1, **{"class": "fault", "cause": "killed", "rank": 0})
    assert "Root Cause" in list(error_lines(run.root))


@pytest.mark.parametrize(
    ("attempt", "rank", "says"),
    [(7, None, "no attempt 7: it has 1"), (1, 9, "no log of rank 9: it has ranks 0 to 3"), (None, 9, "rank 9")],
)
def test_what_is_not_there_is_refused_with_what_is(
    failed: FakeRun, attempt: int | None, rank: int | None, says: str
) -> None:
    with pytest.raises(Refusal, match=says):
        list(log_lines(failed.root, attempt, rank))


def test_a_run_without_logs_says_why(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    with pytest.raises(Refusal, match="no attempt has begun"):
        log_lines(run.root)
    run.attempt(1)
    with pytest.raises(Refusal, match="went to the terminal of torchrun"):
        log_lines(run.root)


def test_following_goes_on_through_a_restart_and_ends_with_the_run(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.journal([{"at": 0, "event": "start"}])
    run.beats(1, 0)
    run.attempt(1)
    run.log(1, 0, [(0.1, "out", "first")])
    seen: list[str] = []
    reader = threading.Thread(target=lambda: [seen.append(line.rsplit("  ", 1)[1]) for line in follow_lines(run.root)])
    reader.start()
    wait_for(lambda: seen == ["first"])
    run.log(1, 1, [(0.2, "out", "second")])
    wait_for(lambda: seen == ["first", "second"])
    run.end(1, **{"class": "fault", "cause": "x", "rank": 0})
    run.attempt(2)
    run.log(2, 0, [(0.3, "out", "third")])
    wait_for(lambda: seen == ["first", "second", "third"])
    run.log(2, 0, [(0.4, "out", "last")])
    run.end(2, **{"class": "done"})
    run.journal([{"at": 9, "event": "end"}])
    reader.join(20)
    assert not reader.is_alive() and seen == ["first", "second", "third", "last"]


def wait_for(condition: object, deadline_s: float = 20.0) -> None:
    assert callable(condition)
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.02)


def test_more_ranks_than_a_process_may_open_files_are_merged(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    for rank in range(300):
        run.log(1, rank, [(rank / 1000, "out", f"line {rank}")])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 100), hard))
    try:
        found = list(log_lines(run.root))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [line.rsplit("  ", 1)[1] for line in found] == [f"line {rank}" for rank in range(300)]


def test_the_command_ends_quietly_when_its_reader_has_seen_enough(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.log(1, 0, [(n / 1000, "out", f"line {n}") for n in range(5000)])
    script = "import typer; from launch.commands_watch import logs; typer.run(logs)"
    with subprocess.Popen([sys.executable, "-c", script, str(run.root)], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().endswith("line 0\n")
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) == 0


def test_errors_that_are_still_to_come_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="--errors and --follow"):
        logs(FakeRun(tmp_path / "run").root, follow=True, errors=True)
