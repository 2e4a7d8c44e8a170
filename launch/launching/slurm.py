"""``stoker launch slurm``: one ``sbatch`` of a fixed script. Values are elements of its arguments, never shell text.

The script (``run.sh``) starts the node program (``node.py``) once on each node by ``srun``; that reads launch.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from launch.launching.folder import Folder, write_down
from launch.launching.job import CONFIG, JOB, Job, Prepared
from launch.launching.values import SECRETS, one_line, refuse_control, refuse_image, refuse_name, split_mount
from launch.supervise import outcome
from pretrain.config_sections import LaunchSection
from pretrain.data import validate_data
from pretrain.rundir import inspect
from stoker import formats
from stoker.errors import Refusal
from stoker.files import write_atomic
from stoker.nearest import nearest

#: Seconds that Slurm's controller has to answer a question, to take a job, and to show one that it may have taken.
ASK_S, SUBMIT_S, LOOK_S = 15, 120, 30
#: What sbatch says where its question may have arrived and only the answer was lost (slurm_errno.c, 22.05).
UNCERTAIN = (
    "timed out",
    "Zero Bytes were transmitted or received",
    "Unexpected message received",
    "receive failure",
    "shutdown failure",
)
#: sbatch --signal takes no more seconds (man sbatch, 22.05).
MOST_SIGNAL_S = 65_535
#: ``--segment`` and topology/block came with it (Slurm's release notes of 23.11).
SEGMENT_SINCE = (23, 11)
#: Starts the comment of every job of ours: what follows finds it again where sbatch did not say its number.
MARK = "stoker "
#: Of a folder in a comment: Slurm refuses more than 1,024 bytes (slurmctld/job_mgr.c, _test_strlen), and a character
#: is four at most.
LONGEST_MARK = 215


class Unanswered(Refusal):
    """Slurm may have taken the job all the same: what the job would need must stay."""


@dataclass(frozen=True)
class Submission:
    """What would be submitted: sbatch's arguments, which end in the script and the command that it runs."""

    argv: list[str]
    job: Job
    config: str

    def show(self) -> str:
        """All of it as text, for a person."""
        script = script_path()
        folder = Path(self.job.config).parent
        return "\n".join(
            (
                "# argv of sbatch",
                json.dumps(self.argv, indent=1, ensure_ascii=False),
                f"# {script}",
                script.read_text(encoding="utf-8").rstrip(),
                f"# {folder / JOB}",
                self.job.to_json().rstrip(),
                f"# {folder / CONFIG}",
                self.config.rstrip(),
            )
        )


def script_path() -> Path:
    return Path(str(files("launch.launching"))) / "run.sh"


def submission(prepared: Prepared, folder: Folder, mark: str | None = None) -> Submission:
    """What ``submit`` would give to Slurm, with a ``mark`` that no other job has; nothing is asked or written."""
    job = prepared.job(prepared.config.run.name, folder.path, folder.number, directory=os.getcwd())
    if job.hosts:
        raise Refusal(f"{job.name}: Slurm chooses the hosts")
    launch = prepared.config.launch
    argv = ["sbatch", "--parsable", f"--comment={mark or _mark(folder)}", *_scheduling(launch)]
    argv += [f"--job-name={refuse_name('run.name', job.name)}"]
    argv += [f"--nodes={job.all_nodes}", "--ntasks-per-node=1", "--exclusive", "--mem=0"]
    if prepared.topology.device.vendor != "generic":
        argv.append(f"--gpus-per-node={job.ranks_per_node}")
    if job.segment is not None:
        argv.append(f"--segment={job.segment + job.segment_spares}")
    if job.spares:
        argv.append("--no-kill")  # without it Slurm ends the job with its first lost node
    argv += [f"--chdir={refuse_control('folder', os.getcwd())}", f"--output={_pattern(folder.path / 'slurm-%j.log')}"]
    ended = Path(job.run_dir) / outcome.FOLDER / f"{job.number}-"
    argv += [str(script_path()), str(ended), *_srun(job, launch)]
    argv += ["python3" if launch.container else sys.executable, "-m", "launch.launching.node", str(folder.path / JOB)]
    return Submission(argv, job, prepared.config.masked().to_yaml())


