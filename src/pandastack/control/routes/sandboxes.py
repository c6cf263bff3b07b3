"""`/v1/sandboxes`: create, list, get, delete, lifecycle, metrics."""

from __future__ import annotations

import base64
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from pandastack.control.parts import Parts
from pandastack.control.routes import answers
from pandastack.control.routes.requests import Body, IdempotencyKey, Reader, Writer, parts
from pandastack.control.sandboxes import view
from pandastack.control.store.sandboxes import Position
from pandastack.errors import InvalidRequest
from pandastack.wire.ids import SandboxId, is_uuid
from pandastack.wire.sandboxes import (
    Lifecycle,
    LifecyclePatch,
    SandboxCreate,
    SandboxMetrics,
    SandboxPage,
    SandboxStatus,
    SandboxView,
)

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])
Here = Annotated[Parts, Depends(parts)]
DEFAULT_PAGE = 100
MAX_PAGE = 1000
MAX_FILTERS = 16


@router.post("", status_code=201, response_model=SandboxView, operation_id="createSandbox")
async def create(
    here: Here,
    caller: Writer,
    body: Annotated[SandboxCreate, Depends(Body(SandboxCreate))],
    key: IdempotencyKey = None,
) -> Response:
    return answers.created(await here.sandboxes.create(caller, body, key))


@router.get("", response_model=list[SandboxView] | SandboxPage, operation_id="listSandboxes")
async def list_all(
    here: Here,
    caller: Reader,
    status: SandboxStatus | None = None,
    metadata: Annotated[list[str], Query(description="key=value; all must match", max_length=MAX_FILTERS)] = [],  # noqa: B006
    limit: Annotated[int | None, Query(ge=1, le=MAX_PAGE)] = None,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """Newest first. A bare array, or a page where `limit` or `cursor` is given."""
    wanted = dict(_pair(text) for text in metadata)
    if limit is None and cursor is None:
        rows = await here.sandboxes.list(caller, status=status, metadata=wanted, limit=None, after=None)
        return answers.json([view(row) for row in rows])
    size = limit or DEFAULT_PAGE
    after = _position(cursor) if cursor is not None else None
    # One more than asked for tells whether there is a next page.
    rows = await here.sandboxes.list(caller, status=status, metadata=wanted, limit=size + 1, after=after)
    more = _cursor((rows[size - 1].created_us, rows[size - 1].id)) if len(rows) > size else None
    return answers.json(SandboxPage(items=[view(row) for row in rows[:size]], next_cursor=more))


@router.get("/{sandbox_id}", response_model=SandboxView, operation_id="getSandbox")
async def get(here: Here, caller: Reader, sandbox_id: str) -> Response:
    return answers.json(view(await here.sandboxes.get(caller, sandbox_id)))


@router.delete("/{sandbox_id}", status_code=204, operation_id="deleteSandbox")
async def delete(here: Here, caller: Writer, sandbox_id: str) -> Response:
    await here.sandboxes.delete(caller, sandbox_id)
    return answers.empty()


@router.get("/{sandbox_id}/lifecycle", response_model=Lifecycle, operation_id="getLifecycle")
async def lifecycle(here: Here, caller: Reader, sandbox_id: str) -> Response:
    return answers.json(await here.sandboxes.lifecycle(caller, sandbox_id))


@router.patch("/{sandbox_id}/lifecycle", response_model=Lifecycle, operation_id="setLifecycle")
async def set_lifecycle(
    here: Here, caller: Writer, sandbox_id: str, body: Annotated[LifecyclePatch, Depends(Body(LifecyclePatch))]
) -> Response:
    lifecycle = await here.sandboxes.set_lifecycle(caller, sandbox_id, body)
    if body.checkpoints is not None:
        here.checkpoints.changed(SandboxId(sandbox_id))
    return answers.json(lifecycle)


@router.get("/{sandbox_id}/metrics", response_model=SandboxMetrics, operation_id="getSandboxMetrics")
async def metrics(here: Here, caller: Reader, sandbox_id: str) -> Response:
    return answers.json(await here.sandboxes.metrics(caller, sandbox_id))


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InvalidRequest("metadata must be key=value", field="metadata")
    return key, value


def _cursor(position: Position) -> str:
    return base64.urlsafe_b64encode(f"{position[0]}.{position[1]}".encode()).decode().rstrip("=")


def _position(cursor: str) -> Position:
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
        created_us, _, sandbox_id = raw.partition(".")
        position = (int(created_us), sandbox_id)
    except ValueError:
        raise InvalidRequest("this is no cursor of ours", field="cursor") from None
    if not is_uuid(sandbox_id) or _cursor(position) != cursor:
        raise InvalidRequest("this is no cursor of ours", field="cursor")
    return position
