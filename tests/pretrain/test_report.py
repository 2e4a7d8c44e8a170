"""report.html: complete for a whole run, honest about what is missing, safe to open, small."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio.log import DataLog, Segment
from dataio.types import TokenizerId
from pretrain import rundir
from pretrain.attempt import ExitClass
from pretrain.config import load, preset, presets
from pretrain.events import METRICS, StepEvent, Timing
from pretrain.figures.chart import Line, Marks, decimate, line_chart, line_table, not_drawn, smooth, ticks
from pretrain.figures.curves import NO_STEPS
from pretrain.figures.layout import heat_map
from pretrain.figures.markup import duration, node, number, short, to_html
from pretrain.figures.record import Loads, read_loads, read_record
from pretrain.figures.run import model_words
from pretrain.report import SECTIONS, write_report
from stoker.errors import Refusal

VOID = {"meta", "br"}


class Page(HTMLParser):
    """A page as a browser takes it: tags, attributes and text; fails on tags that do not close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.html = path.read_text()
        self.feed(self.html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += f"{data} "


def event(step: int, attempt: int = 1, **changes: Any) -> StepEvent:
    fields = {
        "loss": 8.0 * math.exp(-step / 50) + 3,
        "grad_norm": 1.0 + step % 7,
        "lr": 1e-3,
        "valid_targets": 4080,
        "tokens": 4096,
        "draws": {"code": 9 + step % 3, "prose": 7 - step % 3},
        "verdict": "apply",
        "applied": True,
        "aux": {"load_max_over_mean": 1.5},
        "timing": Timing(0.5, 8192.0),
    }
    return StepEvent(attempt, step, **{**fields, **changes})


def skipped(step: int) -> StepEvent:
    return event(step, loss=math.nan, grad_norm=math.inf, verdict="skip", applied=False)


#: What the numbers below are counted from, whatever the preset is tuned to.
FIXED = ("run.steps=240", "train.global_batch=16", "train.micro_batch=1")


def make_run(root: Path, events: Sequence[StepEvent], overrides: Sequence[str] = (), preset: str = "demo") -> Path:
    """A run directory as the trainer writes it, one attempt under way and no checkpoint."""
    config = load(preset, [f"run.dir={root.parent}", f"run.name={root.name}", *FIXED, *overrides])
    rundir.begin(rundir.Start(root, 1, None), config, config.plan(8)).close()
    (root / METRICS).write_text("".join(one.to_line() + "\n" for one in events))
    return root


LAYOUT = ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.pp=2", "parallel.ep=2")


def test_a_whole_run_shows_its_numbers_with_their_units(tmp_path: Path) -> None:
    heldout = {"heldout.code.nats_per_token": 2.8125, "heldout.code.bits_per_byte": 1.25}
    events = [event(step) for step in range(64)] + [event(64, aux={"load_max_over_mean": 1.25, **heldout})]
    root = make_run(tmp_path / "first", events, LAYOUT)
    page = Page(write_report(root))
    for section in SECTIONS:
        assert section in page.text
    assert "65 of 240 steps" in page.text
    assert "3,662,816" in page.text and "2,335,712 met by a token" in page.text  # counted in the preset's own comment
    assert "2.812" in page.text and "1.250" in page.text  # held out in nats per token, in bits per byte
    for unit in ("nats per token", "bits per byte", "tokens per second", "L2, before clipping", "% of windows so far"):
        assert unit in page.text
    assert "266,240" in page.text  # 65 steps of 4,096 tokens
    assert page.tags.count("svg") >= 8


def test_the_report_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "closed", [event(0)], LAYOUT)))
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & set(page.tags)
    assert not {"src", "onload", "onclick", "xlink:href", "style"} & {name for name, _ in page.attributes}
    assert all(value and value.startswith("#") for name, value in page.attributes if name == "href")
    assert "url(" not in page.html and "@import" not in page.html
    assert "default-src 'none'" in page.html


EVIL = "</title></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'\ud800&"


def test_nothing_from_a_file_becomes_markup(tmp_path: Path) -> None:
    aux = {f"heldout.{EVIL}.nats_per_token": 3.0, EVIL: 1.0}
    root = make_run(tmp_path / "evil", [event(0, draws={EVIL: 16}, aux=aux, verdict=EVIL)], LAYOUT)
    (root / "attempts/0001/environment.json").write_text(
        json.dumps({"format": {"name": "environment", "version": 1}, "host": EVIL, "packages": {EVIL: EVIL}})
    )
    (root / "attempts/0001/exit.json").write_text(
        json.dumps({"format": {"name": "exit", "version": 1}, "class": "fault", "cause": EVIL, "rank": 1})
    )
    plan = json.loads((root / "plan.json").read_text())
    (root / "plan.json").write_text(json.dumps({**plan, "predictions": {EVIL: EVIL}}))
    (root / "config.yaml").write_text(f"run: {EVIL[:-2]}")
    page = Page(write_report(root.rename(tmp_path / EVIL.replace("/", "").replace("\ud800", ""))))
    assert not {"script", "img"} & set(page.tags)
    assert "onerror" not in {name for name, _ in page.attributes}
    assert page.text.count("alert(1)") >= 8


