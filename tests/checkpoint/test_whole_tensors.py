"""``CheckpointStore.read``: whole tensors one after another, and the manifest is read once for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.checkpoint import loading, store
from pretrain.checkpoint.store import CheckpointStore
from stoker.errors import Refusal
from tests.checkpoint.state import bits_equal, global_state, plan
from tests.checkpoint.whole import flip
from tests.checkpoint.world import save


@pytest.mark.parametrize("read_bytes", [1, 3000, 2**30])
def test_every_tensor_comes_whole_and_the_manifest_is_read_once(
    read_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = global_state()
    save(tmp_path, 5, state, plan(6, tp=3, ep=2))
    monkeypatch.setattr(store, "READ_BYTES", read_bytes)
    read_manifest, reads, groups = loading.read_manifest, list[int](), list[int]()
    read_tensors = loading.read_tensors
    monkeypatch.setattr(loading, "read_manifest", lambda root, step: reads.append(step) or read_manifest(root, step))
    monkeypatch.setattr(loading, "read_tensors", lambda *a: groups.append(len(a[2])) or read_tensors(*a))
    found = dict(CheckpointStore(tmp_path).read(5))
    assert found.keys() == state.keys() and all(bits_equal(found[name], state[name]) for name in state)
    assert reads == [5] and sum(groups) == len(state)
    assert (len(groups) == 1) == (read_bytes == 2**30)
    assert read_bytes > 1 or max(groups) <= 2, "a tensor without elements takes no room"
    assert [name for name, _ in CheckpointStore(tmp_path).read(5, ["mask", "embed.weight"])] == ["mask", "embed.weight"]


def test_damage_is_refused_when_it_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "READ_BYTES", 1)
    save(tmp_path, 5, global_state(), plan(1))
    at = CheckpointStore(tmp_path).manifest(5).tensors["embed.weight"].chunks[-1]
    flip(tmp_path / "step_00000005" / at.file, at.offset)
    tensors = CheckpointStore(tmp_path).read(5, ["mask", "embed.weight"])
    assert next(tensors)[0] == "mask"
    with pytest.raises(Refusal, match=r"checkpoint of step 5 is damaged: data-00000.bin, tensor embed.weight, chunk 6"):
        next(tensors)
