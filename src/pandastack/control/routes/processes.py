"""`.../processes`: commands that outlive their connection."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from pandastack.control.parts import Parts
from pandastack.control.routes import answers
from pandastack.control.routes.requests import Body, Reader, Writer, changing, parts, pieces_of
from pandastack.errors import ProcessNotFound
from pandastack.wire.ids import PROCESS_ID_PATTERN, ProcessId
from pandastack.wire.processes import ProcessStart, ProcessView, PtySize, SignalRequest, StdinWritten

router = APIRouter(prefix="/v1/sandboxes/{sandbox_id}/processes", tags=["processes"])
Here = Annotated[Parts, Depends(parts)]
Offset = Annotated[int, Query(ge=0, le=1 << 62)]
_ID = re.compile(PROCESS_ID_PATTERN)
MAX_SLICE_BYTES = 1 << 20


def _id(text: str) -> ProcessId:
    if _ID.fullmatch(text) is None:
        raise ProcessNotFound("no such process")
    return ProcessId(text)


@router.post("", status_code=201, response_model=ProcessView, operation_id="startProcess")
async def start(here: Here, caller: Writer, sandbox_id: str, body: Annotated[ProcessStart, Depends(Body(ProcessStart))]) -> Response:
    row = await changing(here, caller, sandbox_id)
    return answers.json(await here.gateway.start(row, body), 201)


@router.get("", response_model=list[ProcessView], operation_id="listProcesses")
async def list_all(here: Here, caller: Reader, sandbox_id: str) -> Response:
    row = await here.states.running(caller, sandbox_id)
    async with here.gateway.deadline():
        return answers.json(await here.host.list_processes(row.id))


@router.get("/{process_id}", response_model=ProcessView, operation_id="getProcess")
async def get(here: Here, caller: Reader, sandbox_id: str, process_id: str) -> Response:
    row = await here.states.running(caller, sandbox_id)
    return answers.json(await here.gateway.look(row, _id(process_id)))


@router.get("/{process_id}/stream", response_class=answers.EventStream, status_code=200, operation_id="followProcess")
async def follow(
    here: Here,
    caller: Reader,
    sandbox_id: str,
    process_id: str,
    stdout_offset: Offset = 0,
    stderr_offset: Offset = 0,
    encoding: Annotated[Literal["text", "base64"], Query()] = "text",
) -> Response:
    """As `exec/stream`, from any offset; every event of output says where it starts."""
    row = await here.states.running(caller, sandbox_id)
    following = await here.gateway.attach(
        row, _id(process_id), stdout_offset=stdout_offset, stderr_offset=stderr_offset, as_bytes=encoding == "base64"
    )
    return answers.EventStream(here, caller, following.frames, headers={"x-process-id": following.process_id})


@router.get("/{process_id}/output", response_class=answers.ByteStream, status_code=200, operation_id="readOutput")
async def output(
    here: Here,
    caller: Reader,
    sandbox_id: str,
    process_id: str,
    stream: Annotated[Literal["stdout", "stderr"], Query()] = "stdout",
    offset: Offset = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_SLICE_BYTES)] = MAX_SLICE_BYTES,
) -> Response:
    """A piece of what the process wrote; the headers say where it starts and where the output ends by now."""
    row = await here.states.running(caller, sandbox_id)
    async with here.gateway.deadline():
        piece = await here.host.read_output(row.id, _id(process_id), stream, offset=offset, limit=limit)
    here.meters.bytes_out.inc(len(piece.data))
    headers = {
        "x-output-offset": str(piece.offset),
        "x-output-end": str(piece.end),
        "x-output-running": "true" if piece.running else "false",
    }
    return Response(piece.data, headers=headers, media_type="application/octet-stream")


@router.post("/{process_id}/stdin", response_model=StdinWritten, operation_id="writeStdin", openapi_extra={"x-raw-body": True})
async def write_stdin(here: Here, caller: Writer, sandbox_id: str, process_id: str, request: Request, close: bool = False) -> Response:
    """The raw body, of any length, as it arrives; the process's pace is the sender's."""
    row = await changing(here, caller, sandbox_id)
    data = here.gateway.counted_in(pieces_of(request, stalled_s=here.settings.stalled_client_s))
    return answers.json(StdinWritten(bytes=await here.host.write_stdin(row.id, _id(process_id), data, close=close)))


@router.post("/{process_id}/signal", status_code=204, operation_id="signalProcess")
async def send_signal(
    here: Here, caller: Writer, sandbox_id: str, process_id: str, body: Annotated[SignalRequest, Depends(Body(SignalRequest))]
) -> Response:
    row = await changing(here, caller, sandbox_id)
    async with here.gateway.deadline():
        await here.host.signal_process(row.id, _id(process_id), body)
    return answers.empty()


@router.post("/{process_id}/resize", status_code=204, operation_id="resizeProcess")
async def resize(
    here: Here, caller: Writer, sandbox_id: str, process_id: str, body: Annotated[PtySize, Depends(Body(PtySize))]
) -> Response:
    row = await changing(here, caller, sandbox_id)
    async with here.gateway.deadline():
        await here.host.resize_process(row.id, _id(process_id), body)
    return answers.empty()
