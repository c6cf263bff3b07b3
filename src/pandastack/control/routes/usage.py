"""`/v1/usage`, and `.../usage` of a sandbox: what is taken of the machine, and how much there may be."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from pandastack.control.parts import Parts
from pandastack.control.routes import answers
from pandastack.control.routes.requests import Reader, parts
from pandastack.wire.usage import SandboxUsage, WorkspaceUsage

router = APIRouter(prefix="/v1", tags=["usage"])
Here = Annotated[Parts, Depends(parts)]


@router.get("/usage", response_model=WorkspaceUsage, operation_id="getUsage")
async def workspace(here: Here, caller: Reader) -> Response:
    """Of the key's workspace, with its quotas."""
    return answers.json(await here.usages.of_workspace(caller))


@router.get("/sandboxes/{sandbox_id}/usage", response_model=SandboxUsage, operation_id="getSandboxUsage")
async def sandbox(here: Here, caller: Reader, sandbox_id: str) -> Response:
    """Wakes nothing, and is no activity."""
    return answers.json(await here.usages.of_sandbox(caller, sandbox_id))
