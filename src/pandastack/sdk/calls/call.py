"""The vocabulary of `calls/`: a Request, an Answer, and a Call that joins a request with the way to read its answer."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar
from urllib.parse import quote, quote_from_bytes

from pydantic import BaseModel, ValidationError

from pandastack import errors

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

PathLike = str | bytes | os.PathLike[str] | os.PathLike[bytes]

Query = Mapping[str, str | bytes | int | bool | None]

DEFAULT_READ_S = -1.0
"""Marks "the client's own timeout" where a read timeout is asked for; None means no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One HTTP request. `path` is below `/v1` and already percent-encoded, query included.

    `chunks` makes a new iterator over a body of `length` bytes (None: unknown), so that a retry can begin again.
    `read_s` bounds the wait between two pieces of the answer. `safe_to_repeat`: sending it twice equals sending it once.
    """

    method: str
    path: str
    body: bytes | None = None
    chunks: Callable[[], Iterable[bytes] | AsyncIterable[bytes]] | None = None
    length: int | None = None
    content_type: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    read_s: float | None = DEFAULT_READ_S
    safe_to_repeat: bool = False
    is_create: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise errors.ServerError(
                "the answer of the API is not JSON", hint="check that the address is that of a PandaStack API", http_status=self.status
            ) from error


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """`read` turns a successful answer into the result; failed ones never reach it (`raise_for_status`)."""

    request: Request
    read: Callable[[Answer], T]


def build(
    method: str,
    path: str,
    query: Query | None = None,
    *,
    body: BaseModel | Mapping[str, Any] | None = None,
    content: bytes | None = None,
    **options: Any,
) -> Request:
    """A request with a JSON `body`, raw `content`, or nothing. GET, HEAD, PUT and DELETE may be repeated unless told otherwise."""
    data = body.model_dump(mode="json", exclude_unset=True) if isinstance(body, BaseModel) else body
    options.setdefault("safe_to_repeat", method in ("GET", "HEAD", "PUT", "DELETE"))
    if data is not None:
        options["body"] = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
        options["content_type"] = "application/json"
    elif content is not None:
        options["body"] = content
        options["content_type"] = "application/octet-stream"
    return Request(method=method, path=path + encode_query(query or {}), **options)


def encode_query(query: Query) -> str:
    """`?a=b&c=d`, or nothing. None is left out; bytes are percent-encoded as they are, so any Linux name passes."""
    pairs = []
    for name, value in query.items():
        if value is None:
            continue
        if isinstance(value, bool):
            value = "true" if value else "false"
        text = quote_from_bytes(value, safe="/") if isinstance(value, bytes) else quote(str(value), safe="/")
        pairs.append(f"{name}={text}")
    return "?" + "&".join(pairs) if pairs else ""


def segment(text: str) -> str:
    """One path segment. `.` and `..` would name another resource, so they and the empty text are refused."""
    if not isinstance(text, str) or text in ("", ".", ".."):
        raise errors.InvalidRequest(f"{text!r} is not an id or a name", field="id")
    return quote(text, safe="")


def validated(shape: type[M], **values: Any) -> M:
    """A wire shape from arguments; None means "not given". Raises InvalidRequest before anything is sent."""
    try:
        return shape(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        raise errors.InvalidRequest(f"{name}: {text}" if name else text, field=name or None) from None


def parse(shape: type[M], data: Any) -> M:
    """A wire shape from an answer. Raises ServerError where the answer is not what the contract says."""
    try:
        return shape.model_validate(data)
    except ValidationError as error:
        raise errors.ServerError(
            f"the answer of the API is not a {shape.__name__}", hint="client and server may be of different versions"
        ) from error


def reads(shape: type[M]) -> Callable[[Answer], M]:
    return lambda answer: parse(shape, answer.json())


def nothing(answer: Answer) -> None:
    """For answers whose body says nothing."""


def items_of(answer: Answer) -> list[Any]:
    """Lists come bare or as `{"items": [...]}`; null is an empty one."""
    data = answer.json()
    items = data.get("items") if isinstance(data, dict) else data
    return items if isinstance(items, list) else []


def error_of(answer: Answer) -> errors.PandastackError:
    """The typed error that a failed answer describes."""
    try:
        body: Any = json.loads(answer.body)
    except ValueError:
        # A proxy's HTML page is not a message for people: name the status instead.
        text = answer.body.decode("utf-8", "replace").strip()
        body = text if text and len(text) < 500 and not text.startswith("<") else None
    return errors.from_body(answer.status, body, request_id=answer.headers.get("x-request-id"), retry_after_s=retry_after_s(answer.headers))


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """`Retry-After` as seconds from now: a number or an HTTP date; None where absent or unreadable."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    try:
        return (
            max(0.0, float(text))
            if text.replace(".", "", 1).isdigit()
            else max(0.0, (parsedate_to_datetime(text) - (now or datetime.now(UTC))).total_seconds())
        )
    except (ValueError, TypeError):
        return None