BROKEN: dict[str, tuple[list[StepEvent], tuple[str, ...]]] = {
    "no step": ([], ("loss, nats per token unknown", NO_STEPS)),
    "one step": ([event(0)], ("1 of 240",)),
    "first step is not zero": ([event(119)], ("120 of 240",)),
    "all skipped": ([skipped(step) for step in range(63)], ("63 of them skipped", "No finite value")),
    "alternating": ([skipped(s) if s % 2 else event(s) for s in range(500)], ("250 of them skipped",)),
    "infinite and zero": ([event(s, loss=math.inf if s else 0.0, grad_norm=0.0, lr=0.0) for s in range(65)], ("∞",)),
    "no time known": ([event(s, timing=Timing()) for s in range(64)], ("tokens per second unknown",)),
    "no window drawn": ([event(s, draws={"code": 0}, tokens=0) for s in range(2)], ("code 0",)),
    "held out is NaN": ([event(0, aux={"heldout.code.nats_per_token": math.nan})], ("NaN",)),
    "a constant": ([event(s, loss=3.0, grad_norm=1.0) for s in range(65)], ("Lowest 3.000 at step 0",)),
}


@pytest.mark.parametrize(("events", "said"), BROKEN.values(), ids=BROKEN)
def test_strange_runs_are_reported_too(tmp_path: Path, events: list[StepEvent], said: tuple[str, ...]) -> None:
    page = Page(write_report(make_run(tmp_path / "strange", events, LAYOUT)))
    flat = re.sub(r"\s+", " ", page.text)
    for words in said:
        assert words in flat


def test_every_preset_is_put_in_words() -> None:
    for name in presets():
        spec = preset(name).model_spec()
        assert model_words(spec).startswith(f"{len(spec.layers)} layers: ")
    words = model_words(preset("kda-moe-48b-a3b").model_spec())
    assert "19 Kimi delta attention + mixture of experts" in words
    assert "Kimi delta attention: 32 heads, keys × 128, values × 128, gates of rank 128" in words


def test_a_model_without_experts_says_so(tmp_path: Path) -> None:
    root = make_run(tmp_path / "dense", [event(s, aux={}) for s in range(3)], ["parallel.tp=2"], preset="tiny-dense")
    page = Page(write_report(root))
    assert "The model has no experts." in page.text
    assert "Expert load" not in page.text and "experts: each rank" not in page.text


DAMAGE = [None, b"", b"\xff\xfe{", b'{"format": {"name": "plan", "version": 99}}\n', b"[]\n"]
DAMAGE += [b'{"format": {"name": "environment", "version": 1}, "packages": 1}\n']


