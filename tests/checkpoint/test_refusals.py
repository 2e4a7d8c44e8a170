"""P7: arguments that do not fit are refused by name, before anything is written or read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.planning.layout import Layout, Split
from pretrain import spec
from pretrain.checkpoint import store
from pretrain.checkpoint.store import CheckpointStore
from stoker.errors import Refusal
from tests.checkpoint.state import bits_equal, global_state, layouts, parts, plan
from tests.checkpoint.whole import COORDS, LAYOUTS, build, state
from tests.checkpoint.world import on_ranks, save

Change = Callable[[dict[str, Any]], Any]
WEIGHT = "embed.weight"


def _tensor(name: str, tensor: torch.Tensor) -> Change:
    return lambda call: call["tensors"].update({name: (Layout(tuple(tensor.shape)), tensor)})


SAVES: dict[str, tuple[Change, str]] = {
    "shape": (
        lambda c: c["tensors"].update({WEIGHT: (LAYOUTS[WEIGHT], torch.zeros(2, 3))}),
        r"tensor embed.weight: local shape \(2, 3\) where its layout has \(257, 300\)",
    ),
    "stage": (
        lambda c: c["tensors"].update({WEIGHT: (replace(LAYOUTS[WEIGHT], stages=(1,)), state(5)[WEIGHT])}),
        "tensor embed.weight: its layout puts it on pipeline stages",
    ),
    "dtype": (_tensor("z", torch.zeros(2, dtype=torch.complex64)), "tensor z: complex64 cannot be stored"),
    "name that climbs": (_tensor("../z", torch.zeros(2)), "tensor name '../z'"),
    "name that is absolute": (_tensor("/z", torch.zeros(2)), "tensor name '/z'"),
    "name with a space": (_tensor("a b", torch.zeros(2)), "tensor name 'a b'"),
    "name of zarr's": (_tensor("a/zarr.json", torch.zeros(2)), "tensor name 'a/zarr.json'"),
    "extra file that climbs": (lambda c: c.update(extra_files={"../x": b""}), "extra file '../x'"),
    "extra file of the format": (lambda c: c.update(extra_files={"COMMIT": b""}), "extra file 'COMMIT'"),
    "extra file like data": (lambda c: c.update(extra_files={"data-00001.bin": b""}), "extra file 'data-00001.bin'"),
    "meta that is not JSON": (lambda c: c.update(meta={"rng": {"state": b"x"}}), "rng.state: bytes is not JSON"),
    "meta with NaN": (lambda c: c.update(meta={"loss": float("nan")}), "loss: nan has no place in JSON"),
    "a shard alone": (
        lambda c: c["tensors"].update({"z": (Layout((4, 3), (Split(0, "tp", 2),)), torch.zeros(2, 3))}),
        "tensor z: the ranks hold 6 of 12 elements of chunk 0; every rank of the plan must take part",
    ),
    "a later shard alone": (
        lambda c: c.update(coords={**COORDS, "dp": 1}),
        "tensor embed.weight: the rank that owns its first shard does not save it",
    ),
}


@pytest.mark.parametrize("case", SAVES)
def test_p7_save_refuses(case: str, tmp_path: Path) -> None:
    change, message = SAVES[case]
    tensors = {name: (LAYOUTS[name], tensor) for name, tensor in state(5).items()}
    call: dict[str, Any] = {"step": 5, "tensors": tensors, "meta": {}, "coords": COORDS, "attempt": 1}
    change(call)
    with pytest.raises(Refusal, match=message):
        CheckpointStore(tmp_path / "checkpoints").save(**call)
    assert CheckpointStore(tmp_path / "checkpoints").steps() == []
    assert not list(tmp_path.rglob("data-*"))


def test_a_manifest_that_no_load_would_read_is_refused_on_all_ranks_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, where = tmp_path / "checkpoints", plan(2, tp=2)
    save(root, 4, global_state(), where)
    size = (root / "step_00000004" / "manifest.json").stat().st_size
    monkeypatch.setattr(store, "MAX_JSON_BYTES", size)
    save(root, 5, global_state(), where)
    monkeypatch.setattr(store, "MAX_JSON_BYTES", size - 1)
    refusals: list[str] = []

    def job(mine: CheckpointStore, rank: int) -> None:
        coords = where.coords(rank)
        tensors = {name: (layouts(where)[name], t) for name, t in parts(global_state(), layouts(where), coords).items()}
        with pytest.raises(Refusal, match=rf"manifest.json of step 6 would have {size} bytes") as refusal:
            mine.save(6, tensors, {"step": 6}, coords, 1)
        refusals.append(str(refusal.value))

    on_ranks(root, 2, job)
    assert len(refusals) == 2
    assert sorted(path.name for path in root.glob("step_*")) == ["step_00000004", "step_00000005"]


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"meta": {"step": 4}}, r"meta \(its SHA-256\) of rank 1 is"),
        ({"step": 4}, "step of rank 1 is 4, of rank 0 5"),
        ({"attempt": 2}, "attempt of rank 1 is 2, of rank 0 1"),
        ({"coords": plan(2, tp=2).coords(0)}, "tensors are announced twice: two ranks have the same coordinates"),
    ],
    ids=["meta", "step", "attempt", "coordinates"],
)
def test_p7_ranks_that_disagree_are_told(odd: dict[str, Any], message: str, tmp_path: Path) -> None:
    two = plan(2, tp=2)
    where, whole = layouts(two), {"layers.0.mixer.A_log": torch.arange(12.0)}

    def job(store: CheckpointStore, rank: int) -> None:
        tensors = {name: (where[name], tensor) for name, tensor in parts(whole, where, two.coords(rank)).items()}
        call: dict[str, Any] = {"step": 5, "meta": {"step": 5}, "coords": two.coords(rank), "attempt": 1}
        with pytest.raises(Refusal, match=message):
            store.save(tensors=tensors, **{**call, **(odd if rank else {})})

    on_ranks(tmp_path, 2, job)
    assert not any(tmp_path.iterdir())


def test_p7_a_replica_of_another_dtype_is_named_with_its_rank(tmp_path: Path) -> None:
    def job(store: CheckpointStore, rank: int) -> None:
        tensors = {"w": (Layout((3,)), torch.zeros(3, dtype=torch.float64 if rank else torch.float32))}
        with pytest.raises(Refusal, match=r"rank 1: tensor w: .*float64.*float32"):
            store.save(5, tensors, {}, plan(2).coords(rank), 1)

    on_ranks(tmp_path, 2, job)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 5 and 6; the tests that take it only read."""
    root = tmp_path_factory.mktemp("saved")
    build(root)
    return root


