"""A byte stream to the guest daemon that outlives a connection, since saving a machine cuts all of its vsock connections.

What runs here: two directions between a vsock connection and a socket pair, whose other end is the channel. Before the machine is
saved the link is *held*: this end sends no more, the guest says how much it has sent, and when all of that is here nothing is
under way. Then it goes on over a new connection, and neither the session nor the daemon has noticed. See guest/PROTOCOL.md,
section 1. In the event loop, without tasks of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import struct
from collections.abc import Callable
from typing import Literal

from pandastack.errors import RuntimeFailed

Operation = Literal["open", "resume", "hold"]

_OPERATIONS: dict[Operation, int] = {"open": 1, "resume": 2, "hold": 3}
ACCEPTED = b"\x01"
_PIECE_BYTES = 256 << 10
# What may be read of one end before the other one takes it.
_MOST_BYTES = 1 << 20


def preamble(operation: Operation, link: bytes, sent: int = 0) -> bytes:
    """The first bytes of a connection: what it is for, of which link, and how much this end has sent on that."""
    return struct.pack(">B16sQ", _OPERATIONS[operation], link, sent)


class _Way:
    """One direction: what is read of `source` is written to `target`, which may wait for its turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop, over: Callable[[], None]) -> None:
        self._loop, self._over = loop, over
        self.source: socket.socket | None = None
        self.target: socket.socket | None = None
        self._waits = bytearray()
        self._reading = self._writing = False
        self.held = False
        self.count = 0  # read of `source`
        self.moved = asyncio.Event()

    @property
    def empty(self) -> bool:
        return not self._waits

    def turn(self) -> None:
        """Read and write as both ends now allow."""
        wants = self.source is not None and not self.held and len(self._waits) < _MOST_BYTES
        if not wants:
            self.stop_reading()
        elif not self._reading and self.source is not None:
            self._reading = True
            self._loop.add_reader(self.source, self._readable)
        if not self._waits:
            self.stop_writing()
        elif not self._writing and self.target is not None:
            self._writing = True
            self._loop.add_writer(self.target, self._writable)

    def stop_reading(self) -> None:
        if self._reading and self.source is not None:
            self._loop.remove_reader(self.source)
        self._reading = False

    def stop_writing(self) -> None:
        if self._writing and self.target is not None:
            self._loop.remove_writer(self.target)
        self._writing = False

    def _readable(self) -> None:
        if self.source is None:
            return
        try:
            piece = self.source.recv(_PIECE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            piece = b""
        if not piece:
            self._over()
            return
        self.count += len(piece)
        self._waits += piece
        self._writable()

    def _writable(self) -> None:
        try:
            while self._waits and self.target is not None:
                del self._waits[: self.target.send(self._waits)]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._over()
            return
        self.moved.set()
        self.turn()


class Link:
    """From the first connection on. `take` is the channel's end, once; close the link when its machine is over."""

    def __init__(self, connection: socket.socket, identity: bytes) -> None:
        self.id = identity
        self.closed = False
        loop = asyncio.get_running_loop()
        self._here, self._there = socket.socketpair()
        self._here.setblocking(False)
        self._connection: socket.socket | None = None
        self._out, self._in = _Way(loop, self.close), _Way(loop, self.close)
        self._out.source = self._in.target = self._here
        self._use(connection)

    @staticmethod
    def identity() -> bytes:
        return secrets.token_bytes(16)

    def take(self) -> int:
        """The descriptor of the channel. Whoever takes it closes it."""
        return self._there.detach()

    @property
    def sent(self) -> int:
        return self._out.count

    @property
    def held(self) -> bool:
        """Nothing is under way, and there is no connection."""
        return not self.closed and self._connection is None

    def gone(self) -> bool:
        """Whether it is over, also where only the channel's end knows that yet; then it is closed."""
        if not self.closed:
            with contextlib.suppress(BlockingIOError):
                if not self._here.recv(1, socket.MSG_PEEK):
                    self.close()
        return self.closed

    async def quiet(self) -> None:
        """Read nothing more of this side, and wait until all that was read is on its way. Raises RuntimeFailed when it is over."""
        self._out.held = True
        self._out.turn()
        while not self._out.empty:
            await self._moved(self._out)

    async def drained(self, sent: int) -> None:
        """Wait until as much came from the guest as it says that it has sent; then the connection is not needed any more."""
        while self._in.count < sent:
            await self._moved(self._in)
        if self._in.count > sent:
            raise RuntimeFailed("the guest sent more than it says")
        self._drop()

    def resume(self, connection: socket.socket) -> None:
        """Go on over another connection."""
        self._out.held = False
        self._use(connection)

    def close(self) -> None:
        """The session at its other end is over. Idempotent."""
        if self.closed:
            return
        self.closed = True
        for way in (self._out, self._in):
            way.stop_reading()
            way.stop_writing()
        self._drop()
        self._out.source = self._in.target = None
        self._here.close()
        self._there.close()
        for way in (self._out, self._in):
            way.moved.set()

    def _use(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = self._out.target = self._in.source = connection
        self._out.turn()
        self._in.turn()

    def _drop(self) -> None:
        self._in.stop_reading()
        self._out.stop_writing()
        connection, self._connection = self._connection, None
        self._out.target = self._in.source = None
        if connection is not None:
            connection.close()

    async def _moved(self, way: _Way) -> None:
        way.moved.clear()
        if not self.closed:
            await way.moved.wait()
        if self.closed:
            raise RuntimeFailed("the stream to the guest is over")
