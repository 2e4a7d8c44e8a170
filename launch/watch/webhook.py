"""Telling a URL what happens to a run: one POST of JSON for each event, from a thread of its own.

    tell(config.launch.webhook, {"event": "restart", "attempt": 3, "text": "rank 1 was killed"})    # returns at once

The address may hold a secret (Slack's and Discord's do): it is never logged. An event that cannot be delivered is
lost; that it could not is said once. Nothing here ever raises, waits or retries: training comes first. Only the end of
the process waits for what is under way, for at most ``TIMEOUT_S``.
"""

from __future__ import annotations

import atexit
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from stoker.secrets import mask
from stoker.version import VERSION

TIMEOUT_S = 5.0
#: Events that wait for a slow receiver; the oldest are dropped beyond that.
WAITING = 64

_log = logging.getLogger(__name__)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """What is told goes to the address that was given and to no other."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)


class _Teller:
    """One address and the thread that tells it. The thread is a daemon: a receiver that hangs keeps nobody alive."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._events: deque[bytes] = deque(maxlen=WAITING)
        self._wake = threading.Condition()
        self._busy = False
        self._complained = False
        threading.Thread(target=self._run, name="webhook", daemon=True).start()

    def put(self, body: bytes) -> None:
        with self._wake:
            self._events.append(body)
            self._wake.notify_all()

    def wait_until_told(self, deadline: float) -> None:
        with self._wake:
            self._wake.wait_for(lambda: not self._events and not self._busy, max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: bool(self._events))
                body, self._busy = self._events.popleft(), True
            try:
                self._post(body)
            except Exception as error:
                self._complain(error)
            with self._wake:
                self._busy = False
                self._wake.notify_all()

    def _post(self, body: bytes) -> None:
        if urlsplit(self._url).scheme not in ("http", "https"):
            raise ValueError("it is no http or https address")
        headers = {"Content-Type": "application/json", "User-Agent": f"stoker/{VERSION}"}
        request = urllib.request.Request(self._url, body, headers, method="POST")
        with _opener.open(request, timeout=TIMEOUT_S):
            pass

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("launch.webhook could not be told: %s. The run goes on; this is said once", _reason(error))


def tell(url: str | None, event: Mapping[str, Any]) -> None:
    """Tell ``url`` of an event, secrets masked; None: nobody. Returns at once."""
    if url is not None:
        atexit.unregister(flush)
        atexit.register(flush)
        _teller(url).put(json.dumps(mask(event), default=str).encode())


def flush(timeout_s: float = TIMEOUT_S) -> None:
    """Wait until everything that was told has been delivered or has failed, at most so long."""
    deadline = time.monotonic() + timeout_s
    with _lock:
        tellers = [*_tellers.values()]
    for teller in tellers:
        teller.wait_until_told(deadline)


_tellers: dict[str, _Teller] = {}
_lock = threading.Lock()


def _teller(url: str) -> _Teller:
    with _lock:
        if url not in _tellers:
            _tellers[url] = _Teller(url)
        return _tellers[url]


def _reason(error: Exception) -> str:
    """What went wrong in words that cannot hold the address: texts of urllib and http.client may quote it."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the answer was HTTP {error.code}"
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return "it is no http or https address" if isinstance(inner, ValueError) else type(inner).__name__
