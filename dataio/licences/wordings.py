"""What people write in a field called "licence", and the SPDX expression that it means."""

from __future__ import annotations

import re
from functools import lru_cache

from dataio.licences.expressions import BSD, LONGEST, PROPRIETARY, PUBLIC_DOMAIN, all_of, any_of, canonical

#: Wordings, as `_plain` leaves them, that no rule below makes out.
# fmt: off
_WORDINGS = {
    "mit": "MIT", "expat": "MIT", "mit expat": "MIT", "expat mit": "MIT", "mit x11": "MIT", "x11 mit": "MIT",
    "expat mit x11": "MIT", "mit mit": "MIT", "mit style": "MIT", "mit no attribution": "MIT-0", "mit 0": "MIT-0",
    "mit cmu": "MIT-CMU", "mit cmu mit": "MIT-CMU", "historical permission notice and disclaimer hpnd": "HPND",
    "bsd": BSD, "bsd style": BSD, "bsd like": BSD, "bsd derived": BSD, "revised bsd": "BSD-3-Clause",
    "new bsd": "BSD-3-Clause", "bsd new": "BSD-3-Clause", "modified bsd": "BSD-3-Clause", "bsd 3": "BSD-3-Clause",
    "bsd3": "BSD-3-Clause", "bsd simplified": "BSD-2-Clause", "simplified bsd": "BSD-2-Clause", "bsd 2": "BSD-2-Clause",
    "bsd2": "BSD-2-Clause", "freebsd": "BSD-2-Clause", "zero clause bsd": "0BSD", "bsd zero clause": "0BSD",
    "bsd zero clause 0bsd": "0BSD", "isc": "ISC", "isc iscl": "ISC", "zlib": "Zlib", "zlib libpng": "Zlib",
    "al2": "Apache-2.0", "asf": "Apache-2.0", "apache2": "Apache-2.0",
    "python foundation": "PSF-2.0", "psf": "PSF-2.0", "psfl": "PSF-2.0", "python": "Python-2.0",
    "unlicense": "Unlicense", "unlicense unlicense": "Unlicense", "wtfpl": "WTFPL", "wtfpl 2": "WTFPL",
    "cc0": "CC0-1.0", "cc0 1.0": "CC0-1.0", "cc0 1.0 universal": "CC0-1.0", "creative commons zero": "CC0-1.0",
    "cc0 1.0 universal cc0 1.0 public domain dedication": "CC0-1.0", "public domain": PUBLIC_DOMAIN,
    "boost": "BSL-1.0", "boost 1.0": "BSL-1.0", "boost 1.0 bsl 1.0": "BSL-1.0", "postgresql": "PostgreSQL",
    "artistic 2": "Artistic-2.0", "artistic 2.0": "Artistic-2.0", "perl": "Artistic-1.0-Perl OR GPL-1.0-or-later",
    "perl 5": "Artistic-1.0-Perl OR GPL-1.0-or-later", "ruby": "Ruby", "openssl": "OpenSSL", "w3c": "W3C",
    "university of illinois ncsa open source": "NCSA", "ms pl": "MS-PL", "microsoft public": "MS-PL",
    "sil open font 1.1": "OFL-1.1", "sil open font 1.1 ofl 1.1": "OFL-1.1", "ofl": "OFL-1.1", "zpl 2.1": "ZPL-2.1",
    "zope public": "ZPL-2.1", "universal permissive upl": "UPL-1.0", "blue oak model 1.0.0": "BlueOak-1.0.0",
    "proprietary": PROPRIETARY, "other proprietary": PROPRIETARY, "commercial": PROPRIETARY, "unlicensed": PROPRIETARY,
    "closed source": PROPRIETARY, "all rights reserved": PROPRIETARY, "proprietary and confidential": PROPRIETARY,
    "business source 1.1": "BUSL-1.1", "elastic 2.0": "Elastic-2.0", "server side public": "SSPL-1.0",
}
#: Licences with versions: how they are named, SPDX's stem, and the versions there are, the newest last.
VERSIONED = [
    (r"apache|asl", "Apache", ["1.0", "1.1", "2.0"]),
    (r"mozilla public|mpl", "MPL", ["1.0", "1.1", "2.0"]),
    (r"eclipse public|epl", "EPL", ["1.0", "2.0"]),
    (r"common development and distribution|cddl", "CDDL", ["1.0", "1.1"]),
    (r"european union public|eupl", "EUPL", ["1.0", "1.1", "1.2"]),
    (r"academic free|afl", "AFL", ["1.1", "1.2", "2.0", "2.1", "3.0"]),
    (r"open software|osl", "OSL", ["1.0", "1.1", "2.0", "2.1", "3.0"]),
    (r"educational community|ecl", "ECL", ["1.0", "2.0"]),
]
_GNU = [
    ("affero|agpl", "AGPL", ["1.0", "3.0"]),
    ("lesser|library|lgpl", "LGPL", ["2.0", "2.1", "3.0"]),
    ("free documentation|gfdl|fdl", "GFDL", ["1.1", "1.2", "1.3"]),
    ("general public|gpl", "GPL", ["1.0", "2.0", "3.0"]),
]
_CREATIVE_PARTS = {
    "attribution": "BY", "by": "BY", "noncommercial": "NC", "non commercial": "NC", "nc": "NC",
    "sharealike": "SA", "share alike": "SA", "sa": "SA", "noderivatives": "ND", "noderivs": "ND", "nd": "ND",
}
# fmt: on
LATER = r"any later|or later|or newer|or greater|or above|and later|\d\.?\d?\s?\+|gplv?\+"
CREATIVE_ADDRESS = re.compile(r"creativecommons\.org/(?:licenses/([a-z-]+)/(\d\.\d)|publicdomain/(zero|mark))")
_GNU_WORDS = re.compile(
    r"(?:(?:gnu|affero|lesser|library|free|documentation|general|public|a?l?gpl|g?fdl|or|and|any|later|newer|greater"
    r"|above|only|\d\.\d|\d)(?: |$))+"
)
_CREATIVE_NAME = re.compile(
    r"(?:creative commons|cc) ?((?:(?:attribution|by|non ?commercial|nc|share ?alike|sa|noderiv\w+|nd) ?)+)"
    r"(\d\.\d)?(?: international| unported| generic)?(?: cc by.*)?"
)
_CLAUSES = re.compile(r"(?:bsd )?([1-4]|two|three) clause(?: bsd)?|bsd ([1-4]) clause .*")
_NO_STATEMENT = re.compile(r"\bnot\b|\bnon\b|\bsee\b|compatible|\bexcept|\bcontributions\b")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+")
_TEXT_ADDRESS = re.compile(
    r"(?:opensource\.org/licenses?|spdx\.org/licenses|choosealicense\.com/licenses|apache\.org/licenses"
    r"|gnu\.org/(?:copyleft|licenses(?:/old-licenses)?)|mozilla\.org/(?:en-us/)?mpl)/([\w.+-]+)"
)
_DIVIDERS = [(r"\s+or\s+|\s*\|\|?\s*", any_of), (r"\s*/\s*", any_of), (r"\s*[,;&]\s*(?:and\s+)?|\s+and\s+", all_of)]