def submit(prepared: Prepared, folder: Folder) -> str:
    """Give the job to Slurm and return its number. Whatever can be refused is refused before anything is written; where
    Slurm itself refuses, what was written is removed, and where it may have taken the job it stays (Unanswered)."""
    config = prepared.config
    if config.launch.container is None:
        validate_data(config)  # of a container's folders nothing is seen from here
    inspect(config)
    mark = _mark(folder, uuid.uuid4().hex)
    ready = submission(prepared, folder, mark)
    require_slurm(config.launch, ready.job.all_nodes)
    if ready.job.segment is not None:
        _require_segments()
    folder.make()
    try:
        write_atomic(folder.path / CONFIG, ready.config)
        write_atomic(folder.path / JOB, ready.job.to_json())
        number = _sbatch(ready.argv, mark, prepared.secrets)
    except Unanswered as unanswered:
        raise Refusal(f"{unanswered}. {folder.path} stays, which the job needs: remove it if there is none") from None
    except Refusal:
        folder.remove()
        raise
    except OSError as error:
        folder.remove()
        raise Refusal(f"{folder.path} cannot be written ({error.strerror}): nothing was submitted") from None
    folder.record("slurm", number, ready.argv)
    return number


def submit_array(
    argv: Sequence[str],
    folder: Path,
    indices: Sequence[int],
    at_once: int,
    section: LaunchSection,
    cpus: int,
    gpus: int,
) -> str:
    """An array job: ``argv`` once for each index, which it finds in SLURM_ARRAY_TASK_ID, ``at_once`` at a time, with so
    many cores and GPUs each; returns the job's number. What was asked for stands in ``array-<job>.json`` of the folder,
    what a task says in ``slurm-<job>_<index>.log``."""
    command = array_argv(argv, folder, indices, at_once, section, cpus, gpus)
    mark = MARK + uuid.uuid4().hex
    command.insert(2, f"--comment={mark}")
    require_slurm(section, 1)
    content = {"format": formats.stamp("array", 1), "indices": list(indices), "argv": command, "mark": mark}
    # Before the job is there: who is killed in between must find it by its mark.
    unnumbered = folder / f"array-{mark.removeprefix(MARK)}.json"
    try:
        write_atomic(unnumbered, json.dumps({**content, "job": None}, indent=2) + "\n")
    except OSError as error:
        raise Refusal(f"{unnumbered} cannot be written ({error.strerror}): nothing was submitted") from None
    try:
        number = _sbatch(command, mark, {})
    except Unanswered:
        raise
    except Refusal:
        unnumbered.unlink(missing_ok=True)
        raise
    write_down(numbered := folder / f"array-{number}.json", {**content, "job": number}, number)
    if numbered.exists():
        unnumbered.unlink(missing_ok=True)
    return number


def array_tasks(folder: Path) -> list[Task]:
    """Tasks that Slurm still has of the folder's arrays; it is asked only where there is one."""
    marks = {found["mark"] for path in folder.glob("array-*.json") if "mark" in (found := _read(path))}
    return [task for task in _queue("nothing was changed") if task.mark in marks] if marks else []


def stop_arrays(folder: Path) -> list[Task]:
    """Take the waiting tasks of the folder's arrays out of the queue and ask the others to save; returns all of them.
    A task that was asked before is asked again, which changes nothing."""
    before = array_tasks(folder)
    for job in dict.fromkeys(task.job for task in before):
        _cancel(["scancel", "--state=PENDING", job])  # first, so that none begins where another one ends
    asked = [task for task in (array_tasks(folder) if before else ()) if not task.waits]  # some began meanwhile
    for job in dict.fromkeys(task.job for task in asked):
        tasks = ranges([task.index for task in asked if task.job == job and task.index is not None])
        with suppress(Refusal):  # of tasks that end just now; one that had its notice would be queued again
            _ask(["scontrol", "update", f"JobId={job}_[{tasks}]", "Requeue=0"])
        _cancel(["scancel", "--full", "--signal=TERM", job])  # --full: the command runs in the batch step
    running = {(task.job, task.index) for task in asked}
    return [*asked, *(task for task in before if task.waits and (task.job, task.index) not in running)]


def array_argv(
    argv: Sequence[str],
    folder: Path,
    indices: Sequence[int],
    at_once: int,
    section: LaunchSection,
    cpus: int,
    gpus: int,
) -> list[str]:
    """What ``submit_array`` gives to Slurm."""
    if not indices or min(indices) < 0 or at_once < 1 or cpus < 1 or gpus < 0:
        raise Refusal(f"an array of {len(indices)} tasks, {at_once} at once, with {cpus} cores and {gpus} GPUs each")
    for word in argv:
        refuse_control("argument", word)
    command = ["sbatch", "--parsable", *_scheduling(section), f"--array={ranges(indices)}%{at_once}"]
    command += ["--nodes=1", "--ntasks=1", f"--cpus-per-task={cpus}", *([f"--gpus={gpus}"] if gpus else [])]
    command += [f"--job-name={refuse_name('folder', folder.name)}", f"--chdir={refuse_control('folder', os.getcwd())}"]
    return [*command, f"--output={_pattern(folder / 'slurm-%A_%a.log')}", str(script_path()), "-", *argv]


