"""What tells of a file that nobody wrote it here: its name, or a line at its head or tail that says so.

Kinds of names follow the lists of GitHub's linguist (vendor.yml, generated.rb), in our own words and fewer of them.
"""

from __future__ import annotations

import re

#: Bytes at either end of a file that are searched for a mark of generation.
HEAD_BYTES, TAIL_BYTES = 4096, 512

_VENDORED = re.compile(
    r"""(?:^|/)(?:
        node_modules | bower_components | jspm_packages | godeps | carthage | pods | externals? | extern
        | _?vendor(?:ed|s|_bundles?)? | third[-_]?part(?:y|ies) | 3rd[-_]?party
        | \.yarn/(?:releases|plugins) | gradle/wrapper | \.mvn/wrapper
    )/
    | (?:^|/)(?:
        (?:jquery|bootstrap|modernizr|html5shiv|mathjax|codemirror|underscore|lodash|knockout|backbone|font-?awesome
           |(?:angular|react|vue|d3|moment|prettify|require|highlight|chart|three|ace|normalize|foundation|ember)
            (?=[-.](?:v?\d|min\b|umd\b|production\b|bundle\b|slim\b)))
        (?:[-.](?:v?\d+(?:\.\d+)*|min|umd|production|bundle|slim|core|pack|all))*\.(?:js|css)
        | gradlew(?:\.bat)? | mvnw(?:\.cmd)? | ltmain\.sh | aclocal\.m4 | config\.(?:guess|sub) | install-sh | depcomp
        | versioneer\.py | ez_setup\.py | get-pip\.py
    )$""",
    re.IGNORECASE | re.VERBOSE,
)
_LOCK_FILE = re.compile(
    r"""(?:^|/)(?:
        package-lock\.json | npm-shrinkwrap\.json | yarn\.lock | pnpm-lock\.ya?ml | bun\.lock | deno\.lock | cargo\.lock
        | poetry\.lock | pipfile\.lock | uv\.lock | pdm\.lock | pixi\.lock | conda-lock\.ya?ml | composer\.lock
        | gemfile\.lock | go\.sum | go\.work\.sum | flake\.lock | mix\.lock | rebar\.lock | pubspec\.lock
        | podfile\.lock | package\.resolved | cartfile\.resolved | packages\.lock\.json | paket\.lock
        | project\.assets\.json | gradle\.lockfile | stack\.yaml\.lock | cabal\.project\.freeze
        | \.terraform\.lock\.hcl | module\.bazel\.lock
    )$""",
    re.IGNORECASE | re.VERBOSE,
)
_GENERATED_NAME = re.compile(
    r"""(?:
        _pb2(?:_grpc)?\.pyi? | \.pb(?:\.gw|_test)?\.go | \.pb\.(?:cc|h|c) | _pb\.(?:js|d\.ts|rb) | \.pb\.swift
        | _grpc\.pb\.(?:cc|h) | \.g(?:\.i)?\.cs | \.(?:g|freezed|gr|pb|pbenum|pbjson|pbserver)\.dart
        | \.designer\.(?:cs|vb) | \.generated\.\w+ | [-_.]generated\.(?:go|rs|py|ts|js|java|h|c|cc|cpp)
        | /zz_generated[\w.]*\.go
        | /bindata\.go | /(?:moc|qrc|ui)_\w+\.(?:cpp|h) | \.(?:js|css)\.map | \.tab\.[ch] | /lex\.yy\.c
        | /generated/[^/]+ | /__generated__/[^/]+
    )$""",
    re.IGNORECASE | re.VERBOSE,
)
_MINIFIED_NAME = re.compile(r"[-.]min\.(?:js|mjs|cjs|css|svg)$", re.IGNORECASE)

