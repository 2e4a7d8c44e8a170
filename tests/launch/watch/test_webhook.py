"""The webhook: told of events, never in the way of training, and its address never written down."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from launch.watch import webhook
from pretrain.config import load, parse, preset
from stoker.errors import Refusal
from stoker.secrets import mask

CANARY = "T0CANARY42xyz"


class Receiver:
    """A server that keeps what it is told; ``code`` is its answer."""

    def __init__(self, code: int = 200) -> None:
        self.bodies: list[dict[str, object]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.bodies.append(json.loads(content))
                self.send_response(code)
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/{CANARY}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.close()


def test_events_arrive_in_order_with_their_secrets_masked(receiver: Receiver) -> None:
    for number in range(5):
        webhook.tell(receiver.url, {"event": "restart", "attempt": number, "text": "password=hunter2hunter2"})
    webhook.flush()
    assert [body["attempt"] for body in receiver.bodies] == [0, 1, 2, 3, 4]
    assert "hunter2" not in json.dumps(receiver.bodies)


def test_the_last_event_arrives_though_the_process_ends(receiver: Receiver) -> None:
    script = "import sys; from launch.watch.webhook import tell; tell(sys.argv[1], {'event': 'end'})"
    subprocess.run([sys.executable, "-c", script, receiver.url], check=True, timeout=60)
    assert receiver.bodies == [{"event": "end"}]


def test_nobody_is_told_without_an_address() -> None:
    webhook.tell(None, {"event": "end"})


@pytest.mark.parametrize("case", ["refused", "hangs", "no address", "redirect", "error"])
def test_a_receiver_that_fails_costs_no_time_and_is_said_once_without_its_address(
    case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.3)
    silent = socket.create_server(("127.0.0.1", 0))
    closed = socket.create_server(("127.0.0.1", 0))
    answering = Receiver({"redirect": 302, "error": 500}.get(case, 200))
    closed_port = closed.getsockname()[1]
    closed.close()
    url = {
        "refused": f"http://127.0.0.1:{closed_port}/{CANARY}",
        "hangs": f"http://127.0.0.1:{silent.getsockname()[1]}/{CANARY}",
        "no address": f"file:///etc/{CANARY}",
    }.get(case, answering.url)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            webhook.tell(url, {"event": "fault"})
        told_s = time.monotonic() - began
        webhook.flush()
    assert told_s < 0.2
    assert len(caplog.records) == 1 and "launch.webhook" in caplog.text
    assert CANARY not in caplog.text and "127.0.0.1" not in caplog.text
    assert len(answering.bodies) == (3 if case in ("redirect", "error") else 0), "a redirect was followed"
    silent.close()
    answering.close()


def test_the_address_is_masked_in_what_a_run_writes_and_can_be_read_back() -> None:
    values = preset("demo").resolved()
    values["launch"]["webhook"] = f"https://example.org/{CANARY}"
    masked = parse(values).masked()
    assert CANARY not in masked.to_yaml() and masked.launch.webhook == "***"
    assert parse(masked.resolved()).launch.webhook == "***"
    assert CANARY not in mask(f"no route to https://hooks.slack.com/services/T01/{CANARY}")


def test_an_address_that_is_none_is_refused_without_being_shown() -> None:
    with pytest.raises(Refusal, match=r"launch\.webhook") as refused:
        load("demo", [f"launch.webhook=ftp://example.org/{CANARY}"])
    assert CANARY not in str(refused.value)
