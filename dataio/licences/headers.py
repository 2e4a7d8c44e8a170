"""What the first lines of a file state as its licence."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dataio.licences.expressions import BSD, PROPRIETARY, PUBLIC_DOMAIN, all_of, any_of, family
from dataio.licences.texts import identify
from dataio.licences.wordings import CREATIVE_ADDRESS, LATER, VERSIONED, gnu, normalise, version_of

#: First lines: the longest usual header, MPL 1.1 with its two alternatives, has 1,900 characters.
HEAD_CHARACTERS = 4096
_TRIGGERS = ("licen", "permission", "redistribution", "public domain", "confidential", "unauthorized", "prohibited")
_TAG = re.compile(r"spdx-license-identifier:[ \t]*([^\r\n]*)", re.IGNORECASE)
#: Everything that is in no name or version is a space; what marks comments, alone or at the ends of words, is cut.
_SPACES = {code: " " for code in range(128) if chr(code) not in "abcdefghijklmnopqrstuvwxyz0123456789.+()/-"}
_MARKS = re.compile(r"(?:^|(?<= ))[/+-]+ ?|[/-]+(?= |$)")
_FULL_TEXTS = (
    "permission is hereby granted",
    "redistribution and use in source",
    "permission to use copy modify",
    "provided as-is without any express",
    "free and unencumbered software",
)
_PROPRIETARY_WORDS = ("confidential", "unauthorized", "not be ", "prohibited")
_PROPRIETARY_PHRASE = re.compile(
    r"proprietary and confidential|confidential and proprietary|unauthorized (?:copying|reproduction|use|distribution)"
    r"|(?:may|can) not be (?:copied|reproduced|distributed|disclosed)(?![^.]{0,60} except )|strictly prohibited"
)
_LICENCE_LINE = re.compile(
    r"^\W{0,8}(?:@|__)?licen[sc]e(?:__)?\s*[:= ]\s*[\"']?([^\"'\r\n]{2,80})", re.MULTILINE | re.IGNORECASE
)
_ALTERNATIVE = re.compile(
    r"\bdual(?:ly)?[ -]licen[sc]|(?<!\()at your option|\byou may choose\b|\bchoice of\b|\bor the (?:mit|apache|bsd)\b"
    r"|\b(?:either(?! version| express)|alternatively) (?:\S{1,20} ){0,12}?(?:licen[sc]|gnu|apache|mit|bsd|a?l?gpl)"
)
#: Before a licence's name, without which it is only spoken of.
_GRANT = re.compile(
    r"\b(?:licen[sc]ed|licenses|(?:re)?distributed?|released?|available|provided|governed|covered|subject|under)\b"
)
_GRANT_CHARACTERS = 120
_GNU = re.compile(r"(?:affero |lesser |library )?(?:or lesser )?general public licen[sc]es?\b|\ba?l?gpl(?=v\d|\b)")
_GNU_VERSION = re.compile(r"(?:version|v\.?|licen[sc]e|gpl-?|foundation) ?(\d(?:\.\d)?)|^ ?-?v?(\d(?:\.\d)?)\b")
_ANY_LATER = re.compile(rf"{LATER}|or \(at your option\) any later")
_TAIL_CHARACTERS = 220
#: A word that is always there, a pattern, and the name, or the stem of one whose version is in the first group.
_NAMES = [
    (word, re.compile(r"\b" + pattern), name)
    for word, pattern, name in [
        ("apache", r"apache(?: software)?(?: licen[sc]e)?(?: v(?:ersion)?\.? ?| |-)(1\.[01]|2(?:\.0)?)\b", "Apache"),
        ("mozilla public", r"mozilla public licen[sc]e(?: - | )v(?:ersion)?\.? ?(\d\.\d)", "MPL"),
        ("mpl", r"mpl[ -]?v?(\d\.\d)", "MPL"),
        ("eclipse public", r"eclipse public licen[sc]e(?: - | )v(?:ersion)?\.? ?(\d\.\d)", "EPL"),
        ("common development", r"common development and distribution licen[sc]e", "CDDL-1.0"),
        ("boost software", r"boost software licen[sc]e", "BSL-1.0"),
        (
            "mit",
            r"(?:mit|mit/x11|x11/mit)(?:-style)?(?: (?:or|and) \S{1,20})?(?: open source)?(?: v\S{0,7} \S{1,3})?"
            r"[ -]licen[sc]e",
            "MIT",
        ),
        ("expat", r"expat licen[sc]e", "MIT"),
        ("bsd", r"(?:3-clause|three-clause|new|modified|revised) bsd|\bbsd[ -](?:3|three)[ -]clause", "BSD-3-Clause"),
        ("bsd", r"(?:2-clause|two-clause|simplified) bsd|\bbsd[ -](?:2|two)[ -]clause", "BSD-2-Clause"),
        ("bsd", r"bsd(?:-style)? licen[sc]e", BSD),
        ("isc", r"isc licen[sc]e", "ISC"),
        ("zlib", r"zlib(?:/libpng)? licen[sc]e", "Zlib"),
        ("psf", r"psf licen[sc]e", "PSF-2.0"),
        ("python software", r"python software foundation licen[sc]e", "PSF-2.0"),
        ("unlicen", r"the unlicen[sc]e\b", "Unlicense"),
    ]
]
_PUBLIC_DOMAIN = re.compile(
    r"(?:placed|released|dedicated|put|is|are|work) (?:hereby )?(?:in|to|into) the public domain"
)


def stated(text: str) -> str | None:
    """What the first lines of a file state as its licence: SPDX-License-Identifier tags, which are all there is where
    there are any; otherwise licence texts and the usual phrases.

    >>> stated("# Licensed under the Apache License, Version 2.0 (the \\"License\\");\\nimport os\\n")
    'Apache-2.0'
    """
    head = text[:HEAD_CHARACTERS]
    lower = head.lower()
    if not any(word in lower for word in _TRIGGERS):
        return None
    if "spdx-license-identifier:" in lower:
        return all_of(_tagged(tag) for tag in _TAG.findall(head))
    plain = _MARKS.sub("", " ".join(lower.translate(_SPACES).split()))
    found = list(_phrases(plain))
    if any(begins in plain for begins in _FULL_TEXTS) and (name := identify(head)):
        found.append(name)
    families = {family(name) for name in found if name != BSD}
    found = [name for name in found if name != BSD or BSD not in families]
    if any(word in plain for word in _PROPRIETARY_WORDS) and _PROPRIETARY_PHRASE.search(plain):
        return all_of([*found, PROPRIETARY])
    if found:
        return any_of(found) if len(found) > 1 and _ALTERNATIVE.search(plain) else all_of(found)
    lines = (normalise(line[1].rstrip(" \t\"',;*/->#.")) for line in _LICENCE_LINE.finditer(head))
    return next((name for name in lines if name), None)


def _phrases(plain: str) -> Iterator[str]:
    kinds: set[str] = set()
    for match in _granted(_GNU, plain) if "gpl" in plain or "general public" in plain else ():
        tail = plain[match.end() : match.end() + _TAIL_CHARACTERS].split(" gnu ")[0]
        version = _GNU_VERSION.search(tail)
        name = gnu(match[0], version and (version[1] or version[2]), bool(_ANY_LATER.search(tail)))
        kind = name.split("-")[0]
        if kind not in kinds:  # what follows speaks of it
            kinds.add(kind)
            yield name
    for word, pattern, name in _NAMES:
        if word in plain:
            versions = next((versions for _, stem, versions in VERSIONED if stem == name), None)
            for match in _granted(pattern, plain):
                yield name if versions is None else f"{name}-{version_of(match[1], versions)}"
    if "public domain" in plain and _PUBLIC_DOMAIN.search(plain):
        yield PUBLIC_DOMAIN
    for match in _granted(CREATIVE_ADDRESS, plain) if "creativecommons.org" in plain else ():
        yield "CC0-1.0" if match[3] else f"CC-{match[1].upper()}-{match[2]}"


def _granted(pattern: re.Pattern[str], plain: str) -> Iterator[re.Match[str]]:
    for match in pattern.finditer(plain):
        if _GRANT.search(plain, max(0, match.start() - _GRANT_CHARACTERS), match.start()):
            yield match


def _tagged(tag: str) -> str:
    """Of what follows the tag; a licence that SPDX does not know is a reference, so that it is not taken for none."""
    words = re.match(r"[\w.+() -]*", tag)
    said = words[0].strip(" -") if words else ""
    return normalise(said) or "LicenseRef-" + (re.sub(r"[^A-Za-z0-9.-]+", "-", said).strip("-.")[:80] or "unknown")
