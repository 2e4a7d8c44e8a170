"""Messages between the agents of a launch: JSON objects, a line each, that nobody without its token can make.

A connection begins with a random number of each side, from which and the token its key follows. Every line carries a
MAC (HMAC-SHA256) over direction, number and text, so that none can be made, changed, repeated or left out by others;
that they may read it is no secret kept from the job's own network.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from stoker.errors import Refusal

#: Bytes of a line, at most: an assembly of 10,000 nodes' states is the longest.
MAX_LINE = 16 * 2**20
NONCE_BYTES, TOKEN_BYTES = 16, 32
#: Seconds for the other side to say its number, and for the token of a launch to be written.
HELLO_S, TOKEN_S = 2.0, 30.0


class Broken(ConnectionError):
    """The connection has ended, or what came was not of this launch."""


class Link:
    """One end of a connection. ``send`` never waits; ``receive`` raises Broken when no more will come."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes, accepted: bool) -> None:
        self._reader, self._writer, self._key = reader, writer, key
        self._out, self._in = (b"a", b"c") if accepted else (b"c", b"a")
        self._sent = self._received = 0

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


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes) -> Link:
    """The other end of ``connect``. Raises Broken where what connects says nothing that is expected."""
    try:
        async with asyncio.timeout(HELLO_S):
            return await _greet(reader, writer, token, accepted=True)
    except (OSError, TimeoutError) as error:
        writer.close()
        raise Broken(str(error)) from None


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: bytes, accepted: bool) -> Link:
    mine = secrets.token_bytes(NONCE_BYTES)
    try:
        writer.write(mine.hex().encode() + b"\n")
        theirs = await _line(reader)
        if len(theirs) != 2 * NONCE_BYTES:
            raise Broken("no agent of a launch")
    except BaseException:
        writer.close()
        raise
    own = mine.hex().encode()
    both = theirs + own if accepted else own + theirs
    return Link(reader, writer, hmac.digest(token, both, hashlib.sha256), accepted)


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
        with suppress(FileExistsError):
            os.link(mine, path)  # unlike a rename, fails where another node was first
    finally:
        mine.unlink(missing_ok=True)
    deadline = time.monotonic() + TOKEN_S
    while time.monotonic() < deadline:
        token = path.read_bytes()
        if len(token) == TOKEN_BYTES:
            return token
        time.sleep(0.1)  # a shared file system shows it to other nodes when it will
    raise Refusal(f"{path} holds no token after {TOKEN_S:.0f} s: is the run directory one shared path on all nodes?")
