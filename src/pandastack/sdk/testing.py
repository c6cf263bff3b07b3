"""In-memory transports for tests of programs that use the SDK: no server, no socket.

def handler(request):
    return answer({"id": "s1", "status": "running"}, status=201)

client = Client("http://test", "key", transport=MemoryTransport(handler))
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from pandastack import errors
from pandastack.sdk.calls.call import Answer, Request


@dataclass
class Streamed:
    """An answer in pieces. A piece that is an exception is raised in its place: a connection that breaks."""

    pieces: Iterable[bytes | Exception]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


Handler = Callable[[Request], Answer | Streamed]


def answer(body: Any = None, status: int = 200, **headers: str) -> Answer:
    """A JSON answer (bytes are taken as they are); `retry_after="5"` becomes the header retry-after."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer(status, {name.replace("_", "-"): value for name, value in headers.items()}, data)


def event(name: str, **data: Any) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def broken(maybe_sent: bool = True) -> errors.ConnectionError:
    """What a transport raises; with `maybe_sent=False` no connection was made at all."""
    return errors.ConnectionError("the connection to the API broke off", maybe_sent=maybe_sent)


class _Memory:
    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.requests: list[Request] = []
        self.bodies: list[bytes] = []

    def _handle(self, request: Request, body: bytes) -> Streamed:
        self.requests.append(request)
        self.bodies.append(body)
        found = self._handler(request)
        return found if isinstance(found, Streamed) else Streamed([found.body], found.status, found.headers)


class MemoryTransport(_Memory):
    """Hands every request to a function. `requests` and `bodies` hold what was sent."""

    def send(self, request: Request) -> Answer:
        with self.open(request) as opened:
            return Answer(opened.status, opened.headers, b"".join(opened))

    @contextmanager
    def open(self, request: Request) -> Iterator[Streamed]:
        body = b"".join(request.chunks()) if request.chunks is not None else request.body or b""  # type: ignore[arg-type]
        yield self._handle(request, body)

    def close(self) -> None:
        """Nothing is open."""


class AsyncMemoryTransport(_Memory):
    """The same for AsyncClient."""

    async def send(self, request: Request) -> Answer:
        async with self.open(request) as opened:
            return Answer(opened.status, opened.headers, b"".join([piece async for piece in opened]))

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[Streamed]:
        body = request.body or b""
        if request.chunks is not None:
            body = b"".join([piece async for piece in request.chunks()])  # type: ignore[union-attr]
        yield self._handle(request, body)

    async def close(self) -> None:
        """Nothing is open."""
