"""What Slurm is asked for: values are data in an argument list, and bad ones are refused before anything is written."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launch.launching import slurm
from launch.launching.folder import Folder
from launch.launching.job import Prepared
from launch.launching.slurm import array_argv, ranges, submit
from launch.launching.where import expand
from pretrain.config_sections import LaunchSection
from stoker.errors import Refusal
from tests.launch.launching.jobs import PRESET, on_slurm, prepared, tree, value
from tests.launch.tiny import tiny

EVIL = [
    "a\n#SBATCH --account=root",
    "$(touch /tmp/x)",
    "`id`",
    "a;b",
    "a b",
    "--wrap=x",
    "é\u2028x",
    "",
    "'\"",
    "a,b",
    "%j",
]


def test_gb200_asks_for_whole_trays_in_segments() -> None:
    submitted = on_slurm(prepared("launch.time_limit_min=240", "launch.partition=batch", "launch.account=me"))
    argv = submitted.argv
    assert argv[0] == "sbatch" and value(argv, "--segment") == "16" and value(argv, "--nodes") == "16"
    assert value(argv, "--ntasks-per-node") == "1" and value(argv, "--gpus-per-node") == "4"
    assert value(argv, "--signal") == "B:USR1@300" and value(argv, "--time") == "240"
    assert (value(argv, "--partition"), value(argv, "--account")) == ("batch", "me")
    assert {"--requeue", "--exclusive", "--mem=0", "--open-mode=append"} <= set(argv) and "--no-kill" not in argv
    ended, command = argv[argv.index(str(slurm.script_path())) + 1 :][:2]
    assert ended.endswith(f"/{PRESET}/.launch/1-") and command == "srun"
    assert argv[-1].endswith("/launch/0001/launch.json") and argv[-2] == "launch.launching.node"


def test_spares_are_asked_for_within_their_segment_and_outlive_a_node() -> None:
    argv = on_slurm(prepared("parallel={ep: 64}", "launch.spare_nodes=4", nodes=32)).argv
    assert value(argv, "--nodes") == "36" and value(argv, "--segment") == "18"
    assert argv.count("--no-kill") == 2  # of sbatch and of srun


def test_a_container_sees_the_run_directory_at_its_own_path(tmp_path: Path) -> None:
    here = (f"run.dir={tmp_path}", "launch.container=ghcr.io/x/stoker:1")
    argv = on_slurm(prepared(*here, f"launch.mounts=['{tmp_path}:{tmp_path}','/data:/data:ro']")).argv
    assert value(argv, "--container-image") == "ghcr.io/x/stoker:1"
    assert value(argv, "--container-mounts") == f"{tmp_path}:{tmp_path},/data:/data:ro"
    assert argv[argv.index("-m") - 1] == "python3"
    for mounts in ("[]", f"['{tmp_path}:/elsewhere']", f"['{tmp_path}:{tmp_path}:ro']"):
        with pytest.raises(Refusal, match="run directory"):
            on_slurm(prepared(*here, f"launch.mounts={mounts}"))
    with pytest.raises(Refusal, match="names no image"):
        on_slurm(prepared("launch.mounts=['/data:/data']"))


def with_launch(ready: Prepared, **changed: object) -> Prepared:
    section = ready.config.launch.model_copy(update=changed)
    return replace(ready, config=ready.config.model_copy(update={"launch": section}))


@pytest.fixture(scope="module")
def ready() -> Prepared:
    return prepared("parallel={ep: 8}", hardware="h100", nodes=2)


@given(text=st.one_of(st.text(), st.sampled_from(EVIL)), key=st.sampled_from(["partition", "account", "container"]))
@example(text="a\n#SBATCH -A root", key="account")
def test_any_text_is_refused_or_one_argument(ready: Prepared, text: str, key: str) -> None:
    changed = with_launch(ready, **{key: text}, **({"mounts": ("/:/",)} if key == "container" else {}))
    try:
        submitted = on_slurm(changed)
    except Refusal as refusal:
        assert "\n" not in str(refusal)
        return
    option = "--container-image" if key == "container" else f"--{key}"
    assert value(submitted.argv, option) == text
    plain = on_slurm(with_launch(ready, **{key: "x"}, **({"mounts": ("/:/",)} if key == "container" else {})))
    assert len(submitted.argv) == len(plain.argv)
    assert [a for a, b in zip(submitted.argv, plain.argv) if a != b] == [f"{option}={text}"] * (text != "x")
    assert not any(sign in word for word in submitted.argv for sign in "\n\r\0\x1b\u2028")
    assert json.loads(json.dumps(submitted.argv)) == submitted.argv


@given(text=st.text(min_size=1).filter(lambda text: "/" not in text and text not in (".", "..")))
@example(text="50%j done %")
@example(text="x\n#SBATCH --uid=0")
def test_any_run_directory_is_refused_or_one_argument(ready: Prepared, text: str) -> None:
    config = ready.config
    changed = replace(
        ready, config=config.model_copy(update={"run": config.run.model_copy(update={"dir": f"/{text}"})})
    )
    try:
        argv = on_slurm(changed).argv
    except Refusal:
        return
    # As Slurm reads it (man sbatch, "filename pattern").
    named = re.sub(
        "%(.)", lambda found: {"%": "%", "j": "7"}.get(found[1], "?"), value(argv, "--output"), flags=re.DOTALL
    )
    assert named == f"/{text}/{config.run.name}/launch/0001/slurm-7.log"
    assert argv[-1] == f"/{text}/{config.run.name}/launch/0001/launch.json" and "\n" not in "".join(argv)


@pytest.mark.parametrize("mount", ["/a:/b,/c:/d", "a:/b", "/a", "/a:b", "/a:/b:rw", "/a:/b\n:ro"])
def test_a_mount_that_is_no_mount_is_refused(ready: Prepared, mount: str) -> None:
    with pytest.raises(Refusal, match="mounts"):
        on_slurm(with_launch(ready, container="image", mounts=("/:/", mount)))


def test_a_notice_after_the_end_or_beyond_what_slurm_takes_is_refused(ready: Prepared) -> None:
    with pytest.raises(Refusal, match="signal_s=300 is not before"):
        on_slurm(with_launch(ready, time_limit_min=5))
    with pytest.raises(Refusal, match="65535"):
        on_slurm(with_launch(ready, signal_s=70_000))


@given(st.sets(st.integers(0, 300), min_size=1))
def test_array_indices_are_written_as_slurm_reads_them(indices: set[int]) -> None:
    assert [int(host[1:]) for host in expand(f"n[{ranges(list(indices))}]")] == sorted(indices)


@pytest.mark.parametrize("word", ["a\nb", "\x00", "\ud800"])
def test_an_array_refuses_control_characters(tmp_path: Path, word: str) -> None:
    with pytest.raises(Refusal, match="control character"):
        array_argv(["python", word], tmp_path, [1], 1, LaunchSection(), 1, 0)


@pytest.mark.parametrize(("indices", "at_once", "cpus"), [([], 1, 1), ([-1], 1, 1), ([1], 0, 1), ([1], 1, 0)])
def test_an_array_of_nothing_is_refused(tmp_path: Path, indices: list[int], at_once: int, cpus: int) -> None:
    with pytest.raises(Refusal, match="array"):
        array_argv(["python"], tmp_path, indices, at_once, LaunchSection(), cpus, 0)


def fake(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


SINFO = "printf 'batch|3\\nbatch|1\\nsmall|1\\n'"


@pytest.mark.parametrize(
    ("commands", "overrides", "said"),
    [
        ({}, [], "sbatch is not on this machine"),
        (
            {"sbatch": "exit 9", "sinfo": "echo 'Unable to contact\n slurm controller' >&2; exit 1"},
            [],
            "slurm controller",
        ),
        ({"sbatch": "exit 9", "sinfo": "exec sleep 60"}, [], "did not answer sinfo"),
        ({"sbatch": "exit 9", "sinfo": SINFO}, ["launch.partition=bacth"], "did you mean batch"),
        ({"sbatch": "exit 9", "sinfo": SINFO}, ["launch.partition=small"], "small \\(1 nodes\\)"),
        ({"sbatch": "exit 9", "sinfo": SINFO}, ["launch.spare_nodes=3"], "5 nodes with the spares"),
        ({"sbatch": "echo bad account >&2; exit 1", "sinfo": SINFO}, [], "bad account; nothing was submitted"),
    ],
)
def test_what_slurm_cannot_do_is_one_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: dict[str, str], overrides: list[str], said: str
) -> None:
    monkeypatch.setattr(slurm, "ASK_S", 1)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in commands.items():
        fake(bin_folder, name, text)
    fake(bin_folder, "sleep", "exec /bin/sleep $1")
    monkeypatch.setenv("PATH", str(bin_folder))
    ready = prepared(*overrides, config=str(tiny(tmp_path)), hardware="cpu", nodes=2, ranks=1)
    before = tree(tmp_path)
    with pytest.raises(Refusal, match=said) as refusal:
        submit(ready, Folder.next(ready.config.run_dir))
    assert "\n" not in str(refusal.value) and [name for name in tree(tmp_path) if name != "runs"] == before


def test_secrets_go_to_sbatch_in_its_environment_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "sinfo", SINFO)
    fake(
        tmp_path, "sbatch", f'printf %s "$STOKER_CONFIG_SECRET" > {tmp_path}/seen; echo "$@" > {tmp_path}/argv; echo 12'
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = str(tiny(tmp_path))
    ready = prepared("launch.webhook=https://x.example/canary", config=config, hardware="cpu", nodes=2, ranks=1)
    folder = Folder.next(ready.config.run_dir)
    assert submit(ready, folder) == "12"
    assert json.loads((tmp_path / "seen").read_text()) == {"launch.webhook": "https://x.example/canary"}
    written = [path for path in ready.config.run_dir.rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"launch.json", "config.yaml", "submission.json"}
    assert not any("canary" in path.read_text() for path in [*written, tmp_path / "argv"])
    assert Folder.next(ready.config.run_dir).number == 2


def test_the_script_is_the_same_for_every_job_and_every_value_an_argument() -> None:
    text = slurm.script_path().read_text()
    assert '"$@" &' in text and "eval" not in text and not any(line.startswith("#SBATCH") for line in text.splitlines())


@pytest.mark.parametrize("noticed", [False, True])
@pytest.mark.parametrize(
    ("recorded", "code", "ends"),
    [
        (None, 3, 3),
        (None, 137, 137),
        ("0\n", 137, 0),  # a node was lost, and a spare finished the run
        ("1\n", 137, 1),
        ("4\n", 137, 4),
        ("4\n", 0, 4),
        ("", 137, 137),  # torn, or no digit
        ("44\n", 137, 137),
        ("$(touch x)\n", 137, 137),
    ],
)
def test_the_job_ends_as_its_nodes_agreed(
    tmp_path: Path, recorded: str | None, code: int, ends: int, noticed: bool
) -> None:
    """Of this start of the job; and only one that is to go on is queued again."""
    fake(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/asked')
    folder = tmp_path / "a 'b' $(c)"
    folder.mkdir()
    for name in ("1-7-0", "1-7-2", "1-70-1", "2-7-1"):
        (folder / f"{name}.ended").write_text("2\n")
    if recorded is not None:
        (folder / "1-7-1.ended").write_text(recorded)
    command = f"trap : USR1; {'kill -USR1 $PPID; sleep 0.3;' if noticed else ''} exit {code}"
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    argv = ["bash", str(slurm.script_path()), f"{folder}/1-", "bash", "-c", command]
    done = subprocess.run(argv, cwd=tmp_path, env={**os.environ, **path}, capture_output=True, text=True, timeout=60)
    queued = noticed and ends >= 4
    assert done.returncode == (0 if queued else ends), done.stderr
    assert (tmp_path / "asked").exists() == queued and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("nodes", "folder", "notice", "ends"),
    [(2, True, False, 0), (1, True, False, 137), (2, False, False, 137), (2, True, True, 0)],
)
def test_what_the_nodes_agreed_on_is_waited_for_where_it_may_be_on_its_way(
    tmp_path: Path, nodes: int, folder: bool, notice: bool, ends: int
) -> None:
    """A network file system shows late what another node has written; a job that is to be queued again cannot wait."""
    fake(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/asked')
    launches = tmp_path / ".launch"
    if folder:
        launches.mkdir()
    late = f"sleep 2; mkdir -p {launches}; echo 0 > {launches}/1-7-0.ended"
    command = f"({late}) & trap : USR1; {'kill -USR1 $PPID; sleep 0.3;' if notice else ''} exit 137"
    known = {name: value for name, value in os.environ.items() if name != "SLURM_RESTART_COUNT"}
    known |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": str(nodes)}
    argv = ["bash", str(slurm.script_path()), f"{launches}/1-", "bash", "-c", command]
    done = subprocess.run(argv, cwd=tmp_path, env=known, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == ends, done.stderr
    assert (tmp_path / "asked").exists() == notice


def test_where_no_launch_says_how_it_ended_the_command_does(tmp_path: Path) -> None:
    (tmp_path / "-7-0.ended").write_text("0\n")
    argv = ["bash", str(slurm.script_path()), "-", "bash", "-c", "exit 5"]
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_RESTART_COUNT"}
    assert subprocess.run(argv, cwd=tmp_path, env={**environment, "SLURM_JOB_ID": "7"}, timeout=60).returncode == 5
