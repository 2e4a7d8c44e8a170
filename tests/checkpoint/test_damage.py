"""P8: every damaged byte is found and named; all fall back to the newest good step, an explicit step refuses."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from pretrain.checkpoint import chunks
from pretrain.checkpoint.damage import Damage
from pretrain.checkpoint.manifest import CRC_BYTES, Extent, Manifest
from pretrain.checkpoint.store import CheckpointStore
from stoker.errors import Refusal
from tests.checkpoint.state import bits_equal
from tests.checkpoint.whole import COORDS, LAYOUTS, PAGED_CHUNK_BYTES, STEPS, build, copy, flip, forge, state

OLD, NEW = STEPS
DATA = "data-00000.bin"


@pytest.fixture(autouse=True, scope="module")
def paged_chunks(small_chunks: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "TARGET_BYTES", PAGED_CHUNK_BYTES)
        yield


@pytest.fixture(scope="module")
def good(paged_chunks: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good") / "checkpoints"
    build(root)
    assert [CheckpointStore(root).verify(step) for step in STEPS] == [[], []]
    return root


@pytest.fixture(scope="module")
def manifest(good: Path) -> Manifest:
    return CheckpointStore(good).manifest(NEW)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """The newest step of a copy of the good checkpoints."""
    return copy(good, tmp_path / "checkpoints")


def extent(manifest: Manifest, tensor: str, chunk: int = 0) -> Extent:
    return next(e for e in manifest.extents()[DATA] if (e.tensor, e.chunk) == (tensor, chunk))


def assert_falls_back(folder: Path, names: str) -> None:
    """An explicit step refuses and says what is wrong; a resume sets the step aside and takes the older one."""
    store = CheckpointStore(folder.parent)
    with pytest.raises(Refusal, match=f"checkpoint of step {NEW} is damaged .*{names}"):
        store.load(NEW, LAYOUTS, COORDS)
    assert folder.is_dir()
    tensors, meta = store.load(None, LAYOUTS, COORDS)
    assert meta == {"step": OLD}
    assert all(bits_equal(tensors[name], tensor) for name, tensor in state(OLD).items())
    assert (store.steps(), store.latest()) == ([OLD], OLD)
    assert folder.with_name(f"{folder.name}.quarantined").is_dir() and not folder.exists()
    assert os.readlink(folder.parent / "latest") == f"step_{OLD:08d}"


def test_the_sample_has_every_region(manifest: Manifest) -> None:
    extents = manifest.extents()[DATA]
    gaps = [b.start - a.stop for a, b in pairwise(extents)]
    assert max(gaps) > 512, "a page gap"
    assert any(0 < gap < 64 for gap in gaps), "a gap between packed chunks"
    assert {e.start % 4096 == 0 for e in extents if e.stop - e.start > 2**16} == {True}
    assert len(manifest.tensors["embed.weight"].chunks) == 4


@pytest.mark.parametrize("where", ["first byte", "last byte", "first byte of the CRC", "last byte of the CRC"])
@pytest.mark.parametrize("tensor", ["embed.weight", "layers.0.mixer.q.weight", "optim.exp_avg/final_norm.weight"])
def test_a_flipped_bit_of_a_chunk_names_file_tensor_and_chunk(
    where: str, tensor: str, folder: Path, manifest: Manifest
) -> None:
    chunk = len(manifest.tensors[tensor].chunks) - 1
    at = extent(manifest, tensor, chunk)
    offset = {
        "first byte": at.start,
        "last byte": at.stop - CRC_BYTES - 1,
        "first byte of the CRC": at.stop - CRC_BYTES,
        "last byte of the CRC": at.stop - 1,
    }[where]
    flip(folder / DATA, offset, bit=7)
    found = CheckpointStore(folder.parent).verify(NEW)
    assert [(d.file, d.tensor, d.chunk) for d in found] == [(DATA, tensor, chunk)]
    assert_falls_back(folder, f"{DATA}, tensor {tensor}, chunk {chunk}: ")


def test_random_flips_anywhere_are_all_found_and_their_file_is_named(folder: Path) -> None:
    pick = random.Random(1)
    store = CheckpointStore(folder.parent)
    files = sorted(folder.iterdir())
    for _ in range(60):
        for file in files:
            byte, bit = pick.randrange(file.stat().st_size), pick.randrange(8)
            flip(file, byte, bit)
            found = store.verify(NEW)
            assert [d.file for d in found] == [file.name], (file.name, byte, bit)
            flip(file, byte, bit)
    assert store.verify(NEW) == []


def test_every_single_byte_of_manifest_and_commit_matters(folder: Path) -> None:
    store = CheckpointStore(folder.parent)
    for name in ("manifest.json", "COMMIT"):
        for byte in range((folder / name).stat().st_size):
            flip(folder / name, byte, bit=byte % 8)
            with pytest.raises(Refusal, match=f"checkpoint of step {NEW} is damaged: {name}: "):
                store.manifest(NEW)
            flip(folder / name, byte, bit=byte % 8)
    assert store.verify(NEW) == []


def test_a_gap_that_is_not_zero_is_found_by_verify(folder: Path, manifest: Manifest) -> None:
    extents = manifest.extents()[DATA]
    for before, behind in pairwise(extents):
        if before.stop < behind.start:
            flip(folder / DATA, behind.start - 1)
            found = CheckpointStore(folder.parent).verify(NEW)
            assert found == [Damage(DATA, None, None, f"byte {behind.start - 1}, between chunks, is not zero")]
            flip(folder / DATA, behind.start - 1)


def zero_page(folder: Path, manifest: Manifest) -> None:
    with open(folder / DATA, "r+b") as file:
        file.seek(extent(manifest, "embed.weight", 1).start + 4096)
        file.write(bytes(4096))


def swap(folder: Path, manifest: Manifest) -> None:
    """Two chunks of equal size change places, each with its CRC."""
    a, b = extent(manifest, "final_norm.weight"), extent(manifest, "optim.exp_avg/final_norm.weight")
    raw = bytearray((folder / DATA).read_bytes())
    raw[a.start : a.stop], raw[b.start : b.stop] = raw[b.start : b.stop], raw[a.start : a.stop]
    (folder / DATA).write_bytes(raw)


def stale(folder: Path, manifest: Manifest) -> None:
    """A chunk and its CRC as an older step had them."""
    at = extent(manifest, "embed.weight", 2)
    older = (folder.parent / f"step_{OLD:08d}" / DATA).read_bytes()
    raw = bytearray((folder / DATA).read_bytes())
    raw[at.start : at.stop] = older[at.start : at.stop]
    (folder / DATA).write_bytes(raw)


def truncate(name: str, keep: float) -> Callable[[Path, Manifest], None]:
    def damage(folder: Path, _: Manifest) -> None:
        os.truncate(folder / name, int((folder / name).stat().st_size * keep))

    return damage


def remove(name: str) -> Callable[[Path, Manifest], None]:
    return lambda folder, _: (folder / name).unlink()


def grow(name: str) -> Callable[[Path, Manifest], object]:
    return lambda folder, _: (folder / name).write_bytes((folder / name).read_bytes() + b"\0")


def from_older(name: str) -> Callable[[Path, Manifest], object]:
    return lambda folder, _: (folder / name).write_bytes((folder.parent / f"step_{OLD:08d}" / name).read_bytes())


def link(folder: Path, _: Manifest) -> None:
    (folder / DATA).rename(folder.parent / "elsewhere")
    (folder / DATA).symlink_to(folder.parent / "elsewhere")


def pipe(folder: Path, _: Manifest) -> None:
    (folder / DATA).unlink()
    (folder / DATA).mkdir()


def earlier_commit(folder: Path, _: Manifest) -> None:
    """Manifest and COMMIT of another step: sound by themselves."""
    for name in ("manifest.json", "COMMIT"):
        from_older(name)(folder, _)


def deep(folder: Path, _: Manifest) -> None:
    (folder / "COMMIT").write_bytes(b"[" * 100_000)


CASES: dict[str, tuple[Callable[[Path, Manifest], object], str]] = {
    "a page of zeros": (zero_page, f"{DATA}, tensor embed.weight, chunk 1: .*its bytes changed"),
    "two chunks swapped": (swap, f"{DATA}, tensor final_norm.weight, chunk 0: .*holds another chunk.*; {DATA}, tensor"),
    "a stale chunk": (stale, f"{DATA}, tensor embed.weight, chunk 2: .*one of another step"),
    "data cut in half": (truncate(DATA, 0.5), f"{DATA}: .* bytes where .* were written"),
    "data cut to nothing": (truncate(DATA, 0), f"{DATA}: 0 bytes where"),
    "data missing": (remove(DATA), f"{DATA}: missing"),
    "data a byte longer": (grow(DATA), f"{DATA}: .* bytes where"),
    "data behind a link": (link, f"{DATA}: a link"),
    "data a folder": (pipe, f"{DATA}: a folder"),
    "manifest cut": (truncate("manifest.json", 0.9), "manifest.json: its SHA-256"),
    "manifest missing": (remove("manifest.json"), "manifest.json: missing"),
    "manifest of another step": (from_older("manifest.json"), "manifest.json: its SHA-256"),
    "commit missing": (remove("COMMIT"), "COMMIT: missing"),
    "commit cut": (truncate("COMMIT", 0.5), "COMMIT: not JSON"),
    "commit empty": (truncate("COMMIT", 0), "COMMIT: not JSON"),
    "commit of brackets": (deep, "COMMIT: not JSON"),
    "commit of another step": (from_older("COMMIT"), "manifest.json: its SHA-256"),
    "commit and manifest of another step": (earlier_commit, f"COMMIT: made for step {OLD}"),
    "meta of another step": (from_older("meta.json"), "meta.json: its SHA-256"),
    "meta missing": (remove("meta.json"), "meta.json: missing"),
    "references cut": (truncate("refs.json", 0.5), "refs.json: its SHA-256"),
    "extra file a byte longer": (grow("tokenizer.json"), "tokenizer.json: its SHA-256"),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named_and_a_resume_takes_the_older_step(case: str, folder: Path, manifest: Manifest) -> None:
    damage, names = CASES[case]
    damage(folder, manifest)
    assert CheckpointStore(folder.parent).verify(NEW) != []
    assert_falls_back(folder, names)


def test_a_file_that_nobody_wrote_is_found(folder: Path) -> None:
    (folder / "data-00007.bin").write_bytes(b"")
    assert CheckpointStore(folder.parent).verify(NEW) == [
        Damage("data-00007.bin", None, None, "not part of the checkpoint")
    ]


def test_no_good_checkpoint_is_a_refusal_and_deletes_nothing(folder: Path) -> None:
    for step in STEPS:
        remove(DATA)(folder.parent / f"step_{step:08d}", CheckpointStore(folder.parent).manifest(step))
    with pytest.raises(Refusal, match="holds no checkpoint that is committed and whole"):
        CheckpointStore(folder.parent).load(None, LAYOUTS, COORDS)
    assert sorted(p.name for p in folder.parent.iterdir()) == [
        "attempt.json",
        *(f"step_{step:08d}.quarantined" for step in STEPS),
    ]


def test_a_newer_format_is_refused_not_quarantined(folder: Path) -> None:
    forge(folder, lambda content: content["format"].update(version=99))
    record = json.loads((folder / "COMMIT").read_bytes())
    assert record["format"]["version"] == 1
    with pytest.raises(Refusal, match="written as stoker-checkpoint version 99 by a newer release"):
        CheckpointStore(folder.parent).load(None, LAYOUTS, COORDS)
    assert folder.is_dir()
