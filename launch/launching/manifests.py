"""The Kubernetes objects of a launch, as plain values: ConfigMap, ComputeDomain and JobSet.

A node of the job is a pod; an NVLink domain is one child Job of the JobSet, kept together by pod affinity on the label
that NVIDIA's driver gives to the nodes of a domain. Field names are those of Kubernetes 1.33, JobSet v1alpha2
(kubernetes-sigs/jobset v0.9, 2025) and ComputeDomain v1beta1 (NVIDIA k8s-dra-driver-gpu v25.3, 2025).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.launching.job import CONFIG, JOB, Job
from launch.launching.values import refuse_image, split_mount
from launch.launching.where import DOMAIN, SET, START
from parallel.planning.topology import HardwareTopology
from pretrain.config_sections import LaunchSection

#: Where a pod finds launch.json and config.yaml.
FOLDER = Path("/etc/stoker")
#: The replicated Job of the nodes, and the one container of a pod.
NODES = "node"
#: Label of a node's NVLink partition, set by NVIDIA's device plug-in (CoreWeave IMEX docs, 2025).
CLIQUE = "nvidia.com/gpu.clique"
#: What a vendor's device plug-in calls its devices.
DEVICES = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu"}
#: Seconds beyond launch.grace_s until a pod is killed: for the agents to agree on how the run ended.
AFTERWARDS_S = 30
#: A start that fails by none of the run's own exit codes (image, disk, node) is tried so often.
POD_RETRIES = 20
#: Seconds until the pods of a host that is not heard, or not ready, are moved. Kubernetes adds 300 to a pod that says
#: nothing of these taints (its documentation, "Taint based Evictions").
UNHEARD_S = 30
UNHEARD = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
JOBSET = "jobset.sigs.k8s.io"


@dataclass(frozen=True)
class Cluster:
    """Names on the cluster: ``secrets`` are variables of the pods, each a Secret's name and key."""

    name: str
    namespace: str
    secrets: Mapping[str, tuple[str, str]]


def hosts(name: str, domains: int, per_domain: int) -> tuple[str, ...]:
    """Names of the pods in the network of a JobSet, in job order."""
    return tuple(f"{name}-{NODES}-{job}-{pod}.{name}" for job in range(domains) for pod in range(per_domain))


def manifests(job: Job, config: str, launch: LaunchSection, topology: HardwareTopology, cluster: Cluster) -> list[Any]:
    """What is applied, in order. ``config``: text of the configuration, secrets masked."""
    domain = [_compute_domain(cluster)] if _needs_imex(job, topology) else []
    return [_config_map(job, config, cluster), *domain, _jobset(job, launch, topology, cluster)]


def _needs_imex(job: Job, topology: HardwareTopology) -> bool:
    """NVLink between hosts needs an IMEX channel in every pod; ComputeDomain brings it."""
    return topology.rack_scale and topology.device.vendor == "nvidia" and job.all_nodes > 1


def _metadata(name: str, cluster: Cluster, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    marked = {"app.kubernetes.io/name": "stoker", "app.kubernetes.io/instance": cluster.name, **(labels or {})}
    return {"name": name, "namespace": cluster.namespace, "labels": marked}


def _config_map(job: Job, config: str, cluster: Cluster) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(f"{cluster.name}-launch", cluster),
        "data": {JOB: job.to_json(), CONFIG: config},
    }


def _compute_domain(cluster: Cluster) -> dict[str, Any]:
    """numNodes 0: daemons start by themselves and find one another by name; the field is to go."""
    return {
        "apiVersion": "resource.nvidia.com/v1beta1",
        "kind": "ComputeDomain",
        "metadata": _metadata(cluster.name, cluster),
        "spec": {"numNodes": 0, "channel": {"resourceClaimTemplate": {"name": _channel(cluster)}}},
    }


def _channel(cluster: Cluster) -> str:
    return f"{cluster.name}-imex"


def _jobset(job: Job, launch: LaunchSection, topology: HardwareTopology, cluster: Cluster) -> dict[str, Any]:
    pods = job.all_nodes // job.domains
    queue = {} if launch.partition is None else {"kueue.x-k8s.io/queue-name": launch.partition}
    spec: dict[str, Any] = {
        "backoffLimit": POD_RETRIES,
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "podFailurePolicy": {"rules": _failures()},
        "template": {
            "metadata": {"labels": {"app.kubernetes.io/name": "stoker", "app.kubernetes.io/instance": cluster.name}},
            "spec": _pod(job, launch, topology, cluster),
        },
    }
    if launch.time_limit_min is not None:
        spec["activeDeadlineSeconds"] = 60 * launch.time_limit_min
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(cluster.name, cluster, queue),
        "spec": {
            # A node that looks for the others does so before any of them is ready.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": cluster.name},
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": [{"name": NODES, "replicas": job.domains, "template": {"spec": spec}}],
        },
    }


