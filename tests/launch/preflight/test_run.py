"""The preflight as a whole: what it costs, that every check runs, and that a fault keeps ranks from starting."""

from __future__ import annotations

import ast
import io
import json
import math
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from launch import doctor
from launch.preflight import compute, disk, facts, host, need, run
from launch.preflight.compute import Computed
from launch.preflight.need import checkpoint_bytes
from launch.preflight.report import Finding, Report, Verdict
from launch.preflight.run import Outcome, preflight, quick, together
from launch.preflight.shared import Launch
from pretrain.config import RunConfig, load
from stoker.errors import Refusal
from tests.house.sources import HOME
from tests.launch.tiny import tiny


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load(tiny(tmp_path))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that load torch have tests of their own."""
    monkeypatch.setattr(compute, "measure", lambda *asked: [Computed("2 threads", "float32", 1e11, 1e10)])


def test_quick_is_quick_writes_nothing_and_needs_no_torch(config: RunConfig, tmp_path: Path) -> None:
    program = f"""
import sys, time
from launch.preflight.run import quick
from pretrain.config import load
config = load({str(tmp_path / "tiny.yaml")!r})
began = time.process_time()
report = quick(config, 2)
report.refuse()
assert time.process_time() - began < 1, report.seconds
heavy = {{"torch", "megatron", "wandb"}} & set(sys.modules)
assert not heavy, heavy
"""
    before = sorted(path.name for path in tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", program], cwd=HOME, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "no run directory is made"


def test_all_of_it_on_this_machine(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing, products included: 2.7 s on two cores, much longer where many tests run."""
    monkeypatch.setattr(run, "COMPUTE_LIMIT_S", 250.0)
    monkeypatch.setattr(run, "LIMIT_S", 100.0)
    report = preflight(config, 2)
    found = {finding.check: finding.status for finding in report.findings}
    assert not report.refused, report.refused
    assert {"clock", "open files", "/dev/shm", "memory", "disk space", "disk speed", "cores compute"} <= set(found)
    assert json.loads(json.dumps(report.to_dict()))["verdict"] is None
    assert not config.run_dir.exists(), "nothing is left, and no run directory is made"


