"""What a manifest says is checked before it is used, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint.damage import Damaged
from pretrain.checkpoint.manifest import Manifest, commit_record, read_committed
from pretrain.checkpoint.store import CheckpointStore
from stoker.errors import Refusal
from tests.checkpoint.state import global_state, plan
from tests.checkpoint.whole import forge
from tests.checkpoint.world import save

TENSOR = "layers.0.ffn.gate_up"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("manifest")
    save(root, 5, global_state(), plan(2, tp=2))
    return root / "step_00000005"


@pytest.fixture(scope="module")
def raw(folder: Path) -> bytes:
    return (folder / "manifest.json").read_bytes()


def test_a_manifest_reads_back_to_the_same_bytes(raw: bytes) -> None:
    manifest = Manifest.from_json(raw)
    assert manifest.to_json() == raw
    assert read_committed(commit_record(manifest, raw), raw, step=5) == manifest


def _entry(change: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda content: change(content["tensors"][TENSOR])


EDITS: dict[str, Callable[[Any], None]] = {
    "a file outside": lambda c: c["data"].__setitem__(0, ["../data-00000.bin", c["data"][0][1]]),
    "an absolute file": lambda c: c["data"].__setitem__(0, ["/etc/passwd", 4]),
    "an extra file outside": lambda c: c["sealed"].update({"../x": {"bytes": 1, "sha256": "0"}}),
    "an extra file called ..": lambda c: c["sealed"].update({"..": {"bytes": 1, "sha256": "0"}}),
    "a tensor outside": lambda c: c["tensors"].update({"../../x": c["tensors"][TENSOR]}),
    "an offset behind the end": _entry(lambda t: t["chunks"][0].__setitem__(1, 2**40)),
    "a negative offset": _entry(lambda t: t["chunks"][0].__setitem__(1, -64)),
    "a fractional offset": _entry(lambda t: t["chunks"][0].__setitem__(1, 0.5)),
    "two chunks at one place": _entry(lambda t: t["chunks"].__setitem__(0, t["chunks"][1])),
    "a file that is not listed": _entry(lambda t: t["chunks"][0].__setitem__(0, 9)),
    "another length": _entry(lambda t: t["chunks"][0].__setitem__(2, 8)),
    "a shape of 2^60 rows": _entry(lambda t: t.update(shape=[2**60, 11])),
    "a chunk of 2^60 rows": _entry(lambda t: t.update(chunk=[2**60, 11])),
    "a chunk of no rows": _entry(lambda t: t.update(chunk=[0, 11])),
    "true as a size": _entry(lambda t: t.update(shape=[True, 11])),
    "a missing chunk": _entry(lambda t: t["chunks"].pop()),
    "an unknown dtype": _entry(lambda t: t.update(dtype="object")),
    "a file that is too short": lambda c: c["data"][0].__setitem__(1, 100),
    "no meta": lambda c: c["sealed"].pop("meta.json"),
    "no tensors": lambda c: c.pop("tensors"),
    "tensors as a list": lambda c: c.update(tensors=[1]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_forged_manifest_is_refused_before_anything_is_read(edit: str, raw: bytes) -> None:
    content = json.loads(raw)
    EDITS[edit](content)
    with pytest.raises(Damaged, match=r"^manifest.json: not a manifest: "):
        Manifest.from_json(json.dumps(content).encode())


def test_a_forged_manifest_with_its_commit_is_refused_by_the_store(tmp_path: Path) -> None:
    save(tmp_path, 5, global_state(), plan(1))
    forge(tmp_path / "step_00000005", EDITS["a file outside"])
    with pytest.raises(Refusal, match="not a manifest: data file"):
        CheckpointStore(tmp_path).manifest(5)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_any_value_anywhere_gives_a_sound_manifest_or_damage(raw: bytes, data: st.DataObject) -> None:
    content = node = json.loads(raw)
    while True:
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.integers(0, 3)) == 0:
            break
        node = node[key]
    node[key] = data.draw(JSON)
    try:
        manifest = Manifest.from_json(json.dumps(content).encode())
    except (Damaged, Refusal):
        return
    for name, extents in manifest.extents().items():
        assert "/" not in name and extents[0].start >= 0 and extents[-1].stop == manifest.data[name]
        assert all(a.stop <= b.start for a, b in pairwise(extents))


@given(st.binary(max_size=200))
def test_any_bytes_are_damage_or_refused(junk: bytes) -> None:
    for read in (Manifest.from_json, lambda raw: read_committed(raw, raw, 5)):
        with pytest.raises((Damaged, Refusal)):
            read(junk)