@pytest.mark.parametrize("name", ["config.yaml", "plan.json", METRICS, "attempts/0001/environment.json"])
@pytest.mark.parametrize("content", DAMAGE)
def test_a_file_that_is_missing_or_damaged_is_named_and_the_rest_is_shown(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    root = make_run(tmp_path / "torn", [event(s) for s in range(3)], LAYOUT)
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_bytes(content)
    page = Page(write_report(root))
    # Metrics that are empty, or one torn line, are those of a run without a step.
    assert "Not shown, or not in full" in page.text or (name == METRICS and NO_STEPS in page.text)
    assert "Seed" in page.text or name == "config.yaml"
    assert "Layers on pipeline ranks" in page.text or name == "plan.json"


def test_what_is_no_run_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no run directory"):
        write_report(tmp_path)
    (tmp_path / "format.json").write_text('{"format": {"name": "run", "version": 99}}')
    with pytest.raises(Refusal, match="newer release"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_attempts_tell_where_they_began_and_how_they_ended(tmp_path: Path) -> None:
    root = make_run(tmp_path / "twice", [event(s) for s in range(60)] + [event(s, attempt=2) for s in range(40, 64)])
    config = load("demo", [f"run.dir={root.parent}", f"run.name={root.name}", *FIXED])
    attempt = rundir.begin(rundir.Start(root, 2, 40), config, config.plan(8))
    attempt.finish(ExitClass.STOPPED, "step 63: 11 steps in a row", None)
    page = Page(write_report(root))
    flat = re.sub(r"\s+", " ", page.text)
    assert "1 initial values 0 to 39 killed: it left no record of its end" in flat
    assert "2 checkpoint of step 40 40 to 63 stopped: step 63: 11 steps in a row" in flat
    assert "attempt 2 from step 40" in flat  # the mark in the curves
    assert "64 of 240 steps, in 2 attempts" in flat


def test_draws_are_held_against_the_blend_that_held_at_each_step(tmp_path: Path) -> None:
    events = [event(s, draws={"code": 8, "prose": 8}) for s in range(10)]
    events += [event(s, draws={"code": 12, "prose": 4}) for s in range(10, 30)]
    root = make_run(tmp_path / "blend", events)
    data = {"code": "1" * 8, "prose": "2" * 8}
    blends = {0: {"code": 1, "prose": 1}, 10: {"code": 3, "prose": 1}}
    segments = tuple(Segment.of(step, 256, 16, blend, data) for step, blend in blends.items())
    DataLog(0, TokenizerId("ab" * 32, 4096, 0), segments).write(root / "data_log.jsonl")
    flat = re.sub(r"\s+", " ", Page(write_report(root)).text)
    assert "code 320 66.67 % 66.67 % +0.00" in flat  # (10*8 + 20*12) of 480 windows, and exactly the blends
    (root / "data_log.jsonl").unlink()
    assert "What the blend asked for is unknown." in Page(write_report(root)).text


def checkpoint(root: Path, step: int, loads: dict[int, list[int]]) -> None:
    import torch

    from parallel.planning.layout import Layout
    from pretrain.checkpoint.store import CheckpointStore

    coords = dict.fromkeys(("tp", "cp", "dp", "pp", "etp", "ep", "edp"), 0)
    tensors = {f"layers.{i}.ffn.router.load": (Layout((len(n),)), torch.tensor(n)) for i, n in loads.items()}
    other = {"final_norm.weight": (Layout((65,)), torch.ones(65))}
    CheckpointStore(root).save(step, {**tensors, **other}, {"step": step}, coords, 1).wait()


def test_expert_loads_are_what_lies_between_the_two_newest_checkpoints(tmp_path: Path) -> None:
    assert read_loads(tmp_path) is None
    checkpoint(tmp_path, 10, {1: [10, 20, 30], 12: [5, 5, 50]})
    only = read_loads(tmp_path)
    assert only is not None and (only.start, only.stop) == (0, 10)
    assert {layer: counts.tolist() for layer, counts in only.by_layer.items()} == {1: [10, 20, 30], 12: [5, 5, 50]}
    checkpoint(tmp_path, 30, {1: [11, 22, 33], 12: [6, 6, 56]})
    both = read_loads(tmp_path)
    assert both is not None and (both.start, both.stop) == (10, 30)
    assert {layer: counts.tolist() for layer, counts in both.by_layer.items()} == {1: [1, 2, 3], 12: [1, 1, 6]}


def test_counters_that_went_back_are_not_subtracted(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10, {0: [10, 20, 30]})
    checkpoint(tmp_path, 30, {0: [40, 1, 40]})
    loads = read_loads(tmp_path)
    assert loads is not None and loads.start == 0 and loads.by_layer[0].tolist() == [40, 1, 40]


def test_a_damaged_checkpoint_is_named_and_its_loads_are_unknown(tmp_path: Path) -> None:
    root = make_run(tmp_path / "flipped", [event(0)])
    checkpoint(root / "checkpoints", 1, {1: [10, 20, 30]})
    path = next((root / "checkpoints/step_00000001").glob("data-*.bin"))
    content = bytearray(path.read_bytes())
    content[content.index((20).to_bytes(8, "little"))] ^= 1
    path.write_bytes(content)
    page = Page(write_report(root))
    assert "layers.1.ffn.router.load" in page.text and "CRC32C" in page.text
    assert "Load by expert is unknown" in page.text


@pytest.mark.parametrize("experts", [1, 8, 63, 512])
def test_every_expert_has_its_cell_in_the_heat_map(experts: int) -> None:
    counts = np.random.default_rng(experts).integers(0, 1000, experts)
    svg = heat_map(Loads(0, 1, {3: counts}))
    covered: list[int] = []
    for path in svg.iter("path"):
        for start, length in re.findall(r"M(\d+) 0h([\d.]+)", path.get("d", "")):
            covered += range(int(start), int(start) + math.ceil(float(length)))
    assert sorted(covered) == list(range(experts))
    busiest = int(counts.argmax())
    assert f"expert {busiest} got most" in (svg.findtext(".//title") or "")


def test_ten_thousand_steps_make_a_page_under_a_megabyte_and_no_spike_is_lost(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    events = [event(s, loss=3 + rng.normal() / 10, grad_norm=math.exp(rng.normal())) for s in range(10_000)]
    events[7_003] = replace(events[7_003], loss=4.75)
    root = make_run(tmp_path / "long", events, LAYOUT)
    path = write_report(root)
    assert path.stat().st_size < 1_000_000
    assert "highest 4.750 at step 7,003" in path.read_text()
    drawn = decimate(np.arange(10_000.0), np.array([one.loss for one in events]), 200)
    assert 7_003 in drawn and len(drawn) <= 402


finite = st.floats(-1e30, 1e30)
anything = st.one_of(finite, st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 5e-324, 1.7e308, -1.7e308]))


@given(st.lists(anything, min_size=1, max_size=70), st.integers(0, 10**9), st.booleans())
def test_any_values_make_a_chart_whose_points_lie_inside_it(values: list[float], first: int, log: bool) -> None:
    line = Line.of("x", "c0", range(first, first + len(values)), values)
    svg = line_chart([line, smooth(line, "median", "c1", 3)], Marks([first], [(first, "attempt 2")]), log=log)
    not_drawn([line], log), line_table([line])
    width, height = map(float, svg.get("viewBox", "").split()[2:])
    for path in svg.iter("path"):
        for x, y in re.findall(r"[ML](\S+) (-?[\d.einfa]+)", path.get("d", "")):
            assert 0 <= float(x) <= width and 0 <= float(y.rstrip("hH")) <= height
    drawn = any("line c0" in path.get("class", "") for path in svg.iter("path"))
    assert drawn or not any(math.isfinite(value) and (value > 0 or not log) for value in values)


@given(st.lists(st.one_of(finite, st.just(math.nan)), min_size=1, max_size=300), st.integers(1, 20))
def test_decimation_keeps_the_ends_and_the_extremes_of_every_part(values: list[float], buckets: int) -> None:
    steps, array = np.arange(len(values), dtype=float), np.array(values)
    kept = decimate(steps, array, buckets)
    known = np.flatnonzero(np.isfinite(array))
    assert set(kept) <= set(known) and len(kept) <= 2 * buckets + 4
    if len(known):
        assert {known[0], known[-1]} <= set(kept)
        part = np.floor(steps[known] / max(steps[-1], 1) * buckets)
        for one in np.unique(part):
            inside = array[known[part == one]]
            shown = [array[index] for index in kept if index in set(known[part == one])]
            assert min(shown) == inside.min() and max(shown) == inside.max()


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(1, 12))
def test_ticks_are_few_round_and_inside(low: float, span: float, about: int) -> None:
    found = ticks(low, low + span, about)
    assert len(found) <= about + 1
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert all(low - slack <= tick <= low + span + slack for tick in found)


