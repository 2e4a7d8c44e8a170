"""metrics.jsonl, its one reader, and the sinks: what is deterministic is kept to the last bit (P5), and no sink but
the file can stop a run."""

from __future__ import annotations

import io
import json
import math
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pretrain import events
from pretrain import sinks as sinks_module
from pretrain.config import RunConfig, load
from pretrain.events import METRICS, StepEvent, Timing, deterministic, read, standing
from pretrain.sinks import ConsoleSink, WandbSink, open_sinks, wandb_mode
from stoker.errors import Refusal


def event(step: int = 0, attempt: int = 1, **changes: Any) -> StepEvent:
    fields: dict[str, Any] = {
        "attempt": attempt,
        "step": step,
        "loss": 8.25 + 1.0 / (step + 3),
        "grad_norm": 1.5,
        "lr": 1e-3,
        "valid_targets": 500,
        "tokens": 512,
        "draws": {"code": 3, "prose": 1},
        "verdict": "apply",
        "applied": True,
        "aux": {"balance_loss": 0.1},
        "timing": Timing(0.5, 1024.0, None),
    }
    return StepEvent(**{**fields, **changes})


def test_a_line_has_exactly_the_keys_of_the_run_directory_format() -> None:
    line = json.loads(event().to_line())
    assert set(line) == {
        "schema", "attempt", "step", "loss", "grad_norm", "lr", "valid_targets", "tokens", "draws", "verdict",
        "applied", "aux", "timing",
    }  # fmt: skip
    assert line["schema"] == 1
    assert line["timing"] == {"step_time_s": 0.5, "tokens_per_s": 1024.0, "mfu": None}


number = st.floats(allow_nan=True, allow_infinity=True)


@given(number, number, number, st.dictionaries(st.text(max_size=5), number, max_size=3))
def test_p5_numbers_are_read_back_to_the_last_bit_whatever_they_are(
    loss: float, norm: float, lr: float, aux: dict[str, float]
) -> None:
    written = event(loss=loss, grad_norm=norm, lr=lr, aux=aux)
    line = written.to_line()
    back = StepEvent.from_json(json.loads(line, parse_constant=pytest.fail))
    assert back.to_line() == line
    for a, b in zip((loss, norm, lr), (back.loss, back.grad_norm, back.lr), strict=True):
        assert a.hex() == b.hex()


def test_p5_deterministic_keys_do_not_depend_on_the_clock_or_the_attempt() -> None:
    assert deterministic(event(attempt=1, loss=math.nan)) == deterministic(
        event(attempt=2, loss=math.nan, timing=Timing(9.0))
    )
    assert deterministic(event()) != deterministic(event(loss=math.nextafter(event().loss, 9.0)))
    assert {"timing", "attempt"}.isdisjoint(deterministic(event()))


def test_the_higher_attempt_wins_and_a_resumed_run_has_no_steps_of_its_past_future(tmp_path: Path) -> None:
    killed = [event(step) for step in range(8)]
    resumed = [event(step, attempt=2, loss=1.0) for step in (4, 5)]
    for item in (*killed, *resumed):
        events.write(tmp_path, item)
    assert [(e.step, e.attempt) for e in read(tmp_path)] == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert read(tmp_path) == read(tmp_path / METRICS)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), max_size=5))
def test_standing_events_equal_a_replay_that_cuts_at_each_resume(attempts: list[tuple[int, int]]) -> None:
    log: list[StepEvent] = []
    replay: list[tuple[int, int]] = []
    for number, (start, length) in enumerate(attempts, start=1):
        start = min(start, len(replay))  # a run resumes inside what it has done
        log += [event(step, attempt=number) for step in range(start, start + length)]
        replay = replay[:start] + [(step, number) for step in range(start, start + length)]
    assert [(e.step, e.attempt) for e in standing(log)] == replay


def test_steps_of_an_attempt_that_went_back_replace_its_own(tmp_path: Path) -> None:
    first = [event(step) for step in range(6)]
    back = [event(step, loss=1.0) for step in (3, 4)]
    for item in (*first[:5], event(5, verdict="rewind", applied=False), *back):
        events.write(tmp_path, item)
    assert [(e.step, e.loss == 1.0) for e in read(tmp_path)] == [
        (0, False), (1, False), (2, False), (3, True), (4, True),
    ]  # fmt: skip
    for item in [event(step, attempt=2, loss=2.0) for step in (3, 4, 5)]:
        events.write(tmp_path, item)
    assert [(e.step, e.attempt) for e in read(tmp_path)] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


