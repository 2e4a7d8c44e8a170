"""``stoker plan`` as a person meets it: the answer for a machine one is not on, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.commands_plan import tokens
from parallel.planning.published.rows import TABLE
from pretrain.config import load
from stoker.errors import Refusal
from tests.house.sources import HOME
from tests.launch.test_cli import stoker

MODEL, RACK = "hybrid-moe-30b-a3b", ["--hardware", "gb200-nvl72", "--gpus", "128"]
#: Raises on what no plan may need, and prints the processor time that the command took from the start of Python.
HOOK = """
import sys, time
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "megatron", "numba", "zarr", "wandb"}:
            raise ImportError(f"a plan imports {name}")
sys.meta_path.insert(0, Hook())
from launch.cli import main
try:
    main(sys.argv[1:])
finally:
    print(time.process_time(), file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever was measured of this machine does not count."""
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))


def answer(capfd: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert stoker("plan", *arguments, "--json") == 0
    return json.loads(capfd.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", MODEL, "--hardware", "gb200-nvl72", "--gpus", "10000"],
        ["plan", MODEL, "--hardware", "h100", "--gpus", "10000", "--json"],
        ["plan", "evaluate", "rows.csv", "--json"],
        ["plan", "demo"],
    ],
)
def test_p9_a_plan_needs_no_torch_and_two_seconds(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("".join(TABLE.open(encoding="utf-8").readlines()[:40]), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", HOOK, *arguments]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    seconds = float(done.stderr.split()[-1])
    assert seconds < 2, f"{seconds} s of processor time"


def test_the_answer_is_readable_on_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert stoker("plan", MODEL, *RACK, "--explain", "tp=2,ep=8") == 0
    lines = capfd.readouterr().out.split("\n")
    assert max(map(len, lines)) <= 100
    heads = [line for line in lines if line and not line.startswith(" ")]
    for head in ("predicted", "where a step goes", "memory of a device by pipeline rank, GB", "placement", "to run it"):
        assert head in heads
    assert "your layout: tp=2,ep=8" in heads
    assert sum(bool(re.match(r"      \+\d", line)) for line in lines) == 4, "four runners-up, each with its reason"


def test_the_json_is_one_object_whose_keys_are_documented(capfd: pytest.CaptureFixture[str]) -> None:
    found = answer(capfd, MODEL, *RACK)
    documented = (HOME / "docs" / "planner.md").read_text(encoding="utf-8")
    for key in (*found, *found["predictions"], *found["memory"], *found["placement"], *found["settings"]):
        assert f"`{key}`" in documented, key
    step = found["predictions"]
    assert sum(step["parts_s"].values()) == pytest.approx(step["step_time_s"])
    assert step["step_time_low_s"] < step["step_time_s"] < step["step_time_high_s"]
    tokens_per_s = found["tokens_per_step"] / step["step_time_s"]
    assert step["tokens_per_s"] == pytest.approx(tokens_per_s)
    assert step["tokens_per_s_per_gpu"] * found["plan"]["world_size"] == pytest.approx(tokens_per_s)
    peak = 2.45e15 * found["plan"]["world_size"]  # hardware.md: GB200 in bfloat16
    assert step["mfu"] == pytest.approx(found["flops_per_token"] * tokens_per_s / peak)
    assert step["memory_bytes"] == max(stage["device"] for stage in found["memory"]["stages"])
    assert step["memory_upper_bytes"] <= found["memory"]["usable_bytes"]


@pytest.mark.parametrize(
    "machine", [RACK, ["--hardware", "h100", "--gpus", "64"], ["--hardware", "b200", "--gpus", "24"]]
)
def test_the_overrides_make_the_trainer_run_the_planned_layout(
    machine: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    found = answer(capfd, MODEL, *machine)
    plan = load(MODEL, found["overrides"]).plan(found["plan"]["world_size"])
    assert json.loads(json.dumps(plan.to_dict())) == found["plan"]


def test_what_the_engine_cannot_run_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    machine = ["--hardware", "h100", "--gpus", "64"]
    plain, free = answer(capfd, MODEL, *machine), answer(capfd, MODEL, *machine, "--what-if")
    assert not plain["answer"]["beyond"] and plain["overrides"]
    assert free["answer"]["beyond"] and not free["overrides"]
    assert free["predictions"]["step_time_s"] <= plain["predictions"]["step_time_s"]


def test_a_layout_of_ones_own_is_judged(capfd: pytest.CaptureFixture[str]) -> None:
    slow = answer(capfd, MODEL, *RACK, "--explain", "tp=2,pp=4,ep=8")["judged"]
    assert slow["fits"] and slow["scored"]["plan"]["tp"] == 2 and slow["verdict"].startswith("+")
    never = answer(capfd, MODEL, *RACK, "--explain", "tp=3")["judged"]
    assert never["scored"] is None and "not possible" in never["verdict"]
    own = answer(capfd, MODEL, *RACK, "parallel.ep=16", "parallel.recompute=full")["judged"]
    assert own["layout"] == "ep=16,recompute=full", "the configuration states it"


def test_pictures_are_one_file_that_loads_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    assert stoker("plan", MODEL, *RACK, "--html", page) == 0
    assert str(page) in capfd.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") >= 4 and "default-src 'none'" in text
    assert not re.search(r"(src|href)=\"(?!#)", text)


REFUSED = {
    "no device": ([MODEL, "--hardware", "h100", "--gpus", "0"], "--gpus 0"),
    "no device here": (["demo", "--gpus", "0"], "--gpus 0"),
    "unknown hardware": ([MODEL, "--hardware", "h10", "--gpus", "8"], "Did you mean h100"),
    "no number of devices": ([MODEL, "--hardware", "gb200-nvl72"], "--gpus 64"),
    "hardware file that is not there": ([MODEL, "--hardware", "mine.yaml", "--gpus", "8"], "mine.yaml is not there"),
    "folder": ([".", *RACK], "neither a .yaml file nor a preset"),
    "folder named as a file": (["folder.yaml", *RACK], "cannot be read"),
    "unknown axis": ([MODEL, *RACK, "--explain", "tq=2"], "'tq' is no axis"),
    "words for a number": ([MODEL, *RACK, "--explain", "tp=two"], "tp=two"),
    "a degree of nothing": ([MODEL, *RACK, "--explain", "tp=0"], "tp=0"),
    "an axis twice": ([MODEL, *RACK, "--explain", "tp=2,tp=4"], "tp is given twice"),
    "an empty layout": ([MODEL, *RACK, "--explain", ""], "names nothing"),
    "nothing fits": ([MODEL, "--hardware", "h100", "--gpus", "1"], "too much"),
    "not measured": (["demo", "--hardware", "cpu", "--gpus", "2"], "stoker plan calibrate"),
    "pictures nowhere": ([MODEL, *RACK, "--html", "nowhere/plan.html"], "nowhere/plan.html"),
    "no table": (["evaluate", "nowhere.csv"], "nowhere.csv"),
    "folder as a table": (["evaluate", "."], "not readable as a table"),
    "empty table": (["evaluate", "empty.csv"], "columns missing"),
    "binary table": (["evaluate", "binary.csv"], "not readable as a table"),
    "no context": (
        ["design", "--hardware", "h100", "--gpus", "8", "--days", "1", "--serve-context", "0k"],
        "--serve-context 0k",
    ),
    "no days": (["design", "--hardware", "h100", "--gpus", "8", "--days", "0", "--serve-context", "8k"], "days=0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line(
    case: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    arguments, says = REFUSED[case]
    assert stoker("plan", *arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith("refused: ") and err.count("\n") == 1 and says in err, err


def test_evaluate_prints_what_scripts_and_people_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = [row for index, row in enumerate(csv.DictReader(file)) if index in (0, 2, 20, 39, 224, 291, 537)]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    found = answer(capfd, "evaluate", path)
    assert [row["row"] for row in found["rows"]] == list(range(7)), "counted from 0 in this file"
    skipped = [row["row"] for row in found["rows"] if row["skipped"]]
    assert skipped == [1, 4] and found["summary"]["coverage"] == pytest.approx(5 / 7)
    given = [float(row["step_time_s"]) if row["step_time_s"] else None for row in rows]
    assert [row["published"]["step_time_s"] for row in found["rows"]] == given
    assert stoker("plan", "evaluate", path, "--constants") == 0
    words = capfd.readouterr().out
    for text in ("7 rows, 5 of them modelled", "not modelled", "regret", "held to", "kernel_gap_s"):
        assert text in words


def test_tokens_are_numbers_or_multiples_of_1024() -> None:
    assert (tokens("--x", "131072"), tokens("--x", "128k"), tokens("--x", "16M")) == (2**17, 2**17, 2**24)
    for text in ("", "k", "0", "-1", "1.5k", "many"):
        with pytest.raises(Refusal, match="--x"):
            tokens("--x", text)