@dataclass(frozen=True)
class Task:
    """A job that Slurm has, or one task of an array (``index``); ``mark``: its comment."""

    job: str
    index: int | None
    state: str
    mark: str

    @property
    def waits(self) -> bool:
        return self.state == "PENDING"


def ranges(indices: Sequence[int]) -> str:
    """Indices as Slurm writes them.

    >>> ranges([1, 2, 3, 7, 9, 10])
    '1-3,7,9-10'
    """
    parts: list[list[int]] = []
    for index in sorted(set(indices)):
        if parts and parts[-1][1] == index - 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def require_slurm(section: LaunchSection, nodes: int) -> None:
    """Refuse where there is no sbatch, where the controller does not answer, and a partition that it does not have or
    that has fewer nodes."""
    if shutil.which("sbatch") is None:
        raise Refusal("sbatch is not on this machine: run this on a login node of the cluster, or give --dry-run")
    sizes: dict[str, int] = {}
    for line in _ask(["sinfo", "--noheader", "--format=%R|%D"]).splitlines():
        name, _, count = line.rpartition("|")
        if not count.isdecimal():
            raise Refusal(f"sinfo answers {line!r}, where a partition and its nodes should be; nothing was submitted")
        sizes[name] = sizes.get(name, 0) + int(count)  # a line for each state of a partition's nodes
    known = ", ".join(f"{name} ({count} nodes)" for name, count in sizes.items()) or "none"
    partition = section.partition
    if partition is not None and partition not in sizes:
        guess = nearest(partition, sizes)
        advice = f"did you mean {guess}? " if guess else ""
        raise Refusal(f"launch.partition={partition!r}: {advice}this cluster's partitions are {known}")
    room = sizes[partition] if partition is not None else max(sizes.values(), default=0)
    if nodes > room:
        raise Refusal(f"{nodes} nodes with the spares, and the partitions have {known}: lower --nodes")


def _scheduling(section: LaunchSection) -> list[str]:
    """Options that every kind of job shares."""
    if section.signal_s > MOST_SIGNAL_S:
        raise Refusal(f"launch.signal_s={section.signal_s}: Slurm takes up to {MOST_SIGNAL_S}")
    limit = section.time_limit_min
    if limit is not None and section.signal_s >= 60 * limit:
        raise Refusal(
            f"launch.signal_s={section.signal_s} is not before the end of launch.time_limit_min={limit}: lower it"
        )
    options = [f"--signal=B:USR1@{section.signal_s}", "--requeue", "--open-mode=append", "--export=ALL"]
    if section.partition is not None:
        options.append(f"--partition={refuse_name('launch.partition', section.partition)}")
    if section.account is not None:
        options.append(f"--account={refuse_name('launch.account', section.account)}")
    if limit is not None:
        options.append(f"--time={limit}")
    return options


