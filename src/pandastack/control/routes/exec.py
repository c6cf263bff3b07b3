"""`.../exec` and `.../exec/stream`: a command that somebody waits for."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Response

from pandastack.control.parts import Parts
from pandastack.control.routes import answers
from pandastack.control.routes.requests import Body, Writer, changing, parts
from pandastack.wire.processes import ExecRequest, ExecResult

router = APIRouter(prefix="/v1/sandboxes/{sandbox_id}/exec", tags=["exec"])
Here = Annotated[Parts, Depends(parts)]
Command = Annotated[ExecRequest, Depends(Body(ExecRequest))]
Encoding = Annotated[Literal["text", "base64"], Query()]


@router.post("", response_model=ExecResult, operation_id="exec")
async def run(here: Here, caller: Writer, sandbox_id: str, body: Command) -> Response:
    """Run a command and answer when it has ended. The command goes on if the client leaves, until its time is over."""
    row = await changing(here, caller, sandbox_id)
    return answers.json(await here.gateway.execute(row, body))


@router.post("/stream", response_class=answers.EventStream, status_code=200, operation_id="execStream")
async def stream(
    here: Here,
    caller: Writer,
    sandbox_id: str,
    body: Command,
    encoding: Encoding = "text",
    on_disconnect: Annotated[Literal["keep", "kill"], Query()] = "keep",
) -> Response:
    """Events `stdout` and `stderr`, then exactly one `exit` or `error`."""
    row = await changing(here, caller, sandbox_id)
    following = await here.gateway.stream(row, body, as_bytes=encoding == "base64")

    async def kill() -> None:
        await here.gateway.kill(row.id, following.process_id)

    return answers.EventStream(
        here,
        caller,
        following.frames,
        headers={"x-process-id": following.process_id},
        on_abandon=kill if on_disconnect == "kill" else None,
    )
