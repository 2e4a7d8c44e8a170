"""Serving the page of a run on loopback: fixed routes, GET only, nothing that writes, nothing from elsewhere.

A page of another site that a browser shows cannot read this one: no answer names another origin, and a request whose
Host is a name that is not this machine's (DNS rebinding) is refused.
"""

from __future__ import annotations

import gzip
import ipaddress
import platform
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from launch.watch.page import Page, script, style
from launch.watch.prometheus import CONTENT_TYPE
from stoker.errors import Refusal
from stoker.secrets import mask
from stoker.version import VERSION

#: The page may use its own style, script and figures, and nothing else, from anywhere.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
HTML, JSON = "text/html; charset=utf-8", "application/json"
#: Seconds that a connection may be silent; bytes from which an answer is compressed.
SILENT_S, COMPRESSED = 10, 1400

Routes = dict[str, tuple[str, Callable[[], bytes]]]


class Server(ThreadingHTTPServer):
    """``Server(run_dir, host, port)`` is bound and reads the run once; ``serve_forever`` answers. Raises Refusal where
    the address cannot be had or ``run_dir`` is no run directory."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, run_dir: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        page = Page(run_dir)
        self.lock = threading.Lock()
        self.routes: Routes = {
            "/": (HTML, page.html),
            "/live.json": (JSON, page.live),
            "/status.json": (JSON, page.status_json),
            "/curves.json": (JSON, page.curves_json),
            "/metrics": (CONTENT_TYPE, page.metrics),
            "/page.css": ("text/css; charset=utf-8", style),
            "/page.js": ("text/javascript; charset=utf-8", script),
        }
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise Refusal(
                f"{host} port {port} cannot be served on: {error}. Give another --port, or 0 for any"
            ) from None

    def server_bind(self) -> None:
        """Without the look-up of the host's name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://{self.server_name}:{self.server_port}/"

    def is_own_name(self, host: str) -> bool:
        """Whether a Host header names this machine: as an address, which no name server can bend, or by its name."""
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.lower() in {"localhost", platform.node().lower()}
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that goes away is no event."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = f"stoker/{VERSION}", ""
    protocol_version = "HTTP/1.1"
    timeout = SILENT_S

    def do_GET(self) -> None:
        if not self.server.is_own_name(self.headers.get("Host", "")):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, b"this page is served under the machine's own address only\n")
            return
        route = self.server.routes.get(self.path.partition("?")[0])
        if route is None:
            self._answer(HTTPStatus.NOT_FOUND, b"there is no such page\n")
            return
        kind, make = route
        try:
            with self.server.lock:
                content = make()
        except Refusal as refusal:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, mask(f"{refusal}\n").encode())
            return
        except Exception:
            sys.stderr.write(mask(traceback.format_exc()))
            self._answer(
                HTTPStatus.INTERNAL_SERVER_ERROR, b"the run could not be read: the terminal of the server says why\n"
            )
            return
        self._answer(HTTPStatus.OK, content, kind)

    do_HEAD = do_GET

    def _answer(self, code: HTTPStatus, content: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        compressed = len(content) > COMPRESSED and "gzip" in self.headers.get("Accept-Encoding", "")
        if compressed:
            content = gzip.compress(content, 1)
        self.send_response(code)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if compressed:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Vary", "Accept-Encoding")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged: the page asks every two seconds."""


def serve(run_dir: Path, host: str, port: int) -> None:
    """Serve until Ctrl-C."""
    with Server(run_dir, host, port) as server:
        print(f"{run_dir} at {server.url}  (figures for Prometheus at {server.url}metrics; Ctrl-C ends)", flush=True)
        if not _is_loopback(server.server_name):
            print("anybody who reaches this address can read the page: it has no password", file=sys.stderr, flush=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print()


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
