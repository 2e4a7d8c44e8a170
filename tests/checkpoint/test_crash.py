"""P8 under kills and stale writers: the old state or the new one, never a mix, and the next save works."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.planning.layout import Layout
from pretrain.checkpoint import folders, saving
from pretrain.checkpoint.store import CheckpointStore
from stoker.errors import Refusal
from tests.checkpoint.state import Tensors, bits_equal, plan

COORDS = plan(1).coords(0)
#: Builtins before each of which the process is killed once: every change that a save makes to the disk.
SYSTEM_CALLS = {"open", "write", "fsync", "mkdir", "rename", "replace", "symlink", "unlink", "rmdir"}


def content(seed: int) -> Tensors:
    make = torch.Generator().manual_seed(seed)
    return {"big": torch.randn(9, 65, generator=make), "small": torch.randn(3, generator=make).bfloat16()}


def save(root: Path, step: int, seed: int, attempt: int = 1) -> Any:
    tensors = {name: (Layout(tuple(tensor.shape)), tensor) for name, tensor in content(seed).items()}
    return CheckpointStore(root).save(step, tensors, {"seed": seed}, COORDS, attempt, {"tokenizer.json": b"{}"})


def loaded_seed(root: Path) -> int:
    """The seed of the state that a resume takes; it must be whole."""
    layouts = {name: Layout(tuple(tensor.shape)) for name, tensor in content(0).items()}
    tensors, meta = CheckpointStore(root).load(None, layouts, COORDS)
    expected = content(meta["seed"])
    assert all(bits_equal(tensors[name], expected[name]) for name in expected)
    return int(meta["seed"])


def killed_before_call(number: int, root: Path, step: int) -> str | None:
    """Save in a child that gets SIGKILL before its n-th system call; which one, or None if it was through by then."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        left = number

        def count(frame: Any, event: str, called: Any) -> None:
            nonlocal left
            if event == "c_call" and called.__name__ in SYSTEM_CALLS:
                left -= 1
                if left < 0:
                    sys.setprofile(None)
                    os.write(writer, called.__name__.encode())
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        save(root, step, seed=2, attempt=2).wait()
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        name = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return name or None


@pytest.mark.parametrize("step", [6, 5], ids=["a new step", "a step saved again"])
def test_p8_a_kill_before_any_system_call_leaves_the_old_state_or_the_new(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "base", 5, seed=1).wait()
    called, outcomes = [], []
    for number in range(1000):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "base", root, symlinks=True)
        name = killed_before_call(number, root, step)
        store = CheckpointStore(root)
        latest = store.latest()
        assert latest is not None
        seed = loaded_seed(root)
        outcomes.append(seed)
        assert store.meta(latest) == {"seed": seed}
        assert [path.name for path in root.glob("*.quarantined")] == []
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda fd: None)  # durability is not what is asked here, and it takes most time
            save(root, 7, seed=3, attempt=3).wait()
        assert loaded_seed(root) == 3
        assert [found for known in store.steps() for found in store.verify(known)] == []
        assert sorted(p.name for p in root.glob("step_*")) == [f"step_{known:08d}" for known in store.steps()]
        if name is None:
            break
        called.append(name)
    assert called.count("fsync") >= 8
    assert called.count("rename") >= 1
    assert {"open", "write", "mkdir", "symlink", "replace"} <= {*called}
    # Old before the rename that commits, new after it.
    assert outcomes == sorted(outcomes) and {*outcomes} == {1, 2}
    print(f"{len(called)} kills: {outcomes.count(1)} kept the old state, {outcomes.count(2) - 1} the new")


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("moment", ["before its data", "before its commit"])
def test_p8_no_byte_of_a_stale_attempt_reaches_a_committed_folder(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = (saving, "write_data") if moment == "before its data" else (folders, "commit")
    real = getattr(module, name)
    committed: list[dict[str, str]] = []

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(module, name, real)
        save(tmp_path, 5, seed=2, attempt=2).wait()
        committed.append(digest(tmp_path / "step_00000005"))
        return real(*arguments)

    monkeypatch.setattr(module, name, overtaken)
    with pytest.raises((Refusal, OSError)):
        save(tmp_path, 5, seed=1, attempt=1).wait()
    assert digest(tmp_path / "step_00000005") == committed[0]
    assert loaded_seed(tmp_path) == 2
    with pytest.raises(Refusal, match="attempt 2 has taken over from attempt 1"):
        save(tmp_path, 6, seed=1, attempt=1)


def test_p8_a_fence_stops_an_older_attempt_in_the_middle_of_its_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = saving.write_data

    def overtaken(*arguments: Any) -> Any:
        CheckpointStore(tmp_path).fence(2)
        return real(*arguments)

    monkeypatch.setattr(saving, "write_data", overtaken)
    with pytest.raises(Refusal, match="attempt 2 has taken over from attempt 1"):
        save(tmp_path, 5, seed=1, attempt=1)
    assert CheckpointStore(tmp_path).steps() == []


def test_a_fence_stops_an_older_attempt_before_the_newer_one_has_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.fence(4)
    with pytest.raises(Refusal, match="attempt 4 has taken over from attempt 3"):
        save(tmp_path, 5, seed=1, attempt=3)
    save(tmp_path, 5, seed=1, attempt=4).wait()
    assert store.latest() == 5


def test_a_full_disk_is_an_error_of_the_handle_and_takes_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5, seed=1).wait()
    real = os.fsync

    def failing(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("manifest.json"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    handle = save(tmp_path, 6, seed=2)
    assert handle.poll() and "No space left" in str(handle.error)
    assert loaded_seed(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempt.json", "latest", "step_00000005"]


def test_folders_are_0700_and_files_0600_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        save(tmp_path / "checkpoints", 5, seed=1).wait()
    finally:
        os.umask(before)
    for path in (tmp_path / "checkpoints", *(tmp_path / "checkpoints").rglob("*")):
        if not path.is_symlink():
            assert oct(path.stat().st_mode & 0o777) == ("0o700" if path.is_dir() else "0o600"), path
