"""`.../pause`, `.../resume`, `.../hibernate`, `.../wake`: what a living sandbox can be. Their bodies mean nothing and are not read."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from pandastack.control.parts import Parts
from pandastack.control.routes import answers
from pandastack.control.routes.requests import Writer, parts
from pandastack.wire.snapshots import StateView

router = APIRouter(prefix="/v1/sandboxes/{sandbox_id}", tags=["state"])
Here = Annotated[Parts, Depends(parts)]


@router.post("/pause", status_code=204, operation_id="pauseSandbox")
async def pause(here: Here, caller: Writer, sandbox_id: str) -> Response:
    """Use no CPU and stay in memory until `resume`, or until a request needs it. A hibernated sandbox stays as it is."""
    await here.states.pause(caller, sandbox_id)
    return answers.empty()


@router.post("/resume", status_code=204, operation_id="resumeSandbox")
async def resume(here: Here, caller: Writer, sandbox_id: str) -> Response:
    await here.states.resume(caller, sandbox_id)
    return answers.empty()


@router.post("/hibernate", response_model=StateView, operation_id="hibernateSandbox")
@router.post("/stop", response_model=StateView, operation_id="stopSandbox")
async def hibernate(here: Here, caller: Writer, sandbox_id: str) -> Response:
    """Save memory, processes and disk, then give back memory and CPU. The next request that needs the sandbox wakes it."""
    return answers.json(StateView(status=(await here.states.hibernate(caller, sandbox_id)).status))


@router.post("/wake", response_model=StateView, operation_id="wakeSandbox")
@router.post("/start", response_model=StateView, operation_id="startSandbox")
async def wake(here: Here, caller: Writer, sandbox_id: str) -> Response:
    return answers.json(StateView(status=(await here.states.wake(caller, sandbox_id)).status))
