"""Messages between the agents of a launch: JSON objects, a line each, that nobody without its token can make.

A connection begins with a random number of each side, from which and the token its key follows, and with a proof of
each that it has the key: until then 98 bytes are taken from it, for two seconds, and of few at once. Every line carries
a MAC (HMAC-SHA256) over direction, number and text, so that none can be made, changed, repeated or left out by others;
that they may read it is no secret kept from the job's own network.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from stoker.errors import Refusal

#: Bytes of a line, at most: an assembly of 10,000 nodes' states is the longest.
MAX_LINE = 16 * 2**20
NONCE_BYTES, TOKEN_BYTES = 16, 32
#: Seconds for the other side to prove itself, and for the token of a launch to be written.
HELLO_S, TOKEN_S = 2.0, 30.0
#: Connections at once that have not proven themselves. The next waits in the kernel, where ``BACKLOG`` may, until one
#: has, or the oldest has been there for ``QUICK_S`` and goes: those of a launch take milliseconds.
MOST_UNPROVEN, QUICK_S, BACKLOG = 64, 0.5, 4096


class Broken(ConnectionError):
    """The connection has ended, or what came was not of this launch."""


class Link:
    """One end of a proven connection. ``send`` never waits; ``receive`` raises Broken when no more will come."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes, accepted: bool) -> None:
        self._reader, self._writer, self._key = reader, writer, key
        self._out, self._in = (b"a", b"c") if accepted else (b"c", b"a")
        self._sent = self._received = 1  # 0 is the proof

    def send(self, message: Mapping[str, Any]) -> None:
        text = json.dumps(message, separators=(",", ":")).encode()
        self._writer.write(_mac(self._key, self._out, self._sent, text) + b" " + text + b"\n")
        self._sent += 1

    async def receive(self) -> dict[str, Any]:
        line = await _line(self._reader)
        mac, _, text = line.partition(b" ")
        if not hmac.compare_digest(mac, _mac(self._key, self._in, self._received, text)):
            raise Broken("a message that is not of this launch")
        self._received += 1
        message = json.loads(text)
        if not isinstance(message, dict):
            raise Broken("a message that is no object")
        return message

    async def flush(self) -> None:
        """Wait until the other side's kernel has what was sent."""
        try:
            await self._writer.drain()
        except OSError as error:
            raise Broken(str(error)) from None

    def end(self) -> None:
        """Say that no more will be sent; the other side still reads what was."""
        with suppress(OSError, RuntimeError):
            self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()