def _srun(job: Job, section: LaunchSection) -> list[str]:
    """One node program a node, with all of its cores, not ended by another's failure; in the container, if there is
    one (pyxis)."""
    words = ["srun", "--mpi=none", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0", "--input=none"]
    words += ["--no-kill"] if job.spares else []
    if section.container is None:
        if section.mounts:
            raise Refusal("launch.mounts has folders, and launch.container names no image that would see them")
        return words
    image, mounts = refuse_image(section.container), [split_mount(mount) for mount in section.mounts]
    run_dir = Path(job.run_dir)
    if not any(host == inside and not fixed and run_dir.is_relative_to(host) for host, inside, fixed in mounts):
        raise Refusal(
            f"launch.mounts: the run directory {run_dir} must be seen at its own path in {image}, "
            f"writable: add {run_dir.parent}:{run_dir.parent}"
        )
    words.append(f"--container-image={image}")
    return [*words, f"--container-mounts={','.join(section.mounts)}"]


def _pattern(path: Path) -> str:
    """A path as --output takes it: Slurm replaces what follows a percent sign, and none of it after a backslash."""
    if "\\" in str(path):
        raise Refusal(f"{path} holds a backslash, which Slurm reads otherwise in a file name: choose another folder")
    return f"{refuse_control('folder', str(path.parent)).replace('%', '%%')}/{path.name}"


def _require_segments() -> None:
    said = _ask(["sbatch", "--version"])
    found = re.search(r"(\d+)\.(\d+)", said)
    if found and (int(found[1]), int(found[2])) < SEGMENT_SINCE:
        raise Refusal(
            f"{said.strip()} has no --segment, which keeps the nodes of an NVLink domain together: "
            f"Slurm {SEGMENT_SINCE[0]}.{SEGMENT_SINCE[1]} with topology/block has"
        )


def _mark(folder: Folder, once: str = "") -> str:
    """The folder, for people; ``once``, since another launch may get the same one after this is removed."""
    return f"{MARK}{str(folder.path)[-LONGEST_MARK:]} {once}".rstrip()


def _read(path: Path) -> Mapping[str, object]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Refusal(f"{path} is damaged ({error}): `squeue --me` shows what Slurm has, scancel ends it") from None
    formats.require(found, "array", 1, path)
    return dict(found)


def _ask(argv: list[str], otherwise: str = "nothing was submitted") -> str:
    """What a command of Slurm says; refuses where it fails, ``otherwise`` being what that means."""
    try:
        said = subprocess.run(argv, capture_output=True, text=True, timeout=ASK_S, errors="replace")
    except subprocess.TimeoutExpired:
        raise Refusal(f"Slurm's controller did not answer {argv[0]} in {ASK_S} s: {otherwise}") from None
    except OSError as error:
        raise Refusal(f"{argv[0]} cannot be run ({error.strerror}): {otherwise}") from None
    if said.returncode:
        raise Refusal(f"Slurm does not answer: {one_line(said.stderr) or argv[0]}; {otherwise}")
    return said.stdout


def _queue(otherwise: str) -> Iterator[Task]:
    """This user's jobs, the tasks of an array one by one, that have not ended."""
    for line in _ask(["squeue", "--me", "--noheader", "--array", "--format=%F|%K|%T|%k"], otherwise).splitlines():
        job, index, state, mark = (line.split("|", 3) + [""] * 3)[:4]
        yield Task(job, int(index) if index.isdecimal() else None, state, mark)


def _cancel(argv: list[str]) -> None:
    try:
        _ask(argv, "give the command again")
    except Refusal as refusal:
        if "Invalid job id" not in str(refusal) and "already completing or completed" not in str(refusal):
            raise  # else it has ended by itself meanwhile


def _sbatch(argv: list[str], mark: str, secrets: Mapping[str, object]) -> str:
    """The number of the job that Slurm has taken. Refuses where it has not, Unanswered where nobody knows."""
    environment = {**os.environ, **({SECRETS: json.dumps(dict(secrets))} if secrets else {})}
    try:
        said = subprocess.run(argv, capture_output=True, text=True, timeout=SUBMIT_S, errors="replace", env=environment)
    except subprocess.TimeoutExpired:
        return _taken(mark, f"sbatch did not answer in {SUBMIT_S} s")
    except OSError as error:
        raise Refusal(f"sbatch cannot be run ({error.strerror}): nothing was submitted") from None
    reason = one_line(said.stderr)
    if said.returncode < 0 or (said.returncode and any(words in reason for words in UNCERTAIN)):
        return _taken(mark, f"sbatch had no answer ({reason or f'signal {-said.returncode}'})")
    if said.returncode:
        raise Refusal(f"Slurm refuses the job: {reason}; nothing was submitted")
    number = re.search(r"^(\d+)(;.*)?$", said.stdout, re.MULTILINE)
    return number[1] if number else _taken(mark, f"sbatch named no job ({one_line(said.stdout)!r})")


def _taken(mark: str, what: str) -> str:
    """The number of the job with this mark: a controller too busy to answer takes a job all the same."""
    until = time.monotonic() + LOOK_S
    while True:
        try:
            if found := next((task.job for task in _queue("") if task.mark == mark), None):
                return found
            seen = "squeue shows no such job"
        except Refusal as refusal:
            seen = str(refusal).rpartition(": ")[0] or str(refusal)
        if time.monotonic() > until:
            raise Unanswered(
                f"{what}, and {seen}. The job may be there all the same, now or later: "
                f"`squeue --me --format='%F %k'` shows it by the words {mark!r}, and scancel with its number ends it"
            )
        time.sleep(2)
