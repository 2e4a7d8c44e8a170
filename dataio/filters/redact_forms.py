"""Credentials that say what they are: how each begins and goes on, as their issuers document or have announced."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """`begins`: every way it begins. `follows`: pattern of the rest. What goes is both, or `follows` alone. `sure`:
    nothing but it has the form, so that no letters and digits are counted."""

    kind: str
    begins: tuple[bytes, ...]
    follows: bytes
    whole: bool = True
    sure: bool = True

    def pattern(self) -> re.Pattern[bytes]:
        """The first group is what goes."""
        begins = b"(?:" + b"|".join(re.escape(way) for way in self.begins) + b")"
        body = b"(" + begins + self.follows + b")" if self.whole else begins + b"(" + self.follows + b")"
        return re.compile(body + rb"(?![A-Za-z0-9_-])")


FORMS = (
    Form("aws_key", (b"AKIA", b"ASIA", b"ABIA", b"ACCA"), rb"[A-Z2-7]{16}"),
    Form("gcp_key", (b"AIza",), rb"[\w-]{35}"),
    Form("gcp_key", (b"GOCSPX-",), rb"[\w-]{28}"),
    Form("gcp_key", (b"ya29.",), rb"[\w-]{30,512}"),
    Form("github_token", (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_"), rb"[A-Za-z0-9]{36,255}"),
    Form("github_token", (b"github_pat_",), rb"\w{22}_\w{59}"),
    Form("gitlab_token", (b"glpat-", b"gldt-", b"glrt-", b"glptt-"), rb"[\w-]{20,64}(?:\.[\w.]{1,32})?"),
    Form("slack_token", tuple(b"xox%c-" % letter for letter in b"abeoprs"), rb"[\w-]{16,250}"),
    Form("slack_token", (b"xoxe.",), rb"xox[bp]-[\w-]{16,250}"),
    Form("slack_token", (b"xapp-",), rb"\d-[\w-]{16,250}"),
    Form("slack_token", (b"hooks.slack.com/services/",), rb"T\w{8,12}/B\w{8,12}/\w{20,28}", whole=False),
    Form("stripe_key", (b"sk_live_", b"rk_live_"), rb"[A-Za-z0-9]{16,250}"),
    Form("stripe_key", (b"whsec_",), rb"[A-Za-z0-9+/]{32,64}"),
    Form("openai_key", (b"sk-",), rb"[\w-]{20,250}", sure=False),
    Form("npm_token", (b"npm_",), rb"[A-Za-z0-9]{36}"),
    Form("pypi_token", (b"pypi-Ag",), rb"[\w-]{50,512}"),
    Form("huggingface_token", (b"hf_",), rb"[A-Za-z0-9]{34,40}"),
    Form("sendgrid_key", (b"SG.",), rb"[\w-]{22}\.[\w-]{43}"),
    Form("jwt", (b"eyJ",), rb"[\w-]{10,4096}\.[\w-]{10,8192}\.[\w-]{16,2048}"),
    Form("secret", (b"Bearer ", b"bearer "), rb"[\w.~+/-]{20,512}={0,2}", whole=False, sure=False),
)
#: Of every beginning, which form it is of; a private key has a check of its own.
BEGINS = tuple((way, form) for form in FORMS for way in form.begins)
PRIVATE_KEY = b"-----BEGIN "
