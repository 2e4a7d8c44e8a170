"""``stoker status``: what a run does or how it ended, from its directory alone, whatever state that is in."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from launch.commands_watch import status as status_command
from launch.watch.observe import Observer
from launch.watch.record import Health, State, Status
from launch.watch.useful import supervised_spans
from launch.watch.words import lines, printable, ranks_named
from pretrain.rundir import LOCK
from stoker.errors import Refusal
from tests.launch.watch.runs import FakeRun, eventful, moment

app = typer.Typer()
app.command()(status_command)


def look(run: FakeRun) -> Status:
    return Observer(run.root).look()


def words(found: Status) -> str:
    return "\n".join(lines(found, colour=False))


def dead(run: FakeRun, host: str | None = None) -> None:
    """Let the run directory be held by a process that is gone, here or on another host."""
    process = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(process, 0)
    (run.root / LOCK).write_text(f"process {process} on {host or os.uname().nodename}")


def test_a_run_that_was_only_made_has_not_started(tmp_path: Path) -> None:
    found = look(FakeRun(tmp_path / "run"))
    assert found.state is State.NOT_STARTED and found.step == 0 and found.loss is None
    assert "not started" in words(found) and "0 of 1,000" in words(found)


def test_a_run_is_starting_until_its_first_step_and_then_running_with_the_time_that_is_left(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", steps=100)
    run.attempt(1)
    observer = Observer(run.root)
    assert observer.look().state is State.STARTING
    run.train(1, range(40))
    found = observer.look()
    assert found.state is State.RUNNING and found.step == 40
    assert found.time_left_s == pytest.approx(60 * run.step_time_s)
    assert found.tokens == 40 * 2048


@pytest.mark.parametrize(
    ("exit_class", "state"),
    [
        ("done", State.DONE),
        ("refused", State.REFUSED),
        ("stopped", State.STOPPED),
        ("preempted", State.PREEMPTED),
        ("fault", State.FAULT),
    ],
)
def test_a_run_that_has_ended_says_how(tmp_path: Path, exit_class: str, state: State) -> None:
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.train(1, range(3))
    run.end(1, **{"class": exit_class, "cause": "because", "rank": 2, "kind": "exception"})
    found = look(run)
    assert found.state is state and found.words == "because"
    assert found.faults == ({"exception": 1} if exit_class == "fault" else {})
    assert "rank 2: because" in words(found)


def test_a_fault_under_a_living_supervisor_is_a_restart(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", ranks=4)
    run.journal([{"at": 0, "event": "start"}])
    run.attempt(1)
    run.train(1, range(3))
    run.end(1, **{"class": "fault", "cause": "rank 1 was killed by SIGKILL", "rank": 1, "kind": "signal"})
    run.beats(1, 3, state="restarting")
    found = look(run)
    assert found.state is State.RESTARTING and found.words == "after signal of rank 1"
    assert [rank.health for rank in found.ranks] == [Health.WELL, Health.GUILTY, Health.WELL, Health.WELL]
    run.journal([{"at": 9, "event": "end", "text": "the same failure twice"}])
    assert look(run).state is State.FAULT


def test_a_run_whose_process_is_gone_without_a_word_was_killed(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.train(1, range(3))
    dead(run)
    found = look(run)
    assert found.state is State.KILLED and found.attempts[-1].outcome == "killed" and found.faults == {"unknown": 1}


def test_of_a_run_on_another_host_its_files_are_the_signs_of_life(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.train(1, range(3))
    dead(run, host="node-elsewhere")
    assert look(run).state is State.RUNNING
    long_ago = time.time() - 3600
    for name in ("metrics.jsonl", "config.yaml"):
        os.utime(run.root / name, (long_ago, long_ago))
    found = look(run)
    assert found.state is State.UNKNOWN and "nothing was written for" in found.words


def test_useful_time_is_that_of_the_steps_that_stand(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run", step_time_s=2.0, began=time.time() - 1000)
    run.journal([{"at": 0, "event": "start"}, {"at": 50, "event": "fault"}, {"at": 100, "event": "end"}])
    run.attempt(1, began=run.began + 10)
    run.train(1, range(20))
    run.end(1, run.began + 50, **{"class": "fault"})
    run.attempt(2, 15, began=run.began + 60)
    run.train(2, range(15, 25))
    run.end(2, run.began + 90, **{"class": "done"})
    found = look(run).useful
    assert found.useful_s == pytest.approx(25 * 2.0)
    assert (found.redone_steps, found.redone_s) == (5, pytest.approx(5 * 2.0))
    assert found.elapsed_s == pytest.approx(100, abs=0.01) and found.share == pytest.approx(0.5, abs=1e-3)


def test_the_wait_before_a_restart_is_not_useful_and_that_between_two_supervisors_is_not_counted() -> None:
    def spans(*said: tuple[float, str]) -> list[tuple[float, float]]:
        events = [{"time": moment(at), "event": event} for at, event in said]
        return [(round(a), round(b)) for a, b in supervised_spans(events, False)]

    restarted = spans((10, "start"), (20, "fault"), (21, "restart"), (80, "start"), (90, "end"))
    assert restarted == [(10, 90)]
    killed = spans((10, "start"), (20, "training"), (80, "start"), (90, "end"), (200, "start"), (230, "stop"))
    assert killed == [(10, 20), (80, 90), (200, 230)]


def test_useful_time_without_a_supervisor_is_of_the_attempts_and_unknown_where_file_times_cannot_be(
    tmp_path: Path,
) -> None:
    run = FakeRun(tmp_path / "run", step_time_s=2.0, began=time.time() - 10_000)
    run.attempt(1, began=run.began)
    run.train(1, range(10))
    run.end(1, run.began + 40, **{"class": "fault"})
    run.attempt(2, 10, began=run.began + 5000)  # hours between two launches are nobody's
    run.train(2, range(10, 20))
    run.end(2, run.began + 5040, **{"class": "done"})
    assert look(run).useful.elapsed_s == pytest.approx(80, abs=0.01)
    for number in (1, 2):  # copied just now
        for path in (run.root / "attempts" / f"{number:04d}").iterdir():
            os.utime(path)
    assert look(run).useful.share is None


def test_slow_quiet_and_lost_ranks_are_named_until_it_is_over(tmp_path: Path) -> None:
    run = eventful(tmp_path / "run", ranks=16)
    observer = Observer(run.root)
    found = observer.look()
    assert found.slow_ranks == [6] and found.ranks[13].health is Health.QUIET
    assert "quiet: 13; slow: 6" in words(found) and "loss is NaN, first in layers.2.mixer.q" in words(found)
    run.guards([{"at": 720, "attempt": 3, "step": 903, "kind": "slow_over", "rank": 6, "text": "rank 6 keeps up"}])
    run.beats(3, 910, r13={"alive": False})
    found = observer.look()
    assert found.slow_ranks == [] and found.ranks[13].health is Health.GONE


def test_attempts_have_the_steps_that_stand_and_their_cause(tmp_path: Path) -> None:
    found = look(eventful(tmp_path / "run"))
    spans = [(attempt.first_step, attempt.last_step) for attempt in found.attempts]
    assert spans == [(0, 399), (400, 799), (800, 904)]
    assert [attempt.kind for attempt in found.attempts] == ["signal", "hang", None]
    assert found.restarts == 2 and found.faults == {"signal": 1, "hang": 1} and found.skipped == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plan.json", b"{"),
        ("config.yaml", b"run: ["),
        ("config.yaml", b"- 1\n"),
        ("ranks.json", b"[]"),
        ("ranks.json", b'{"format":{"name":"ranks","version":99}}'),
        ("supervisor.jsonl", b"{}\nnot json\n"),
        ("guards.jsonl", b"\xff\xfe\n"),
        ("attempts/0001/exit.json", b"\x00"),
        ("attempts/0001/environment.json", b"3"),
        ("metrics.jsonl", b"\n\n{}\n"),
        (".lock", b"process 99999999999999999999 on " + os.uname().nodename.encode()),
    ],
)
def test_what_is_damaged_is_said_and_the_rest_is_shown(tmp_path: Path, name: str, content: bytes) -> None:
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.train(1, range(5))
    with open(run.root / name, "ab" if name == "metrics.jsonl" else "wb") as file:
        file.write(content)
    found = look(run)
    assert found.step == 5
    assert name == ".lock" or any(Path(name).stem.split("/")[-1][:3] in s or "attempt 1" in s for s in found.unreadable)
    assert name == ".lock" or "not shown" in words(found)


@pytest.mark.parametrize("case", ["missing", "empty", "file", "newer", "damaged", "parent"])
def test_what_is_no_run_directory_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    run = FakeRun(tmp_path / "run")
    path = {"missing": tmp_path / "nowhere", "parent": tmp_path, "file": run.root / "config.yaml"}.get(case, run.root)
    stamp = run.root / "format.json"
    if case == "empty":
        stamp.unlink()
    if case == "newer":
        stamp.write_text('{"format":{"name":"run","version":99}}')
    if case == "damaged":
        stamp.write_text("{")
    with pytest.raises(Refusal) as refused:
        Observer(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert case != "parent" or "it holds the runs run" in str(refused.value)


def test_the_command_prints_words_or_json(tmp_path: Path) -> None:
    run = eventful(tmp_path / "run")
    shown = CliRunner().invoke(app, [str(run.root)])
    assert shown.exit_code == 0 and "running, attempt 3" in shown.stdout and "\x1b" not in shown.stdout
    told = CliRunner().invoke(app, [str(run.root), "--json"])
    value = json.loads(told.stdout)
    assert value["format"] == {"name": "status", "version": 1}
    assert (value["state"], value["step"], value["steps"]) == ("running", 905, 1000)
    assert len(value["ranks"]) == 16 and 0 < value["useful"]["share"] < 1


def test_numbers_that_are_not_finite_are_json(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.train(1, [0], loss=float("nan"), grad_norm=float("inf"))
    value = json.loads(json.dumps(look(run).to_json(), allow_nan=False))
    assert (value["loss"], value["grad_norm"]) == ("nan", "inf")


def test_secrets_and_control_characters_do_not_reach_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "CANARY-0123456789")
    run = FakeRun(tmp_path / "run")
    run.attempt(1)
    run.end(1, **{"class": "fault", "cause": "key CANARY-0123456789 \x1b]0;gone\x07", "rank": 0})
    found = look(run)
    assert "CANARY" not in json.dumps(found.to_json()) and "CANARY" not in words(found)
    assert "\x1b" not in words(found)
    assert printable("a\tb") == "a\tb"


def test_ranks_are_named_in_few_words() -> None:
    assert ranks_named([7, 3, 4, 5]) == "3 to 5, 7"
    assert ranks_named(range(0, 10_000, 2)).endswith("and 4,988 more")


def test_looking_writes_nothing(tmp_path: Path) -> None:
    run = eventful(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    look(run)
    assert before == {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}


def test_every_state_and_health_is_explained_in_the_documentation() -> None:
    said = (Path(__file__).parents[3] / "docs" / "watching.md").read_text()
    assert [member.value for kind in (State, Health) for member in kind if member.value not in said] == []
