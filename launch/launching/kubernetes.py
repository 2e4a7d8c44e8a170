"""``stoker launch kubernetes``: manifests by a serializer, given to ``kubectl apply``."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from launch.launching.job import Job, Prepared
from launch.launching.manifests import DEVICES, FOLDER, NODES, Cluster, dns_name, hosts, manifests
from launch.launching.values import SECRETS, one_line, refuse_control
from pretrain.config_sections import LaunchSection
from stoker.errors import Refusal
from stoker.yaml_core import dump_yaml

#: Seconds for a question to the cluster, and for the answer to all manifests; kubectl itself has ``MORE_S`` more.
ASK_S, APPLY_S, MORE_S = 15, 120, 5
#: What kubectl says where its question may have arrived and only the answer was lost (Go's net and net/http).
UNCERTAIN = ("Client.Timeout", "deadline exceeded", "i/o timeout", "EOF", "connection reset", "http2: ")
#: What a cluster says where a webhook of it cannot be tried (apiserver, webhook/errors/statuserror.go).
NO_TRIAL = "does not support dry run"
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

    @property
    def name(self) -> str:
        """Of the JobSet: the run's, as Kubernetes takes it."""
        return str(self.manifests[-1]["metadata"]["name"])

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
    """Apply the manifests. Refuses without kubectl, where the cluster does not answer, has no JobSet or would not take
    one of them, and where a JobSet of this name is there: applying the same again would start nothing.

    The server is asked to try all of them first, and keeps nothing of that; where it refuses one all the same, those
    that this launch has made are deleted again."""
    if shutil.which("kubectl") is None:
        raise Refusal("kubectl is not on this machine: install it, or give --dry-run and apply what that prints")
    name, text = ready.name, ready.show()
    scope = ["kubectl", f"--namespace={ready.namespace}", f"--request-timeout={ASK_S}s"]
    if _is_there(scope, name):
        raise Refusal(
            f"JobSet {name} is in namespace {ready.namespace} already: see to it that it has ended, then "
            f"kubectl --namespace={ready.namespace} delete jobset {name}"
        )
    trial = _run([*scope, "apply", "--dry-run=server", "--filename=-"], APPLY_S, text)
    if trial is None:
        raise Refusal(f"the cluster did not try the manifests in {APPLY_S} s: nothing was made")
    if trial.returncode and NO_TRIAL not in trial.stderr:
        raise Refusal(f"{_reason(trial)}; nothing was made")
    done = _run([*scope[:2], "--request-timeout=0", "apply", "--filename=-"], APPLY_S, text)
    if done is None or (done.returncode and any(words in done.stderr for words in UNCERTAIN)):
        _require(scope, ready)
    elif done.returncode:
        raise Refusal(f"{_reason(done)}; {_take_back(scope, ready, done.stdout)}")


def _is_there(scope: list[str], name: str) -> bool:
    found = _run([*scope, "get", "jobsets.jobset.x-k8s.io", name, "--ignore-not-found", "--output=name"], ASK_S)
    if found is None:
        raise Refusal(f"the cluster did not answer in {ASK_S} s: nothing was made")
    if found.returncode:
        raise Refusal(f"{_reason(found)}; nothing was made")
    return bool(found.stdout.strip())


def _require(scope: list[str], ready: Submission) -> None:
    """The JobSet is there, though nobody has said that it was made; refuses with how to look for it where it is not."""
    with suppress(Refusal):
        if _is_there(scope, ready.name):
            return
    kinds = ",".join(manifest["kind"].lower() for manifest in ready.manifests)
    what = f"{kinds} --selector=app.kubernetes.io/instance={ready.name}"
    raise Refusal(
        f"kubectl had no answer. The job may be there all the same, now or later: "
        f"`kubectl --namespace={ready.namespace} get {what}` shows it, and delete in place of get ends it"
    )


def _take_back(scope: list[str], ready: Submission, said: str) -> str:
    """Delete what ``kubectl apply`` says that it has created, nothing else; returns what became of it, in words."""
    made = [line.removesuffix(" created") for line in said.splitlines() if line.endswith(" created")]
    if not made:
        return "nothing was made"
    gone = _run([*scope, "delete", "--ignore-not-found", "--wait=false", *made], ASK_S)
    if gone is None or gone.returncode:
        why = f"no answer in {ASK_S} s" if gone is None else one_line(gone.stderr)
        return (
            f"{', '.join(made)} of this launch could not be deleted again ({why}): "
            f"kubectl --namespace={ready.namespace} delete {' '.join(made)}"
        )
    return f"{', '.join(made)} of this launch deleted again"


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


def _run(argv: list[str], limit_s: int, text: str | None = None) -> subprocess.CompletedProcess[str] | None:
    """What a command of kubectl says; None where it does not answer."""
    try:
        return subprocess.run(
            argv, input=text, capture_output=True, text=True, timeout=limit_s + MORE_S, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return None
    except OSError as error:
        raise Refusal(f"kubectl cannot be run ({error.strerror}): nothing was made") from None


def _reason(said: subprocess.CompletedProcess[str]) -> str:
    reason = one_line(said.stderr)
    if "doesn't have a resource type" in reason or "no matches for kind" in reason:
        reason += ": JobSet (and for NVLink domains NVIDIA's DRA driver) must be installed on the cluster"
    return f"Kubernetes refuses: {reason}"
