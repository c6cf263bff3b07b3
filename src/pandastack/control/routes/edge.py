"""Around every route: a request id, bounds on what comes in, counters, and the last net for errors. Plain ASGI."""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pandastack.control.meters import Meters
from pandastack.control.routes import answers
from pandastack.errors import BadRequestError, PandastackError, ServerError, TooLarge

log = structlog.get_logger(__name__)

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
MAX_TARGET_BYTES = 16 * 1024
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# The two routes whose bodies are streamed; each bounds itself by the disk or the pipe behind it.
_STREAMED = (("PUT", re.compile(r"/v1/sandboxes/[^/]+/fs")), ("POST", re.compile(r"/v1/sandboxes/[^/]+/processes/[^/]+/stdin")))


class Edge:
    """The outermost of our layers; one per application."""

    def __init__(self, app: ASGIApp, *, meters: Meters, body_limit_bytes: int) -> None:
        self._app = app
        self._meters = meters
        self._body_limit = body_limit_bytes
        self._timers: dict[tuple[str, str], Any] = {}
        self._counters: dict[tuple[str, str, int], Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id, problem = self._inspect(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        header = (b"x-request-id", request_id.encode("ascii"))
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], header]
            await send(message)

        try:
            if problem is not None:
                await answers.error(problem, request_id)(scope, receive, answer)
            else:
                await self._app(scope, self._bounded(scope, receive), answer)
        except answers.ClientGone:
            # The server closes the connection, because the answer is not complete.
            log.info("client.gone", request_id=request_id, route=_route(scope))
        except Exception as error:
            log.exception("request.failed", request_id=request_id, method=scope["method"], route=_route(scope))
            if status:
                raise
            unexpected = error if isinstance(error, PandastackError) else ServerError("internal error")
            await answers.error(unexpected, request_id)(scope, receive, answer)
        finally:
            self._count(scope, status, time.perf_counter() - began)

    def _inspect(self, scope: Scope) -> tuple[str, PandastackError | None]:
        """The request's id, theirs if it is sane, and what is wrong with its head."""
        request_id = b""
        total, length = 0, None
        headers = scope["headers"]
        for name, value in headers:
            total += len(name) + len(value)
            if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                request_id = value
            elif name == b"content-length":
                length = value
        text = request_id.decode("ascii") or secrets.token_hex(12)
        if len(headers) > MAX_HEADERS or total > MAX_HEADER_BYTES:
            return text, BadRequestError("the headers are too large", http_status=431)
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_TARGET_BYTES:
            return text, BadRequestError("the address is too long", http_status=414)
        if length is not None and not _is_streamed(scope):
            if not length.isdigit() or len(length) > 20:
                return text, BadRequestError("Content-Length is not a number", field="Content-Length")
            if int(length) > self._body_limit:
                return text, self._too_large()
        return text, None

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """A body without a length is counted as it comes."""
        if _is_streamed(scope):
            return receive
        left = self._body_limit

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    raise self._too_large()
            return message

        return counted

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is larger than {self._body_limit} bytes", field="body", maximum=self._body_limit)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = _route(scope)
        timer = self._timers.get((method, route))
        if timer is None:
            timer = self._timers[(method, route)] = self._meters.latency_s.labels(method, route)
        counter = self._counters.get((method, route, status))
        if counter is None:
            counter = self._counters[(method, route, status)] = self._meters.requests.labels(method, route, str(status or 499))
        timer.observe(seconds)
        counter.inc()


def _route(scope: Scope) -> str:
    """The template of the route that was found; never the path, which is the client's text."""
    return getattr(scope.get("route"), "path", None) or "unmatched"


def _is_streamed(scope: Scope) -> bool:
    # A cheap look at the path, only to choose the bound: what the request may do is decided on its route.
    return any(scope["method"] == method and path.fullmatch(scope["path"]) for method, path in _STREAMED)
