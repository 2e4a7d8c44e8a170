"""``stoker launch kubernetes`` where the cluster takes only a part, or does not answer: it leaves what was there."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.launching import kubernetes
from launch.launching.job import Prepared
from launch.launching.kubernetes import submission, submit
from stoker.errors import Refusal
from tests.launch.launching.jobs import prepared

IN_PODS = ("launch.container=ghcr.io/x/stoker:1", "launch.volume_claim=runs", "run.dir=/runs")
NAME = "hybrid-moe-30b-a3b"
MADE = [f"configmap/{NAME}-launch", f"computedomain.resource.nvidia.com/{NAME}", f"jobset.jobset.x-k8s.io/{NAME}"]

#: A kubectl that keeps the words and the input of each call under its verb, and then does what a test says of the verb.
KUBECTL = """\
#!/bin/bash
here=$(dirname "$0")
verb=$3
[[ $4 == --dry-run=server ]] && verb=try
echo "$verb" >> "$here/verbs"
printf '%s\\n' "$@" > "$here/$verb.argv"
[[ $verb == try || $verb == apply ]] && cat > "$here/$verb.stdin"
[[ -f $here/$verb.does ]] && . "$here/$verb.does"
exit 0
"""


@dataclass
class Kubectl:
    folder: Path

    def does(self, verb: str, text: str) -> None:
        (self.folder / f"{verb}.does").write_text(text)

    def verbs(self) -> list[str]:
        return (self.folder / "verbs").read_text().split()

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    path = tmp_path / "kubectl"
    path.write_text(KUBECTL)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return Kubectl(tmp_path)


@pytest.fixture(scope="module")
def rack() -> Prepared:
    return prepared(*IN_PODS, "parallel={ep: 64}")


def refused(rack: Prepared) -> str:
    with pytest.raises(Refusal) as refusal:
        submit(submission(rack))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_everything_is_tried_on_the_server_before_anything_is_made(kubectl: Kubectl, rack: Prepared) -> None:
    submit(submission(rack))
    assert kubectl.verbs() == ["get", "try", "apply"]
    assert kubectl.read("try.stdin") == kubectl.read("apply.stdin") == submission(rack).show()


def test_what_the_server_would_refuse_is_never_applied(kubectl: Kubectl, rack: Prepared) -> None:
    kubectl.does("try", "echo 'admission webhook vjobset.kb.io denied the\n request' >&2; exit 1")
    assert refused(rack).endswith("vjobset.kb.io denied the request; nothing was made")
    assert kubectl.verbs() == ["get", "try"]


def test_a_cluster_whose_webhooks_cannot_be_tried_is_asked_at_once(kubectl: Kubectl, rack: Prepared) -> None:
    kubectl.does("try", "echo 'admission webhook \"a.b\" does not support dry run' >&2; exit 1")
    submit(submission(rack))
    assert kubectl.verbs() == ["get", "try", "apply"]


@pytest.mark.parametrize(
    ("said", "deleted"),
    [
        ([f"{MADE[0]} created", f"{MADE[1]} created"], MADE[:2]),
        ([f"{MADE[0]} created", f"{MADE[2]} created"], [MADE[0], MADE[2]]),  # the ComputeDomain was refused
        ([f"{MADE[0]} configured", f"{MADE[1]} created"], [MADE[1]]),  # a ConfigMap of an earlier launch
    ],
)
def test_where_a_part_is_refused_this_launchs_part_alone_is_deleted(
    kubectl: Kubectl, rack: Prepared, said: list[str], deleted: list[str]
) -> None:
    kubectl.does("apply", "".join(f"echo '{line}'\n" for line in said) + "echo 'exceeded quota' >&2; exit 1")
    text = refused(rack)
    assert "exceeded quota" in text and text.endswith(f"{', '.join(deleted)} of this launch deleted again")
    argv = kubectl.read("delete.argv").splitlines()
    assert argv[0] == "--namespace=default" and argv[-len(deleted) :] == deleted
    assert [word for word in argv if "/" in word] == deleted


def test_where_nothing_was_made_nothing_is_deleted(kubectl: Kubectl, rack: Prepared) -> None:
    kubectl.does("apply", f"echo '{MADE[0]} unchanged'; echo 'exceeded quota' >&2; exit 1")
    assert refused(rack).endswith("exceeded quota; nothing was made")
    assert "delete" not in kubectl.verbs()


def test_what_cannot_be_deleted_again_is_named_with_the_command(kubectl: Kubectl, rack: Prepared) -> None:
    kubectl.does("apply", f"echo '{MADE[0]} created'; echo 'connection lost' >&2; exit 1")
    kubectl.does("delete", "echo 'connection\nrefused' >&2; exit 1")
    assert refused(rack).endswith(
        f"could not be deleted again (connection refused): kubectl --namespace=default delete {MADE[0]}"
    )


@pytest.mark.parametrize("taken", [True, False])
def test_where_apply_does_not_answer_the_jobset_is_looked_for_and_nothing_deleted(
    kubectl: Kubectl, rack: Prepared, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    monkeypatch.setattr(kubernetes, "APPLY_S", 0)
    monkeypatch.setattr(kubernetes, "MORE_S", 3)
    kubectl.does("apply", "exec sleep 60")
    kubectl.does("get", f"[[ -f {kubectl.folder}/apply.argv ]] && echo {MADE[2]}" if taken else "")
    if taken:
        submit(submission(rack))
    else:
        text = refused(rack)
        kinds = "configmap,computedomain,jobset"
        assert f"get {kinds} --selector=app.kubernetes.io/instance={NAME}` shows it" in text
    assert kubectl.verbs() == ["get", "try", "apply", "get"]


@pytest.mark.parametrize("taken", [True, False])
def test_where_the_answer_of_apply_was_lost_nothing_is_deleted(kubectl: Kubectl, rack: Prepared, taken: bool) -> None:
    lost = "error when creating STDIN: Post jobsets: context deadline exceeded (Client.Timeout exceeded)"
    kubectl.does("apply", f"echo '{MADE[0]} created'; echo '{lost}' >&2; exit 1")
    kubectl.does("get", f"[[ -f {kubectl.folder}/apply.argv ]] && echo {MADE[2]}" if taken else "")
    if taken:
        submit(submission(rack))
    else:
        assert "kubectl had no answer. The job may be there all the same" in refused(rack)
    assert kubectl.verbs() == ["get", "try", "apply", "get"]
    assert "--request-timeout=0" in kubectl.read("apply.argv").splitlines(), "the answer is waited for"


def test_a_kubectl_that_cannot_be_started_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rack: Prepared
) -> None:
    path = tmp_path / "kubectl"
    path.write_text("#!/no/such/interpreter\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(rack) == "kubectl cannot be run (No such file or directory): nothing was made"
