"""SPDX licence expressions: canonical form, what they permit, and how statements are joined."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

#: Said to be BSD, not which; every one of them is permissive.
BSD = "LicenseRef-BSD"
PUBLIC_DOMAIN = "LicenseRef-public-domain"
PROPRIETARY = "LicenseRef-proprietary"
#: A condition that is none of a permissive licence's: no commercial use, no evil, no nuclear facility.
RESTRICTED = "LicenseRef-restricted"
#: Licences under which a text may be used, changed and passed on, with attribution at most: those that the Blue Oak
#: Council rates (https://blueoakcouncil.org/list) and that are met in practice, the public domain, Creative Commons and
#: Open Data Commons with attribution only.
# fmt: off
PERMISSIVE = frozenset([
    "0BSD", "AFL-3.0", "Apache-1.1", "Apache-2.0", "BSD-1-Clause", "BSD-2-Clause", "BSD-2-Clause-Patent",
    "BSD-3-Clause", "BSD-3-Clause-Clear", "BSD-4-Clause", "BSD-Source-Code", "BSL-1.0", "Beerware", "BlueOak-1.0.0",
    "CC-BY-2.0", "CC-BY-2.5", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "CNRI-Python", "ECL-2.0", "FTL", "HPND", "ICU",
    "IJG", "ISC", "Info-ZIP", "Libpng", "MIT", "MIT-0", "MIT-CMU", "MIT-Modern-Variant", "MITNFA", "MulanPSL-2.0",
    "NCSA", "NTP", "ODC-By-1.0", "OLDAP-2.8", "OpenSSL", "PDDL-1.0", "PHP-3.01", "PSF-2.0", "PostgreSQL",
    "Python-2.0", "Python-2.0.1", "SGI-B-2.0", "SMLNJ", "Spencer-94", "TCL", "UPL-1.0", "Unicode-3.0",
    "Unicode-DFS-2016", "Unlicense", "W3C", "WTFPL", "X11", "Xnet", "ZPL-2.1", "Zlib", "blessing", "bzip2-1.0.6",
    "curl", "libpng-2.0", "libtiff", "zlib-acknowledgement", BSD, PUBLIC_DOMAIN,
])
# fmt: on
#: Longest expression that is read, in characters, and how deep it may nest: beyond any that means something.
LONGEST, _DEEPEST = 1000, 20
#: GNU licences as SPDX wrote them before version 3 of its list.
_OLD_NAME = re.compile(r"((?:A?L?GPL|GFDL)-\d\.\d)(\+?)")
_OPERATORS = frozenset(["AND", "OR", "WITH", "(", ")"])


@lru_cache(4096)
def canonical(text: str) -> str | None:
    """An SPDX expression in SPDX's own letters and newest names; None if it is none.

    >>> canonical("gpl-2.0+ or (mit and bsd-3-clause)")
    'GPL-2.0-or-later OR (MIT AND BSD-3-Clause)'
    """
    if len(text) > LONGEST or text.count("(") > _DEEPEST:
        return None
    try:
        expression = str(canonicalize_license_expression(text))
    except InvalidLicenseExpression:
        return None
    tokens = _tokens(expression)
    while tokens[0] == "(" and _closing(tokens, 0) == len(tokens) - 1:
        tokens = tokens[1:-1]
    for place, token in enumerate(tokens):
        if old := _OLD_NAME.fullmatch(token):
            tokens[place] = f"{old[1]}-{'or-later' if old[2] else 'only'}"
    return " ".join(tokens).replace("( ", "(").replace(" )", ")")


def permissive(expression: str, allowed: frozenset[str] = PERMISSIVE) -> bool:
    """Whether an SPDX expression leaves a way that is allowed: one side of OR, both of AND. An exception (WITH) and
    "+" only add to what a licence permits. False for what is no expression.

    >>> permissive("MIT OR GPL-2.0-only"), permissive("MPL-2.0 AND MIT"), permissive("(MIT OR ISC) AND Zlib")
    (True, False, True)
    """
    known = canonical(expression)
    return known is not None and _allowed(_tokens(known), allowed)


def all_of(expressions: Iterable[str]) -> str | None:
    """The expression under which all of some hold; None of none.

    >>> all_of(["MIT", "ISC OR Zlib", "MIT"])
    '(ISC OR Zlib) AND MIT'
    """
    plain = {part for one in expressions for part in ([one] if " OR " in one else one.split(" AND "))}
    return _joined(" AND ", sorted(plain), " OR ")


def any_of(expressions: Iterable[str]) -> str | None:
    """The expression under which one of some may be chosen; None of none."""
    return _joined(" OR ", sorted(set(expressions)), " AND ")


def names(expression: str) -> set[str]:
    """Licences that a canonical expression names, its exceptions not.

    >>> sorted(names("MIT OR (GPL-2.0-only WITH Classpath-exception-2.0)"))
    ['GPL-2.0-only', 'MIT']
    """
    tokens = _tokens(expression)
    exceptions = {place + 1 for place, token in enumerate(tokens) if token == "WITH"}
    return {token for place, token in enumerate(tokens) if token not in _OPERATORS and place not in exceptions}


def family(name: str) -> str:
    """One for all names that stand for, or contain, the same text: BSD is each of its kinds, a GNU licence's text does
    not say whether later versions will do, and the Python Software Foundation's licence is a part of Python's."""
    if name == BSD or re.fullmatch(r"BSD-[1-4]-Clause", name):
        return BSD
    if name in ("PSF-2.0", "Python-2.0", "Python-2.0.1"):
        return "Python-2.0"
    return re.sub(r"-(?:only|or-later)$|\+$", "", name)


def _joined(operator: str, expressions: list[str], other: str) -> str | None:
    if len(expressions) < 2:
        return expressions[0] if expressions else None
    return operator.join(f"({one})" if other in one else one for one in expressions)


def _tokens(expression: str) -> list[str]:
    return expression.replace("(", " ( ").replace(")", " ) ").split()


def _closing(tokens: list[str], place: int) -> int:
    """Where the parenthesis that opens at a place closes."""
    depth = 1
    while depth:
        place += 1
        depth += (tokens[place] == "(") - (tokens[place] == ")")
    return place


def _allowed(tokens: list[str], allowed: frozenset[str]) -> bool:
    """Of a canonical expression's tokens: AND binds tighter than OR."""
    before, every, place = False, True, 0  # an alternative before this one holds; all of this one so far do
    while place < len(tokens):
        token = tokens[place]
        if token == "OR":
            before, every = before or every, True
        elif token == "(":
            end = _closing(tokens, place)
            every = every and _allowed(tokens[place + 1 : end], allowed)
            place = end
        elif token != "AND":
            ways = {token, token.rstrip("+")}
            if tokens[place + 1 : place + 2] == ["WITH"]:
                ways.add(" ".join(tokens[place : place + 3]))
                place += 2
            every = every and not allowed.isdisjoint(ways)
        place += 1
    return before or every
