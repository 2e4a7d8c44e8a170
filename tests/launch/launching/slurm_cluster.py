"""A real Slurm of four virtual nodes on this machine, in a folder of its own and on free ports; gone with the tests.

Debian's slurm-wlm and munge, started as root without systemd or cgroups. All nodes are this host: 127.0.0.1, a port
each, so a node's name does not resolve, which the node program has to cope with.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "sinfo", "scontrol", "scancel", "squeue", "srun")
NODES = 4

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdParameters=config_overrides
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MailProg=/bin/true
ReturnToService=2
EnforcePartLimits=ALL
KillWait=20
MinJobAge=600
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=small Nodes=n1 Default=NO MaxTime=10 State=UP
PartitionName=batch Nodes=n[1-{count}] Default=YES MaxTime=10 State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    if os.geteuid() != 0:
        return "starting Slurm's daemons needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge" if absent else None


class Cluster:
    """``environment``: for every Slurm command that is to speak with this cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        control, *ports = _free_ports(NODES + 1)
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN"
            for number, port in enumerate(ports, start=1)
        )
        text = CONF.format(host=host, control=control, folder=folder, nodes=nodes, count=NODES)
        (folder / "slurm.conf").write_text(text)
        self._munge()
        self._daemon(["slurmctld", "-D", "-c", "-f", str(folder / "slurm.conf")])
        for number in range(1, NODES + 1):
            (folder / f"spool.n{number}").mkdir()
            self._daemon(["slurmd", "-D", "-N", f"n{number}", "-f", str(folder / "slurm.conf")])
        until(
            lambda: (
                self.run("sinfo", "--noheader", "--format=%D %t %R").split("\n")[-2:] == [f"{NODES} idle batch", ""]
            ),
            30,
        )

    def _munge(self) -> None:
        """munged as the present user: it wants a key and a folder that nobody else may write."""
        key, socket_path = self.folder / "munge.key", self.folder / "munge.socket"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True, capture_output=True)
        self._daemon(
            [
                "munged",
                "--foreground",
                "--force",
                f"--key-file={key}",
                f"--socket={socket_path}",
                f"--pid-file={self.folder / 'munge.pid'}",
                f"--log-file={self.folder / 'munge.log'}",
                f"--seed-file={self.folder / 'munge.seed'}",
            ]
        )
        until(socket_path.exists, 10)

    def _daemon(self, argv: list[str]) -> None:
        with open(self.folder / f"{Path(argv[0]).name}.out", "ab") as out:
            self._daemons.append(subprocess.Popen(argv, env={**os.environ, **self.environment}, stdout=out, stderr=out))

    def run(self, *argv: str) -> str:
        """A Slurm command's output; empty where it fails."""
        said = subprocess.run(argv, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60)
        return said.stdout if said.returncode == 0 else ""

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        found = re.search(r"JobState=(\S+)", self.run("scontrol", "show", "job", job))
        return found[1] if found else "?"

    def close(self) -> None:
        """End all jobs, then the daemons, newest first; nothing of them stays."""
        if self._daemons:
            self.run("scancel", "--user=root", "--signal=KILL", "--full")
            self.run("scancel", "--user=root")
            until(lambda: not self.run("squeue", "--noheader"), 20, strict=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # What runs a step outlives its daemon.
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"] and process.pid != os.getpid():
                    process.kill()


def until(true: Callable[[], object], limit_s: float, strict: bool = True) -> None:
    """Wait for it; AssertionError after ``limit_s``."""
    end = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > end:
            if strict:
                raise AssertionError(f"not within {limit_s} s")
            return
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()