def test_a_spike_far_outside_is_drawn_at_the_edge_and_said() -> None:
    values = np.linspace(3.0, 2.0, 500)
    values[77] = 1e6
    line = Line.of("loss", "c0", range(500), values)
    titles = [title.text for title in line_chart([line]).iter("title")]
    assert "loss, step 77: 1,000,000" in titles
    assert not_drawn([line]).startswith("1 far outside")
    assert not_drawn([Line.of("loss", "c0", range(500), np.linspace(3, 2, 500))]) == ""


def test_the_median_neither_lags_nor_keeps_a_spike() -> None:
    line = Line.of("loss", "c0", range(65), np.arange(65.0))
    assert smooth(line, "median", "c0", 5).values.tolist() == line.values.tolist()
    line.values[30] = 1e9
    assert smooth(line, "median", "c0", 5).values.max() <= 64


def test_numbers_read_as_people_write_them() -> None:
    assert [number(v) for v in (None, 0, 0.0, 3, 12345, 2.89651, 0.0001234, 1e12, math.nan, -math.inf)] == [
        *("unknown", "0", "0", "3", "12,345", "2.897", "1.234e-04", "1.000e+12", "NaN", "-∞"),
    ]
    counts = (999_999, 3_662_816, 22.9e9, 7.9e12)
    assert list(map(short, counts)) == ["999,999", "3.66 million", "22.9 billion", "7.9 trillion"]
    assert list(map(duration, (8.31, 252, 59.9, 3599.9))) == ["8.3 s", "4 min 12 s", "59.9 s", "1 h 0 min"]


def test_elements_escape_what_they_hold() -> None:
    html = to_html(node("p", "a<b", node("b", "c"), "d&e", title='"<&>')).decode()
    assert html.endswith('<p title="&quot;<&amp;&gt;">a&lt;b<b>c</b>d&amp;e</p>')


def test_a_run_is_only_read(tmp_path: Path) -> None:
    root = make_run(tmp_path / "kept", [event(0)], LAYOUT)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    read_record(root)
    write_report(root)
    after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "report.html"}
    assert after == before
