"""The import rule of the house: launch -> pretrain -> {dataio, parallel, kernels} -> stoker."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.sources import HOME, ROOMS, imports, module_name, shipped, tree

MAY_IMPORT = {
    "stoker": {"stoker"},
    "dataio": {"dataio", "stoker"},
    "parallel": {"parallel", "stoker"},
    "kernels": {"kernels", "stoker"},
    "pretrain": {"pretrain", "dataio", "parallel", "kernels", "stoker"},
    "launch": set(ROOMS),
}
TORCH_FREE = ("stoker/", "dataio/", "parallel/planning/", "pretrain/spec.py", "pretrain/workload.py", "pretrain/config")
HEAVY = {"torch", "megatron", "transformers"}
MEGATRON_ROOMS = ("parallel/engine/", "pretrain/model/")


def torch_free() -> list[Path]:
    return [path for path in shipped() if str(path).startswith(TORCH_FREE)]


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_upward_or_sideways(room: str) -> None:
    wrong = [
        f"{path}:{line} imports {name}"
        for path in shipped()
        if path.parts[0] == room
        for line, name in imports(path)
        if name.split(".")[0] in {*ROOMS, "tests"} - MAY_IMPORT[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_planning_never_knows_the_engine() -> None:
    wrong = [
        f"{path}:{line}"
        for path in shipped()
        if path.is_relative_to("parallel/planning")
        for line, name in imports(path)
        if name.startswith("parallel.engine")
    ]
    assert not wrong, wrong


def test_megatron_is_touched_in_the_engine_and_the_model_only() -> None:
    wrong = [
        f"{path}:{line}"
        for path in shipped()
        if not str(path).startswith(MEGATRON_ROOMS)
        for line, name in imports(path)
        if name.split(".")[0] == "megatron"
    ]
    assert not wrong, wrong


def test_torch_free_files_name_no_heavy_package() -> None:
    wrong = [
        f"{p}:{line} imports {name}" for p in torch_free() for line, name in imports(p) if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_free_modules_load_where_torch_does_not_exist() -> None:
    modules = [module_name(path) for path in torch_free() if path.name != "__main__.py"]
    assert "stoker.files" in modules and "pretrain.spec" in modules
    program = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"{{name}} is not here", name=name)
sys.meta_path.insert(0, Absent())
for module in {modules!r}:
    importlib.import_module(module)
assert not {HEAVY!r} & {{name.split(".")[0] for name in sys.modules}}
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=HOME, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("room", [*ROOMS, "parallel/planning", "parallel/engine"])
def test_a_room_opens_with_what_lives_there_what_may_not_and_where_to_start(room: str) -> None:
    docstring = ast.get_docstring(tree(Path(room, "__init__.py"))) or ""
    lines = docstring.splitlines()
    assert len(lines) == 3 and lines[1].startswith("Not here:") and lines[2].startswith("Start with"), docstring
