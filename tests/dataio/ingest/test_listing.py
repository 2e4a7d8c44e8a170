"""Listing: the same files in the same order from a folder, a pattern or a store, and nothing that is not a file."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataio.ingest.listing import matches, roots
from stoker.errors import Refusal
from tests.dataio.ingest.support import lay

FILES = ["a.md", "b/a.md", "b/c/d.md", "b/c/.hidden.md", "b.md", "b/x [1].md", "é/ü.md"]


def listed(path: str, base: Path) -> list[tuple[str, str]]:
    return [(root.name, entry.path) for root in roots(path, base) for entry in root.entries]


def test_order_is_of_paths_whatever_order_files_were_made_in(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        names = FILES.copy()
        random.Random(folder).shuffle(names)
        lay(tmp_path / folder, dict.fromkeys(names, "x"))
        assert listed(folder, tmp_path) == [(folder, name) for name in sorted(FILES)]


def test_a_pattern_finds_files_and_folders_and_paths_start_at_its_first_wild_card(tmp_path: Path) -> None:
    lay(tmp_path, dict.fromkeys(["in/x/1/a.md", "in/x/2/a.md", "in/y/1/b.md", "in/z.md"], "x"))
    assert listed("in/x/*/a.md", tmp_path) == [("x", "1/a.md"), ("x", "2/a.md")]
    assert listed("in/*", tmp_path) == [("x", "1/a.md"), ("x", "2/a.md"), ("y", "1/b.md"), ("in", "z.md")]
    assert listed("in/**/b.md", tmp_path) == [("in", "y/1/b.md")]
    assert listed("in/z.md", tmp_path) == listed(f"file://{tmp_path}/in/z.md", Path("/")) == [("in", "z.md")]
    lay(tmp_path, {"in/[q].md": "x"})
    assert listed("in/[q].md", tmp_path) == [("in", "[q].md")], "a file of that name is meant before a pattern"


def test_links_and_what_is_no_file_are_not_followed(tmp_path: Path) -> None:
    lay(tmp_path / "in", {"a.md": "x", "sub/b.md": "x", ".git/config.md": "x", "sub/.git/x.md": "x"})
    os.symlink(tmp_path / "in", tmp_path / "in/sub/loop")
    os.symlink("/etc/passwd", tmp_path / "in/passwd.md")
    os.mkfifo(tmp_path / "in/pipe.md")
    assert listed("in", tmp_path) == [("in", "a.md"), ("in", "sub/b.md")]
    os.symlink(tmp_path / "in/sub", tmp_path / "link")
    assert listed("link", tmp_path) == [("link", "b.md")], "but a link that is named is"


def test_folders_as_deep_as_paths_can_be_are_listed() -> None:
    depth = 1100  # Python's recursion ends at 1000
    with tempfile.TemporaryDirectory() as top:
        folder = "/".join(["d"] * depth)
        subprocess.run(["mkdir", "-p", folder], cwd=top, check=True)
        subprocess.run(["touch", f"{folder}/a.md"], cwd=top, check=True)
        found = [path for _, path in listed(".", Path(top))]
        subprocess.run(["rm", "-r", f"{top}/d"], check=True)  # too deep for shutil
    assert found == [f"{folder}/a.md"]


def test_a_stamp_changes_with_the_contents_and_not_otherwise(tmp_path: Path) -> None:
    lay(tmp_path, {"a.md": "one"})

    def stamp() -> str:
        return next(roots(".", tmp_path)).entries[0].stamp

    first = stamp()
    assert stamp() == first
    lay(tmp_path, {"a.md": "two"})
    os.utime(tmp_path / "a.md", ns=(1, 1))
    assert stamp() != first


@pytest.mark.parametrize("path", ["nowhere", "no*where", "memory://nowhere/x", "memory://no*"])
def test_a_path_that_names_nothing_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(Refusal, match="there is no such file"):
        list(roots(path, tmp_path))


@pytest.mark.parametrize("url", ["nonsense://x/y", "https://"])
def test_a_url_that_nothing_reads_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(Refusal, match="://"):
        list(roots(url, tmp_path))


def test_a_store_is_listed_as_a_folder_is(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name in FILES:
        store.pipe(f"/bucket/{name}", b"x")
    names = [name for name in FILES]
    assert listed("memory://bucket", tmp_path) == [("bucket", name) for name in sorted(names)]
    assert listed("memory://bucket/b/a.md", tmp_path) == [("b", "a.md")]
    assert [path for _, path in listed("memory://bucket/b/*.md", tmp_path)] == ["a.md", "x [1].md"]
    (root,) = roots("memory://bucket/b/c", tmp_path)
    assert root.read("d.md", 10) == b"x" and root.entries[1].url == "memory://bucket/b/c/d.md"
    store.rm("/bucket", recursive=True)


@given(st.lists(st.sampled_from(["a", "b.py", ".x", "ü", "a[1]"]), min_size=1, max_size=4).map("/".join))
def test_patterns_agree_with_pathlib(path: str) -> None:
    from pathlib import PurePosixPath

    for pattern in ("*", "*.py", "?", "[ab]*", "[!a]*"):
        assert matches((pattern,), path) == PurePosixPath(path).match(pattern), pattern
        assert matches((f"a/{pattern}",), path) == PurePosixPath(f"/{path}").match(f"/a/{pattern}"), pattern


@pytest.mark.parametrize("pattern", ["a+(b|c)*.{1,2}$^\\d", "[", "[]", "[^a]", "[[:alpha:]]", "**", "a**b", "/", "//"])
def test_any_text_is_a_pattern(pattern: str) -> None:
    matches((pattern,), "a/b")
    assert matches(("a+(b|c).$^",), "x/a+(b|c).$^")
