"""Which node of a job a process runs on, and where the others are: from Slurm's variables, or from JobSet's."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launch.launching.job import Job
from stoker.errors import Refusal

#: Set by the manifest from the labels that JobSet puts on a pod (docs/launch.md).
DOMAIN, START, SET = "STOKER_DOMAIN", "STOKER_START", "STOKER_SET"
#: Seconds for all pods of a job to be there: some still pull the image.
PULLING_S = 900.0
#: Names in a node list, at most: a range such as n[1-999999999] is a damaged variable.
MOST_HOSTS = 100_000


@dataclass(frozen=True)
class Where:
    """``hosts``: every node of the job, spares too, in one order on all of them; this one is at ``index``.
    ``addresses``: what the hosts are reached by. ``start``: names this start of the job and no other, nor the job after
    it was queued again. ``comes_back``: a node program that has ended may be started again, under the same ``start``.
    """

    index: int
    hosts: tuple[str, ...]
    addresses: tuple[str, ...]
    start: str
    comes_back: bool = False

    @property
    def host(self) -> str:
        return self.hosts[self.index]

    @property
    def one_machine(self) -> bool:
        """Whether the nodes are virtual ones of a single machine: they are reached by its loopback."""
        return all(address.startswith("127.") for address in self.addresses)


def where(job: Job, environment: Mapping[str, str]) -> Where:
    """This node's place in the job. Refuses a process that neither Slurm nor a JobSet started, and a job that was given
    other nodes than it asked for."""
    if "SLURM_JOB_ID" in environment and "SLURM_NODEID" in environment:
        found = _slurm(job, environment)
    elif "JOB_COMPLETION_INDEX" in environment and job.hosts:
        found = _jobset(job, environment)
    elif job.all_nodes == 1:
        found = Where(0, (socket.gethostname(),), ("127.0.0.1",), "here")
    else:
        raise Refusal(
            f"this process is to be one of {job.all_nodes} nodes, and neither Slurm (SLURM_JOB_ID, SLURM_NODEID) nor "
            "JobSet (JOB_COMPLETION_INDEX) says which: start it by `stoker launch`"
        )
    if len(found.hosts) != job.all_nodes or not 0 <= found.index < len(found.hosts):
        raise Refusal(
            f"the scheduler gave {len(found.hosts)} nodes (this is number {found.index}), and the launch asked for "
            f"{job.all_nodes}: {job.nodes} that train and {job.spares} spares"
        )
    return found


def expand(node_list: str) -> list[str]:
    """The hosts of a Slurm node list, in its order.

    >>> expand("n[08-10,12],login,r[1-2]c[3,5]")
    ['n08', 'n09', 'n10', 'n12', 'login', 'r1c3', 'r1c5', 'r2c3', 'r2c5']
    """
    hosts: list[str] = []
    for pattern in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", node_list):
        for host in _expand(pattern):
            hosts.append(host)
            if len(hosts) > MOST_HOSTS:
                raise Refusal(f"the node list {node_list[:100]!r} names more than {MOST_HOSTS} nodes")
    return hosts


def _expand(pattern: str) -> Iterator[str]:
    before, bracket, rest = pattern.partition("[")
    if not bracket:
        yield pattern
        return
    inside, _, after = rest.partition("]")
    for part in inside.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise Refusal(f"the node list part {pattern!r} cannot be read")
        for number in range(int(first), int(last or first) + 1):
            for end in _expand(after):
                yield f"{before}{number:0{len(first)}d}{end}"


def _slurm(job: Job, environment: Mapping[str, str]) -> Where:
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    hosts = tuple(expand(listed))
    # A cluster begins to count its jobs anew some day; a run never does with its launches.
    start = f"{job.number}-{environment['SLURM_JOB_ID']}-{environment.get('SLURM_RESTART_COUNT') or 0}"
    return Where(int(environment["SLURM_NODEID"]), hosts, tuple(map(_address, hosts)), start)


def _address(host: str) -> str:
    """What a node of Slurm is reached by: its name, or where nobody resolves that, the address that Slurm uses."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        argv = ["scontrol", "--oneliner", "show", "node", host]
        said = subprocess.run(argv, capture_output=True, text=True, timeout=15).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    if found := re.search(r"\bNodeAddr=(\S+)", said):
        return found[1]
    raise Refusal(f"node {host} of the job has no address: its name does not resolve, and scontrol does not know it")


def _jobset(job: Job, environment: Mapping[str, str]) -> Where:
    per_domain = job.all_nodes // job.domains
    index = int(environment.get(DOMAIN) or 0) * per_domain + int(environment["JOB_COMPLETION_INDEX"])
    if not (uid := environment.get(SET)):
        raise Refusal(
            f"{SET} is not set: JobSet 0.9 and later put the label jobset.sigs.k8s.io/jobset-uid on a pod, which tells "
            "this launch from others; install it, and apply the manifests of this release"
        )
    start = f"{uid}-{environment.get(START) or 0}"
    return Where(index, job.hosts, job.hosts, start, comes_back=True)
