"""What Kubernetes is asked for: manifests that its schemas accept, from a serializer, secrets by reference only."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from launch.launching.job import Job, Prepared
from launch.launching.kubernetes import Submission, submission, submit
from launch.launching.manifests import dns_name
from stoker.errors import Refusal
from tests.launch.launching.jobs import prepared
from tests.launch.launching.test_slurm import with_launch

HERE = Path(__file__).parent
IN_PODS = ("launch.container=ghcr.io/x/stoker:1", "launch.volume_claim=runs", "run.dir=/runs")
#: Releases of Kubernetes whose schemas the core objects must fit: the oldest that docs/launch.md names, and a new one.
RELEASES = ("1.31", "1.34")


def of_kind(ready: Submission, kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in read(ready) if manifest["kind"] == kind]
    return found


def read(ready: Submission) -> list[Any]:
    """As an independent reader of YAML 1.1 has it."""
    return list(yaml.safe_load_all(ready.show()))


def pod(ready: Submission) -> dict[str, Any]:
    return of_kind(ready, "JobSet")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def rack() -> Prepared:
    return prepared(*IN_PODS, "parallel={ep: 64}", "launch.spare_nodes=2", nodes=32)


@pytest.fixture(scope="module")
def eights() -> Prepared:
    return prepared(*IN_PODS, "parallel={ep: 8}", hardware="h100", nodes=2)


@pytest.mark.parametrize("release", RELEASES)
def test_core_objects_fit_the_schemas_of_kubernetes(rack: Prepared, eights: Prepared, release: str) -> None:
    extras = {"time_limit_min": 60, "scratch": "/scratch", "mounts": ("/nvme:/cache", "/data:/data:ro")}
    for ready in (submission(rack), submission(with_launch(eights, **extras), ["WANDB_API_KEY=wandb/key"])):
        kubernetes_validate.validate(of_kind(ready, "ConfigMap"), release, strict=True)
        template = of_kind(ready, "JobSet")["spec"]["replicatedJobs"][0]["template"]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **template}
        kubernetes_validate.validate(job, release, strict=True)
        broken = json.loads(json.dumps(job).replace('"backoffLimit"', '"backofLimit"'))
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, release, strict=True)


@pytest.mark.parametrize("kind", ["JobSet", "ComputeDomain"])
def test_custom_objects_fit_their_schemas(rack: Prepared, kind: str) -> None:
    schema = json.loads((HERE / "schemas" / f"{kind.lower()}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    manifest = of_kind(submission(rack), kind)
    jsonschema.validate(manifest, schema)
    for field in manifest["spec"]:
        wrong = {**manifest, "spec": {**manifest["spec"], field: "wrong", f"{field}x": 1}}
        assert len(list(jsonschema.Draft202012Validator(schema).iter_errors(wrong))) >= 2


def test_an_nvlink_domain_is_a_job_whose_pods_stay_together(rack: Prepared) -> None:
    ready = submission(rack)
    replicated = of_kind(ready, "JobSet")["spec"]["replicatedJobs"][0]
    assert replicated["replicas"] == 2 and replicated["template"]["spec"]["completions"] == 17
    assert replicated["template"]["spec"]["completionMode"] == "Indexed"
    (term,) = pod(ready)["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "nvidia.com/gpu.clique"
    assert term["matchLabelKeys"] == ["jobset.sigs.k8s.io/job-key"]
    claim = pod(ready)["resourceClaims"][0]["resourceClaimTemplateName"]
    assert claim == of_kind(ready, "ComputeDomain")["spec"]["channel"]["resourceClaimTemplate"]["name"]
    container = pod(ready)["containers"][0]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 4}, "claims": [{"name": "imex"}]}
    assert len(ready.job.hosts) == 34 and ready.job.hosts[17].startswith("hybrid-moe-30b-a3b-node-1-0.")


def test_hosts_of_eight_need_no_imex(eights: Prepared) -> None:
    ready = submission(eights)
    assert [manifest["kind"] for manifest in read(ready)] == ["ConfigMap", "JobSet"]
    assert "resourceClaims" not in pod(ready) and "affinity" not in pod(ready)
    assert pod(ready)["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_the_nodes_find_the_job_and_its_memory_and_volumes(eights: Prepared) -> None:
    ready = submission(
        with_launch(eights, mounts=("/nvme:/cache", "/data:/data:ro"), partition="research", grace_s=90.5)
    )
    container = pod(ready)["containers"][0]
    mounts = {one["mountPath"]: one for one in container["volumeMounts"]}
    assert set(mounts) == {"/etc/stoker", "/dev/shm", "/runs", "/cache", "/data"}
    assert mounts["/data"]["readOnly"] and not mounts["/cache"]["readOnly"]
    volumes = {one["name"]: one for one in pod(ready)["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == set(volumes)
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == "runs"
    assert pod(ready)["terminationGracePeriodSeconds"] == 121
    assert of_kind(ready, "JobSet")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    data = of_kind(ready, "ConfigMap")["data"]
    assert Job.from_dict(json.loads(data["launch.json"])) == ready.job
    assert container["command"][-1] == "/etc/stoker/launch.json" and ready.job.config == "/etc/stoker/config.yaml"


def test_a_pod_learns_from_its_labels_which_node_of_which_launch_it_is(eights: Prepared) -> None:
    """Labels that JobSet puts on pods (its documentation, v0.9)."""
    env = {one["name"]: one for one in pod(submission(eights))["containers"][0]["env"]}
    read = {name: one["valueFrom"]["fieldRef"]["fieldPath"] for name, one in env.items() if "valueFrom" in one}
    assert read == {
        variable: f"metadata.labels['jobset.sigs.k8s.io/{label}']"
        for variable, label in (
            ("STOKER_DOMAIN", "job-index"), ("STOKER_START", "restart-attempt"), ("STOKER_SET", "jobset-uid"),
        )
    }  # fmt: skip


@pytest.mark.parametrize("hardware", ["h100", "cpu"])
def test_pods_of_a_host_that_is_lost_are_moved_within_a_minute(hardware: str) -> None:
    """Kubernetes adds 300 s for each taint that a pod does not speak of (its documentation)."""
    tolerated = pod(submission(prepared(*IN_PODS, "parallel={}", hardware=hardware, nodes=2)))["tolerations"]
    seconds = {one["key"]: one["tolerationSeconds"] for one in tolerated if one["effect"] == "NoExecute"}
    assert set(seconds) == {"node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"}
    assert max(seconds.values()) <= 60
    devices = [one["key"] for one in tolerated if one["effect"] == "NoSchedule"]
    assert devices == (["nvidia.com/gpu"] if hardware == "h100" else [])


def test_secrets_are_references(eights: Prepared) -> None:
    ready = submission(eights, ["WANDB_API_KEY=wandb/key"])
    env = {one["name"]: one for one in pod(ready)["containers"][0]["env"]}
    assert env["WANDB_API_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "wandb", "key": "key"}}
    hidden = with_launch(eights, webhook="https://x.example/canary")
    hidden = replace(hidden, secrets={"launch.webhook": "https://x.example/canary"})
    with pytest.raises(Refusal, match="STOKER_CONFIG_SECRET") as refusal:
        submission(hidden)
    assert "canary" not in str(refusal.value)
    assert "canary" not in submission(hidden, ["STOKER_CONFIG_SECRET=run/values"]).show()


@pytest.mark.parametrize("text", ["WANDB_API_KEY=abc123", "=a/b", "A=B/c", "A=b/", "A=b/c\n", "1A=b/c", ""])
def test_a_secret_that_is_no_reference_is_refused_unseen(eights: Prepared, text: str) -> None:
    with pytest.raises(Refusal, match="--secret") as refusal:
        submission(eights, [text])
    assert "abc123" not in str(refusal.value)


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for one in pair for text in strings(one)]
    if isinstance(value, list):
        return [text for one in value for text in strings(one)]
    return [value] if isinstance(value, str) else []


@given(text=st.text(), key=st.sampled_from(["container", "namespace", "partition", "volume_claim"]))
@example(text="x\nspec: {}", key="namespace")
@example(text="1e3", key="container")
@example(text="off", key="partition")
@example(text="{{ .Values.x }}", key="container")
def test_any_text_is_refused_or_one_string_of_a_manifest(eights: Prepared, text: str, key: str) -> None:
    try:
        ready = submission(with_launch(eights, **{key: text}))
    except Refusal as refusal:
        assert "\n" not in str(refusal)
        return
    plain = submission(with_launch(eights, **{key: "plain"}))
    jobset = replace(ready, manifests=ready.manifests[-1:])
    (found,) = read(jobset)
    assert found == ready.manifests[-1]
    pairs = list(zip(strings(found), strings(plain.manifests[-1]), strict=True))
    assert {pair for pair in pairs if pair[0] != pair[1]} <= {(text, "plain")}
    assert any(pair[0] == text for pair in pairs)


@given(st.text(min_size=1, max_size=80), st.text(min_size=1, max_size=80))
def test_any_run_name_becomes_a_label_and_two_never_the_same(one: str, other: str) -> None:
    names = [dns_name(text, 40) for text in (one, other)]
    for name in names:
        assert len(name) <= 40 and name[0].isascii() and name[0].isalpha() and name[-1].isalnum()
        assert all(sign in "abcdefghijklmnopqrstuvwxyz0123456789-" for sign in name)
    assert (names[0] == names[1]) == (one == other)


def test_pods_names_of_the_largest_index_fit(tmp_path: Path) -> None:
    ready = submission(prepared(*IN_PODS, "parallel={ep: 64}", f"run.name={'x' * 80}", nodes=144))
    names = [f"{host.partition('.')[0]}-abcde" for host in ready.job.hosts]
    assert len(names) == 144 and max(map(len, names)) <= 63


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"container": None}, "launch.container"),
        ({"volume_claim": None}, "on no volume"),
        ({"namespace": "A b"}, "launch.namespace"),
        ({"partition": "x/y"}, "launch.partition"),
        ({"container": "-x"}, "no image"),
        ({"mounts": ("x:/y",)}, "launch.mounts"),
    ],
)
def test_what_kubernetes_cannot_run_is_refused(eights: Prepared, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        submission(with_launch(eights, **changed))


def kubectl(folder: Path, text: str) -> None:
    path = folder / "kubectl"
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_kubectl_is_given_what_the_dry_run_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eights: Prepared
) -> None:
    kubectl(tmp_path, f'echo "$@" >> {tmp_path}/argv; if [[ $3 == apply ]]; then cat > {tmp_path}/stdin; fi')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    ready = submission(eights)
    submit(ready)
    assert (tmp_path / "stdin").read_text() == ready.show()
    asked, tried, applied = (tmp_path / "argv").read_text().splitlines()
    assert "get jobsets.jobset.x-k8s.io hybrid-moe-30b-a3b" in asked and "apply --filename=-" in applied
    assert "apply --dry-run=server --filename=-" in tried


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo jobset.jobset.x-k8s.io/x", "already"),
        ("echo 'The connection to the server was\n refused' >&2; exit 1", "server was refused"),
        ('echo "error: the server doesn\'t have a resource type jobsets" >&2; exit 1', "must be installed"),
        ("[[ $3 == get ]] || { echo 'quota exceeded' >&2; exit 1; }", "quota exceeded"),
        (None, "kubectl is not on this machine"),
    ],
)
def test_what_the_cluster_cannot_do_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eights: Prepared, script: str | None, said: str
) -> None:
    if script is not None:
        kubectl(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path) if script is None else f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(Refusal, match=said) as refusal:
        submit(submission(eights))
    assert "\n" not in str(refusal.value)
