"""`.../history` and `.../restore`: the points of a sandbox, and the way back to one."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from pandastack.control.parts import Parts
from pandastack.control.routes import answers
from pandastack.control.routes.requests import Body, Reader, Writer, parts
from pandastack.control.snapshots import view
from pandastack.wire.snapshots import History, Restored, RestoreRequest

router = APIRouter(prefix="/v1/sandboxes/{sandbox_id}", tags=["history"])
Here = Annotated[Parts, Depends(parts)]
MAX_POINTS = 1000


@router.get("/history", response_model=History, operation_id="getHistory")
async def history(here: Here, caller: Reader, sandbox_id: str, limit: Annotated[int | None, Query(ge=1, le=MAX_POINTS)] = None) -> Response:
    """Every point of the sandbox, newest first: the snapshots that were asked for, and those that it took by itself."""
    rows = await here.history.points(caller, sandbox_id, limit=limit)
    return answers.json(History(points=[view(row) for row in rows]))


@router.post("/restore", response_model=Restored, operation_id="restoreSandbox")
async def restore(here: Here, caller: Writer, sandbox_id: str, body: Annotated[RestoreRequest, Depends(Body(RestoreRequest))]) -> Response:
    """Make memory, processes and files those of the point; the sandbox keeps its id and runs. What it was is saved as `undo_point`."""
    return answers.json(await here.history.restore(caller, sandbox_id, body))