_GENERATED = r"(?:auto(?:matically)?[- ]?|machine[- ]|mechanically[ ]|programmatically[ ])?generated\b"
_FILE = r"(?:file|code|source|module|header|script|document|package|class|stub|binding)s?\b"
#: How a line begins that says so of its file, and what says so wherever in a line it stands.
_FIRST = r"""(?:
      (?:%(file)s[ ](?:(?:is|was)[ ])?)? %(generated)s[ ]
      (?:by|from|using|with|via|on|file|code|source|header|module|automatically)\b
    | auto(?:matically)?[- ]?generated\b
    | (?:please[ ])?(?:do[ ]not|don't)[ ]edit\b )"""
_ANYWHERE = r"""(?:
      @generated\b
    | \b(?:this|these)[ ](?:\w+[ ])?%(file)s[ ](?:(?:is|was|are|were|has[ ]been|have[ ]been)[ ])?
      (?:\W?\w+\W?[ ])?%(generated)s (?![ ](?:when|if|for|only)\b)
    | (?-i:\bDO[ ]NOT[ ](?:EDIT|MODIFY)\b)
    | (?:do[ ]not|don't)[ ](?:edit|modify|change|alter)[ ]
      (?:(?:this|the)[ ](?:generated[ ])?%(file)s | (?:it[ ])?(?:by[ ]hand|manually|directly)\b) )"""
#: In a comment, or in a line of words as a docstring has them. A program that writes such a line has it in quotes.
_GENERATED_LINE = re.compile(
    r"""^[ \t]*(?:
          (?:\#|//|/\*|\*|--|;|%|<!--|\"\"\"|'''|\.\.|dnl\b|rem\b)[^\w\n"'`@]*+
          (?P<comment> %(first)s | [^\n"'`]*?(?P<within> %(anywhere)s))
        | (?P<words> %(first)s | %(anywhere)s) [^\n"'`=()]*$
    )""".replace("%(first)s", _FIRST)
    .replace("%(anywhere)s", _ANYWHERE)
    .replace("%(file)s", _FILE)
    .replace("%(generated)s", _GENERATED),
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
#: One of these is in every such line: most files are done after these.
_HINTS = (b"generated", b"t edit", b"t modify", b"t change", b"t alter")


def vendored(path: str) -> bool:
    """Whether a path is that of a copy of other people's code.

    >>> [vendored(p) for p in ("src/vendor/x.go", "static/jquery-3.6.0.min.js", "src/vendors.py", "lib/external.c")]
    [True, True, False, False]
    """
    return _VENDORED.search(path) is not None


def lock_file(path: str) -> bool:
    """Whether a path is that of a list of resolved dependencies."""
    return _LOCK_FILE.search(path) is not None


def minified(path: str) -> bool:
    """Whether a path says that its file is minified."""
    return _MINIFIED_NAME.search(path) is not None


def head_and_tail(content: bytes, start: int, end: int) -> tuple[bytes, bytes]:
    """Of the file at [start, end) of `content` what `generated` looks at; the tail begins where a line does."""
    last = max(start, end - TAIL_BYTES)
    if last > start:
        last = content.find(b"\n", last, end) + 1 or end
    return content[start : min(end, start + HEAD_BYTES)], content[last:end]


def generated(path: str, head: bytes, tail: bytes) -> str | None:
    """What tells that a program wrote a file: the end of its path, or the words of a line at its head or tail; None
    where nothing does.

    >>> generated("a.py", b"# Code generated by stringer; DO NOT EDIT.", b"")
    'code generated by'
    >>> generated("a.py", b'print("# generated by us, do not edit")', b"") is None
    True
    """
    if name := _GENERATED_NAME.search(f"/{path}"):
        return name[0].lower()
    for part in (head, tail):
        lowered = part.lower()
        if not any(hint in lowered for hint in _HINTS):
            continue
        if line := _GENERATED_LINE.search(part.decode("utf-8", "replace")):
            words = line["within"] or line["comment"] or line["words"]
            return " ".join(words.lower().split())[:60]
    return None
