"""`.../snapshots` of a sandbox, and `/v1/snapshots`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from pandastack.control.parts import Parts
from pandastack.control.routes import answers
from pandastack.control.routes.requests import IdempotencyKey, Reader, Writer, parts
from pandastack.control.snapshots import view
from pandastack.wire.snapshots import SnapshotList, SnapshotView

router = APIRouter(prefix="/v1", tags=["snapshots"])
Here = Annotated[Parts, Depends(parts)]


@router.post("/sandboxes/{sandbox_id}/snapshots", status_code=201, response_model=SnapshotView, operation_id="createSnapshot")
async def create(here: Here, caller: Writer, sandbox_id: str, key: IdempotencyKey = None) -> Response:
    """Durable when answered; the sandbox goes on as it was. A restore is then tried, and the snapshot is `verified` or `failed`."""
    return answers.created(await here.snapshots.capture(caller, sandbox_id, key))


@router.get("/snapshots", response_model=SnapshotList, operation_id="listSnapshots")
async def list_all(
    here: Here,
    caller: Reader,
    sandbox_id: Annotated[str | None, Query(max_length=64)] = None,
    automatic: Annotated[bool, Query(description="also those that nobody asked for")] = False,
) -> Response:
    """Newest first."""
    rows = await here.snapshots.list(caller, sandbox_id=sandbox_id, automatic=automatic)
    return answers.json(SnapshotList(snapshots=[view(row) for row in rows]))


@router.get("/snapshots/{snapshot_id}", response_model=SnapshotView, operation_id="getSnapshot")
async def get(here: Here, caller: Reader, snapshot_id: str) -> Response:
    row = await here.snapshots.get(caller, snapshot_id)
    return answers.json(view(row, await here.usages.of_snapshot(row)))


@router.post("/snapshots/{snapshot_id}/offload", response_model=SnapshotView, operation_id="offloadSnapshot")
async def offload(here: Here, caller: Writer, snapshot_id: str) -> Response:
    """Its memory and its disk are in the object store when answered, and take no place on the machine; all else stays the same."""
    row = await here.snapshots.offload(caller, snapshot_id)
    return answers.json(view(row, await here.usages.of_snapshot(row)))


@router.delete("/snapshots/{snapshot_id}", status_code=204, operation_id="deleteSnapshot")
async def delete(here: Here, caller: Writer, snapshot_id: str) -> Response:
    """Sandboxes that were made from it stay."""
    await here.snapshots.delete(caller, snapshot_id)
    return answers.empty()
