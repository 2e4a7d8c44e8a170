"""Whether a candidate is an address, a key or a password of somebody, and which bytes of it have to go.

Every pattern is tried at one place and reads on at most as far as its bounds say. What looks like a secret but is made
up (``AKIAIOSFODNN7EXAMPLE``, ``changeme``, ``sk_test_...``), a reference (``${PASSWORD}``) or a name stays.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable

from dataio.filters.redact_forms import BEGINS, Form
from dataio.filters.redact_scan import ASSIGNED, EMAIL, IPV4, IPV6, NAME_BYTES, PREFIX, URL

#: First byte, end and kind of what has to go.
Span = tuple[int, int, str]

# fmt: off
#: Country codes and the generic domains in common use (https://www.iana.org/domains/root/db): a matrix product
#: ``x@self.weight`` has an address's form, but no domain ends so.
_TOP_LEVEL = frozenset(
    b"""
    ac ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz ca
    cc cd cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj fk fm fo
    fr ga gd ge gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq ir is it je
    jm jo jp ke kg kh ki km kn kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh mk ml mm mn mo
    mp mq mr ms mt mu mv mw mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl pm pn pr ps pt
    pw py qa re ro rs ru rw sa sb sc sd se sg sh si sk sl sm sn so sr ss st su sv sx sy sz tc td tf tg th tj tk
    tl tm tn to tr tt tv tw tz ua ug uk us uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw aero agency app art
    asia berlin bio biz blog cat center cloud club com community company consulting coop design dev digital edu
    email engineering finance foundation gmbh gov group health info institute int international jobs lab law
    legal life live london ltd media mil mobi museum name net network news ninja nyc one online org page paris
    partners post pro pub science school services shop site social software solutions space store studio systems
    team tech technology tel today tokyo tools top travel university ventures wiki work world xyz zone
    """.split()
)
#: Reserved for documentation and tests (RFC 2606, RFC 6761).
_RESERVED = re.compile(rb"(?:^|\.)(?:example\.[\w.]+|example|test|invalid|localhost|local)$")
#: Addresses of nobody: not global (IANA special-purpose registries), resolvers that everybody knows, and
#: what stands for any address.
_NOT_GLOBAL = [ipaddress.ip_network(network) for network in (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/3", "2001::/23", "2001:db8::/32", "3ffe::/16", "3fff::/20",
)]
_EVERYBODYS = frozenset([
    "1.0.0.1", "1.1.1.1", "4.2.2.1", "4.2.2.2", "8.8.4.4", "8.8.8.8", "9.9.9.9", "149.112.112.112", "208.67.220.220",
    "208.67.222.222", "12.34.56.78", "123.45.67.89", "2001:4860:4860::8844", "2001:4860:4860::8888",
    "2606:4700:4700::1001", "2606:4700:4700::1111",
])
# fmt: on
#: Numbers of a version, or of a section, are small: of random addresses one in 2,000 has four numbers below the first
#: bound or three below the second.
_ALL_BELOW, _THREE_BELOW = 32, 10
_VERSION_BEFORE = re.compile(
    rb"(?:\bv|\bver|version|release|\brev|build|[=<>~!^]=|[~^])[\s\"':=()/-]{0,4}$|\w/$", re.IGNORECASE
)
_IPV6 = re.compile(rb"[0-9A-Fa-f:]{6,39}(?![0-9A-Za-z:])")

_MADE_UP = re.compile(
    rb"example|sample|placeholder|change.?me|your|dummy|fake|test|redacted|insert|replace|todo|secret|passw|foobar|hunter2"
    rb"|xxxx|\*\*\*|\.\.\.|0123456|1234567|abcdef|qwerty|deadbeef|\$\{|\{\{|<|%\(|^%s",
    re.IGNORECASE,
)
_UUID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
#: Bytes at the end of a credential that must look random; what is before them may be words.
_RANDOM_BYTES = 64
#: Of words, a few digits and what joins them: names, paths, dotted names.
_WORDS = re.compile(rb"[~./]*(?:[A-Za-z]*\d{0,4}(?:[-_./:,]+|$))+")
_CODE = re.compile(rb"^arn:|[\\()\[\]{}<>|;`]|://|^(?:[/~]|\./)")


def _looks_random(value: bytes) -> bool:
    """Whether a value could not be a word, a name or a pattern: letters and digits, of which none is frequent."""
    if _MADE_UP.search(value) or _UUID.fullmatch(value) or _CODE.search(value) or _WORDS.fullmatch(value):
        return False
    digits = sum(48 <= byte <= 57 for byte in value)
    letters = sum(65 <= byte & 0xDF <= 90 for byte in value)
    return digits >= 2 and letters >= 2 and _entropy(value) >= (3.0 if len(value) >= 16 else 2.75)


def _is_drawn(value: bytes) -> bool:
    """Whether a value in the form of a credential is one, not an example of it."""
    return _MADE_UP.search(value) is None and _entropy(value) >= 2.5


def _entropy(value: bytes) -> float:
    """Bits a byte. Of 32 random hexadecimal digits it is 3.6 +- 0.1, of 20 letters and digits 4.0 +- 0.1; English words
    of that length have 3 to 3.5."""
    return -sum(count / len(value) * math.log2(count / len(value)) for count in Counter(value).values())


def _looks_like_password(value: bytes) -> bool:
    """As above, of what people make up themselves: letters and something else, or letters of which neither nearly all
    nor nearly none are capitals, as they are in names."""
    if _MADE_UP.search(value) or _UUID.fullmatch(value) or re.search(rb"[\\()\[\]{}<>`]|://|^[/~.$%:]", value):
        return False
    letters = sum(65 <= byte & 0xDF <= 90 for byte in value)
    others = sum(not (65 <= byte & 0xDF <= 90 or byte in b"-_./:, ") for byte in value)
    capitals = sum(65 <= byte <= 90 for byte in value)
    mixed = len(value) >= 10 and 0.3 * letters <= capitals <= 0.7 * letters
    return letters >= 2 and (others >= 1 or mixed) and len(set(value)) >= 6


_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z0-9 ]{0,24}PRIVATE KEY(?: BLOCK)?-----")
#: Longest private key: 16,384 bits of RSA are 12.7 KB of text.
_KEY_BYTES = 16 << 10
_KEY_BODY = re.compile(rb"[A-Za-z0-9+/]{40}")
_KEY_MARGIN = re.compile(rb"(?:\s|\\[nr])*")
_KEY_LINES = re.compile(rb"(?:[A-Za-z0-9+/=\s]|\\[nr]){0,16384}")
_URL = re.compile(rb"://([^\s:@/\"'`<>{}$()\[\]|\\]{0,128}):([^\s:@/\"'`<>{}|\\]{1,256})@([\w.-]{1,255})")
_URL_TOKEN = re.compile(rb"://([\w-]{20,255})@[\w.-]{1,255}")
_IN_URL = re.compile(rb"//[^\s/@\"'<>]*$")
#: What stands for a password where everybody may know it.
_OPEN_PASSWORDS = frozenset(
    b"admin guest root user username pass password passwd pwd pw secret postgres mysql redis rabbitmq default token p"
    b" x-oauth-basic".split()
)
_SECRET_NAME = re.compile(
    rb".*?(?:(passw(?:or)?d|passwd|pwd|passphrase|\bpass|_pass)|secret|token|credentials?"
    rb"|(?:api|access|secret|private|auth|encryption|signing|master|account|client|consumer|service|app|shared|storage"
    rb"|deploy|session|hmac|crypt|webhook|subscription)[_.-]?key)",
    re.IGNORECASE,
)
#: Names that end alike: where a list goes on, and names of types.
_NO_SECRET = re.compile(
    rb"(?:public.?key|next|page|continu\w*|pagin\w*|starting|marker|sync|eos|bos|pad|unk|mask)[_.-]?token",
    re.IGNORECASE,
)
_QUOTED = re.compile(rb"[\]\"']{0,2}[ \t]{0,4}(?:=>|:=|=|:)\s{0,4}[bBrRuU@]?([\"'`])([!-&(-_a-~]{8,512})\1")
_BARE = re.compile(rb"(?:=>|:=|=|:)[ \t]{0,4}([A-Za-z0-9][A-Za-z0-9_+/=~!@#%^*-]{11,511}+)(?=[\s,;&]|$)")
_BARE_PASSWORD = re.compile(rb"(?:=>|:=|=|:)[ \t]{0,4}([A-Za-z0-9][A-Za-z0-9_+/=~!@#%^*-]{7,511}+)(?=[\s,;&]|$)")


def check(content: memoryview, what: int, first: int, last: int, low: int, high: int) -> Span | None:
    """What a candidate is; None for nothing that has to go. `low` and `high`: of its document in `content`."""
    if what >= PREFIX:
        return _BY_PREFIX[what - PREFIX](content, first, high)
    return _BY_FORM[what](content, first, last, low, high)


def _email(content: memoryview, first: int, last: int, low: int, high: int) -> Span | None:
    local, _, domain = bytes(content[first:last]).lower().partition(b"@")
    if domain.rpartition(b".")[2] not in _TOP_LEVEL or _RESERVED.search(domain) or local == b"git":
        return None
    if last < high and content[last] in b"(_@":  # a call, a name, another part
        return None
    if first > low and _IN_URL.search(content[max(low, first - 2 * NAME_BYTES) : first]):  # user and password of a URL
        return None
    return first, last, "email"


def _ipv4(content: memoryview, first: int, last: int, low: int, high: int) -> Span | None:
    address = bytes(content[first:last]).decode()
    numbers = sorted(int(number) for number in address.split("."))
    if numbers[3] < _ALL_BELOW or numbers[2] < _THREE_BELOW or numbers[0] == numbers[3]:
        return None
    before = content[max(low, first - 24) : first]
    if _VERSION_BEFORE.search(before):
        return None
    return (first, last, "ipv4") if _is_somebodys(address) else None


def _ipv6(content: memoryview, first: int, last: int, low: int, high: int) -> Span | None:
    found = _IPV6.match(content, first, high)
    if found is None or found[0].count(b":") < 2:
        return None
    end = found.end() - (found[0].endswith(b":") and not found[0].endswith(b"::"))
    address = bytes(content[first:end]).decode()
    return (first, end, "ipv6") if _is_somebodys(address) else None


def _is_somebodys(address: str) -> bool:
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return False
    return str(known) not in _EVERYBODYS and not any(known in network for network in _NOT_GLOBAL)


def _url(content: memoryview, first: int, last: int, low: int, high: int) -> Span | None:
    if found := _URL.match(content, first, high):
        user, password, host = found[1].lower(), found[2], found[3].lower()
        open_to_all = password.lower() in _OPEN_PASSWORDS or password.lower() == user
        if (
            open_to_all
            or _MADE_UP.search(password)
            or _RESERVED.search(host)
            or re.search(rb"\$|\(|^%.$|^\d*$|^[a-z]{0,5}$", password)
        ):
            return None
        return *found.span(2), "url_password"
    found = _URL_TOKEN.match(content, first, high)
    return (*found.span(1), "url_password") if found and _looks_random(found[1]) else None


def _assigned(content: memoryview, first: int, last: int, low: int, high: int) -> Span | None:
    name = re.sub(rb"[\]\"' \t]+$", b"", bytes(content[first:last]))
    known = _SECRET_NAME.fullmatch(name)
    if known is None or _NO_SECRET.search(name) or bytes(content[max(low, first - 2) : first]) == b"::":
        return None
    if (last > low and content[last - 1] in b"=!<>:") or bytes(content[last : last + 2]) == b"==":
        return None
    password = known[1] is not None
    looks = _looks_like_password if password else _looks_random
    if found := _QUOTED.match(content, last, high):
        return (*found.span(2), "secret") if looks(found[2]) else None
    found = (_BARE_PASSWORD if password else _BARE).match(content, last, high)
    return (*found.span(1), "secret") if found and _looks_random(found[1]) else None


def _private_key(content: memoryview, first: int, high: int) -> Span | None:
    begin = _PRIVATE_KEY.match(content, first, high)
    if begin is None:
        return None
    rest = bytes(content[begin.end() : min(high, begin.end() + _KEY_BYTES)])
    end = rest.find(b"-----")
    if end < 0:
        lines = _KEY_LINES.match(rest)
        end = lines.end() if lines else 0
    if _KEY_BODY.search(rest, 0, end) is None:
        return None
    margin = _KEY_MARGIN.match(rest, 0, end)
    start = margin.end() if margin else 0
    body = re.sub(rb"(?:[\s\"',]|\\[nr]|(?<=[\s\"'])\+)+$", b"", rest[start:end])
    return begin.end() + start, begin.end() + start + len(body), "private_key"


def _credential(form: Form) -> Callable[[memoryview, int, int], Span | None]:
    pattern = form.pattern()

    def check_form(content: memoryview, first: int, high: int) -> Span | None:
        found = pattern.match(content, first, high)
        if found is None:
            return None
        end = found[1][-_RANDOM_BYTES:]
        if not (_is_drawn(end) if form.sure else _looks_random(end)):
            return None
        return *found.span(1), form.kind

    return check_form


_BY_FORM = {EMAIL: _email, IPV4: _ipv4, IPV6: _ipv6, URL: _url, ASSIGNED: _assigned}
_BY_PREFIX = [*(_credential(form) for _, form in BEGINS), _private_key]
