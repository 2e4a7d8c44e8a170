"""A host of its own for a process: network, mounts with an empty /dev/shm, and host name (Linux namespaces).

What a run leaves behind in it is the run's, whatever else the machine does; several, joined by a switch, are a cluster
whose cables can be pulled.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.house.sources import HOME

PROGRAMS = ("unshare", "nsenter", "ip", "ss", "mount", "hostname", "tc")
PREFIX = "10.77.0."


@functools.cache
def missing() -> str | None:
    """Why there are no namespaces here; None where there are."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(absent)} not found: apt-get install iproute2 util-linux"
    try:
        Box("probe").close()
    except RuntimeError as error:
        return f"no network namespaces here: {error}"
    return None


@functools.cache
def no_switch() -> str | None:
    """Why namespaces cannot be joined; None where they can."""
    if why := missing():
        return why
    box = Box("probe")
    try:
        box.run("ip", "link", "add", "probe", "type", "bridge")
    except RuntimeError as error:
        return f"no bridge between network namespaces: {error}"
    finally:
        box.close()
    return None


class Box:
    """Lasts until ``close``, or until the process that made it has ended. Raises RuntimeError where it may not be."""

    def __init__(self, name: str, hosts: Path | None = None) -> None:
        make = ["mount -t tmpfs tmpfs /dev/shm", "ip link set lo up", f"hostname {name}"]
        if hosts is not None:
            make.append(f"mount --bind '{hosts}' /etc/hosts")
        script = " && ".join([*make, "echo made", "exec cat"])
        self.name = name
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != b"made\n":
            said = self._holder.stderr.read().decode().strip()
            self.close()
            raise RuntimeError(said or "unshare failed")

    @property
    def pid(self) -> int:
        return self._holder.pid

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command that runs ``argv`` in it, in the folder of the sources."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "env", f"--chdir={HOME}", *argv]

    def run(self, *argv: str) -> str:
        done = subprocess.run(self.command(argv), capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")
        return done.stdout

    def left(self) -> list[str]:
        """Shared memory and ports that somebody listens on."""
        shared = [f"/dev/shm/{name}" for name in self.run("ls", "-A", "/dev/shm").split()]
        ports = [f"a port: {line.split()[3]}" for line in self.run("ss", "-Htln").splitlines()]
        return shared + ports

    def close(self) -> None:
        if self._holder.stdin is not None:
            self._holder.stdin.close()
        self._holder.terminate()
        self._holder.wait()
        for pipe in (self._holder.stdout, self._holder.stderr):
            if pipe is not None:
                pipe.close()


class Network:
    """Boxes named stk0, stk1, ... on one switch, which know each other by name; ``eth0`` of each is its cable."""

    def __init__(self, folder: Path, count: int) -> None:
        self.names = [f"stk{i}" for i in range(count)]
        self.addresses = [f"{PREFIX}{i + 1}" for i in range(count)]
        hosts = folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{a} {n}" for a, n in zip(self.addresses, self.names, strict=True))]
        hosts.write_text("\n".join(lines) + "\n")
        self._switch = Box("switch")
        self.boxes: list[Box] = []
        try:
            self._switch.run("ip", "link", "add", "bridge", "type", "bridge")
            self._switch.run("ip", "link", "set", "bridge", "up")
            for i, name in enumerate(self.names):
                self.boxes.append(Box(name, hosts))
                self._plug(i)
        except BaseException:
            self.close()
            raise

    def _plug(self, i: int) -> None:
        switch, box = self._switch, self.boxes[i]
        there = ("peer", "name", "eth0", "netns", str(box.pid))
        switch.run("ip", "link", "add", f"port{i}", "type", "veth", *there)
        switch.run("ip", "link", "set", f"port{i}", "master", "bridge", "up")
        box.run("ip", "address", "add", f"{self.addresses[i]}/24", "dev", "eth0")
        box.run("ip", "link", "set", "eth0", "up")

    def pull(self, i: int) -> None:
        """The cable of a node is out."""
        self._switch.run("ip", "link", "set", f"port{i}", "down")

    def plug_in(self, i: int) -> None:
        self._switch.run("ip", "link", "set", f"port{i}", "up")

    def connected(self, i: int) -> bool:
        """Node ``i`` has a connection to another one; it may have some to itself."""
        lines = self.boxes[i].run("ss", "-Htn", "state", "established").splitlines()
        peers = {line.split()[3].rpartition(":")[0].strip("[]").removeprefix("::ffff:") for line in lines}
        return not peers.isdisjoint(set(self.addresses) - {self.addresses[i]})

    def swallow(self, i: int, j: int, on: bool = True) -> None:
        """What node ``i`` sends to ``j`` vanishes; the other way it passes."""
        self.boxes[i].run("ip", "route", "add" if on else "del", "blackhole", f"{self.addresses[j]}/32")

    def throttle(self, i: int, rate: str) -> None:
        """Node ``i`` sends and gets no more than ``rate`` (of tc-tbf, such as 1mbit)."""
        limit = ("root", "tbf", "rate", rate, "burst", "16kb", "latency", "400ms")
        self.boxes[i].run("tc", "qdisc", "add", "dev", "eth0", *limit)
        self._switch.run("tc", "qdisc", "add", "dev", f"port{i}", *limit)

    def close(self) -> None:
        for box in (*self.boxes, self._switch):
            box.close()
