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
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from launch.launching.folder import Folder
from launch.launching.job import CONFIG, JOB, Job, Prepared
from launch.launching.values import SECRETS, one_line, refuse_control, refuse_image, refuse_name, split_mount
from pretrain.config_sections import LaunchSection
from pretrain.data import validate_data
from pretrain.rundir import inspect
from stoker import formats
from stoker.errors import Refusal
from stoker.files import write_atomic
from stoker.nearest import nearest

#: Seconds that Slurm's controller has to answer a question, and to take a job.
ASK_S, SUBMIT_S = 15, 120
#: sbatch --signal takes no more seconds (man sbatch, 22.05).
MOST_SIGNAL_S = 65_535
#: ``--segment`` and topology/block came with it (Slurm's release notes of 23.11).
SEGMENT_SINCE = (23, 11)


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


def submission(prepared: Prepared, folder: Folder) -> Submission:
    """What ``submit`` would give to Slurm; nothing is asked or written."""
    job = prepared.job(prepared.config.run.name, folder.path, folder.number, directory=os.getcwd())
    if job.hosts:
        raise Refusal(f"{job.name}: Slurm chooses the hosts")
    launch = prepared.config.launch
    argv = ["sbatch", "--parsable", *_scheduling(launch), f"--job-name={refuse_name('run.name', job.name)}"]
    argv += [f"--nodes={job.all_nodes}", "--ntasks-per-node=1", "--exclusive", "--mem=0"]
    if prepared.topology.device.vendor != "generic":
        argv.append(f"--gpus-per-node={job.ranks_per_node}")
    if job.segment is not None:
        argv.append(f"--segment={job.segment + job.segment_spares}")
    if job.spares:
        argv.append("--no-kill")  # without it Slurm ends the job with its first lost node
    argv += [f"--chdir={refuse_control('folder', os.getcwd())}", f"--output={_pattern(folder.path / 'slurm-%j.log')}"]
    argv += [str(script_path()), *_srun(job, launch)]
    argv += ["python3" if launch.container else sys.executable, "-m", "launch.launching.node", str(folder.path / JOB)]
    return Submission(argv, job, prepared.config.masked().to_yaml())


def submit(prepared: Prepared, folder: Folder) -> str:
    """Give the job to Slurm and return its number. Whatever can be refused is refused before anything is written; where
    Slurm itself refuses, what was written is removed."""
    config = prepared.config
    if config.launch.container is None:
        validate_data(config)  # of a container's folders nothing is seen from here
    inspect(config)
    ready = submission(prepared, folder)
    require_slurm(config.launch, ready.job.all_nodes)
    if ready.job.segment is not None:
        _require_segments()
    folder.make()
    try:
        write_atomic(folder.path / CONFIG, ready.config)
        write_atomic(folder.path / JOB, ready.job.to_json())
        number = _sbatch(ready.argv, prepared.secrets)
    except Refusal:
        folder.remove()
        raise
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
    require_slurm(section, 1)
    number = _sbatch(command, {})
    content = {"format": formats.stamp("array", 1), "job": number, "indices": list(indices), "argv": command}
    write_atomic(folder / f"array-{number}.json", json.dumps(content, indent=2) + "\n")
    return number


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
    return [*command, f"--output={_pattern(folder / 'slurm-%A_%a.log')}", str(script_path()), *argv]


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
    mounts = [split_mount(mount) for mount in section.mounts]
    run_dir = Path(job.run_dir)
    if not any(host == inside and not fixed and run_dir.is_relative_to(host) for host, inside, fixed in mounts):
        raise Refusal(
            f"launch.mounts: the run directory {run_dir} must be seen at its own path in {section.container}, "
            f"writable: add {run_dir.parent}:{run_dir.parent}"
        )
    words.append(f"--container-image={refuse_image(section.container)}")
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


def _ask(argv: list[str]) -> str:
    try:
        said = subprocess.run(argv, capture_output=True, text=True, timeout=ASK_S, errors="replace")
    except subprocess.TimeoutExpired:
        raise Refusal(f"Slurm's controller did not answer {argv[0]} in {ASK_S} s: nothing was submitted") from None
    except OSError as error:
        raise Refusal(f"{argv[0]} cannot be run ({error.strerror}): nothing was submitted") from None
    if said.returncode:
        raise Refusal(f"Slurm does not answer: {one_line(said.stderr) or argv[0]}; nothing was submitted")
    return said.stdout


def _sbatch(argv: list[str], secrets: Any) -> str:
    environment = {**os.environ, **({SECRETS: json.dumps(dict(secrets))} if secrets else {})}
    try:
        said = subprocess.run(argv, capture_output=True, text=True, timeout=SUBMIT_S, errors="replace", env=environment)
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"sbatch did not answer in {SUBMIT_S} s: squeue --me tells whether the job is there"
        ) from None
    if said.returncode:
        raise Refusal(f"Slurm refuses the job: {one_line(said.stderr)}; nothing was submitted")
    return said.stdout.strip().partition(";")[0]
