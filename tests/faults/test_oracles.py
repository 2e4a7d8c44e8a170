"""Each oracle of the fault matrix finds what it is there to find, in a run that is as it should be but for that."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.supervise.journal import Journal
from pretrain.checkpoint import folders
from pretrain.events import METRICS
from tests.faults import box, oracles
from tests.faults.bench import QUICK_STEPS, Bench
from tests.faults.box import Box
from tests.faults.rank import FOLDER
from tests.faults.runs import Run, Strike

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def copy(bench: Bench) -> Iterator[Run]:
    whole = bench.whole(2, QUICK_STEPS)
    run = Run(whole.config, "copy", QUICK_STEPS)
    for mine, theirs in ((run.root, whole.root), (run.folder, whole.folder)):
        shutil.rmtree(mine, ignore_errors=True)
        shutil.copytree(theirs, mine, symlinks=True)
    yield run
    run.close()


def change(path: Path, number: int, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit line ``number`` of a file of JSON lines."""
    lines = path.read_text().splitlines()
    line = json.loads(lines[number])
    edit(line)
    lines[number] = json.dumps(line, sort_keys=True)
    path.write_text("\n".join(lines) + "\n")


def found(run: Run, bench: Bench) -> dict[str, list[str]]:
    return {name: wrong for name, wrong in oracles.check(run, bench.whole(2, QUICK_STEPS)).items() if wrong}


def test_an_undisturbed_run_is_all_right(copy: Run, bench: Bench) -> None:
    copy.remember()
    assert len(copy.remembered) == QUICK_STEPS // 4 and found(copy, bench) == {}


def test_o1_finds_the_last_bit_of_a_loss_and_the_state_of_one_rank(copy: Run, bench: Bench) -> None:
    change(copy.root / METRICS, 10, lambda line: line.update(loss=line["loss"] * (1 + 2**-52)))
    change(copy.folder / "steps_1.jsonl", 13, lambda line: line.update(state="0" * 64))
    (loss, state) = found(copy, bench)["O1"]
    assert loss.startswith("step 10:") and state == "the state of rank 1 after step 13 is another, and of 1 steps"


def test_o2_finds_a_checkpoint_that_is_altered_and_one_that_is_gone(copy: Run, bench: Bench) -> None:
    copy.remember()
    root = copy.root / "checkpoints"
    shutil.rmtree(folders.path(root, 8))
    data = max(folders.path(root, 16).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    wrong = found(copy, bench)["O2"]
    assert wrong[0] == f"{folders.path(root, 8).name} was committed and is gone"
    assert wrong[1] == f"{folders.path(root, 16).name} was altered" and wrong[2].startswith("step 16: ")


def test_o3_finds_a_window_consumed_twice_and_too_many_steps_done_again(copy: Run, bench: Bench) -> None:
    def repeat(line: dict[str, Any]) -> None:
        line["samples"][0] = line["samples"][1]

    change(copy.folder / "steps_0.jsonl", 7, repeat)
    lines = (copy.root / METRICS).read_text().splitlines()
    again = [json.dumps({**json.loads(line), "attempt": 2}, sort_keys=True) for line in lines[-5:]]
    (copy.root / METRICS).write_text("\n".join([*lines, *again]) + "\n")
    for rank in range(2):
        history = (copy.folder / f"steps_{rank}.jsonl").read_text().splitlines()
        later = [json.dumps({**json.loads(line), "attempt": 2}) for line in history[-5:]]
        (copy.folder / f"steps_{rank}.jsonl").write_text("\n".join([*history, *later]) + "\n")
    wrong = found(copy, bench)
    assert set(wrong) == {"O3"}
    assert "did 5 steps again" in wrong["O3"][0] and "consumed more than once" in wrong["O3"][1]
    assert "1 windows of the undisturbed run were not consumed" in wrong["O3"][2]


def test_o4_finds_a_fault_that_nobody_named(copy: Run, bench: Bench) -> None:
    copy.strikes = [Strike("a fault", ("signal",), 1, 1), Strike("another", ("hang",), 0, 7)]
    kind, rank, missing = found(copy, bench)["O4"]
    assert "exit.json says done" in kind and "blames rank None and not 1" in rank and "no exit.json" in missing


def test_o5_finds_a_process_a_lock_and_what_lies_in_its_box(
    copy: Run, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracles, "ENDING_S", 0.2)
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={FOLDER: str(copy.folder)})
    with Journal(copy.root):
        wrong = found(copy, bench)["O5"]
    assert wrong[0] == f"process {orphan.pid} is left" and "is supervised by process" in wrong[1]
    orphan.kill()
    orphan.wait()
    if (why := box.missing()) is not None:
        pytest.skip(why)
    copy.box = Box("copy")
    try:
        copy.box.run("touch", "/dev/shm/segment")
        program = (
            "import socket, time; s = socket.create_server(('127.0.0.1', 4321)); print(flush=True); time.sleep(60)"
        )
        server = subprocess.Popen(copy.box.command([sys.executable, "-c", program]), stdout=subprocess.PIPE)
        assert server.stdout is not None and server.stdout.readline()
        assert found(copy, bench)["O5"] == [
            "copy: /dev/shm/segment is left", "copy: a port: 127.0.0.1:4321 is left",
        ]  # fmt: skip
        server.kill()
        server.wait()
    finally:
        copy.box.close()