def _failures() -> list[dict[str, Any]]:
    """A pod that was moved away, or that saved because it was asked to end, starts again at no cost; a fault that the
    supervisor gave up on (1), a refusal (2) and a verdict (3) end the whole set."""
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [4]}},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2, 3]}},
    ]


def _pod(job: Job, launch: LaunchSection, topology: HardwareTopology, cluster: Cluster) -> dict[str, Any]:
    device = DEVICES.get(topology.device.vendor)
    volumes, seen = _volumes(job, launch, cluster)
    container: dict[str, Any] = {
        "name": NODES,
        "image": refuse_image(launch.container or ""),
        "command": ["python3", "-m", "launch.launching.node", str(FOLDER / JOB)],
        "env": _environment(cluster),
        "volumeMounts": seen,
    }
    resources: dict[str, Any] = {}
    if device:
        resources["limits"] = {device: job.ranks_per_node}
    elif topology.device.vendor == "generic":
        resources["requests"] = {"cpu": job.ranks_per_node}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # a pod failure policy asks for it
        "terminationGracePeriodSeconds": math.ceil(launch.grace_s) + AFTERWARDS_S,
        "enableServiceLinks": False,
        "tolerations": [
            {"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": UNHEARD_S}
            for taint in UNHEARD
        ],
        "containers": [container],
        "volumes": volumes,
    }
    if device:
        pod["tolerations"].append({"key": device, "operator": "Exists", "effect": "NoSchedule"})
    if _needs_imex(job, topology):
        pod["resourceClaims"] = [{"name": "imex", "resourceClaimTemplateName": _channel(cluster)}]
        resources["claims"] = [{"name": "imex"}]
        pod["affinity"] = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [_together(cluster)]}}
    return {**pod, "containers": [{**container, **({"resources": resources} if resources else {})}]}


def _together(cluster: Cluster) -> dict[str, Any]:
    """The pods of one child Job on one NVLink domain; matchLabelKeys is on by default from Kubernetes 1.31."""
    return {
        "topologyKey": CLIQUE,
        "labelSelector": {"matchLabels": {f"{JOBSET}/jobset-name": cluster.name}},
        "matchLabelKeys": [f"{JOBSET}/job-key"],
    }


def _environment(cluster: Cluster) -> list[dict[str, Any]]:
    """Which child Job of which set a pod is of, which start of the set this is, and secrets by reference."""

    def label(name: str) -> dict[str, Any]:
        return {"fieldRef": {"fieldPath": f"metadata.labels['{JOBSET}/{name}']"}}

    told: list[dict[str, Any]] = [
        {"name": DOMAIN, "valueFrom": label("job-index")},
        {"name": START, "valueFrom": label("restart-attempt")},
        {"name": SET, "valueFrom": label("jobset-uid")},
        {"name": "PYTHONUNBUFFERED", "value": "1"},
    ]
    for variable, (name, key) in cluster.secrets.items():
        told.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}})
    return told


def _volumes(job: Job, launch: LaunchSection, cluster: Cluster) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes of a pod, and where its container sees them."""
    volumes: list[dict[str, Any]] = [
        {"name": "launch", "configMap": {"name": f"{cluster.name}-launch"}},
        # NCCL and the loaders share more memory than the 64 MiB of a container.
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    seen: list[dict[str, Any]] = [
        {"name": "launch", "mountPath": str(FOLDER), "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if launch.volume_claim is not None:
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": launch.volume_claim}})
        seen.append({"name": "runs", "mountPath": str(Path(job.run_dir).parent)})
    if launch.scratch is not None:
        volumes.append({"name": "scratch", "emptyDir": {}})
        seen.append({"name": "scratch", "mountPath": launch.scratch})
    for index, mount in enumerate(launch.mounts):
        host, inside, fixed = split_mount(mount)
        volumes.append({"name": f"mount-{index}", "hostPath": {"path": host}})
        seen.append({"name": f"mount-{index}", "mountPath": inside, "readOnly": fixed})
    return volumes, seen


def dns_name(text: str, longest: int) -> str:
    """A text as a name of Kubernetes (RFC 1035 label): itself where it is one, else what is like it with a mark of its
    own, so that two texts do not become one name."""
    if len(text) <= longest and re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", text):
        return text
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"run-{plain}"
    return f"{plain[: longest - 9].rstrip('-')}-{mark}"
