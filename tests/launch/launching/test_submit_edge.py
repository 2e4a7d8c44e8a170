"""Whatever a person types, ``stoker launch`` answers with what it would submit, the text in it as data, or with one
message and code 2; and it writes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launch.cli import MOST_CHARACTERS, main
from tests.launch.launching.jobs import prepared, tree, value
from tests.launch.tiny import tiny

IN_PODS = ("launch.container=img", "launch.volume_claim=runs")
#: Keys whose text reaches an argument list or a manifest, and what says the same text there again.
SLURM = {"launch.partition": "--partition", "launch.account": "--account", "run.name": "--job-name"}
KUBERNETES = ("launch.partition", "launch.namespace", "launch.volume_claim", "launch.container", "launch.scratch")
OTHERS = (
    "run.dir",
    "launch.network_interface",
    "launch.webhook",
    "launch.mounts",
    "data.blend",
    "launch.time_limit_min",
)
HOSTILE = [
    "a\nb", "a'b", 'a"b', "$(touch x)", "`id`", "a\0b", "\x1b[31m", "\u2028", "é", "", "~", "-x", "--help", "1e999",
    "../..", "a/b", "%j", "{{ .x }}", ",", ":", "x" * 300, "x" * 100_000, "ghp_0123456789abcdefghij",
]  # fmt: skip
#: Hypothesis' own handling of a fixture that it sees once.
ONCE = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edge")
    tiny(folder)
    return folder


@pytest.fixture
def ask(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Ask]:
    """``stoker launch SCHEDULER`` of the tiny run with these words: code, output and messages."""
    monkeypatch.chdir(place)
    before = tree(place)

    def ask(scheduler: str, *words: str, nodes: str = "2", config: str = "tiny.yaml") -> tuple[int, str, str]:
        argv = ["launch", scheduler, config, "--hardware=cpu", f"--nodes={nodes}", "--ranks-per-node=1"]
        with pytest.raises(SystemExit) as ended:
            main([*argv, "--dry-run", *words])
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err  # type: ignore[return-value]

    yield ask
    assert tree(place) == before


def one_message(said: str) -> bool:
    return said.startswith("refused: ") and said.count("\n") == 1 and len(said) < MOST_CHARACTERS + 100


def override(key: str, text: str) -> str:
    """As YAML has any text: JSON with its escapes, of which YAML has another for characters beyond 16 bits."""
    written = "".join(sign if " " <= sign <= "~" and sign not in '"\\' else f"\\U{ord(sign):08x}" for sign in text)
    listed = f'["{written}"]' if key == "launch.mounts" else f'"{written}"'
    return f"{key}={{{listed}: 1}}" if key == "data.blend" else f"{key}={listed}"


def texts(found: Any) -> Iterator[str]:
    if isinstance(found, dict):
        for pair in found.items():
            yield from (text for one in pair for text in texts(one))
    elif isinstance(found, list):
        yield from (text for one in found for text in texts(one))
    elif isinstance(found, str):
        yield found


ANY_TEXT = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=[]), max_size=20))


@ONCE
@given(key=st.sampled_from([*SLURM, *OTHERS]), text=ANY_TEXT)
@example("run.name", "x" * 300)
@example("run.dir", "/" + "x" * 300)
@example("launch.network_interface", "x" * 100_000)
def test_any_text_is_one_argument_of_sbatch_or_one_message(ask: Ask, key: str, text: str) -> None:
    code, out, err = ask("slurm", override(key, text))
    if code == 2:
        assert one_message(err) and out == ""
        return
    assert code == 0
    argv, _ = json.JSONDecoder().raw_decode(out, out.index("["))
    if key in SLURM:
        assert value(argv, SLURM[key]) == text
    if key == "run.dir":
        assert value(argv, "--comment") == f"stoker {os.path.abspath(text)}/tiny/launch/0001"
    assert not any(sign in word for word in argv for sign in "\n\0\x1b\u2028")


@ONCE
@given(key=st.sampled_from([*KUBERNETES, *OTHERS]), text=ANY_TEXT)
@example("launch.container", "x" * 100_000)
def test_any_text_is_one_string_of_a_manifest_or_one_message(ask: Ask, key: str, text: str) -> None:
    code, out, err = ask("kubernetes", *IN_PODS, override(key, text))
    if code == 2:
        assert one_message(err) and out == ""
        return
    assert code == 0
    *_, jobset = yaml.safe_load_all(out)
    assert key not in KUBERNETES or text in texts(jobset)


@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes"])
@pytest.mark.parametrize(
    "word",
    [
        "launch.time_limit_min=" + "9" * 5000,
        "launch.time_limit_min=99999999999999999999",
        "launch.grace_s=1e300",
        "launch.grace_s=.nan",
        "launch.spare_nodes=99999999999",
        "launch.mounts=" + "[" * 5000,
        "launch={partition: {partition: x}}",
        "launch.mounts=&a [*a]",
        "train.lr=1e9999",
        "launch.container=!!python/object/apply:os.system [id]",
        "\udcff=1",
        "--ranks-per-node=1000000000",
    ],
)
def test_absurd_values_are_one_message(ask: Ask, scheduler: str, word: str) -> None:
    code, out, err = ask(scheduler, *IN_PODS, word)
    assert code == 2 and out == "" and one_message(err)


@pytest.mark.parametrize("nodes", ["0", "-1", "65537", "9" * 30])
def test_absurd_numbers_of_nodes_are_one_message(ask: Ask, nodes: str) -> None:
    code, out, err = ask("slurm", nodes=nodes)
    assert code == 2 and out == "" and one_message(err) and "--nodes" in err


@pytest.mark.parametrize("nodes", ["nan", "inf", "1.5", "", "0x2", "$(id)"])
def test_what_is_no_number_of_nodes_is_a_wrong_use(ask: Ask, nodes: str) -> None:
    code, out, err = ask("slurm", nodes=nodes)
    assert code == 2 and out == "" and "--nodes" in err and "Traceback" not in err


SHA = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes"])
@pytest.mark.parametrize(
    "image",
    [
        "docker://me:hunter22@reg.example#x/stoker:1",
        "dockerd://me:hunter22@x/stoker:1",
        "DOCKER://me:hunter22@reg.example#x",
        "https://me:hunter22@reg.example/x:1",
        "me:hunter22@reg.example#x/stoker",
        "me:hunter22@reg.example:5000/x/stoker",
        f"me:hunter22@reg.example/x/stoker:1@{SHA}",
        "me:hunt/hunter22#@reg.example#x",
        "me%3Ahunter22@reg.example#x",
        "me:hunter22@",
        "//me:hunter22@reg.example/x",
        "docker://$oauthtoken:hunter22@nvcr.io#nvidia/x",
        "docker://ghp_hunter22hunter22hunter22@ghcr.io#x/y",
    ],
)
def test_a_password_in_the_image_is_refused_unseen(ask: Ask, scheduler: str, image: str) -> None:
    code, out, err = ask(scheduler, *IN_PODS, f"launch.container='{image}'")
    assert code == 2 and one_message(err) and "launch.container" in err and "hunter22" not in out + err


@pytest.mark.parametrize(
    "image",
    [
        "ghcr.io/x/stoker:1",
        "reg.example:5000/x/stoker:1",
        f"reg.example:5000/x/stoker:1@{SHA}",
        f"stoker@{SHA}",
        "docker://nvcr.io#nvidia/x:25.01",
        "docker://me@reg.example:5000#x/stoker:1",
        "docker://$oauthtoken@nvcr.io#nvidia/x",
        "/images/me:25@home.sqsh",
        "./me:25@home.sqsh",
    ],
)
def test_an_image_without_one_is_taken_as_it_is(ask: Ask, place: Path, image: str) -> None:
    code, out, err = ask("slurm", f"launch.container='{image}'", f"launch.mounts=['{place}:{place}']")
    assert code == 0, err
    argv, _ = json.JSONDecoder().raw_decode(out, out.index("["))
    assert value(argv, "--container-image") == image


@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes"])
@pytest.mark.parametrize(
    "word",
    [
        "launch.partition=ghp_hunter22hunter22hunter22",
        "launch.mounts=['/a:/b','/canary-hunter22:/c']",
        "run.name=x-canary-hunter22",
        "run.dir=/runs/https://me:hunter22@x",
        "launch.scratch=/tmp/canary-hunter22",
        "launch.network_interface=canary-hunter22",
        "launch.volume_claim=canary-hunter22",
        "launch.namespace=canary-hunter22",
    ],
)
def test_no_key_carries_a_secret_into_the_job(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, scheduler: str, word: str
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "canary-hunter22")
    code, out, err = ask(scheduler, *IN_PODS, word)
    assert code == 2 and one_message(err) and "hunter22" not in out + err and word.partition("=")[0] in err


def test_a_folder_of_secrets_is_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/run/secrets/google.json")
    mounts = "launch.mounts=['/run/secrets:/run/secrets:ro','/run/secrets/google.json:/google.json']"
    ready = prepared(mounts, "launch.container=x", config=str(tiny(tmp_path)), hardware="cpu", nodes=2, ranks=1)
    assert ready.config.launch.mounts[0] == "/run/secrets:/run/secrets:ro"


def test_a_folder_that_is_gone_is_one_message(ask: Ask, place: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)  # and back, with the fixture
    gone.rmdir()
    code, out, err = ask("slurm", config=str(place / "tiny.yaml"))
    assert code == 2 and out == "" and one_message(err)