LOADS: dict[str, tuple[Change, str]] = {
    "missing tensor": (lambda c: c["layouts"].update(z=Layout((2,))), "tensor z is not in the checkpoint of step 6"),
    "unasked tensor": (
        lambda c: (c["layouts"].pop(WEIGHT), c["into"].pop(WEIGHT)),
        "tensor embed.weight of the checkpoint is asked for by no rank",
    ),
    "shape": (
        lambda c: c["layouts"].update({WEIGHT: Layout((256, 300))}),
        r"tensor embed.weight: stored with shape \(257, 300\), asked for with \(256, 300\)",
    ),
    "dtype": (
        lambda c: c["into"].update({WEIGHT: torch.zeros(257, 300, dtype=torch.bfloat16)}),
        "tensor embed.weight: stored as float32, asked for as bfloat16",
    ),
    "local shape": (
        lambda c: c["into"].update({WEIGHT: torch.zeros(300, 257)}),
        r"tensor embed.weight: local shape \(300, 257\) where its layout has",
    ),
    "target missing": (lambda c: c["into"].pop(WEIGHT), "tensor embed.weight: asked for, and no tensor was given"),
    "target too many": (lambda c: c["into"].update(z=torch.zeros(1)), "tensor z: given to load into, without a layout"),
    "step": (lambda c: c.update(step=7), r"no checkpoint of step 7; committed steps: 5, 6"),
}


@pytest.mark.parametrize("case", LOADS)
@pytest.mark.parametrize("step", [6, None], ids=["explicit", "newest"])
def test_p7_load_refuses_and_quarantines_nothing(case: str, step: int | None, saved: Path) -> None:
    call: dict[str, Any] = {"step": step, "layouts": dict(LAYOUTS), "coords": COORDS, "into": state(0)}
    change, message = LOADS[case]
    change(call)
    with pytest.raises(Refusal, match=message):
        CheckpointStore(saved).load(**call)
    assert CheckpointStore(saved).steps() == [5, 6]


def test_weights_load_without_the_optimizer_when_it_is_ignored_by_name(saved: Path) -> None:
    weights = {name: layout for name, layout in LAYOUTS.items() if not name.startswith("optim.")}
    tensors, _ = CheckpointStore(saved).load(6, weights, COORDS, ignore=("optim.",))
    assert tensors.keys() == weights.keys()


def test_meta_extra_files_and_manifest_need_no_layout(saved: Path) -> None:
    store = CheckpointStore(saved)
    assert store.meta(5) == {"step": 5}
    assert store.file(6, "tokenizer.json") == b'{"a":1}'
    assert store.manifest(6).tensors["final_norm.weight"].grid.shape == (63,)
    with pytest.raises(Refusal, match=r"step_00000006 has no file vocab.txt; it has meta.json, refs.json, tokenizer"):
        store.file(6, "vocab.txt")


def test_names_of_an_older_release_are_read_through_aliases(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "aliases", {"final_norm.weight": "last_norm.weight"})
    renamed = {name.replace("final_norm", "last_norm"): layout for name, layout in LAYOUTS.items()}
    tensors, _ = CheckpointStore(saved).load(6, renamed, COORDS)
    for name, tensor in state(6).items():
        assert bits_equal(tensors[name.replace("final_norm", "last_norm")], tensor)


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_saved_and_filled_in_place(tmp_path: Path) -> None:
    tensors = {name: (LAYOUTS[name], tensor.cuda()) for name, tensor in state(5).items()}
    CheckpointStore(tmp_path).save(5, tensors, {}, COORDS, attempt=1).wait()
    into = {name: torch.zeros_like(tensor) for name, (_, tensor) in tensors.items()}
    loaded, _ = CheckpointStore(tmp_path).load(5, LAYOUTS, COORDS, into=into)
    assert all(loaded[name] is into[name] and bits_equal(into[name], tensor) for name, (_, tensor) in tensors.items())