def test_every_check_runs_and_each_refusal_is_told(
    config: RunConfig, computed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> tuple[Finding, None]:
        raise RuntimeError("a bug in a check")

    shm = host.shared_memory
    monkeypatch.setattr(disk, "speed", broken)
    monkeypatch.setattr(host, "open_files", lambda need: Finding("open files", "refuse", "128 a process", "ulimit -n"))
    monkeypatch.setattr(host, "shared_memory", lambda need, gpus: shm(need, gpus, Path("/nowhere")))
    report = preflight(config, 2)
    found = {finding.check: finding for finding in report.findings}
    assert found["disk speed"].status == "warn" and "a bug in a check" in found["disk speed"].found
    assert found["cores compute"].status == "ok", "the rest still ran"
    with pytest.raises(Refusal, match=r"open files: 128 a process; ulimit -n; /dev/shm|/nowhere: not there"):
        report.refuse()


def test_a_check_that_never_comes_back_is_refused_and_holds_nobody_up() -> None:
    stuck = threading.Event()
    began = time.monotonic()
    outcomes = together(
        {
            "disk speed": (lambda: Outcome([Finding("never", "ok", str(stuck.wait(60)))]), 0.3),
            "products": (lambda: Outcome([Finding("products", "ok", "fine")], {"products": 1.0}), 5.0),
        }
    )
    assert time.monotonic() - began < 5
    stuck.set()
    assert [one.findings[0].status for one in outcomes] == ["refuse", "ok"]
    assert outcomes[0].findings[0].found == "did not come back within 0.3 s" and outcomes[1].rates == {"products": 1.0}


def test_a_run_directory_on_a_server_that_does_not_answer_is_refused(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hard NFS mount whose server is gone: statvfs does not return."""
    gone = threading.Event()

    def room(*given: object) -> Finding:
        gone.wait(60)
        return Finding("disk space", "ok", "")

    monkeypatch.setattr(disk, "room", room)
    monkeypatch.setattr(run, "LIMIT_S", 2.0)
    with pytest.raises(Refusal, match=r"disk space: did not come back within 2 s"):
        quick(config, 2).refuse()
    gone.set()


def test_a_wrong_product_is_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    flipped = Computed("2 threads", "float32", 1e11, 1e10, wrong="a matrix product is wrong in the element in row 5")
    monkeypatch.setattr(compute, "measure", lambda *asked: [flipped])
    with pytest.raises(Refusal, match="cores compute: a matrix product is wrong in the element in row 5"):
        preflight(config, 2).refuse()


def test_busy_cores_are_no_fault_and_a_dead_process_is(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*asked: object) -> list[Computed]:
        raise error

    monkeypatch.setattr(compute, "measure", measure)
    error: OSError = TimeoutError("no answer within 60 s")
    assert {f.check: f.status for f in preflight(config, 2).findings}["computes"] == "warn"
    error = OSError("Illegal instruction")
    with pytest.raises(Refusal, match="computes: Illegal instruction"):
        preflight(config, 2).refuse()


def test_a_package_of_the_wrong_version_is_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda asked: "2.9.0" if asked == "torch" else real(asked))
    with pytest.raises(Refusal, match=r"packages: torch 2\.9\.0: .*pip install 'torch"):
        quick(config, 2).refuse()


def test_scratch_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    config = load(tiny(tmp_path), [f"launch.scratch={tmp_path / 'taken'}"])
    with pytest.raises(Refusal, match=r"launch\.scratch: .*taken is a file"):
        quick(config, 2).refuse()


def launched(config: RunConfig, nodes: str, needed: int, **more: object) -> dict[str, Report]:
    """The preflight of several nodes that are this machine."""
    found: dict[str, Report] = {}
    start = f"job-{time.monotonic_ns()}"

    def node(name: str) -> None:
        found[name] = preflight(config, 1, Launch(start, name, tuple(nodes), needed, **more))  # type: ignore[arg-type]

    threads = [threading.Thread(target=node, args=(name,)) for name in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    return found


def test_nodes_of_one_host_are_refused_by_name_unless_they_may_share_it(config: RunConfig, computed: None) -> None:
    found = launched(config, "ab", 2)
    for report in found.values():
        with pytest.raises(Refusal, match=r"1 of 2 nodes can train and 2 are needed; b: is the same host as a"):
            report.refuse()
    for report in launched(config, "ab", 2, share_hosts=True).values():
        report.refuse()
        assert report.verdict and report.verdict.good == ("a", "b")


def test_a_port_that_is_taken_keeps_the_leader_out(config: RunConfig, computed: None) -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        found = launched(config, "abc", 2, share_hosts=True, port=port)
    for report in found.values():
        assert report.verdict and report.verdict.good == ("b", "c")
        assert f"port {port}: taken by process" in report.verdict.excluded["a"]
    found["b"].refuse()
    with pytest.raises(Refusal, match=rf"a: port {port}: taken by process"):
        found["a"].refuse()


def test_the_hash_of_the_code_is_of_its_bytes_and_names(tmp_path: Path) -> None:
    for room, name in (("pretrain", "loop.py"), ("kernels", "scan.cu"), ("launch", "notes.txt")):
        (tmp_path / room).mkdir()
        (tmp_path / room / name).write_text("x")
    first = facts.code_sha256(tmp_path)
    (tmp_path / "launch" / "notes.txt").write_text("y")
    assert facts.code_sha256(tmp_path) == first
    (tmp_path / "kernels" / "scan.cu").write_text("y")
    second = facts.code_sha256(tmp_path)
    (tmp_path / "kernels" / "scan.cu").rename(tmp_path / "kernels" / "moved.cu")
    assert len({first, second, facts.code_sha256(tmp_path)}) == 3


def test_no_secret_of_the_environment_is_stated(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789abcdef")
    assert "canary" not in json.dumps(facts.facts(config).to_dict())


def test_a_report_refuses_for_this_node_for_the_launch_and_for_an_excluded_node() -> None:
    good = Finding("clock", "ok", "runs evenly")
    verdict = Verdict(("a", "b"), {"c": "torch 2.12.1"}, 2, 3, ("b: driver 570",))
    Report("a", (good,), 1.0, verdict).refuse()
    with pytest.raises(Refusal, match=r"c is excluded from this launch: torch 2\.12\.1"):
        Report("c", (good,), 1.0, verdict).refuse()
    with pytest.raises(Refusal, match="2 of 3 nodes can train and 3 are needed; c: torch"):
        Report("a", (good,), 1.0, replace(verdict, needed=3)).refuse()
    console = Console(file=io.StringIO(), width=120)
    console.print(Report("a", (good, Finding("x", "warn", "[brackets]", "do [this]")), 1.0, verdict).table())
    text = console.file.getvalue()
    assert "[brackets]" in text and "do [this]" in text and "torch 2.12.1" in text and "driver 570" in text


@pytest.mark.parametrize(
    "dtype", [*(pytest.param(dtype, marks=pytest.mark.verify) for dtype in ("float64", "float32")), "bfloat16"]
)
def test_a_checkpoint_takes_as_many_bytes_as_said(dtype: str, tmp_path: Path) -> None:
    """Against the manifest of a checkpoint that the trainer wrote."""
    source = tiny(tmp_path, steps=1, dtype=dtype)
    command = [sys.executable, "-m", "pretrain", str(source), "log.quiet=true"]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = json.loads((tmp_path / "runs/tiny/checkpoints/step_00000001/manifest.json").read_bytes())
    width = {"float64": 8, "float32": 4, "bfloat16": 2, "int64": 8}
    written = sum(width[one["dtype"]] * math.prod(one["shape"]) for one in manifest["tensors"].values())
    assert checkpoint_bytes(load(source).model_spec(), dtype) == written


def test_what_a_host_needs_counts_its_ranks_and_the_checkpoints_that_will_be(tmp_path: Path) -> None:
    config = load(tiny(tmp_path, steps=8), ["checkpoint.every=3", "checkpoint.keep_last=5"])
    one = need.need_of(config, config.plan(1), 1)
    assert (one.hosts, one.checkpoints) == (1, 3)  # after steps 3, 6 and 8
    spread = need.need_of(config, config.plan(4), 2)
    assert spread.hosts == 2 and spread.ranks == 2 and spread.world == 4
    # Weights and gradients are whole on every rank, moments are shared out: 8 bytes each of float64.
    parameters = config.model_spec().num_parameters
    assert spread.state_bytes == pytest.approx(2 * (8 + 8 + 16 / 4) * parameters, rel=0.02)


def test_the_modules_of_the_preflight_name_no_torch_at_their_top() -> None:
    for path in (HOME / "launch" / "preflight").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        assert "torch" not in names, path
    assert run.LIMIT_S > disk.PROBE_S
