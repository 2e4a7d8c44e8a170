"""Masking of secrets before anything is logged, kept in a run directory or sent to a tracker.

A secret is known by its name (``WANDB_API_KEY``, ``password``), by its shape (``hf_...``, a bearer token, a private
key), or by being the value of a secretly named variable of this process's environment. In doubt, text is masked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, overload

MASK = "***"

_NAME = (
    r"(?:api|access|account|private|secret)[_-]?key(?:[_-]?id)?|secrets?|passw(?:or)?d|passphrase|credentials?"
    r"|authorization|cookie|jwt|(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!per )token"
)
#: ``hf_token`` and ``TOKEN`` name secrets; ``num_tokens``, ``tokenizer`` and ``eos_token`` (a piece of text) do not.
_SECRET_NAME = re.compile(rf"(?:{_NAME})$", re.IGNORECASE)
_SHAPE = re.compile(
    r"""
      -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)
    | \b(?:hf_|sk-|gh[opsur]_|github_pat_|glpat-|xox[abprs]-|wandb_v\d_)[A-Za-z0-9_-]{16,}
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b
    | \beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+
    | (?<=://)[^\s/@]*:[^\s/]*(?=@)
    | (?<=hooks\.slack\.com/services/)[\w/-]+
    | (?<=discord\.com/api/webhooks/)[\w/-]+
    """,
    re.VERBOSE | re.DOTALL,
)
#: ``name=value``, ``"name": "value"``, ``Authorization: Bearer value`` and ``--name value``; the value is the rest of
#: the word, separators included: a password may hold them.
_ASSIGNED = re.compile(
    rf"""((?:{_NAME})["']?\s*[=:]\s*|--[\w.-]*(?:{_NAME})\s+|\bbearer\s+)"""
    r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|(?:bearer\s+|basic\s+)?\S+)""",
    re.IGNORECASE,
)


@overload
def mask(value: str) -> str: ...
@overload
def mask(value: Mapping[str, Any]) -> dict[str, Any]: ...
@overload
def mask(value: Any) -> Any: ...
def mask(value: Any) -> Any:
    """A copy of a text, or of a nest of dicts and lists, with every secret in it replaced by ``***``.

    Below a secret name everything goes but None (which says that it is not set). Other types come back as they are.
    """
    return _mask(value, _environment_secrets())


def _mask(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        return _mask_text(value, known)
    if isinstance(value, Mapping):
        return {
            name: MASK if _SECRET_NAME.search(str(name)) and item is not None else _mask(item, known)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mask(item, known) for item in value]
    return value


def _mask_text(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, MASK)
    text = _SHAPE.sub(MASK, text)
    return _ASSIGNED.sub(lambda found: found[1] + MASK, text)


def _environment_secrets(shortest: int = 8) -> list[str]:
    """Longest first, so that a secret which contains another one goes whole. Shorter ones would mask common words."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= shortest}
    return sorted(values, key=len, reverse=True)
