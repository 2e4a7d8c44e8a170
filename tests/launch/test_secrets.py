"""No secret of the environment, the command line or the configuration is in anything that a run leaves or shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from base64 import b64decode, urlsafe_b64decode
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import cli
from launch.sweep.report import write_report
from launch.sweep.scheduler import Scheduler
from launch.watch.server import Server
from pretrain.events import read
from stoker import secrets
from stoker.secrets import mask, remember
from tests.launch import leaky
from tests.launch.sweep.sweeps import forks, planned
from tests.launch.tiny import tiny
from tests.launch.watch.test_server import ROUTES, ask
from tests.launch.watch.test_webhook import Receiver

#: In every secret of these tests, several times; in nothing else that they make.
MARK = b"canary"
SECRETS = {
    "WANDB_API_KEY": "canary/wandb+key\"with 'quotes\\and=äß%canary",
    "AWS_SECRET_ACCESS_KEY": "canary+aws/EXAMPLEKEY/canary==",
    "STOKER_TRACKER_TOKEN": "canary0123456789canary",
    "DEPLOY_PRIVATE_KEY": "--BEGIN X KEY--\ncanary0AAAAB3NzaC1yc2Ecanary\ncanary1Z\tAAAADAQABcanary\n--END X KEY--",
}
#: Nobody could know that this is a secret: it may be printed by a rank, and by nothing of ours.
PLAIN = {"STOKER_X": "canary-in-an-arbitrary-variable"}


def leaks(content: bytes) -> list[bytes]:
    """Where the mark is in some bytes, as it is or as hexadecimal or base64 at any offset hides it."""
    found = [content[max(0, at.start() - 60) : at.end() + 20] for at in re.finditer(MARK, content)]
    found += [at[0] for at in re.finditer(MARK.hex().encode(), content, re.IGNORECASE)]
    for run in re.finditer(rb"[A-Za-z0-9+/_-]{12,}", content):
        for start in range(4):
            text = run[0][start:].replace(b"-", b"+").replace(b"_", b"/")
            if MARK in b64decode(text[:-1] if len(text) % 4 == 1 else text + b"=" * (-len(text) % 4)):
                found.append(run[0][:80])
    return found


def left_in(folder: Path) -> dict[str, list[bytes]]:
    """Files below a folder that hold a secret, or have one in their name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    found = {str(path): leaks(path.read_bytes()) + leaks(str(path.relative_to(folder)).encode()) for path in files}
    return {path: where for path, where in found.items() if where}


