"""`.../fork`, `.../fork-tree`, `.../promote`: running copies of a sandbox, and the one that wins."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from pandastack.control.parts import Parts
from pandastack.control.routes import answers
from pandastack.control.routes.requests import Body, IdempotencyKey, Writer, parts
from pandastack.wire.snapshots import Forked, ForkRequest, ForkTreeRequest, Promoted, PromoteRequest

router = APIRouter(prefix="/v1/sandboxes/{sandbox_id}", tags=["forks"])
Here = Annotated[Parts, Depends(parts)]


@router.post("/fork", status_code=201, response_model=Forked, operation_id="forkSandbox")
async def fork(
    here: Here,
    caller: Writer,
    sandbox_id: str,
    body: Annotated[ForkRequest, Depends(Body(ForkRequest))],
    key: IdempotencyKey = None,
) -> Response:
    """Running copies, memory and processes included: all or none. The sandbox itself goes on as it was."""
    return answers.created(await here.forks.fork(caller, sandbox_id, body, key))


@router.post("/fork-tree", status_code=201, response_model=Forked, operation_id="forkSandboxTree")
async def fork_tree(
    here: Here,
    caller: Writer,
    sandbox_id: str,
    body: Annotated[ForkTreeRequest, Depends(Body(ForkTreeRequest))],
    key: IdempotencyKey = None,
) -> Response:
    """As `fork`, two copies unless `count` says otherwise."""
    return answers.created(await here.forks.fork(caller, sandbox_id, body, key))


@router.post("/promote", response_model=Promoted, operation_id="promoteSandbox")
async def promote(here: Here, caller: Writer, sandbox_id: str, body: Annotated[PromoteRequest, Depends(Body(PromoteRequest))]) -> Response:
    """Let one child of a fork win. `cleanup_siblings` deletes the other children of the same fork, and nothing else."""
    return answers.json(await here.forks.promote(caller, sandbox_id, body))
