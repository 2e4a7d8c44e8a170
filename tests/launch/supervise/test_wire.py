"""Who has not the token of a launch gets nothing done: not by talking much, slowly, again, or with our own words."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from launch.supervise import wire
from launch.supervise.wire import NONCE_BYTES, Broken, Door, Link, connect, shared_token
from stoker.errors import Refusal
from tests.launch.supervise.nodes.agents import free_ports

TOKEN, OTHER = b"t" * 32, b"u" * 32
NONCE = b"0" * 2 * NONCE_BYTES + b"\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Server:
    """A door, and who came in."""

    def __init__(self) -> None:
        self.links: asyncio.Queue[Link] = asyncio.Queue()
        self.door = Door(TOKEN, self.links.put)
        self.port = 0

    async def stranger(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.port)


@asynccontextmanager
async def listening(visited: Callable[..., Awaitable[None]]) -> AsyncIterator[int]:
    """Somebody else's server."""
    server = await asyncio.start_server(visited, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def served(play: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        server = Server()
        (server.port,) = free_ports(1)
        async with asyncio.timeout(60):
            await server.door.open("127.0.0.1", server.port)
            await play(server)
            while server.door._unproven:
                await asyncio.sleep(0.01)  # who has left is not counted any more
            server.door.close()

    asyncio.run(run())


async def ended(reader: asyncio.StreamReader) -> None:
    """The other side has hung up."""
    with suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: list[bytes] | None = None) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            if seen is not None:
                seen.append(data)
            writer.write(data)


def test_both_sides_hear_what_the_other_said_however_long() -> None:
    async def play(server: Server) -> None:
        link = await connect("127.0.0.1", server.port, TOKEN, 10)
        other = await server.links.get()
        long = {"states": "x" * (1 << 20)}
        for message in ({}, {"a": 1}, long, {"b": 2}):
            link.send(message)
            assert await other.receive() == message
            other.send(message)
            assert await link.receive() == message
        link.send({"last": 1})
        link.end()
        assert await other.receive() == {"last": 1}
        with pytest.raises(Broken):
            await other.receive()
        link.close()
        other.close()

    served(play)


def test_a_stranger_who_sends_a_hundred_megabytes_is_cut_before_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [0]
    feed = asyncio.StreamReader.feed_data
    monkeypatch.setattr(
        asyncio.StreamReader,
        "feed_data",
        lambda self, data: (held.append(len(self._buffer) + len(data)), feed(self, data)),
    )

    async def play(server: Server) -> None:
        _, writer = await server.stranger()
        sent = 0
        with suppress(ConnectionError):
            while sent < 100 * 2**20:
                writer.write(b"x" * (1 << 16))
                sent += 1 << 16
                await writer.drain()
        assert sent < 16 * 2**20, "the rest filled the kernel's buffers"

    served(play)
    assert max(held) <= 2**20, "two readings of the event loop at most"


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\nHost: node-17.cluster.local\r\n", NONCE + b"f" * 64 + b"\n"])
def test_the_wrong_words_are_cut_after_as_many_bytes_as_the_right_ones_have(words: bytes) -> None:
    async def play(server: Server) -> None:
        reader, writer = await server.stranger()
        began = time.monotonic()
        writer.write(words)
        await ended(reader)
        assert time.monotonic() - began < wire.HELLO_S, "without waiting for more"
        writer.close()

    served(play)


@pytest.mark.parametrize("words", [b"", NONCE[:-1], NONCE + b"f" * 64])
def test_who_is_slow_is_cut_when_the_time_is_up(words: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HELLO_S", 0.3)

    async def play(server: Server) -> None:
        reader, writer = await server.stranger()
        for byte in words:
            writer.write(bytes([byte]))
        await ended(reader)
        assert server.links.empty()
        writer.close()

    served(play)


def test_of_too_many_who_say_nothing_the_oldest_go_and_one_of_the_launch_is_let_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "HELLO_S", 30.0)
    monkeypatch.setattr(wire, "MOST_UNPROVEN", 8)

    async def play(server: Server) -> None:
        strangers = [await server.stranger() for _ in range(20)]
        for reader, _ in strangers[:11]:
            await ended(reader)
        assert len(server.door._unproven) <= 8
        link = await connect("127.0.0.1", server.port, TOKEN, 10)
        link.send({"join": 1})
        assert await (await server.links.get()).receive() == {"join": 1}
        link.close()
        for _, writer in strangers:
            writer.close()

    served(play)


def test_another_launch_is_refused_by_both_sides() -> None:
    async def play(server: Server) -> None:
        with pytest.raises(Broken):
            await connect("127.0.0.1", server.port, OTHER, 10)
        assert server.links.empty()

    served(play)


def test_what_one_of_the_launch_said_is_no_key_for_another() -> None:
    async def play(server: Server) -> None:
        said: list[bytes] = []

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            near, far = await server.stranger()
            await asyncio.gather(carry(reader, far, said), carry(near, writer))

        async with listening(between) as port:
            link = await connect("127.0.0.1", port, TOKEN, 10)
            link.send({"join": 1})
            assert await (await server.links.get()).receive() == {"join": 1}
            link.close()
        reader, writer = await server.stranger()
        writer.write(b"".join(said))
        await ended(reader)
        assert server.links.empty()
        writer.close()

    served(play)


def test_our_own_words_prove_nothing() -> None:
    async def play(server: Server) -> None:
        async with listening(carry) as port:
            with pytest.raises(Broken, match="no agent of this launch"):
                await connect("127.0.0.1", port, TOKEN, 10)
        reader, writer = await server.stranger()
        echo = asyncio.ensure_future(carry(reader, writer))
        await echo
        assert server.links.empty()
        writer.close()

    served(play)


@pytest.mark.parametrize("words", [b"", NONCE[:7], NONCE, NONCE + b"f" * 63])
def test_a_greeting_that_ends_early_is_none(words: bytes) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        writer.close()

    async def play(server: Server) -> None:
        reader, writer = await server.stranger()
        writer.write(words)
        writer.write_eof()
        await ended(reader)
        assert server.links.empty()
        writer.close()
        async with listening(hang_up) as port:
            with pytest.raises(Broken):
                await connect("127.0.0.1", port, TOKEN, 10)

    served(play)


@pytest.mark.parametrize("act", ["changed", "repeated", "left out"])
def test_lines_that_are_changed_repeated_or_left_out_end_the_connection(act: str) -> None:
    async def play(server: Server) -> None:
        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            near, far = await server.stranger()
            back = asyncio.ensure_future(carry(near, writer))
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                for number in range(5):
                    line = await reader.readuntil(b"\n")
                    if number == 3:  # of number, proof, and three messages
                        line = {"changed": line.replace(b"1", b"2"), "repeated": line * 2, "left out": b""}[act]
                    far.write(line)
            await back

        async with listening(between) as port:
            link = await connect("127.0.0.1", port, TOKEN, 10)
            other = await server.links.get()
            for number in range(3):
                link.send({"number": number})
            heard = []
            with pytest.raises(Broken, match="not of this launch"):
                while True:
                    heard.append((await other.receive())["number"])
            assert heard == ([0, 1] if act == "repeated" else [0])
            link.close()
            other.close()

    served(play)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
def test_a_token_that_is_removed_as_it_is_read_is_made_again(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a node does that finds its launch ended, while another begins the next one."""
    path, read, times = tmp_path / ".launch" / "l.token", Path.read_bytes, [0]

    def removed(self: Path) -> bytes:
        times[0] += 1
        if times[0] < 3:
            path.unlink()
            raise OSError(number, os.strerror(number))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", removed)
    token = shared_token(path)
    assert times[0] == 3 and len(token) == 32 and read(path) == token == shared_token(path)
    assert [each.name for each in path.parent.iterdir()] == ["l.token"] and path.stat().st_mode & 0o777 == 0o600


def test_a_token_that_never_comes_is_refused_and_what_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "TOKEN_S", 0.3)
    path = tmp_path / "l.token"
    path.write_bytes(b"torn")
    with pytest.raises(Refusal, match="holds no token"):
        shared_token(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        shared_token(path)
    assert [each.name for each in tmp_path.iterdir()] == ["l.token"]
