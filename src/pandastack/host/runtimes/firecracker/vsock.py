"""Connections to the guest daemon through the vsock device of a Firecracker: its socket, and the words with which a port is asked for.

Source: Firecracker docs/vsock.md.
"""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.firecracker import command, sockets

_CONNECT_TIMEOUT_S = 5.0
_MOST_WORDS_BYTES = 32
_WISH = f"CONNECT {command.GUEST_PORT}\n".encode()


class Listens:
    """Whether the daemon of a machine that boots listens. A connection waits in Firecracker until the guest has answered it."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._waiting: socket.socket | None = None

    def now(self) -> bool:
        with contextlib.suppress(OSError):
            if self._waiting is None:
                self._waiting = sockets.connect(self._place, _CONNECT_TIMEOUT_S)
                self._waiting.sendall(_WISH)
                self._waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                if self._waiting.recv(3) == b"OK ":
                    return True
                self.close()
            return False
        self.close()
        return False

    def close(self) -> None:
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None


def dialed(place: Path, opening: bytes, answer_bytes: int, ends: float) -> tuple[socket.socket, bytes]:
    """A connection over which `opening` was sent, and so many bytes of answer. Raises OSError, RuntimeFailed.

    `ends` is of `time.monotonic`.
    """
    connection = sockets.connect(place, max(0.001, ends - time.monotonic()))
    try:
        connection.sendall(_WISH)
        accepted = b""
        while not accepted.endswith(b"\n"):
            accepted += _received(connection, 1, ends)
            if len(accepted) > _MOST_WORDS_BYTES:
                raise RuntimeFailed("Firecracker accepts a connection with too many words")
        if not accepted.startswith(b"OK "):
            raise RuntimeFailed("Firecracker does not accept a connection", detail=repr(accepted))
        connection.sendall(opening)
        answer = b""
        while len(answer) < answer_bytes:
            answer += _received(connection, answer_bytes - len(answer), ends)
    except BaseException:
        connection.close()
        raise
    return connection, answer


def _received(connection: socket.socket, count: int, ends: float) -> bytes:
    connection.settimeout(max(0.001, ends - time.monotonic()))
    piece = connection.recv(count)
    if not piece:
        raise ConnectionResetError("nobody listens there")
    return piece
