"""How answers look: JSON from shapes, event streams and byte streams that wait for their reader, and errors.

The two streams write to ASGI directly: a piece costs one call, and nothing is kept between the host and the socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import Response
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from pandastack.control.access import Caller
from pandastack.control.creates import Created
from pandastack.control.gateway import error_event
from pandastack.control.hosts import closing
from pandastack.control.parts import Parts
from pandastack.errors import AuthError, PandastackError

KEEP_ALIVE = b": keep-alive\n\n"
# How often a stream looks whether its key is still valid and whether it was silent for too long.
TICK_S = 1.0


def json(
    value: BaseModel | Sequence[BaseModel] | Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    body = value.model_dump_json().encode() if isinstance(value, BaseModel) else to_json(value)
    return Response(body, status, headers=headers, media_type="application/json")


def raw_json(body: bytes, status: int, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, status, headers=headers, media_type="application/json")


def created(made: Created) -> Response:
    """The answer to a create or a fork, or the same bytes again."""
    return raw_json(made.body, made.status, {"idempotent-replay": "true"} if made.replayed else None)


def empty() -> Response:
    return Response(status_code=204)


def error(problem: PandastackError, request_id: str) -> Response:
    """The flat object every client can read, and the headers its status asks for."""
    body = {**problem.body(), "request_id": request_id}
    headers = {}
    if problem.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(problem.retry_after_s)))
    if problem.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    if problem.http_status in (408, 413, 431):
        # What is left of the request is not worth reading.
        headers["connection"] = "close"
    return Response(
        to_json(body, inf_nan_mode="null", serialize_unknown=True), problem.http_status, headers=headers, media_type="application/json"
    )


class _Stalled(Exception):
    """The client took nothing for too long."""


class EventStream(Response):
    """Server-sent events until the frames end, the client leaves or stalls, or its key is revoked."""

    media_type = "text/event-stream"

    def __init__(
        self,
        parts: Parts,
        caller: Caller,
        frames: AsyncIterator[bytes],
        *,
        headers: Mapping[str, str] | None = None,
        on_abandon: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        # No proxy on the way may collect events before it passes them on.
        super().__init__(
            b"", 200, headers={"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})}, media_type=self.media_type
        )
        del self.headers["content-length"]
        self._parts = parts
        self._caller = caller
        self._frames = frames
        self._on_abandon = on_abandon

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        settings = self._parts.settings
        complete = False
        sending_since: float | None = None
        sent_at = loop.time()

        async def put(body: bytes, *, more: bool = True) -> None:
            nonlocal sending_since, sent_at
            sending_since = loop.time()
            await send({"type": "http.response.body", "body": body, "more_body": more})
            sending_since, sent_at = None, loop.time()

        async def copy() -> None:
            nonlocal complete
            async with closing(self._frames) as frames:
                async for frame in frames:
                    await put(frame)
            await put(b"", more=False)
            complete = True

        async def watch_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        async def watch_time() -> None:
            while True:
                await asyncio.sleep(min(TICK_S, settings.keepalive_s))
                if not self._parts.keys.is_live(self._caller):
                    if sending_since is None:
                        await put(error_event(AuthError("unauthorized", detail="the key was revoked or has expired")))
                    return
                now = loop.time()
                if sending_since is not None:
                    if now - sending_since > settings.stalled_client_s:
                        return
                elif now - sent_at >= settings.keepalive_s:
                    await put(KEEP_ALIVE)

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        work = {asyncio.create_task(one()) for one in (copy, watch_client, watch_time)}  # Owned here: see `finally`.
        try:
            done, _rest = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            if not complete and self._on_abandon is not None:
                self._parts.crew.start("abandoned", self._on_abandon())  # type: ignore[arg-type]
        for task in done:
            task.result()
        if not complete:
            raise ClientGone


class ClientGone(Exception):
    """A stream ended before its last piece. The server closes the connection, so that the client sees it was cut."""


class ByteStream(Response):
    """A download. Each piece goes to the socket as it is; the host is asked for the next when the socket has taken it."""

    def __init__(
        self,
        parts: Parts,
        caller: Caller,
        data: AsyncIterator[bytes],
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str = "application/octet-stream",
    ) -> None:
        super().__init__(b"", status, headers=headers, media_type=media_type)
        if headers is None or "content-length" not in headers:
            del self.headers["content-length"]
        self._parts = parts
        self._caller = caller
        self._data = data

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stalled_s = self._parts.settings.stalled_client_s
        keys, caller = self._parts.keys, self._caller
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with closing(self._data) as data:
            async for piece in data:
                try:
                    async with asyncio.timeout(stalled_s):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                except TimeoutError:
                    raise ClientGone from None
                if not keys.is_live(caller):
                    raise ClientGone
        await send({"type": "http.response.body", "body": b"", "more_body": False})
