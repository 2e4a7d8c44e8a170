"""The ``stoker`` command as a person meets it: exit codes, one line for a refusal, and a quick start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from dataio import tokenizer as bpe
from dataio.documents import document_id
from dataio.store import Store, StoreWriter
from launch.cli import app, main
from tests.house.sources import HOME
from tests.launch.tiny import tiny

HEAVY = ("torch", "megatron", "numba", "transformers", "wandb", "zarr")


def stoker(*arguments: object) -> int:
    """Run a command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("cli"))


REFUSED = {
    "unknown key": (["train.lrr=1"], "did you mean train.lr?"),
    "unknown section": (["trian.lr=1"], "did you mean train"),
    "not an override": (["lr"], "section.key=value"),
    "wrong kind": (["run.steps=many"], "run.steps"),
    "degrees that do not multiply": (["parallel.tp=3", "parallel.sequence_parallel=true"], "world_size"),
    "batch that does not divide": (["train.global_batch=7"], "global_batch=6 or 8"),
    "heads that do not divide": (["parallel.tp=4", "parallel.sequence_parallel=true", "--ranks=4"], "tp=4"),
    "experts that do not divide": (["parallel.ep=8", "--ranks=8", "train.global_batch=8"], "moe.num_experts=4"),
    "sequence parallelism of one rank": (["parallel.sequence_parallel=true"], "it needs tp > 1"),
    "context parallelism": (["parallel.cp=2"], "use cp=1"),
    "interleaving without a pipeline": (["parallel.vpp=2"], "pp > 1"),
    "more chunks than layers": (["parallel.pp=2", "parallel.vpp=2"], "layers"),
    "missing store": (["data.blend={nowhere: 1}"], "no token store here"),
    "sequence length of no block": (["data.seq_len=48"], "nearest"),
    "vocabulary smaller than the tokenizer's": (["model.vocab_size=200"], "set model.vocab_size=257"),
    "step that is not there": (["run.resume=3"], "holds no committed checkpoint"),
    "unknown preset": (None, "neither a .yaml file nor a preset"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_p7_train_refuses_in_one_line_before_any_rank_starts(
    case: str, config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.local.Agent", None)  # to start ranks would be a TypeError
    overrides, says = REFUSED[case]
    arguments = ["train", "no-such-preset"] if overrides is None else ["train", config, "--ranks=2", *overrides]
    assert stoker(*arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith("refused: ") and err.count("\n") == 1 and says in err, err
    assert not (config.parent / "runs").exists(), "a refusal touches nothing"


def test_a_directory_that_is_no_run_is_refused_and_left_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tiny(tmp_path)
    foreign = tmp_path / "runs" / "tiny" / "thesis.tex"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    assert stoker("train", path) == 2
    assert "it is no run directory" in capfd.readouterr().err
    assert [entry.name for entry in foreign.parent.iterdir()] == ["thesis.tex"] and foreign.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["checkpoint", "ls", "nowhere"], "holds no committed checkpoint"),
        (["checkpoint", "verify", "nowhere/checkpoints/step_00000003"], "holds no committed checkpoint"),
        (["report", "nowhere"], "nowhere"),
        (["data", "prepare", "nowhere.yaml"], "cannot be read as a recipe"),
        (["data", "verify", "nowhere"], "no token store here"),
        (["data", "view", "nowhere"], "no token store here"),
    ],
)
def test_other_commands_refuse_in_one_line(
    arguments: list[str], says: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert stoker(*arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith("refused: ") and err.count("\n") == 1 and says in err, err


@pytest.mark.parametrize("arguments", [["launch", "slurm"], ["sweep"], ["train"], ["plan", "demo", "--gpu", "1"]])
def test_what_is_not_a_command_is_refused_by_usage(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert stoker(*arguments) == 2
    assert "Usage: stoker" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "demo", "--ranks", "2"], ["doctor"], ["train", "--help"], ["data", "--help"]]
)
def test_p9_help_doctor_and_plan_import_nothing_heavy(arguments: list[str]) -> None:
    program = f"""
import sys
from launch.cli import app, main
try:
    main({arguments!r})
except SystemExit as ended:
    assert ended.code == 0, ended.code
loaded = {set(HEAVY)!r} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=HOME, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


def test_plan_says_what_it_knows_and_that_it_does_not_know_the_rest(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "demo", "--ranks", "4", "parallel.ep=2", "parallel.pp=2"]
    assert stoker(*arguments) == 0
    words = capfd.readouterr().out
    assert "4 ranks, dense (fastest first): tp 1 x cp 1 x dp 2 x pp 2" in words and "unknown" in words
    assert stoker(*arguments, "--json") == 0
    known = json.loads(capfd.readouterr().out)
    assert known["plan"]["pp"] == 2 and known["predictions"] == {"step_time_s": None, "memory_bytes": None}
    # Counted by hand from the preset: 2 matrices of 4096 x 128 outside the layers, and the layers hold the rest.
    assert known["parameters"] > known["active_parameters"] > 2 * 4096 * 128


def test_verify_names_a_damaged_store(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny(tmp_path)
    store = tmp_path / "train"
    assert stoker("data", "verify", store) == 0
    shard = sorted((store / "tokens" / "c").iterdir())[0]
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    assert stoker("data", "verify", store) == 2
    assert str(shard) in capfd.readouterr().out


def test_stats_counts_what_is_in_a_store(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert stoker("data", "stats", config.parent / "train") == 0
    assert "6,000 tokens" in capfd.readouterr().out


def test_a_store_goes_out_and_comes_back_the_same(tmp_path: Path) -> None:
    texts = [f"the {i}th text of a few words\n" * (1 + i % 3) for i in range(40)]
    tokenizer = bpe.train(texts, 270, tmp_path / "tokenizer.json")
    tokens, lengths = tokenizer.encode_batch(texts)
    ids = np.frombuffer(b"".join(document_id(text.encode()) for text in texts), ">u8").reshape(-1, 2)
    with StoreWriter(tmp_path / "store", "text", tokenizer.id) as writer:
        writer.append(tokens, lengths, np.array([len(text) for text in texts]), ids)
        identity = writer.commit().dataset_id
    assert stoker("data", "repack", tmp_path / "store", tmp_path / "cold", "--profile", "cold") == 0
    assert Store.open(tmp_path / "cold").dataset_id == identity
    for form in ("megatron", "mds"):
        assert stoker("data", "export", tmp_path / "store", tmp_path / form, "--to", form) == 0
        given = ("--from", form, "--tokenizer", tmp_path / "tokenizer.json")
        assert stoker("data", "import", tmp_path / form, tmp_path / f"from-{form}", *given) == 0
        again = Store.open(tmp_path / f"from-{form}")
        assert np.array_equal(again.read(0, len(tokens)), tokens) and np.array_equal(again.doc_id, ids)


def test_what_is_listed_is_built_and_says_what_it_is_for() -> None:
    root: Any = typer.main.get_command(app)
    fixed = "train plan launch doctor generate report status logs watch sweep bench data checkpoint"
    assert set(root.commands) == set(fixed.split())
    todo = [root]
    while todo:
        command = todo.pop()
        assert command.help, command.name
        todo += getattr(command, "commands", {}).values()
