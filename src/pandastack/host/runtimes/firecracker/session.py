"""The way from a machine to the daemon of its guest: one session, that is held still while the machine is saved. See `link`."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.base import Channel
from pandastack.host.runtimes.firecracker import vsock
from pandastack.host.runtimes.firecracker.link import ACCEPTED, Link, preamble

_log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0
# A daemon that has not answered by then has lost what was under way; the machine is saved all the same.
_HOLD_TIMEOUT_S = 2.0
_AGAIN_S = 0.01


class Session:
    """Of the machine with that name, by its vsock at `place`. `alive` raises RuntimeFailed when the machine is over."""

    def __init__(self, machine: str, place: Path, *, patience: float, alive: Callable[[], object]) -> None:
        self._machine = machine
        self._place = place
        self._patience = patience
        self._alive = alive
        self._link: Link | None = None

    async def connect(self) -> Channel:
        """A new one; an older one is over."""
        identity = Link.identity()
        connection, _ = await asyncio.to_thread(self._dial, preamble("open", identity), _CONNECT_TIMEOUT_S)
        self.close()
        self._link = Link(connection, identity)
        fd = self._link.take()
        return Channel(read_fd=fd, write_fd=fd)

    async def hold(self, *, frozen: bool) -> Link | None:
        """Let nothing be under way until `go_on`. None where there is no link, or where it could not be held and is over."""
        link = self._link
        if link is None or link.gone():
            return None
        try:
            if frozen:
                raise RuntimeFailed("the machine is frozen")
            async with asyncio.timeout(_HOLD_TIMEOUT_S * self._patience):
                await link.quiet()
                opening = preamble("hold", link.id, link.sent)
                connection, answer = await asyncio.to_thread(self._dial, opening, _HOLD_TIMEOUT_S, 8)
                connection.close()
                await link.drained(struct.unpack(">Q", answer)[0])
        except (RuntimeFailed, OSError, TimeoutError) as error:
            _log.warning("machine %s is saved without the session with its daemon: %s", self._machine, error)
            link.close()
            return None
        return link

    @property
    def held(self) -> Link | None:
        return self._link if self._link is not None and self._link.held else None

    async def go_on(self, link: Link) -> None:
        """Of one that was held."""
        try:
            connection, answer = await asyncio.to_thread(self._dial, preamble("resume", link.id), _CONNECT_TIMEOUT_S, len(ACCEPTED))
        except (RuntimeFailed, OSError) as error:
            _log.warning("machine %s goes on without the session with its daemon: %s", self._machine, error)
            link.close()
            return
        if link.closed or answer != ACCEPTED:
            connection.close()
            link.close()
        else:
            link.resume(connection)

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _dial(self, opening: bytes, timeout_s: float, answer_bytes: int = 0) -> tuple[socket.socket, bytes]:
        """A connection to the daemon, with what it is for said, and the daemon's answer to that. Tries until the time is over."""
        ends = time.monotonic() + timeout_s * self._patience
        while True:
            self._alive()
            try:
                return vsock.dialed(self._place, opening, answer_bytes, ends)
            except (OSError, TimeoutError, RuntimeFailed) as error:
                if time.monotonic() > ends:
                    raise RuntimeFailed("the machine's daemon cannot be reached", detail=str(error)) from error
            time.sleep(_AGAIN_S)