def shown(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command of ``stoker`` prints."""
    with pytest.raises(SystemExit):
        cli.main(arguments)
    return "".join(capfd.readouterr())


def pages(run_dir: Path) -> Iterator[tuple[str, bytes]]:
    server = Server(run_dir)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        for route in ROUTES:
            yield route, ask(server, route)[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def secretive(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has secrets in its environment, and forgets those that it is told of."""
    monkeypatch.setattr(secrets, "_remembered", set())
    for name, value in {**SECRETS, **PLAIN}.items():
        monkeypatch.setenv(name, value)
    yield


def test_the_search_finds_every_form_of_every_secret(secretive: None) -> None:
    told = leaky.confession("https://hooks.example/canary").split(" | ")
    assert len(told) == 9 * (len(SECRETS) + 1)
    assert [part for part in told if not leaks(part.encode())] == []


def test_a_secret_is_masked_however_it_is_written(secretive: None) -> None:
    address = "https://hooks.example/services/canary-hook-0123456789"
    remember(address)
    said = leaky.confession(address)
    assert len(leaks(said.encode())) > 20
    assert leaks(mask(said).encode()) == []
    for line in said.replace("\\n", "\n").splitlines():  # a log takes line by line
        assert leaks(mask(line).encode()) == []
    assert leaks(mask(f"POST {address.removeprefix('https://hooks.example')} HTTP/1.1").encode()) == []


def test_words_of_an_address_are_no_secrets(secretive: None) -> None:
    remember("https://ntfy.sh/pretrain")
    remember("https://hooks.example/stoker-runs-of-the-team")
    kept = "File /data/pretrain/loop.py, run.dir=/shared/stoker-runs-of-the-team"
    assert mask(kept) == kept
    assert "pretrain" not in mask("POST https://ntfy.sh/pretrain")


@given(st.text(min_size=12, max_size=60), st.text(max_size=9), st.text(max_size=9))
def test_base64_of_a_text_that_holds_a_secret_is_masked_at_every_offset(secret: str, before: str, after: str) -> None:
    from base64 import b64encode, urlsafe_b64encode

    whole = (before + secret + after).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "_remembered", {secret})
        for encode, decode in ((b64encode, b64decode), (urlsafe_b64encode, urlsafe_b64decode)):
            text = mask(encode(whole).decode())
            assert "***" in text
            kept = re.sub("[^A-Za-z0-9]+$", "", text.partition("***")[0])
            assert secret.encode() not in decode(kept[: len(kept) // 4 * 4])


def test_what_is_refused_is_said_without_the_secret(
    tmp_path: Path, secretive: None, capfd: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny(tmp_path))
    for override in (
        "launch.webhook=ftp://hooks.example/canary",
        "data.tokenizer=https://me:canary@example.org/tokenizer.json",
        "data.blend={'https://me:canary@example.org/store': 1}",
        f"train.lr={SECRETS['STOKER_TRACKER_TOKEN']}",
        f"run.dtype={SECRETS['AWS_SECRET_ACCESS_KEY']}",
        "launch.container=docker://me:canary@example.org/image",
    ):
        said = shown(capfd, "train", config, override, "--ranks", "1")
        assert "refused" in said and leaks(said.encode()) == [], said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("where", ["slurm", "kubernetes"])
def test_a_submission_holds_no_secret(
    tmp_path: Path, secretive: None, capfd: pytest.CaptureFixture[str], where: str
) -> None:
    hidden = ["launch.webhook=https://hooks.example/services/canary/canary"]
    if where == "kubernetes":
        hidden += ["launch.container=ghcr.io/x/stoker:1", "launch.volume_claim=runs", f"run.dir={tmp_path}/runs"]
        hidden += ["--secret", "STOKER_CONFIG_SECRET=run/values", "--secret", "WANDB_API_KEY=wandb/key"]
    preset = "hybrid-moe-30b-a3b" if where == "kubernetes" else str(tiny(tmp_path))
    hardware = (
        ["gb200-nvl72", "--nodes", "16"] if where == "kubernetes" else ["cpu", "--nodes", "2", "--ranks-per-node", "1"]
    )
    said = shown(capfd, "launch", where, preset, *hidden, "--hardware", *hardware, "--dry-run")
    assert not said.startswith("refused") and ("sbatch" in said or "JobSet" in said), said
    assert leaks(said.encode()) == []


def test_a_sweep_whose_runs_tell_their_secrets_keeps_them(tmp_path: Path, secretive: None) -> None:
    ledger = planned(tmp_path, seeds=2, retries=0)
    slots = forks(ledger, "leaking")
    try:
        said: list[str] = []
        assert Scheduler(ledger, slots, announce=said.append).run().code == 1
    finally:
        slots.close()
    write_report(ledger.root)
    assert "the server refused" in ledger.log(ledger.trials[0]).read_text()
    assert left_in(ledger.root) == {} and leaks("".join(said).encode()) == []


PROGRAM = """
import sys
from launch.supervise import processes
processes.MODULE = "tests.launch.leaky"
from launch.cli import main
main(sys.argv[1:])
"""


def command_lines(process: subprocess.Popen[bytes], seen: dict[int, list[str]]) -> None:
    """Of all that the process has started, while it runs."""
    while process.poll() is None:
        try:
            seen |= {child.pid: child.cmdline() for child in psutil.Process(process.pid).children(recursive=True)}
        except psutil.Error:
            continue
        time.sleep(0.05)


@pytest.mark.verify
@pytest.mark.timeout(900)
def test_a_run_that_crashes_with_all_its_secrets_in_hand_keeps_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    receiver = Receiver()
    address = f"{receiver.url.rsplit('/', 1)[0]}/canary-hook-0123456789/canary"
    kept = tmp_path / "hf_canary0123456789abcdef"  # a path with the shape of a secret
    kept.mkdir()
    config = tiny(kept, ("attention/dense",))
    arguments = [str(config), f"launch.webhook={address}", f"run.dir={tmp_path / 'runs'}", "log.wandb=offline"]
    environment: Mapping[str, str] = {
        **os.environ,
        **SECRETS,
        **PLAIN,
        "OMP_NUM_THREADS": "1",
        leaky.TOLD: str(tmp_path / "told"),
        leaky.WEBHOOK: address,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "train", *arguments, "--ranks", "2"],
        env=environment,
        stdout=(tmp_path / "out").open("wb"),
        stderr=(tmp_path / "err").open("wb"),
    )
    seen: dict[int, list[str]] = {}
    try:
        command_lines(process, seen)
        assert process.wait() == 0, (tmp_path / "err").read_text()[-3000:]
    finally:
        process.kill()
        process.wait()
        receiver.close()
    run_dir = tmp_path / "runs" / "tiny"
    assert len(read(run_dir)) == 8 and (run_dir / "attempts/0002").exists()
    ended = json.loads((run_dir / "attempts/0001/exit.json").read_text())
    assert ended["rank"] == 1 and "the server refused" in ended["cause"]
    assert "login with" in (run_dir / "logs/0001/rank_00001.log").read_text()
    ranks = [line for line in seen.values() if "tests.launch.leaky" in line]
    assert len(ranks) >= 4, "ranks, and those that took their place"
    assert leaks("\n".join(word for line in seen.values() for word in line).encode()) == []
    told = [body["event"] for body in receiver.bodies]
    assert "fault" in told and "end" in told and leaks(json.dumps(receiver.bodies).encode()) == []
    assert "the server refused" in (tmp_path / "err").read_text()
    for path in (tmp_path / "out", tmp_path / "err"):
        assert leaks(path.read_bytes()) == [], path.name
    for words in (["status", str(run_dir)], ["status", str(run_dir), "--json"], ["report", str(run_dir)]):
        assert leaks(shown(capfd, *words).encode()) == [], words
    for words in (["--errors", "--attempt", "1"], ["--attempt", "1"], ["--rank", "1", "--attempt", "1"]):
        said = shown(capfd, "logs", str(run_dir), *words)
        assert "the server refused" in said and leaks(said.encode()) == [], words
    assert {route: leaks(content) for route, content in pages(run_dir)} == {route: [] for route in ROUTES}
    assert left_in(run_dir) == {}
