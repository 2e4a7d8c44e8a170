"""A sweep's folder: everything is checked before anything is written, and a number is for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.sweep import definition, ledger, planning
from launch.sweep.history import Cut, record_cut
from pretrain.config import load
from stoker.errors import Refusal
from stoker.yaml_core import dump_yaml, parse_yaml
from tests.launch.sweep.sweeps import again, planned, write
from tests.launch.tiny import tiny


def plan(folder: Path, **keys: Any) -> ledger.Ledger:
    return planning.plan(definition.load(write(folder, **keys)), threads=1)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"grid": {"train.rl": [1e-3]}}, "run 1 (train.rl=0.001): "),
        ({"grid": {"train.rl": [1e-3]}}, "unknown key train.rl: did you mean train.lr?"),
        ({"grid": {"train.lr": [1e-3, -1.0]}}, "run 2 (train.lr=-1.0): "),
        ({"grid": {"parallel.tp": [1, 7]}}, "run 2 (parallel.tp=7): "),
        ({"grid": {"data.blend": [{"nowhere": 1}]}}, "nowhere"),
        ({"list": [{}, {"train.lr": 1e-2}]}, "runs 1 (no override) and 2 (train.lr=0.01) are the same run"),
        ({"metric": "heldout.txt.nats_per_token"}, "did you mean heldout.text.nats_per_token?"),
        ({"stop": {"first": 8}}, "stop.first=8 is not below run.steps=8"),
        ({"stop": {"first": 2}, "grid": {"run.steps": [8, 9]}}, "theirs differ in run.steps (8, 9)"),
        ({"stop": {"first": 2}, "metric": "heldout.text.nats_per_token"}, "set eval.every to 2 or less"),
        ({"base": {"launch.webhook": "https://example.org/x"}}, "launch.webhook"),
        ({"base": {"run.steps": "many"}}, "run.steps"),
        ({"config": "dmeo"}, "did you mean demo?"),
    ],
)
def test_what_any_run_would_refuse_is_refused_before_anything_is_written(
    tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(Refusal) as refused:
        plan(tmp_path, **keys)
    assert words in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_a_plan_writes_nothing_and_its_ledger_reads_back_as_it_was(tmp_path: Path) -> None:
    found = plan(tmp_path, grid={"train.lr": [1e-2, 1e-3]}, seeds=2, base={"run.steps": 6})
    assert not (tmp_path / "runs").exists()
    found.write()
    assert again(tmp_path) == found
    assert [trial.name[:5] for trial in found.trials] == ["0001-", "0002-", "0003-", "0004-"]
    assert len({trial.name for trial in found.trials}) == 4


def test_a_run_alone_is_the_run_of_the_sweep(tmp_path: Path) -> None:
    """Its arguments, given to ``stoker train``, are the configuration that a person would have written."""
    found = planned(tmp_path, grid={"train.lr": [1e-3]}, base={"train.schedule": {"kind": "cosine"}}, seeds=[5])
    source, *overrides = found.arguments(found.trials[0])
    by_hand = ["train.lr=1e-3", "train.schedule.kind=cosine", "run.seed=5"]
    own = [f"run.dir={found.root}", f"run.name={found.trials[0].name}"]
    assert load(source, overrides) == load(tmp_path / "tiny.yaml", [*by_hand, *own]) == found.config(found.trials[0])


def test_a_changed_grid_appends_and_never_renumbers(tmp_path: Path) -> None:
    before = planned(tmp_path, grid={"train.lr": [1e-2, 1e-3]})
    after = planned(tmp_path, grid={"train.lr": [5e-2, 1e-3]})
    assert after.trials[:2] == before.trials
    assert [trial.overrides["train.lr"] for trial in after.trials] == [1e-2, 1e-3, 5e-2]
    assert [trial.number for trial in after.active] == [2, 3]
    assert planned(tmp_path, grid={"train.lr": [1e-2, 1e-3]}).trials == after.trials


def test_a_change_that_makes_others_of_the_runs_is_refused_and_names_them(tmp_path: Path) -> None:
    planned(tmp_path, list=[{"train.clip": 2.0}, {"train.lr": 5e-3}])
    with pytest.raises(Refusal, match=r"train\.lr: 0\.01 -> 0\.02 \(run 1\)"):
        plan(tmp_path, list=[{"train.clip": 2.0}, {"train.lr": 5e-3}], base={"train.lr": 2e-2})
    values = parse_yaml((tmp_path / "tiny.yaml").read_text(), "tiny")
    (tmp_path / "tiny.yaml").write_text(dump_yaml({**values, "run": {**values["run"], "steps": 9}}))
    with pytest.raises(Refusal, match=r"run\.steps: 8 -> 9 \(runs 1, 2\)"):
        plan(tmp_path, list=[{"train.clip": 2.0}, {"train.lr": 5e-3}])
    (tmp_path / "tiny.yaml").write_text(dump_yaml({**values, "checkpoint": {"every": 2}}))
    assert plan(tmp_path, list=[{"train.clip": 2.0}, {"train.lr": 5e-3}]).values["checkpoint"] == {"every": 2}


def test_the_rule_cannot_change_once_it_has_stopped_a_run(tmp_path: Path) -> None:
    found = planned(tmp_path, grid={"train.lr": [1e-2, 1e-3]}, stop={"first": 2})
    assert plan(tmp_path, grid={"train.lr": [1e-2, 1e-3]}, stop={"first": 3}).definition.stop is not None
    record_cut(found, found.trials[1], Cut(2, 3.5, 2, 2))
    with pytest.raises(Refusal, match=r"run 2 of .* stopped by what they were"):
        plan(tmp_path, grid={"train.lr": [1e-2, 1e-3]}, stop={"first": 3})


def test_a_folder_that_is_no_sweeps_and_a_damaged_ledger_are_refused(tmp_path: Path) -> None:
    tiny(tmp_path, ("attention/dense",))
    folder = tmp_path / "runs" / "sweep"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(Refusal, match=r"holds thesis\.txt and no sweep\.json"):
        plan(tmp_path)
    (folder / "thesis.txt").unlink()
    found = planned(tmp_path)
    content = json.loads((found.root / "sweep.json").read_text())
    for damaged, words in (
        ({**content, "format": {"name": "sweep", "version": 9}}, "newer release"),
        ({**content, "trials": [{**content["trials"][0], "number": 2}]}, "damaged"),
        ({**content, "trials": [{}]}, "damaged"),
    ):
        (found.root / "sweep.json").write_text(json.dumps(damaged))
        with pytest.raises(Refusal, match=words):
            again(tmp_path)


def test_a_secret_is_not_written_down(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="secret"):
        plan(tmp_path, base={"data.tokenizer": "https://user:pass-word@example.org/tokenizer.json"})
    assert not (tmp_path / "runs").exists()
