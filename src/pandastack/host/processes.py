"""Commands in a sandbox: turns the public shapes into guest calls and the guest's answers back into public shapes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime
from typing import Literal

from pandastack.errors import ProcessNotFound
from pandastack.host.guest import Guest, ProcessSpec, ProcessStream
from pandastack.host.guest.processes import MAX_INLINE_STDIN_BYTES
from pandastack.wire.guest import Exit, ProcessEntry, Started
from pandastack.wire.host import Output, OutputSlice, ProcessExit
from pandastack.wire.ids import ProcessId
from pandastack.wire.processes import Command, ExecRequest, ProcessStart, ProcessView, SignalRequest

Items = AsyncGenerator[ProcessView | Output | ProcessExit, None]

_CHANNELS: dict[int, Literal["stdout", "stderr"]] = {1: "stdout", 2: "stderr"}
_NUMBERS = {"stdout": 1, "stderr": 2}
_SLICE_BYTES = 128 << 10
_STDIN_PIECE_BYTES = 256 << 10


def spec(request: Command, process_id: ProcessId | None, *, stdin: bool | bytes, pty: tuple[int, int] | None = None) -> ProcessSpec:
    """What to start. Python code goes to the warm interpreter where the template has one."""
    shell, argv, python = request.cmd, request.argv, None
    if request.code is not None:
        if request.language == "python":
            python = request.code
        else:
            argv = ["/bin/bash", "-c", request.code]
    return ProcessSpec(
        argv=argv,
        shell=shell,
        python=python,
        id=process_id,
        cwd=request.cwd,
        env=request.env,
        user=request.user,
        stdin=stdin,
        pty=pty,
        timeout_s=request.timeout_seconds,
    )


async def run(guest: Guest, request: ExecRequest, process_id: ProcessId) -> Items:
    """See `control.hosts.Host.run`."""
    stdin = request.stdin_bytes()
    large = stdin is not None and len(stdin) > MAX_INLINE_STDIN_BYTES
    stream = await guest.run(spec(request, process_id, stdin=True if large else stdin if stdin is not None else False))
    async with stream:
        # The view comes first, so that a reader knows the id before it waits for output.
        yield started_view(stream.started, request)
        if large and stdin is not None:
            async for item in _feed_and_follow(stream, process_id, stdin):
                yield item
        else:
            async for item in _follow(stream):
                yield item


async def attach(guest: Guest, process_id: ProcessId, *, stdout_offset: int, stderr_offset: int) -> Items:
    """See `control.hosts.Host.attach`."""
    view = await get(guest, process_id)
    stream = await guest.attach(process_id, stdout_offset=stdout_offset, stderr_offset=stderr_offset)
    async with stream:
        yield view
        async for item in _follow(stream):
            yield item


async def start(guest: Guest, request: ProcessStart) -> ProcessView:
    pty = (request.pty.rows, request.pty.cols) if request.pty else None
    process_id = ProcessId(request.id) if request.id else None
    started = await guest.start(spec(request, process_id, stdin=request.stdin and pty is None, pty=pty))
    return started_view(started, request)


async def every(guest: Guest) -> list[ProcessView]:
    """Running processes and the last finished ones; not those that came with the template."""
    return [_view(entry) for entry in await guest.list_processes() if not entry.baked]


async def get(guest: Guest, process_id: ProcessId) -> ProcessView:
    for view in await every(guest):
        if view.id == process_id:
            return view
    raise ProcessNotFound("no such process", process_id=process_id)


async def read_output(guest: Guest, process_id: ProcessId, channel: Literal["stdout", "stderr"], *, offset: int, limit: int) -> OutputSlice:
    """Up to `limit` bytes, gathered from as many guest answers as it takes."""
    running = (await get(guest, process_id)).running
    pieces: list[bytes] = []
    taken = 0
    first: int | None = None
    while True:
        piece = await guest.output(process_id, _NUMBERS[channel], offset + taken, min(limit - taken, _SLICE_BYTES))
        data = piece.data
        if first is None:
            first = offset = piece.offset
        elif piece.offset != offset + taken:
            break  # The ring moved on meanwhile; what we have is still in one piece.
        pieces.append(data)
        taken += len(data)
        if not data or taken >= limit:
            break
    return OutputSlice(offset=first, data=b"".join(pieces), end=piece.next, running=running)


async def write_stdin(guest: Guest, process_id: ProcessId, data: AsyncIterator[bytes], *, close: bool) -> int:
    return await guest.write_stdin(process_id, data, close=close, timeout_s=None)


async def send_signal(guest: Guest, process_id: ProcessId, request: SignalRequest) -> None:
    await guest.signal(process_id, signal.Signals[f"SIG{request.signal}"], tree=request.tree)


async def _follow(stream: ProcessStream) -> AsyncIterator[Output | ProcessExit]:
    async for channel, offset, data in stream:
        yield Output(_CHANNELS[channel], offset, data)
    yield exit_view(stream.exit)


async def _feed_and_follow(stream: ProcessStream, process_id: ProcessId, stdin: bytes) -> AsyncIterator[Output | ProcessExit]:
    """A command may answer before it has read all of its input, so both directions run at once."""

    async def feed() -> None:
        for at in range(0, len(stdin), _STDIN_PIECE_BYTES):
            await stream.write(stdin[at : at + _STDIN_PIECE_BYTES])
        stream.end_input()

    feeder = asyncio.create_task(feed(), name=f"stdin {process_id}")
    try:
        async for item in _follow(stream):
            yield item
    finally:
        feeder.cancel()
        await asyncio.gather(feeder, return_exceptions=True)


def exit_view(ended: Exit) -> ProcessExit:
    return ProcessExit(
        exit_code=ended.code,
        signal=_signal_name(ended.signal),
        reason=ended.reason,
        stdout_bytes=ended.stdout_bytes,
        stderr_bytes=ended.stderr_bytes,
        duration_ms=ended.duration_ms,
    )


def started_view(started: Started, request: Command) -> ProcessView:
    words = request.cmd or (" ".join(request.argv) if request.argv else request.code) or ""
    return ProcessView(
        id=started.id,
        pid=started.pid,
        command=words[:4096],
        user=request.user or "root",
        running=True,
        started_at=_time(started.started_unix_ns),
        stdout_start=started.stdout.first,
        stdout_bytes=started.stdout.next,
        stderr_start=started.stderr.first,
        stderr_bytes=started.stderr.next,
    )


def _view(entry: ProcessEntry) -> ProcessView:
    ended = entry.exit
    return ProcessView(
        id=entry.id,
        pid=entry.pid,
        command=" ".join(entry.argv)[:4096],
        user=entry.user,
        running=entry.running,
        started_at=_time(entry.started_unix_ns),
        ended_at=_time(entry.started_unix_ns + ended.duration_ms * 1_000_000) if ended else None,
        exit_code=ended.code if ended else None,
        signal=_signal_name(ended.signal) if ended else None,
        reason=ended.reason if ended else None,
        stdout_start=entry.stdout.first,
        stdout_bytes=entry.stdout.next,
        stderr_start=entry.stderr.first,
        stderr_bytes=entry.stderr.next,
    )


def _signal_name(number: int | None) -> str | None:
    if number is None:
        return None
    try:
        return signal.Signals(number).name.removeprefix("SIG")
    except ValueError:
        return str(number)


def _time(unix_ns: int) -> str:
    # The guest says this number; one beyond what a date can hold must not become an error of ours.
    try:
        moment = datetime.fromtimestamp(unix_ns / 1e9, UTC)
    except (OverflowError, ValueError, OSError):
        moment = datetime.fromtimestamp(0, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