@lru_cache(4096)
def normalise(expression: str) -> str | None:
    """The SPDX expression that a wording means; None if it is empty or cannot be told.

    Takes expressions, names, trove classifiers and addresses of licences. A name without a version means the newest
    one, of the GNU licences every one, as these define it. "/" and "or" divide alternatives; a comma and "and" do not.

    >>> normalise("License :: OSI Approved :: MIT License"), normalise("GPLv3+"), normalise("apache 2.0 / MIT")
    ('MIT', 'GPL-3.0-or-later', 'Apache-2.0 OR MIT')
    >>> normalise("see LICENSE") is None
    True
    """
    text = " ".join(expression[: 2 * LONGEST].split("::")[-1].split())
    if not text or len(text) > LONGEST:
        return None
    return canonical(text) or _named(text) or _divided(text)


def gnu(words: str, version: str | None, later: bool) -> str:
    """The GNU licence of a kind ("lesser general public"), of a version if one is said, or later ones.

    >>> gnu("lesser general public", "2.1", True), gnu("gpl", None, False)
    ('LGPL-2.1-or-later', 'GPL-1.0-or-later')
    """
    stem, versions = next((stem, versions) for pattern, stem, versions in _GNU if re.search(pattern, words))
    if version is None:
        return f"{stem}-{versions[0]}-or-later"
    return f"{stem}-{version_of(version, versions)}-{'or-later' if later else 'only'}"


