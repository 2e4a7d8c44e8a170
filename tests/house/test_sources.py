"""Rules that every file keeps: size, no code loaded from data, no loose ends, nothing of one machine."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from tests.house.sources import HOME, python_files, shipped, tree


def num_lines(path: Path) -> int:
    return len((HOME / path).read_text().splitlines())


def test_no_file_is_over_800_lines() -> None:
    long = {str(path): n for path in [*shipped(), *python_files("tests")] if (n := num_lines(path)) > 800}
    assert not long, f"a file that wants more holds two ideas: {long}"


def test_files_are_short_median_under_200_and_nine_of_ten_under_500_lines() -> None:
    sizes = sorted(num_lines(path) for path in shipped() if path.name != "__init__.py")
    assert statistics.median(sizes) < 200
    assert sizes[len(sizes) * 9 // 10] < 500


def test_the_foundation_stays_under_600_lines_and_its_modules_are_a_closed_list() -> None:
    modules = {path.stem: num_lines(path) for path in python_files("stoker")}
    assert sum(modules.values()) < 600, modules
    assert set(modules) == {
        *("__init__", "canonical", "errors", "files", "formats", "hashing"),
        *("nearest", "progress", "secrets", "sections", "version", "yaml_core"),
    }


def unsafe(path: Path) -> Iterator[str]:
    """Calls that can run code found in a file, or that a shell would read."""
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if (
            called in {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
            or called.startswith(("pickle.", "cPickle.", "dill.", "cloudpickle.", "marshal.", "joblib."))
            or (called == "torch.load" and keywords.get("weights_only") != "True")
            or (called.endswith("np.load") and keywords.get("allow_pickle") == "True")
            or keywords.get("shell") == "True"
        ):
            yield f"{path}:{node.lineno}: {called}"


def test_shipped_code_runs_nothing_that_it_reads() -> None:
    wrong = [found for path in shipped() for found in unsafe(path)]
    assert not wrong, "\n".join(wrong)


def texts() -> Iterator[tuple[Path, str]]:
    """Every text a reader of the repository meets."""
    yield from ((path, (HOME / path).read_text()) for path in [*shipped(), *python_files("tests")])
    for pattern in ("*.md", "docs/**/*.md", "*.toml", "Makefile", ".ci/*", "pretrain/presets/*.yaml"):
        yield from ((path.relative_to(HOME), path.read_text()) for path in HOME.glob(pattern) if path.is_file())


def test_no_loose_end_without_an_anchor() -> None:
    loose = re.compile(r"#.*\b(?:T[O]DO|FIXM[E]|XX[X]|HAC[K])\b(?!\(\S+\))")
    wrong = [f"{path}: {found[0]}" for path, text in texts() for found in loose.finditer(text)]
    assert not wrong, "\n".join(wrong)


def test_no_path_of_somebodys_machine() -> None:
    local = re.compile(r"""(?<![\w.}>])/(?:work|root|home|Users)/\w+""")
    wrong = [f"{path}: {found[0]}" for path, text in texts() for found in local.finditer(text)]
    assert not wrong, "\n".join(wrong)
