"""What every route needs to read a request: the caller, a JSON body, exact bytes from the query, a streamed body.

Text is parsed here once, into typed values, and the values are passed on. The order is always the same: who asks
(401), may they (403), is it well formed (400), does it exist (404).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote_to_bytes

from fastapi import Depends, Header, Query, Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from pandastack.control.access import Caller
from pandastack.control.parts import Parts
from pandastack.control.store.sandboxes import SandboxRow
from pandastack.errors import AuthError, InvalidRequest, PermissionDenied, TooLarge
from pandastack.wire.sandboxes import MAX_TTL_SECONDS

MAX_JSON_DEPTH = 32
MAX_PATH_BYTES = 4096
_EXACT_INTEGER = 1 << 53
_IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")
M = TypeVar("M", bound=BaseModel)


def parts(request: Request) -> Parts:
    """Everything the application was built from."""
    found: Parts = request.app.state.parts
    return found


# Who asks


class Needs:
    """A dependency that yields the caller and refuses one whose key lacks `scope`."""

    def __init__(self, scope: str) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> Caller:
        caller = await parts(request).keys.authenticate(_key(request))
        if not caller.may(self.scope):
            raise PermissionDenied(f"this needs a key with the scope {self.scope!r}", scope=self.scope)
        return caller


def _key(request: Request) -> str:
    header = request.headers.getlist("authorization")
    if header:
        kind, _, key = header[0].partition(" ")
        if len(header) > 1 or kind.lower() != "bearer":
            raise AuthError("unauthorized", detail="give one `Authorization: Bearer pds_...` header")
        return key.strip()
    if request.method == "GET":
        # Browsers' EventSource can send no header. For reading only: addresses end up in logs and histories.
        token = raw_query(request, "access_token")
        if token is not None:
            return token.decode("latin-1")
    raise AuthError("unauthorized", detail="give an API key as `Authorization: Bearer pds_...`")


Reader = Annotated[Caller, Depends(Needs("read"))]
Writer = Annotated[Caller, Depends(Needs("write"))]
Admin = Annotated[Caller, Depends(Needs("admin"))]


# JSON bodies


class Body:
    """A dependency that reads a JSON object into `model`. An empty body is `{}`; the content type does not matter."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model

    async def __call__(self, request: Request) -> BaseModel:
        raw = await read_body(request)
        return parse(self.model, raw)


async def read_body(request: Request) -> bytes:
    """The whole body, which the edge has bounded. Raises TooLarge."""
    pieces = [piece async for piece in pieces_of(request, stalled_s=parts(request).settings.stalled_client_s)]
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def parse(model: type[M], raw: bytes) -> M:
    """Strict JSON into a shape. Raises InvalidRequest naming the first wrong field."""
    if not raw or raw.isspace():
        value: Any = {}
    else:
        try:
            value = from_json(raw, allow_inf_nan=False)
        except ValueError:
            raise InvalidRequest("the body is not valid JSON in UTF-8", field="body") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object", field="body")
    value = _plain(value, MAX_JSON_DEPTH)
    try:
        return model.model_validate(value, strict=True)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)) from None


def _plain(value: Any, depth: int) -> Any:
    """Check the depth, and read 60.0 as the integer that JSON says it is."""
    if isinstance(value, dict):
        if depth == 0:
            raise InvalidRequest(f"the body is nested deeper than {MAX_JSON_DEPTH}", field="body")
        return {key: _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        if depth == 0:
            raise InvalidRequest(f"the body is nested deeper than {MAX_JSON_DEPTH}", field="body")
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_INTEGER:
        return int(value)
    return value


def invalid(errors: list[Any]) -> InvalidRequest:
    """The first of pydantic's complaints as our error; the input itself is not repeated."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("[key]",)]
    if place and place[0] in ("query", "path", "header", "body") and len(place) > 1:
        place = place[1:]
    field = ".".join(place)[:200] or "body"
    if field == "ttl_seconds" and first["type"] == "less_than_equal":
        # Existing clients look for this wording and ask again without a ttl.
        return InvalidRequest(f"ttl_seconds exceeds tier maximum of {MAX_TTL_SECONDS}", field=field)
    text = str(first["msg"]).removeprefix("Value error, ")
    return InvalidRequest(text if field == "body" else f"{field}: {text}", field=field)


# Repetitions


async def idempotency_key(
    idempotency_key: Annotated[str | None, Header(description="1 to 255 visible ASCII characters, remembered for 24 hours")] = None,
) -> str | None:
    """The `Idempotency-Key` header. Raises InvalidRequest."""
    if idempotency_key is not None and _IDEMPOTENCY_KEY.fullmatch(idempotency_key) is None:
        raise InvalidRequest("Idempotency-Key must be 1 to 255 visible ASCII characters", field="Idempotency-Key")
    return idempotency_key


IdempotencyKey = Annotated[str | None, Depends(idempotency_key)]


# The sandbox


async def changing(here: Parts, caller: Caller, sandbox_id: str) -> SandboxRow:
    """A running sandbox that is about to be changed, once what its last command left is safe (see `checkpoints`)."""
    row = await here.states.running(caller, sandbox_id)
    await here.checkpoints.turn(row)
    return row


# The query

Truth = Annotated[bool, Query()]


def raw_query(request: Request, name: str) -> bytes | None:
    """The bytes of a parameter, percent-decoded, "+" being a space; None if absent. Raises InvalidRequest if given twice."""
    wanted = name.encode("ascii")
    found: bytes | None = None
    query: bytes = request.scope["query_string"]
    for pair in query.split(b"&"):
        key, _, value = pair.partition(b"=")
        if unquote_to_bytes(key.replace(b"+", b" ")) == wanted:
            if found is not None:
                raise InvalidRequest(f"{name} is given twice", field=name)
            found = unquote_to_bytes(value.replace(b"+", b" "))
    return found


def absolute_path(request: Request, path: Annotated[str, Query(min_length=1, description="absolute; percent-encoded bytes")]) -> bytes:
    """The `path` parameter as bytes: a Linux name need not be UTF-8. What it means is decided inside the sandbox."""
    raw = raw_query(request, "path") or b""
    if not raw.startswith(b"/"):
        raise InvalidRequest("path must be absolute", field="path")
    if b"\x00" in raw or len(raw) > MAX_PATH_BYTES:
        raise InvalidRequest(f"path must have no NUL and at most {MAX_PATH_BYTES} bytes", field="path")
    return raw


FilePath = Annotated[bytes, Depends(absolute_path)]


# Streamed bodies


async def pieces_of(request: Request, *, stalled_s: float) -> AsyncIterator[bytes]:
    """The body as it arrives; the reader's pace is the sender's. Raises InvalidRequest where the client left or stalled."""
    receive: Callable[[], Awaitable[Any]] = request.receive
    while True:
        try:
            async with asyncio.timeout(stalled_s):
                message = await receive()
        except TimeoutError:
            raise InvalidRequest(f"no byte of the body came for {stalled_s:g} s", field="body", http_status=408) from None
        if message["type"] == "http.disconnect":
            raise InvalidRequest("the body ended early", field="body")
        piece: bytes = message.get("body", b"")
        if piece:
            yield piece
        if not message.get("more_body", False):
            return


def content_length(request: Request) -> int | None:
    raw = request.headers.get("content-length")
    return int(raw) if raw is not None and raw.isascii() and raw.isdigit() else None


def check_length(request: Request, limit_bytes: int) -> None:
    length = content_length(request)
    if length is not None and length > limit_bytes:
        raise TooLarge(f"the body is larger than {limit_bytes} bytes", field="body", maximum=limit_bytes)
