"""Values that a person typed, on their way to a scheduler: data, never shell text; and which of them are secret."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig
from pretrain.config_base import leaves
from stoker.errors import Refusal
from stoker.secrets import SHORTEST, mask_values

#: Configuration values that are masked wherever they are written reach the nodes in this variable, as JSON by key. Its
#: name marks it as a secret for ``stoker.secrets``.
SECRETS = "STOKER_CONFIG_SECRET"
#: Names of accounts, partitions and queues.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]*")
#: Of a path (PATH_MAX of linux/limits.h), and so of everything else that is given to a scheduler.
MOST_CHARACTERS = 4096
#: Bytes of the name of a file (NAME_MAX of linux/limits.h).
LONGEST_NAME = 255


def refuse_control(what: str, text: str) -> str:
    """The text, refused where it is longer than any path, or holds a line break, another control character, or half of
    a character."""
    if len(text) > MOST_CHARACTERS:
        raise Refusal(f"{what} {text[:40]!r}... has {len(text):,} characters, and {MOST_CHARACTERS:,} are the most")
    if wrong := next((sign for sign in text if unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp")), None):
        raise Refusal(f"{what} {text!r} holds the control character {wrong!r}: remove it")
    return text


def refuse_folder(what: str, path: Path) -> None:
    """Refuse a path that no folder can have."""
    refuse_control(what, str(path))
    if long := next((part for part in path.parts if len(part.encode()) > LONGEST_NAME), None):
        raise Refusal(f"{what}: {long[:40]!r}... has {len(long.encode())} bytes, and {LONGEST_NAME} are the most")


def refuse_name(key: str, text: str) -> str:
    """The text, refused where it is no plain name."""
    refuse_control(key, text)
    if not NAME.fullmatch(text):
        raise Refusal(f"{key}={text!r} is no name: letters, digits, dot, dash, underscore, @ and + are")
    return text


def holds_secret(text: str) -> bool:
    """The text shows a secret, by its look or as a value of the environment. A path to one does not
    (GOOGLE_APPLICATION_CREDENTIALS), nor a name: ``/run/secrets:/run/secrets`` is a mount."""
    for value in os.environ.values():
        text = text.replace(value, "") if value.startswith("/") and len(value) >= SHORTEST else text
    return mask_values(text) != text


def refuse_image(text: str) -> str:
    """The name of a container image: any text on one line without spaces around it."""
    refuse_control("launch.container", text)
    if not text or text != text.strip() or text.startswith("-"):
        raise Refusal(f"launch.container={text!r} is no image")
    return text


def split_mount(text: str) -> tuple[str, str, bool]:
    """HOST, CONTAINER and whether it is read-only, of ``HOST:CONTAINER[:ro]``."""
    refuse_control("launch.mounts", text)
    host, _, rest = text.partition(":")
    inside, _, mode = rest.partition(":")
    if not (host.startswith("/") and inside.startswith("/")) or mode not in ("", "ro") or "," in text:
        raise Refusal(f"launch.mounts: {text!r} is not HOST:CONTAINER or HOST:CONTAINER:ro with two absolute paths")
    return host, inside, mode == "ro"


def concealed(config: RunConfig) -> dict[str, Any]:
    """Keys whose values are masked in every file, with the values: a webhook, a password in a path."""
    masked = dict(leaves(config.masked()))
    return {key: _plain(value) for key, value in leaves(config) if value != masked.get(key)}


def overrides(secrets: str | None) -> list[str]:
    """What the variable ``SECRETS`` says, as overrides of the masked configuration."""
    if not secrets:
        return []
    try:
        values = json.loads(secrets)
    except ValueError:
        values = None
    if not isinstance(values, Mapping):
        raise Refusal(f"the variable {SECRETS} is not a JSON object of configuration keys and values")
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def one_line(words: Iterable[str] | str) -> str:
    """What a program said, on one line."""
    return " ".join((words if isinstance(words, str) else " ".join(words)).split())


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
