"""A package of another project is noticed before it is taken for ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import guard
from tests.house.sources import HOME

REPORT = """
from pretrain import guard
print([(f.name, f.in_the_way) for f in guard.foreign_rooms()], guard.apex())
guard.require_own_rooms()
"""


def report(folder: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """What a fresh interpreter, started in `folder` with `path` to search, finds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-P", "-c", REPORT]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def package(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise SystemExit('a foreign package was imported')\n")
    return folder


def distribution(folder: Path, name: str, *packages: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("\n".join(packages) + "\n")


def test_this_installation_is_clean() -> None:
    assert not [found for found in guard.foreign_rooms() if found.in_the_way]
    guard.require_own_rooms()


@pytest.mark.parametrize("room", ["kernels", "launch", "parallel"])
def test_a_foreign_room_found_first_is_refused_by_name_and_place(tmp_path: Path, room: str) -> None:
    found = report(tmp_path, package(tmp_path, room), HOME)
    assert found.returncode == 1 and f"[('{room}', True)]" in found.stdout
    assert "Refusal: a foreign package" in found.stderr and str(tmp_path / room) in found.stderr


def test_a_foreign_room_behind_ours_is_told_but_harmless(tmp_path: Path) -> None:
    distribution(package(tmp_path, "kernels"), "kernels", "kernels")
    found = report(tmp_path, HOME, tmp_path)
    assert (found.returncode, found.stdout) == (0, "[('kernels', False)] absent\n"), found.stderr


def test_two_distributions_in_one_folder_are_refused(tmp_path: Path) -> None:
    for room in guard.ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    shutil.copytree(HOME / "stoker", tmp_path / "stoker", dirs_exist_ok=True)
    shutil.copy(HOME / "pretrain" / "guard.py", tmp_path / "pretrain")
    distribution(tmp_path, "stoker", *guard.ROOMS)
    distribution(tmp_path, "kernels", "kernels")
    found = report(tmp_path, tmp_path)
    assert found.returncode == 1 and "pip uninstall kernels" in found.stderr, found.stderr


def test_the_other_apex_is_refused_and_nvidias_is_not(tmp_path: Path) -> None:
    other = package(tmp_path / "other", "apex")
    found = report(tmp_path, HOME, other)
    assert found.returncode == 1 and "pip uninstall apex" in found.stderr

    nvidia = package(tmp_path / "nvidia", "apex")
    (nvidia / "apex" / "optimizers").mkdir()
    assert report(tmp_path, HOME, nvidia).stdout == "[] unbuilt\n"
    (nvidia / "amp_C.py").touch()
    assert report(tmp_path, HOME, nvidia).stdout == "[] built\n"
