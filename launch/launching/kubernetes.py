"""``stoker launch kubernetes``: manifests by a serializer, given to ``kubectl apply``."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.launching.job import Job, Prepared
from launch.launching.manifests import DEVICES, FOLDER, NODES, Cluster, dns_name, hosts, manifests
from launch.launching.values import SECRETS, one_line, refuse_control
from pretrain.config_sections import LaunchSection
from stoker.errors import Refusal
from stoker.yaml_core import dump_yaml

#: Seconds for a question to the cluster, and for the answer to all manifests.
ASK_S, APPLY_S = 15, 120
#: A name of Kubernetes: RFC 1123 subdomain.
_OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY = re.compile(r"[A-Za-z0-9._-]{1,253}")
#: A pod of a JobSet is named <set>-<job>-<index>-<index>-<5 random>, in 63 characters.
_LONGEST = 63
#: Bytes of a ConfigMap (kubernetes.io, ConfigMaps: 1 MiB).
MOST_BYTES = 2**20


@dataclass(frozen=True)
class Submission:
    """What would be applied."""

    job: Job
    namespace: str
    manifests: list[Any]

    def show(self) -> str:
        """The manifests as YAML documents, as ``kubectl apply`` reads them."""
        return "".join(f"---\n{dump_yaml(manifest, flow=False)}" for manifest in self.manifests)


def submission(prepared: Prepared, secrets: Sequence[str] = ()) -> Submission:
    """What ``submit`` would apply; nothing is asked. ``secrets``: VARIABLE=SECRET/KEY each."""
    launch, settings = prepared.config.launch, prepared.settings
    _refuse_section(launch, prepared)
    given = dict(map(_secret, secrets))
    if prepared.secrets and SECRETS not in given:
        raise Refusal(
            f"{', '.join(prepared.secrets)}: the value is a secret, which a manifest must not hold. Put it as JSON, "
            f'{{"key": value}}, into a Secret and give --secret {SECRETS}=NAME/KEY'
        )
    domains = 1 if settings.segment is None else settings.nodes // settings.segment
    per_domain = (settings.nodes + launch.spare_nodes) // domains
    name = dns_name(prepared.config.run.name, _LONGEST - len(f"-{NODES}-{domains - 1}-{per_domain - 1}-abcde"))
    job = prepared.job(prepared.config.run.name, FOLDER, 1, hosts=hosts(name, domains, per_domain))
    text = prepared.config.masked().to_yaml()
    if len(text.encode()) + len(job.to_json().encode()) > MOST_BYTES:
        raise Refusal("the configuration and the plan are larger than a ConfigMap may be (1 MiB)")
    cluster = Cluster(name, launch.namespace, given)
    return Submission(job, launch.namespace, manifests(job, text, launch, prepared.topology, cluster))


def submit(ready: Submission) -> None:
    """Apply the manifests. Refuses without kubectl, where the cluster does not answer or has no JobSet, and where a
    JobSet of this name is there: applying the same again would start nothing."""
    if shutil.which("kubectl") is None:
        raise Refusal("kubectl is not on this machine: install it, or give --dry-run and apply what that prints")
    name = ready.manifests[-1]["metadata"]["name"]
    scope = ["kubectl", f"--namespace={ready.namespace}", f"--request-timeout={ASK_S}s"]
    found = _kubectl([*scope, "get", "jobsets.jobset.x-k8s.io", name, "--ignore-not-found", "--output=name"], ASK_S)
    if found.strip():
        raise Refusal(
            f"JobSet {name} is in namespace {ready.namespace} already: see to it that it has ended, then "
            f"kubectl --namespace={ready.namespace} delete jobset {name}"
        )
    _kubectl([*scope, "apply", "--filename=-"], APPLY_S, ready.show())


def _refuse_section(launch: LaunchSection, prepared: Prepared) -> None:
    if launch.container is None:
        raise Refusal("launch.container: Kubernetes runs images; name one that has Stoker in it")
    if not _OBJECT.fullmatch(refuse_control("launch.namespace", launch.namespace)):
        raise Refusal(f"launch.namespace={launch.namespace!r} is no name of Kubernetes: lower-case letters, digits, -")
    for key, name in (("launch.partition", launch.partition), ("launch.volume_claim", launch.volume_claim)):
        if name is not None and not _OBJECT.fullmatch(refuse_control(key, name)):
            raise Refusal(f"{key}={name!r} is no name of Kubernetes: lower-case letters, digits, - and dot")
    run_dir = prepared.config.run_dir
    if launch.volume_claim is None and not any(
        run_dir.is_relative_to(mount.split(":")[1]) for mount in launch.mounts if mount.count(":")
    ):
        raise Refusal(
            f"the run directory {run_dir} is on no volume, and would be lost with the pods: set launch.volume_claim, "
            "or launch.mounts to a folder that all nodes share"
        )
    vendor = prepared.topology.device.vendor
    if vendor not in (*DEVICES, "generic"):
        raise Refusal(f"what {vendor}'s device plug-in calls a device is not known here: {', '.join(DEVICES)} are")


def _secret(text: str) -> tuple[str, tuple[str, str]]:
    variable, _, source = refuse_control("--secret", text).partition("=")
    name, _, key = source.partition("/")
    if not (_VARIABLE.fullmatch(variable) and _OBJECT.fullmatch(name) and _KEY.fullmatch(key)):
        raise Refusal("--secret takes VARIABLE=SECRET/KEY, such as WANDB_API_KEY=wandb/key, never the value itself")
    return variable, (name, key)


def _kubectl(argv: list[str], limit_s: int, text: str | None = None) -> str:
    try:
        said = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=limit_s + 5, errors="replace")
    except subprocess.TimeoutExpired:
        raise Refusal(f"the cluster did not answer `{' '.join(argv[3:5])}` in {limit_s} s") from None
    if said.returncode:
        reason = one_line(said.stderr)
        if "doesn't have a resource type" in reason or "no matches for kind" in reason:
            reason += ": JobSet (and for NVLink domains NVIDIA's DRA driver) must be installed on the cluster"
        raise Refusal(f"Kubernetes refuses: {reason}")
    return said.stdout
