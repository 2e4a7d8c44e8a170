"""What a second run makes of changed recipes, changed inputs and damaged files: what a first one would have made."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dataio import code_order, funnel
from dataio.dedup import exact, near
from dataio.estimate import estimate
from dataio.prepare import prepare
from dataio.recipe import load
from dataio.stages import LocalPool, Stage, Task, Workspace
from dataio.store import Store
from stoker.errors import Refusal
from stoker.yaml_core import dump_yaml
from tests.dataio.test_prepare import tree

OFF = dict.fromkeys(("code", "language", "prose", "redact", "substring", "decontaminate"))
WORDS = ["".join(random.Random(number).choices("aeioubdfgklmnprst", k=3 + number % 5)) for number in range(60)]


def texts(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=40)) for _ in range(count)]


def jsonl(path: Path, records: Sequence[str], **fields: str) -> Path:
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in records))
    return path


def run(folder: Path, **changes: Any) -> Path:
    stages = {**OFF, "licence": None, **changes.pop("stages", {})}
    values: Mapping[str, Any] = {
        "output": "out",
        "sources": [{"name": "a", "paths": ["a*.jsonl"], "unit_bytes": 4000}],
        "tokenizer": {"vocab_size": 300},
        **changes,
        "stages": stages,
    }
    (folder / "recipe.yaml").write_text(dump_yaml(values))
    recipe, base = load(folder / "recipe.yaml")
    estimate(recipe, base)
    prepare(recipe, base, LocalPool(1))
    return recipe.folder(base)


def kept(out: Path) -> int:
    return funnel.read(out).total(reason="kept").documents


def same_as_fresh(out: Path, **changes: Any) -> None:
    """Every file, but those of scratch and the manifests of stages that are not asked for any more."""
    again = {name: data for name, data in tree(out).items() if not name.startswith("work/")}
    aside = out.with_name("aside")
    out.rename(aside)
    fresh = {name: data for name, data in tree(run(out.parent, **changes)).items() if not name.startswith("work/")}
    shutil.rmtree(aside)
    stages = {path.name for path in (out / "manifests").iterdir()}
    again = {name: again[name] for name in again if name[:10] != "manifests/" or name.split("/")[1] in stages}
    assert {name for name in {*again, *fresh} if again.get(name) != fresh.get(name)} == set()


def test_a_file_that_comes_or_goes_leaves_what_a_fresh_run_leaves(tmp_path: Path) -> None:
    for number in range(4):
        jsonl(tmp_path / f"a{number}.jsonl", texts(12, number))
    out = run(tmp_path)
    jsonl(tmp_path / "a00.jsonl", texts(3, 9))
    run(tmp_path)
    same_as_fresh(out)
    (tmp_path / "a2.jsonl").unlink()
    (tmp_path / "a3.jsonl").unlink()
    run(tmp_path)
    same_as_fresh(out)
    (tmp_path / "a1.jsonl").rename(tmp_path / "a7.jsonl")
    run(tmp_path)
    assert Store.open(out / "stores" / "a").input_files[-1].endswith("a7.jsonl")


def test_memory_changes_nothing_in_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = texts(120, 1)
    jsonl(tmp_path / "a1.jsonl", [*held, *held[:30], *(text + " more" for text in held[:30])])
    with monkeypatch.context() as patch:
        for module in (exact, near, code_order):
            patch.setattr(module, "BYTES_PER_DOCUMENT", 40 << 20)
        out = run(tmp_path)
        assert len(list((out / "work/exact/gathered").iterdir())) > 3
    assert kept(out) == 120
    run(tmp_path)
    same_as_fresh(out)
    assert kept(out) == 120


def test_what_is_not_in_the_recipe_any_more_is_gone(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", texts(20, 1), license="MIT")
    jsonl(tmp_path / "b.jsonl", texts(20, 2), license="GPL-3.0-only")
    both = [{"name": name, "paths": [f"{name}.jsonl"]} for name in "ab"]
    out = run(tmp_path, sources=both)
    assert {path.name for path in (out / "stores").iterdir()} == {"a", "b"}
    run(tmp_path, sources=both, stages={"licence": {"allowed": ["MIT"]}, "near": None})
    assert {path.name for path in (out / "stores").iterdir()} == {"a"}
    assert not (out / "attributes" / "near").exists()
    with pytest.raises(Refusal, match="nothing is left of any source"):
        run(tmp_path, sources=both, stages={"licence": {"allowed": ["ISC"]}})
    assert not list((out / "stores").iterdir())
    run(tmp_path, sources=both[1:])
    assert not list((out / "documents").glob("a/*"))
    same_as_fresh(out, sources=both[1:])


def test_damage_is_found_and_the_next_run_heals_it(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", texts(40, 1))
    out = run(tmp_path)
    sound = tree(out)
    damaged = out / "work/encode/units/a/00000/tokens.npy"
    content = bytearray(damaged.read_bytes())
    content[-9] ^= 1
    damaged.write_bytes(content)
    shutil.rmtree(out / "work/store")
    with pytest.raises(Refusal, match=r"tokens\.npy: damaged or changed"):
        run(tmp_path)
    run(tmp_path)
    assert tree(out) == sound
    (out / "stores/a/tokens/c/0").unlink()
    run(tmp_path)
    assert tree(out) == sound and Store.open(out / "stores/a").verify() == []
    (out / "manifests/select/a/00000.json").write_text('{"format":{"name":"stoker.prepare.task","version":1}}')
    with pytest.raises(Refusal, match="remove it and the task is done again"):
        run(tmp_path)


def test_documents_that_are_weighed_are_searched_for_evaluation_items(tmp_path: Path) -> None:
    item = "an item that nobody may train on because it is asked in a test of models later on"
    (tmp_path / "items.jsonl").write_text(json.dumps({"question": item}) + "\n")
    long = " ".join(texts(6, 3))
    jsonl(tmp_path / "a.jsonl", [f"{long} {item}", f"{long} {item} and more", *texts(20, 4)])
    sets = [{"name": "test", "path": "items.jsonl", "fields": ["question"]}]
    out = run(tmp_path, stages={"near": {"mode": "weigh"}, "decontaminate": {"sets": sets}})
    assert dict(funnel.read(out).reasons())["decontaminate.evaluation_item"].documents == 2


def test_weights_are_one_over_the_size_of_the_cluster(tmp_path: Path) -> None:
    long = " ".join(texts(6, 3))
    jsonl(tmp_path / "a.jsonl", [long, f"{long} and more", f"{long} and this", *texts(20, 4)])
    out = run(tmp_path, stages={"near": {"mode": "weigh"}})
    store = Store.open(out / "stores/a")
    assert sorted(map(float, store.doc_weight))[:4] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])
    assert store.num_documents == 23


@pytest.mark.parametrize(
    ("output", "message"), [(".", "lies in source"), ("in/out", "lies in source"), ("f", "is a file")]
)
def test_an_output_that_cannot_be_one_is_refused(tmp_path: Path, output: str, message: str) -> None:
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in" / "a.jsonl", texts(3, 1))
    (tmp_path / "f").touch()
    paths = ["."] if output == "." else ["in"]
    with pytest.raises(Refusal, match=message):
        run(tmp_path, output=output, sources=[{"name": "a", "paths": paths}])


def put(path: Path, text: str) -> dict[str, int]:
    path.write_text(text)
    return {}


class Killed(Exception):
    pass


class KilledAfterTheWork:
    """Does the work, and is gone before anybody hears of it."""

    def results(self, calls: Any) -> Any:
        for call in calls:
            call()
        raise Killed
        yield


def test_an_option_that_went_and_came_back_is_not_taken_for_done(tmp_path: Path) -> None:
    def stage(option: str) -> Stage:
        task = Task("t", partial(put, tmp_path / "f", option), {}, ["f"])
        return Stage("s", 1, {"option": option}, [task])

    workspace = Workspace(tmp_path)
    workspace.run(stage("A"), LocalPool(1))
    with pytest.raises(Killed):
        workspace.run(stage("B"), KilledAfterTheWork())
    workspace.run(stage("A"), LocalPool(1))
    assert (tmp_path / "f").read_text() == "A"
