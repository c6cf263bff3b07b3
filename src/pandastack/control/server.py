"""uvicorn, set up for this application. Whoever starts the process serves `config(app, ...)`.

What uvicorn leaves open is closed here: a head of unlimited size, and a peer that is gone without saying so.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HALF_OPEN_S = 60
WRITE_BUFFER_BYTES = 256 * 1024


class Protocol(HttpToolsProtocol):
    """One connection: its head is bounded before it is complete, and a dead peer is noticed by the kernel."""

    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Larger than the default of 64 KiB, so that one piece of a download does not wait for the one before it.
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, HALF_OPEN_S // 2)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, HALF_OPEN_S // 6)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, HALF_OPEN_S * 1000)

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._bound(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._bound(name + value)
        super().on_header(name, value)

    def _bound(self, piece: bytes) -> None:
        self._head_bytes += len(piece)
        if self._head_bytes > MAX_HEAD_BYTES:
            # The parser turns this into an error of its own, and uvicorn answers 400 and closes.
            raise ValueError("head too large")


def config(app: Any, **options: Any) -> uvicorn.Config:
    """The settings of the server; `options` are uvicorn's (host, port, uds, fd, ssl_*)."""
    wanted: dict[str, Any] = {
        "loop": "uvloop",
        "http": Protocol,
        "ws": "none",
        "lifespan": "on",
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "date_header": True,
        "proxy_headers": False,
        "timeout_keep_alive": 30,
        "timeout_graceful_shutdown": 20,
        "limit_concurrency": 4096,
        "backlog": 2048,
        **options,
    }
    return uvicorn.Config(app, **wanted)
