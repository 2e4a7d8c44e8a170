"""A secret never leaves through a log, and what is no secret stays readable."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.secrets import mask

canaries = st.text(string.ascii_letters + string.digits, min_size=16, max_size=48).map("canary".__add__)
SECRET_NAMES = [
    *(
        "WANDB_API_KEY",
        "HF_TOKEN",
        "token",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "aws_access_key_id",
        "apiKey",
    ),
    *(
        "password",
        "PGPASSWORD",
        "db.passwd",
        "client_secret",
        "private-key",
        "SLURM_JWT",
        "Authorization",
        "credentials",
    ),
]
TEXTS = [
    *("{name}={canary}", "{name}: {canary}", "export {name}='{canary} x'", '{{"{name}": "{canary}\\" x"}}'),
    *("{{'{name}': '{canary}', 'a': 1}}", "{name} = {canary},{canary}", "https://host/path?a=1&{name}={canary}"),
    *("train --{name} {canary} --steps 3", "Authorization: Bearer {canary}", "authorization: basic {canary}"),
    *("curl -H 'bearer {canary}'", "https://user:{canary}@host/x", "postgres://{canary}:p@host", "s3 hf_{canary}"),
    *("sk-{canary} ghp_{canary}", "-----BEGIN RSA PRIVATE KEY-----\n{canary}\n-----END RSA PRIVATE KEY-----"),
    *("-----BEGIN PRIVATE KEY-----\n{canary}\ncut off", "eyJhbGciOiJI.eyJzdWIi{canary}.{canary}"),
]


@pytest.mark.parametrize("text", TEXTS)
@given(canary=canaries, name=st.sampled_from(SECRET_NAMES))
def test_no_text_leaks_the_canary(text: str, canary: str, name: str) -> None:
    assert canary not in mask("before " + text.format(name=name, canary=canary) + "\nafter")


@given(
    canary=canaries | st.integers(10**9, 10**12),
    name=st.sampled_from(SECRET_NAMES),
    around=st.sampled_from(["plain", "list", "dict", "deep"]),
)
def test_no_config_leaks_the_canary(canary: Any, name: str, around: str) -> None:
    secret = {"plain": canary, "list": [canary], "dict": {"user": canary}, "deep": [{"a": [canary]}]}[around]
    config = {"run": {"name": "x", "trackers": [{name: secret, "entity": "team"}]}}
    masked = mask(config)
    assert str(canary) not in str(masked)
    assert masked["run"]["name"] == "x" and masked["run"]["trackers"][0]["entity"] == "team"
    assert str(canary) in str(config), "the value that was given is not touched"


@given(canary=canaries)
def test_the_value_of_a_secret_variable_is_masked_wherever_it_appears(canary: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", canary)
        patch.setenv("OTHER_PASSWORD", canary + "longer")
        assert mask({"log": [f"POST {canary}longer/{canary}"]}) == {"log": ["POST ***/***"]}


@pytest.mark.parametrize(
    "harmless",
    [
        "step 100 loss 2.31 nats per token: 2.31 tokens/s 512",
        "num_tokens=512, tokenizer: data/demo/tokenizer.json, eos_token: <|endoftext|>",
        "commit 0123456789abcdef0123456789abcdef01234567",
        "https://host:8080/path@tag basic understanding of private keys",
        {"block_tokens": 131072, "eos_token": "<|endoftext|>", "key": "layers.0.ffn", "api_key": None, "lr": 0.1},
    ],
)
def test_what_is_no_secret_stays(harmless: Any) -> None:
    assert mask(harmless) == harmless