@pytest.mark.parametrize("kept", [1, 63, -1])
def test_a_torn_last_line_is_left_out_and_the_next_attempt_writes_over_it(tmp_path: Path, kept: int) -> None:
    line = event(1).to_line().encode()
    (tmp_path / METRICS).write_bytes(event(0).to_line().encode() + b"\n" + line[:kept])
    assert [e.step for e in read(tmp_path)] == [0]
    events.write(tmp_path, event(1, attempt=2))
    assert [e.step for e in read(tmp_path)] == [0, 1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{}", "schema None"),
        (b'{"schema": 2}', "schema 2 where this release reads 1"),
        (b'{"schema": 1, "step": 3}', "damaged"),
        (b'{"schema": 1, ', "damaged"),
        (event().to_line().replace('"lr"', '"lrr"').encode(), "damaged"),
    ],
)
def test_p7_a_damaged_or_newer_line_is_refused_by_its_number(tmp_path: Path, line: bytes, expected: str) -> None:
    events.write(tmp_path, event())
    with open(tmp_path / METRICS, "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(Refusal, match=f"{METRICS}, line 2: .*{expected}"):
        read(tmp_path)


def test_p7_a_run_without_metrics_says_so(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no step has been trained"):
        read(tmp_path)


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_without_a_terminal_there_is_a_plain_line_every_few_steps_and_at_the_end() -> None:
    console = plain_console()
    sink = ConsoleSink(console, steps=25, every=10)
    for step in range(25):
        sink.step(event(step))
    assert [line.split("  ")[0] for line in printed(console)] == ["step 10/25", "step 20/25", "step 25/25"]
    first = printed(console)[0]
    assert f"loss {event(9).loss:.4f}" in first and "1,024 tokens/s" in first and "left 0:00:08" in first


def test_p7_what_is_not_known_is_printed_as_unknown() -> None:
    console = plain_console()
    ConsoleSink(console, steps=1, every=1).step(event(timing=Timing()))
    assert "unknown tokens/s" in printed(console)[0] and "left unknown" in printed(console)[0]


def test_a_skipped_step_is_always_said() -> None:
    console = plain_console()
    ConsoleSink(console, steps=100, every=50, quiet=True).step(event(3, loss=math.nan, verdict="skip", applied=False))
    assert printed(console)[0].startswith("step 3: skip, not applied (loss nan")


def test_quiet_leaves_only_what_is_said() -> None:
    console = plain_console()
    sink = ConsoleSink(console, steps=2, every=1, quiet=True)
    sink.step(event(0))
    sink.say("checkpoint [100]")
    assert printed(console) == ["checkpoint [100]"]


def test_a_terminal_shows_one_live_line() -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    sink = ConsoleSink(console, steps=3, every=1)
    for step in range(3):
        sink.step(event(step))
    sink.close()
    shown = "".join(printed(console))
    assert "3/3" in shown and f"loss {event(2).loss:.4f}" in shown and "step 1/3" not in shown


def demo(*overrides: str) -> RunConfig:
    return load("demo", list(overrides))


def test_wandb_is_offline_unless_a_key_is_set_or_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_mode(demo()) == "offline"
    assert wandb_mode(demo("log.wandb=online")) == "online"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode(demo()) == "online"
    assert wandb_mode(demo("log.wandb=offline")) == "offline"


class FakeWandb:
    """Stands in for the package: remembers what it is told, and fails at ``breaks``."""

    def __init__(self, breaks: str = "") -> None:
        self.breaks, self.calls = breaks, list[tuple[str, Any]]()
        self.Settings = type("Settings", (dict,), {"model_fields": {"silent": None, "x_disable_meta": None}})

    def _do(self, what: str, value: Any) -> Any:
        self.calls.append((what, value))
        if what == self.breaks:
            raise RuntimeError(f"no network, api_key={'k' * 40}")
        return self

    def init(self, **settings: Any) -> Any:
        return self._do("init", settings)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, values: Any) -> Any:
        return self._do("log", values)

    def finish(self) -> Any:
        return self._do("finish", None)


@pytest.mark.parametrize("breaks", ["init", "log", "finish"])
def test_a_failure_of_wandb_is_said_once_without_secrets_and_the_run_goes_on(
    breaks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb(breaks)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    console = plain_console()
    with open_sinks(demo("log.quiet=true"), tmp_path, attempt=1, console=console) as sinks:
        for step in range(3):
            sinks.step(event(step))
    assert len(read(tmp_path)) == 3
    (line,) = printed(console)
    assert line.startswith(f"W&B could not {'start' if breaks == 'init' else breaks}") and "kkkk" not in line
    assert sum(what == breaks for what, _ in fake.calls) == 1


def test_a_wandb_that_never_finishes_does_not_hold_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks_module, "FINISH_S", 0.2)
    monkeypatch.setattr(sinks_module, "MARGIN_S", 0.1)
    fake, released = FakeWandb(), threading.Event()
    monkeypatch.setattr(fake, "finish", lambda: released.wait(60))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    console, began = plain_console(), time.monotonic()
    with open_sinks(demo("log.quiet=true"), tmp_path, attempt=1, console=console) as sinks:
        sinks.step(event())
    released.set()
    assert time.monotonic() - began < 30
    (line,) = printed(console)
    assert line.startswith("W&B could not finish: TimeoutError: no answer")


def test_wandb_gets_no_secret_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = demo("data.blend={'https://me:hunter2hunter2@host/store': 1}")
    sink = WandbSink(config, tmp_path, 3, pytest.fail)
    sink.step(event(7))
    sink.close()
    (_, settings), (_, values), _ = fake.calls
    assert "hunter2" not in repr(settings["config"]) and settings["name"] == "demo-0003"
    assert values["step"] == 7 and values["loss"] == event(7).loss and values["draws/code"] == 3
    assert "timing/mfu" not in values


def test_the_installed_wandb_writes_offline_without_network_or_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    sink = WandbSink(demo("log.wandb=offline"), tmp_path, 1, pytest.fail)
    sink.step(event())
    sink.close()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_steps_that_a_rewind_does_again_arrive_at_the_installed_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="another layout of the package")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    done = [(0, 8.0), (1, 7.0), (2, 99.0), (1, 7.0), (2, 6.0), (3, 5.0)]
    sink = WandbSink(demo("log.wandb=offline"), tmp_path, 1, pytest.fail)
    for step, loss in done:
        sink.step(event(step, loss=loss))
    sink.close()
    wandb.teardown()  # its service writes until it ends
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content, position, rows, axes = path.read_bytes(), 7, [], {}
    while position < len(content):  # a header of 7 bytes, then records: checksum, length, 1 for whole, content
        _, length, whole = struct.unpack_from("<IHB", content, position)
        assert whole == 1
        position += 7
        record = records.Record.FromString(content[position : position + length])
        position += length
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            rows.append((items["step"], items["loss"]))
        elif record.HasField("metric"):
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    assert rows == done
    assert axes["*"] == "step" or axes["loss"] == "step"
