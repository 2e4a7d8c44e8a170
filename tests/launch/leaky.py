"""A worker that tells its secrets: rank 1 prints them and raises an error that holds them, once, in every form."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from base64 import b64encode
from pathlib import Path
from typing import Any
from urllib.parse import quote

#: Names of variables whose values are secrets.
NAMES = ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "STOKER_TRACKER_TOKEN", "DEPLOY_PRIVATE_KEY")
#: Names the file that is there once it has happened; and the address that is in the configuration.
TOLD, WEBHOOK = "LEAKY_TOLD", "LEAKY_WEBHOOK"


def confession(webhook: str | None = None) -> str:
    """Everything that this process should keep to itself, as programs write such things."""
    said = []
    for secret in (*(os.environ[name] for name in NAMES), *([webhook] if webhook else [])):
        said += [secret, json.dumps(secret), repr(secret), quote(secret), quote(secret, safe=""), secret.encode().hex()]
        said += [b64encode(f"{user}:{secret}".encode()).decode() for user in ("a", "me", "you")]
    return " | ".join(said)


def tell(webhook: str | None = None) -> None:
    said = confession(webhook)
    print(f"login with {said}", flush=True)
    warnings.warn(said, stacklevel=1)
    logging.getLogger("leaky").error("no answer: %s", said)
    print(json.dumps({"environment": {name: os.environ[name] for name in NAMES}}), file=sys.stderr, flush=True)
    raise RuntimeError(f"the server refused {said}")


def inject() -> None:
    from pretrain import loop

    whole = loop.train_step

    def train_step(trainer: Any, step: int, *rest: Any, **more: Any) -> Any:
        told = Path(os.environ[TOLD])
        if os.environ["RANK"] == "1" and step == 4 and not told.exists():
            told.touch()
            tell(os.environ[WEBHOOK])
        return whole(trainer, step, *rest, **more)

    loop.train_step = train_step


if __name__ == "__main__":
    from launch.supervise import worker

    whole = worker.prepare
    worker.prepare = lambda arguments: (whole(arguments), inject())  # type: ignore[func-returns-value]
    sys.exit(worker.main(sys.argv[1:]))