async def connect(address: str, port: int, token: bytes, timeout_s: float) -> Link:
    """A connection to an agent. Raises Broken where none can be made in time."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(address, port, limit=MAX_LINE)
            return await _greet(reader, writer, token, accepted=False)
    except (OSError, TimeoutError) as error:
        raise Broken(str(error)) from None


class Door:
    """Where others connect: whoever proves to have ``token`` is handed to ``visited``. ``open`` in an event loop."""

    def __init__(self, token: bytes, visited: Callable[[Link], Coroutine[Any, Any, None]]) -> None:
        self._token, self._visited = token, visited
        self._listening: list[asyncio.Task[None]] = []
        self._unproven: dict[asyncio.Task[None], float] = {}
        self._proven: set[asyncio.Task[None]] = set()  # an event loop itself does not hold its tasks

    async def open(self, address: str, port: int) -> None:
        """Listen at ``address``, where it is empty on every interface. Raises OSError."""
        loop, passive = asyncio.get_running_loop(), socket.AI_PASSIVE
        found = await loop.getaddrinfo(address or None, port, type=socket.SOCK_STREAM, flags=passive)
        for number, (family, _, _, _, where) in enumerate(found, 1):
            try:
                listening = socket.create_server(where, family=family, backlog=BACKLOG)
            except OSError as error:
                without = error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # a host without IPv6, say
                if without and (self._listening or number < len(found)):
                    continue
                self.close()
                raise
            listening.setblocking(False)
            self._listening.append(asyncio.ensure_future(self._let_in(listening)))

    def close(self) -> None:
        """Listen no more; who is in stays."""
        for task in (*self._listening, *self._unproven):
            task.cancel()

    async def _let_in(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listening:
            while True:
                while len(self._unproven) >= MOST_UNPROVEN:
                    oldest, since = next(iter(self._unproven.items()))
                    if loop.time() - since > QUICK_S:
                        del self._unproven[oldest]
                        oldest.cancel()
                    else:
                        await asyncio.sleep(QUICK_S / 100)
                try:
                    accepted, _ = await loop.sock_accept(listening)
                except OSError:  # too many open files, or it has hung up already
                    await asyncio.sleep(QUICK_S)
                    continue
                self._unproven[asyncio.ensure_future(self._meet(accepted))] = loop.time()

    async def _meet(self, accepted: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(HELLO_S):
                reader, writer = await asyncio.open_connection(sock=accepted, limit=MAX_LINE)
                link = await _greet(reader, writer, self._token, accepted=True)
        except (OSError, TimeoutError):
            return
        finally:
            self._unproven.pop(task, None)
        visit = asyncio.ensure_future(self._visited(link))
        self._proven.add(visit)
        visit.add_done_callback(self._proven.discard)


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes, accepted: bool) -> Link:
    """Each side says a number, and proves that it has the key that follows from both, who connects first. As much is
    read and no more."""
    try:
        mine = secrets.token_bytes(NONCE_BYTES).hex().encode()
        writer.write(mine + b"\n")
        theirs = await _exactly(reader, len(mine))
        both = theirs + mine if accepted else mine + theirs
        key = hmac.digest(token, both, hashlib.sha256)
        out, incoming = (b"a", b"c") if accepted else (b"c", b"a")
        proof, expected = _mac(key, out, 0, b""), _mac(key, incoming, 0, b"")
        if not accepted:
            writer.write(proof + b"\n")
        if not hmac.compare_digest(await _exactly(reader, len(expected)), expected):
            raise Broken("no agent of this launch")
        if accepted:
            writer.write(proof + b"\n")
        return Link(reader, writer, key, accepted)
    except BaseException:
        writer.transport.abort()  # what it has not taken is not waited for
        raise


async def _exactly(reader: asyncio.StreamReader, length: int) -> bytes:
    """A line of ``length`` bytes and its end."""
    try:
        line = await reader.readexactly(length + 1)
    except (asyncio.IncompleteReadError, OSError) as error:
        raise Broken(str(error) or "the connection was closed") from None
    if not line.endswith(b"\n"):
        raise Broken("no agent of a launch")
    return line[:-1]


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return (await reader.readuntil(b"\n"))[:-1]
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError) as error:
        raise Broken(str(error) or "the connection was closed") from None


def _mac(key: bytes, direction: bytes, number: int, text: bytes) -> bytes:
    return hmac.digest(key, b"%s %d %s" % (direction, number, text), hashlib.sha256).hex().encode()


def shared_token(path: Path) -> bytes:
    """The token of a launch: the first node writes it, for its owner alone to read, and the others wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(TOKEN_BYTES))
            file.flush()
            os.fsync(file.fileno())
        deadline = time.monotonic() + TOKEN_S
        while time.monotonic() < deadline:
            try:
                with suppress(FileExistsError):
                    os.link(mine, path)  # unlike a rename, fails where another node was first
                token = path.read_bytes()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):  # a node that ends has removed it in between
                    raise
                token = b""
            if len(token) == TOKEN_BYTES:
                return token
            time.sleep(0.1)  # a shared file system shows it to other nodes when it will
    finally:
        mine.unlink(missing_ok=True)
    raise Refusal(f"{path} holds no token after {TOKEN_S:.0f} s: is the run directory one shared path on all nodes?")
