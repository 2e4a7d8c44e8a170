"""Text of HTML pages: what a reader of the page would read, without menus, scripts and mark-up."""

from __future__ import annotations

import codecs
import logging
import re
from functools import cache
from html.parser import HTMLParser
from importlib import metadata

from dataio.ingest.records import SAMPLE_BYTES, Malformed, Skipped

_log = logging.getLogger(__name__)

#: Elements inside each other: browsers stop at 512 (Blink, kMaximumHTMLParserDOMTreeDepth); the time of what looks for
#: the main content grows with the square of it.
MAX_DEPTH = 512
#: Of 1000 characters, how many may have been no characters of the page's encoding.
_MAX_REPLACED = 1
#: Tags, but for those of elements that have no end, or one that is commonly left out because the next one implies it
#: (HTML, 13.1.2).
_TAG = re.compile(
    r"<(/?)(?!(?:area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr|p|li|d[td]|t[rdh]|tbody|thead|"
    r"tfoot|option|optgroup|colgroup|rp|rt|body|html|head)\b)[a-z]",
    re.IGNORECASE,
)
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([a-zA-Z0-9._:-]{2,40})")
_HEAD_BYTES = 2048


@cache
def extractor() -> str:
    """What turns pages into text, with its version: part of what decides a unit's output."""
    try:
        return f"resiliparse {metadata.version('resiliparse')}"
    except metadata.PackageNotFoundError:
        _log.warning(
            "resiliparse is not installed: pages are read with Python's html.parser, at a third of the speed and with "
            "most of what surrounds the main content; run: pip install 'stoker[html]'"
        )
        return "html.parser 1"


def text_of(row: int, page: bytes, stated: str | None = None) -> str | Malformed | Skipped:
    """The text of a page. `stated`: its encoding, where something outside the page says so."""
    html = _decoded(page, stated)
    if html.count("\ufffd") * 1000 > _MAX_REPLACED * len(html):
        return Malformed(row, "encoding", page[:SAMPLE_BYTES], "is not in the encoding that it states")
    if "\0" in html:
        return Malformed(row, "binary", page[:SAMPLE_BYTES], "holds NUL characters")
    if _depth(html) > MAX_DEPTH:
        return Malformed(row, "nested", page[:SAMPLE_BYTES], f"elements lie deeper than {MAX_DEPTH} in each other")
    text = _with_resiliparse(html) if extractor().startswith("resiliparse") else _Plain().text(html)
    return text.strip() + "\n" if text and not text.isspace() else Skipped("empty")


def _decoded(page: bytes, stated: str | None) -> str:
    """UTF-8 where it is, since pages that state another encoding often are; else as stated, by the page or about it;
    Windows-1252 where nothing is (WHATWG Encoding, 4.2, the common default)."""
    if page.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return page.decode("utf-16", "replace")
    try:
        return page.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    found = _CHARSET.search(page[:_HEAD_BYTES])
    name = stated or (found[1].decode() if found else "windows-1252")
    try:
        return page.decode("windows-1252" if name.lower() in ("iso-8859-1", "latin-1", "ascii") else name, "replace")
    except (LookupError, ValueError):
        return page.decode("windows-1252", "replace")


def _depth(html: str) -> int:
    """An estimate of how deep elements lie in each other; exact where every one has its end."""
    if html.count("<") < 2 * MAX_DEPTH:
        return 0
    deepest = depth = 0
    for end in _TAG.findall(html):
        depth = max(0, depth - 1) if end else depth + 1
        deepest = max(deepest, depth)
    return deepest


def _with_resiliparse(html: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    return str(extract_plain_text(html, preserve_formatting=True, main_content=True, alt_texts=False))


class _Plain(HTMLParser):
    """Visible text with a line for every block."""

    _HIDDEN = re.compile("script|style|head|template|noscript|svg|math|iframe|object|select|nav|footer")
    _INLINE = re.compile(
        "a|abbr|b|bd[io]|big|cite|code|del|dfn|em|font|i|ins|kbd|mark|q|s|samp|small|span|strike|strong|su[bp]|time|tt|"
        "u|var|wbr"
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._hidden: list[str] = []
        self._preformatted = 0

    def text(self, html: str) -> str:
        self.feed(html)
        self.close()
        lines = "".join(self._parts).split("\n")
        return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._HIDDEN.fullmatch(tag):
            self._hidden.append(tag)
        elif not self._INLINE.fullmatch(tag):
            self._parts.append("\n")
            self._preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            while self._hidden.pop() != tag:
                pass
        elif not self._INLINE.fullmatch(tag):
            self._parts.append("\n")
            self._preformatted -= tag == "pre" and self._preformatted > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._parts.append(data if self._preformatted else re.sub(r"\s+", " ", data))
