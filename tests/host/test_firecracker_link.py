"""The stream to a guest that goes on over another connection; with a guest in Python that keeps to the protocol."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.firecracker.link import Link, preamble

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class End:
    """One end of a stream, as whoever uses it sees it."""

    def __init__(self, made: socket.socket) -> None:
        made.setblocking(False)
        self.socket = made
        self._loop = asyncio.get_running_loop()

    async def write(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.socket, data)

    async def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count and (piece := await self._loop.sock_recv(self.socket, min(65536, count - len(data)))):
            data += piece
        return data

    def close(self) -> None:
        self.socket.close()


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Link, End, End]]:
    """A link, the channel's end and the guest's."""
    ours, theirs = socket.socketpair()
    link = Link(ours, Link.identity())
    channel, guest = End(socket.socket(fileno=link.take())), End(theirs)
    try:
        yield link, channel, guest
    finally:
        link.close()
        channel.close()
        guest.close()


def connection() -> tuple[socket.socket, End]:
    ours, theirs = socket.socketpair()
    return ours, End(theirs)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_connection_says_what_it_is_for() -> None:
    assert preamble("open", b"x" * 16) == b"\x01" + b"x" * 16 + bytes(8)
    assert preamble("hold", b"y" * 16, 258) == b"\x03" + b"y" * 16 + bytes(6) + b"\x01\x02"


async def test_much_goes_both_ways_unchanged() -> None:
    data = os.urandom(3_000_000)
    async with linked() as (_, channel, guest):
        for source, target in ((channel, guest), (guest, channel)):
            sending = asyncio.create_task(source.write(data))
            assert await target.read(len(data)) == data
            await sending


async def test_nobody_loses_a_byte_when_it_goes_on_over_another_connection() -> None:
    async with linked() as (link, channel, guest):
        await channel.write(b"one")
        assert await guest.read(3) == b"one"
        await guest.write(b"answer")
        await link.quiet()
        assert link.sent == 3
        await channel.write(b"two")  # Waits in the channel.
        await link.drained(6)
        assert link.held
        assert await guest.read(1) == b""
        ours, again = connection()
        link.resume(ours)
        assert not link.held
        assert await again.read(3) == b"two"
        await again.write(b" and more")
        assert await channel.read(15) == b"answer and more"
        again.close()


async def test_what_is_under_way_is_waited_for() -> None:
    data = os.urandom(1_000_000)
    async with linked() as (link, channel, guest):
        quiet = asyncio.create_task(channel.write(b"x" * 400_000))
        await guest.read(1)
        quieting = asyncio.create_task(link.quiet())
        reading = asyncio.create_task(guest.read(399_999))
        await quieting
        rest = await reading
        assert 1 + len(rest) <= link.sent <= 400_000
        quiet.cancel()
        drained = asyncio.create_task(link.drained(len(data)))
        await asyncio.sleep(0.05)
        assert not drained.done()
        sending = asyncio.create_task(guest.write(data))
        assert await channel.read(len(data)) == data
        await drained
        await sending


async def test_a_guest_that_counts_wrongly_is_found_out() -> None:
    async with linked() as (link, _, guest):
        await guest.write(b"12345")
        await link.quiet()
        await asyncio.sleep(0.05)
        with pytest.raises(RuntimeFailed):
            await link.drained(3)


@pytest.mark.parametrize("who", ["guest", "channel"])
async def test_the_end_of_either_end_is_that_of_the_other(who: str) -> None:
    async with linked() as (link, channel, guest):
        gone, stays = (guest, channel) if who == "guest" else (channel, guest)
        gone.close()
        assert await stays.read(1) == b""
        assert link.closed
        with pytest.raises(RuntimeFailed):
            await link.drained(1)


async def test_a_channel_that_was_just_closed_is_noticed() -> None:
    async with linked() as (link, channel, guest):
        assert not link.gone()
        channel.close()
        assert link.gone()
        assert await guest.read(1) == b""


async def test_nothing_stays_open_of_one_that_is_closed_while_it_is_held() -> None:
    before = descriptors()
    async with linked() as (link, _, _):
        await link.quiet()
        await link.drained(0)
        waiting = asyncio.create_task(link.drained(1))
        await asyncio.sleep(0)
        link.close()
        link.close()
        with pytest.raises(RuntimeFailed):
            await waiting
    assert descriptors() == before
