"""Repositories: files are told apart by checkout, folder, package or distribution, each with its own licence."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dataio.ingest.git import checkout, tracked
from dataio.ingest.repositories import Repository
from stoker.errors import Refusal
from tests.dataio.ingest.support import lay, read

git_is_there = pytest.mark.skipif(shutil.which("git") is None, reason="git is the oracle, and is not installed")


def package(licence: str) -> str:
    return f'{{"license": "{licence}"}}'


def cargo(licence: str) -> str:
    return f'[package]\nlicense = "{licence}"\n'


TREE: dict[str, str | bytes] = {
    "package.json": package("MIT"),
    "top.py": "x = 1\n",
    "one/Cargo.toml": cargo("Apache-2.0"),
    "one/src/a.rs": "a\n",
    "one/src/vendored/Cargo.toml": cargo("GPL-3.0-only"),
    "one/src/vendored/b.rs": "b\n",
    "two/package.json": "{}",
    "two/c.js": "c\n",
}


def found(tmp_path: Path, rule: str) -> dict[str, tuple[str, str | None, str | None]]:
    lay(tmp_path / "in", TREE)
    rows = read(tmp_path / "in", format="code", repository=rule, exclude=["*.json", "*.toml"]).rows
    return {row["text"].strip(): (row["path"], row["repository"], row["licence"]) for row in rows}


def test_the_root_is_one_repository(tmp_path: Path) -> None:
    assert found(tmp_path, "root") == {
        "x = 1": ("top.py", "in", "MIT"),
        "a": ("one/src/a.rs", "in", "MIT"),
        "b": ("one/src/vendored/b.rs", "in", "MIT"),
        "c": ("two/c.js", "in", "MIT"),
    }


def test_the_first_folder_is_one_repository(tmp_path: Path) -> None:
    assert found(tmp_path, "first") == {
        "x = 1": ("top.py", "in", "MIT"),
        "a": ("src/a.rs", "one", "Apache-2.0"),
        "b": ("src/vendored/b.rs", "one", "Apache-2.0"),
        "c": ("c.js", "two", None),
    }


def test_the_nearest_package_is_the_repository_and_without_a_licence_has_that_of_the_one_around_it(
    tmp_path: Path,
) -> None:
    assert found(tmp_path, "nearest") == {
        "x = 1": ("top.py", "in", "MIT"),
        "a": ("src/a.rs", "one", "Apache-2.0"),
        "b": ("b.rs", "one/src/vendored", "GPL-3.0-only"),
        "c": ("c.js", "two", "MIT"),
    }


def test_no_rule_no_repository(tmp_path: Path) -> None:
    assert set(found(tmp_path, "none").values()) == {
        (path, None, None) for path in ("top.py", "one/src/a.rs", "one/src/vendored/b.rs", "two/c.js")
    }


def test_a_distribution_has_the_files_that_its_record_lists(tmp_path: Path) -> None:
    site = "lib/site-packages"
    lay(
        tmp_path / "in",
        {
            f"{site}/pkg/a.py": "a\n",
            f"{site}/pkg/sub/b.py": "b\n",
            "bin/tool.py": "t\n",
            f"{site}/other.py": "o\n",
            f"{site}/nobody.py": "n\n",
            f"{site}/my_pkg-1.0.post1.dist-info/RECORD": 'pkg/a.py,sha256=x,2\n"pkg/sub/b.py",,\n../../bin/tool.py,,\n',
            f"{site}/my_pkg-1.0.post1.dist-info/METADATA": "Metadata-Version: 2.4\nLicense-Expression: MIT\n",
            f"{site}/other-2.dist-info/RECORD": "other.py,,\n" + "x" * 200_000,  # longer than a field may be
        },
    )
    rows = read(tmp_path / "in", format="code", repository="distribution").rows
    assert {(row["path"], row["repository"], row["revision"], row["licence"]) for row in rows} == {
        ("pkg/a.py", "my_pkg", "1.0.post1", "MIT"),
        ("pkg/sub/b.py", "my_pkg", "1.0.post1", "MIT"),
        ("bin/tool.py", "my_pkg", "1.0.post1", "MIT"),
        ("other.py", "other", "2", None),
        (f"{site}/nobody.py", None, None, None),
    }


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "init.defaultBranch=main"]
    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    ran = subprocess.run(["git", *who, *arguments], cwd=folder, env=environment, capture_output=True, check=True)
    return ran.stdout.decode()


@git_is_there
@pytest.mark.parametrize("index", ["2", "3", "4"])
@pytest.mark.parametrize("form", ["sha1", "sha256"])
def test_a_checkout_is_what_git_says_it_is(tmp_path: Path, index: str, form: str) -> None:
    folder = tmp_path / "checkouts/project"
    names = [
        "a.py",
        "src/b.py",
        "src/" + "n" * 200 + "/" + "deep" * 50 + ".py",
        "src/ü.py",
        "b" * 62 + ".py",
        "LICENSE",
    ]
    lay(folder, dict.fromkeys(names, "x = 1\n"))
    git(folder, "init", "-q", f"--object-format={form}")
    os.symlink("a.py", folder / "link.py")
    git(folder, "add", ".")
    git(folder, "update-index", "--index-version", index)
    if index == "3":
        lay(folder, {"later.py": "x\n"})
        git(folder, "add", "-N", "later.py")  # makes entries with extended flags
    git(folder, "commit", "-qm", "first", "--", "a.py")
    git(folder, "remote", "add", "origin", "https://user:secret@example.org:8443/group/project.git")
    revision = git(folder, "rev-parse", "HEAD").strip()
    lay(folder, {"untracked.py": "x\n", "build/out.py": "x\n"})

    listed = set(git(folder, "ls-files", "-z").split("\0")) - {"", "link.py"}
    assert tracked(folder) == listed
    assert checkout(folder) == Repository("example.org/group/project", revision=revision)
    rows = read(tmp_path / "checkouts", format="git").rows
    assert {row["path"] for row in rows} == {name for name in listed}
    assert {(row["repository"], row["revision"]) for row in rows} == {("example.org/group/project", revision)}

    git(folder, "checkout", "-q", "--detach")
    git(folder, "pack-refs", "--all")
    assert checkout(folder) == Repository("example.org/group/project", revision=revision)
    git(folder, "checkout", "-q", "-f", "main")
    git(folder, "worktree", "add", "-q", "../tree", "-b", "side")
    assert checkout(tmp_path / "checkouts/tree") == Repository("example.org/group/project", revision=revision)
    assert tracked(tmp_path / "checkouts/tree") == {"a.py"}


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("git@github.com:owner/name.git", "github.com/owner/name"),
        ("ssh://git@host:22/a/b/c", "host/a/b/c"),
        ("https://x-token:abc@github.com/o/n/", "github.com/o/n"),
        ("/mnt/somebody/secret-path/n.git", "in"),
        ("../n", "in"),
        ("", "in"),
    ],
)
def test_a_repository_is_called_by_where_it_was_cloned_from_without_credentials(
    tmp_path: Path, url: str, name: str
) -> None:
    config = f'[core]\n\tbare = false\n[remote "origin"]\n\turl = {url}\n\tfetch = +refs/heads/*\n'
    lay(tmp_path / "in", {".git/HEAD": "ref: refs/heads/main\n", ".git/config": config})
    found = checkout(tmp_path / "in")
    assert found == Repository(name)


@pytest.mark.parametrize(
    "files",
    [
        {".git/HEAD": "ref: ../../../etc/passwd", ".git/index": b"DIRC"},
        {".git/HEAD": "", ".git/index": b"DIRC\0\0\0\2\xff\xff\xff\xff" + b"x" * 100},
        {".git/HEAD": b"\xff\xfe", ".git/config": "[remote\nurl", ".git/index": os.urandom(1000)},
        {".git/HEAD": "x", ".git/config": b'[remote "origin"]\nurl'},
    ],
)
def test_a_damaged_checkout_has_no_revision_and_no_list(tmp_path: Path, files: dict[str, str | bytes]) -> None:
    lay(tmp_path / "in", {**files, "a.py": "x\n"})
    assert checkout(tmp_path / "in") == Repository("in") and tracked(tmp_path / "in") is None
    assert [row["path"] for row in read(tmp_path / "in", format="git").rows] == ["a.py"]


def test_git_wants_checkouts(tmp_path: Path) -> None:
    lay(tmp_path / "in", {"a.py": "x\n"})
    with pytest.raises(Refusal, match="format git"):
        read(tmp_path / "in", format="git")
