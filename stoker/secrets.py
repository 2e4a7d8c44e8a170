"""Masking of secrets before anything is logged, kept in a run directory or sent to a tracker.

A secret is known by its name (``WANDB_API_KEY``, ``password``), by its shape (``hf_...``, a bearer token, a private
key), or by being the value of a secretly named variable of this process's environment, or one that it was told of
(``remember``): as it is, or as JSON, a URL, base64 and the like write it. In doubt, text is masked.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, overload
from urllib.parse import quote, quote_plus

MASK = "***"
#: Characters of a value that is masked wherever it appears: shorter ones would mask common words.
SHORTEST = 8
_remembered: set[str] = set()

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
    | (?:(?<=://)|(?<=:/)(?!/))[^\s/@]*:[^\s/]*(?=@)  # a path has one slash
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


def mask_values(text: str) -> str:
    """Only what is known to be a secret or has the shape of one: for a message that speaks of secrets, by their names
    (``--secret takes VARIABLE=SECRET/KEY``)."""
    return _mask_values(text, _environment_secrets())


def _mask_values(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, MASK)
    return _SHAPE.sub(MASK, text)


def _mask_text(text: str, known: list[str]) -> str:
    text = _mask_values(text, known)
    return _ASSIGNED.sub(lambda found: found[1] + MASK, text)


def remember(secret: str) -> None:
    """From now on this process masks the value wherever it appears, and of an address the parts that look like keys."""
    path = secret.partition("://")[2].partition("/")[2]
    _remembered.update({secret, *re.findall(r"(?=[^/?&=]*\d)[^/?&=]{16,}", path)})


def _environment_secrets() -> list[str]:
    """Longest first, so that a secret which contains another one goes whole."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)} | _remembered
    return sorted({form for value in values for form in _forms(value)}, key=len, reverse=True)


@cache
def _forms(secret: str) -> frozenset[str]:
    """The texts that give a value away: itself, and as others write it. None of a short one."""
    if len(secret) < SHORTEST:
        return frozenset()
    lines = [line.strip() for line in secret.splitlines()]  # as logs are masked, one by one
    whole = [secret, *(line for line in lines if len(line) >= 2 * SHORTEST)]
    return frozenset(form for text in whole for form in _written(text) if len(form) >= SHORTEST)


def _written(secret: str) -> Iterator[str]:
    data = secret.encode("utf-8", "surrogateescape")
    yield secret
    yield from (json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1])
    yield from (repr(secret)[1:-1], repr(data)[2:-1], data.hex())
    for url in (quote(data), quote(data, safe=""), quote_plus(data)):
        yield from (url, re.sub("%..", lambda found: found[0].lower(), url))
    for encode in (b64encode, urlsafe_b64encode):
        for before in range(3):  # bytes that it may stand behind: of a name, say, as in ``user:password``
            first, last = -(-before * 8 // 6), (before + len(data)) * 8 // 6
            yield encode(bytes(before) + data).decode()[first:last]