def version_of(said: str | None, versions: list[str]) -> str:
    """The version that is meant, as SPDX writes it; the newest if none is said or there is no such."""
    return next((version for version in versions if said in (version, version.removesuffix(".0"))), versions[-1])


def _named(text: str) -> str | None:
    """Of one name."""
    lower = re.sub(r"\(see [^)]*\)", " ", text.lower())
    if address := _ADDRESS.search(lower):
        return _addressed(address[0])
    plain = _plain(lower)
    if found := _WORDINGS.get(plain):
        return found
    if len(text) > 100 or _NO_STATEMENT.search(lower):
        return None
    if clauses := _CLAUSES.fullmatch(plain):
        number = clauses[1] or clauses[2]
        return f"BSD-{ {'two': '2', 'three': '3'}.get(number, number) }-Clause"
    if creative := _CREATIVE_NAME.fullmatch(plain):
        parts = re.findall("|".join(_CREATIVE_PARTS), creative[1])
        return canonical(f"CC-{'-'.join(_CREATIVE_PARTS[part] for part in parts)}-{creative[2] or '4.0'}")
    numbers = re.findall(r"\d+(?:\.\d+)?", plain)
    if _GNU_WORDS.fullmatch(plain) and len(set(numbers)) <= 1 and len(set(re.findall(r"\ba?l?gpl\b", plain))) <= 1:
        kind = next((pattern for pattern, _, _ in _GNU if re.search(rf"\b(?:{pattern})\b", plain)), None)
        if kind is not None:
            return gnu(kind.split("|")[0], numbers[0] if numbers else None, bool(re.search(LATER, lower)))
    for pattern, stem, versions in VERSIONED:
        if re.fullmatch(rf"(?:(?:{pattern}|[\d.]+)(?: |$))+", plain) and len(set(numbers)) <= 1:
            return f"{stem}-{version_of(numbers[0] if numbers else None, versions)}"
    return None


def _plain(lower: str) -> str:
    """The words that tell licences from one another."""
    if "unlicense" in lower:
        return " ".join(re.findall("unlicensed?", lower))
    words = re.sub(
        r"licen[sc]ed?s?\b|\bversion\b|\bthe\b|\bsoftware\b|\bagreement\b|\bunder\b|\bterms of\b", " ", lower
    )
    words = re.sub(r"\bv\.? ?(?=\d)|(?<=[a-z])v(?=\d)", " ", words)
    return " ".join(re.findall(r"[a-z0-9]+(?:\.[0-9]+)*", words))


def _addressed(address: str) -> str | None:
    """Of the address of a licence's text."""
    if creative := CREATIVE_ADDRESS.search(address):
        return "CC0-1.0" if creative[3] else canonical(f"CC-{creative[1]}-{creative[2]}")
    place = _TEXT_ADDRESS.search(address)
    if place is None:
        return None
    name = re.sub(r"[.]+$|\.(?:en\.)?(?:html?|txt|php)$", "", place[1]).replace("-license", "")
    if "apache.org" in place[0] or "mozilla.org" in place[0]:
        name = ("MPL-" if "mozilla" in place[0] else "Apache-") + name.removeprefix("license-")
    return canonical(name) or _named(name)


def _divided(text: str) -> str | None:
    """Of names that "or", "/", "and" or commas divide, each of which must be told."""
    text = re.sub(r"(?i)^(?:dual|your choice of|either)\b:?|\b(?:dual[- ])?licensed under\b", " ", text).strip()
    for divider, join in _DIVIDERS:
        parts = [part for part in re.split(f"(?i:{divider})", text) if part.strip()]
        found = [normalise(part) for part in parts] if len(parts) > 1 else []
        if found and all(found):
            return join(name for name in found if name)
    return None
