"""Carries commands, output and files between a client and the host of its sandbox. Runs in the control plane.

It authorises nothing (the routes did) and keeps nothing: a stream is pulled by its reader, one piece at a time, so
a slow client slows the command down instead of filling memory. What it yields are finished pieces of an HTTP answer.
"""

from __future__ import annotations

import base64
import codecs
import math
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from pandastack.control.checkpoints import Checkpoints
from pandastack.control.hosts import Host, closing, deadline
from pandastack.control.meters import Meters
from pandastack.control.settings import ControlSettings
from pandastack.control.store.sandboxes import SandboxRow
from pandastack.errors import GuestGone, PandastackError, SandboxTimeout, ServerError
from pandastack.wire.host import Output, ProcessExit
from pandastack.wire.ids import ProcessId, SandboxId, new_process_id
from pandastack.wire.processes import ExecRequest, ExecResult, ProcessStart, ProcessView, SignalRequest

DEFAULT_OUTPUT_BYTES = 1 << 20
Items = AsyncIterator[ProcessView | Output | ProcessExit]


def sse(event: str, data: object) -> bytes:
    """One server-sent event. `\\n` only: an existing client splits frames on exactly two of them."""
    return b"event: %b\ndata: %b\n\n" % (event.encode(), to_json(data, inf_nan_mode="null"))


def error_event(error: PandastackError) -> bytes:
    return sse("error", error.body())


def timed_out(timeout_s: float | None) -> str:
    """The words by which existing clients recognise that a command ran too long."""
    limit = f"{timeout_s:g} s" if timeout_s is not None else "its limit"
    return f"command timeout: exceeded {limit} and was ended with its whole process tree"


class Head:
    """The first `limit` bytes of a channel; the rest is counted and dropped, so that the command can go on."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._kept = 0

    def add(self, data: bytes) -> None:
        room = self._limit - self._kept
        if room > 0:
            self._parts.append(data[:room])
            self._kept += min(room, len(data))

    def render(self, total: int, *, process_id: str, channel: str) -> tuple[str, str | None, bool]:
        """The text (with a marker where bytes are missing), the bytes in base64 where the text is not exact, and whether it was cut."""
        raw = b"".join(self._parts)
        cut = total > len(raw)
        # A cut may split a character; the half of it is dropped rather than shown as damage.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(raw, final=not cut)
        exact = None if "\ufffd" not in text else base64.b64encode(raw).decode()
        if cut:
            text += (
                f"\n[... output cut here: {len(raw)} of {total} bytes shown; "
                f"read the rest with GET .../processes/{process_id}/output?stream={channel} ...]\n"
            )
        return text, exact, cut


class _Channel:
    """Turns the bytes of one channel into events; half a UTF-8 character waits for its other half."""

    def __init__(self, name: str, *, as_bytes: bool, offsets: bool) -> None:
        self._event = name
        self._as_bytes = as_bytes
        self._offsets = offsets
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._next: int | None = None

    def frames(self, output: Output) -> bytes:
        """Zero or more whole events."""
        if self._as_bytes:
            return sse(self._event, {"b64": base64.b64encode(output.data).decode("ascii"), "offset": output.offset})
        lost = b"" if self._next in (None, output.offset) else self.rest()
        held = len(self._decoder.getstate()[0])
        text = self._decoder.decode(output.data)
        self._next = output.offset + len(output.data)
        return lost + self._frame(text, output.offset - held)

    def rest(self) -> bytes:
        """What is still held back when the channel ends or jumps."""
        held = len(self._decoder.getstate()[0])
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return self._frame(text, (self._next or 0) - held)

    def _frame(self, text: str, offset: int) -> bytes:
        if not text:
            return b""
        return sse(self._event, {"chunk": text, "offset": offset} if self._offsets else {"chunk": text})


@dataclass(frozen=True)
class Following:
    """A stream that has begun: the host accepted it, and nothing has been sent yet."""

    process_id: ProcessId
    frames: AsyncIterator[bytes]


class Gateway:
    """The way to one host."""

    def __init__(self, host: Host, checkpoints: Checkpoints, settings: ControlSettings, meters: Meters) -> None:
        self._host = host
        self._checkpoints = checkpoints
        self._settings = settings
        self._meters = meters

    def deadline(self) -> AbstractAsyncContextManager[None]:
        """For a call that the host answers at once."""
        return deadline(self._settings.host_timeout_s)

    # Commands

    async def execute(self, row: SandboxRow, request: ExecRequest) -> ExecResult:
        """Run a command and wait for its end. Raises SandboxTimeout with what it had said."""
        request = self._limited(request)
        process_id = new_process_id()
        limit = request.max_output_bytes or DEFAULT_OUTPUT_BYTES
        heads = {"stdout": Head(limit), "stderr": Head(limit)}
        seen = {"stdout": 0, "stderr": 0}
        ended: ProcessExit | None = None
        self._checkpoints.began(row, process_id, request)
        no_end = "no answer from the sandbox about the end of the command"
        async with deadline(self._patience_s(request), no_end), closing(self._host.run(row.id, request, process_id)) as items:
            async for item in items:
                if isinstance(item, Output):
                    heads[item.channel].add(item.data)
                    seen[item.channel] = item.offset + len(item.data)
                elif isinstance(item, ProcessExit):
                    ended = item
                else:
                    process_id = ProcessId(item.id)
        if ended is None:
            raise GuestGone("the stream of the command ended without its exit code", process_id=process_id)
        self._checkpoints.ended(row, process_id)
        totals = {"stdout": max(ended.stdout_bytes, seen["stdout"]), "stderr": max(ended.stderr_bytes, seen["stderr"])}
        self._meters.bytes_out.inc(seen["stdout"] + seen["stderr"])
        stdout, stdout_b64, cut_out = heads["stdout"].render(totals["stdout"], process_id=process_id, channel="stdout")
        stderr, stderr_b64, cut_err = heads["stderr"].render(totals["stderr"], process_id=process_id, channel="stderr")
        if ended.reason == "timeout":
            raise SandboxTimeout(timed_out(request.timeout_seconds), stdout=stdout, stderr=stderr, process_id=process_id)
        return ExecResult(
            stdout=stdout,
            stderr=stderr,
            exit_code=ended.exit_code,
            duration_ms=ended.duration_ms,
            signal=ended.signal,
            truncated=cut_out or cut_err,
            process_id=process_id,
            stdout_bytes=totals["stdout"],
            stderr_bytes=totals["stderr"],
            stdout_b64=stdout_b64,
            stderr_b64=stderr_b64,
        )

    async def stream(self, row: SandboxRow, request: ExecRequest, *, as_bytes: bool) -> Following:
        """Start a command and return its events once the host has accepted it."""
        request, process_id = self._limited(request), new_process_id()
        self._checkpoints.began(row, process_id, request)
        items = self._host.run(row.id, request, process_id)
        return await self._follow(row, items, timeout_s=request.timeout_seconds, as_bytes=as_bytes, offsets=False)

    async def start(self, row: SandboxRow, request: ProcessStart) -> ProcessView:
        """Start a process that nobody need follow."""
        process_id = ProcessId(request.id) if request.id is not None else new_process_id()
        async with self.deadline():
            # The id is made up here, so that the call to the host can be repeated without starting a second process.
            started = await self._host.start_process(row.id, request.model_copy(update={"id": process_id}))
        self._checkpoints.began(row, process_id, request)
        return started

    async def attach(self, row: SandboxRow, process_id: ProcessId, *, stdout_offset: int, stderr_offset: int, as_bytes: bool) -> Following:
        items = self._host.attach(row.id, process_id, stdout_offset=stdout_offset, stderr_offset=stderr_offset)
        return await self._follow(row, items, timeout_s=None, as_bytes=as_bytes, offsets=True)

    async def look(self, row: SandboxRow, process_id: ProcessId) -> ProcessView:
        """How a process is, once."""
        async with self.deadline():
            found = await self._host.get_process(row.id, process_id)
        if not found.running:
            self._checkpoints.ended(row, process_id)
        return found

    async def kill(self, sandbox_id: SandboxId, process_id: ProcessId) -> None:
        async with self.deadline():
            await self._host.signal_process(sandbox_id, process_id, SignalRequest(signal="KILL", tree=True))

    async def _follow(self, row: SandboxRow, items: Items, *, timeout_s: float | None, as_bytes: bool, offsets: bool) -> Following:
        async with AsyncExitStack() as undo:
            await undo.enter_async_context(closing(items))
            async with self.deadline():
                first = await anext(items, None)
            if not isinstance(first, ProcessView):
                raise GuestGone("the stream of the command ended before it began")
            undo.pop_all()
        frames = self._frames(row, items, ProcessId(first.id), timeout_s=timeout_s, as_bytes=as_bytes, offsets=offsets)
        return Following(ProcessId(first.id), frames)

    async def _frames(
        self, row: SandboxRow, items: Items, process_id: ProcessId, *, timeout_s: float | None, as_bytes: bool, offsets: bool
    ) -> AsyncIterator[bytes]:
        channels = {name: _Channel(name, as_bytes=as_bytes, offsets=offsets) for name in ("stdout", "stderr")}
        sent = self._meters.bytes_out
        async with closing(items):
            try:
                async for item in items:
                    if isinstance(item, Output):
                        sent.inc(len(item.data))
                        frame = channels[item.channel].frames(item)
                        if frame:
                            yield frame
                    elif isinstance(item, ProcessExit):
                        self._checkpoints.ended(row, process_id)
                        yield b"".join(channel.rest() for channel in channels.values()) + _end(item, process_id, timeout_s)
                        return
                raise GuestGone("the stream of the command ended without its exit code", process_id=process_id)
            except PandastackError as error:
                yield b"".join(channel.rest() for channel in channels.values()) + error_event(error)

    def _limited(self, request: ExecRequest) -> ExecRequest:
        if request.timeout_seconds is not None:
            return request
        return request.model_copy(update={"timeout_seconds": self._settings.default_exec_timeout_s})

    def _patience_s(self, request: ExecRequest) -> float:
        # The guest ends a command that is over its time; this is for a guest that does not.
        return (request.timeout_seconds or math.inf) + self._settings.exec_grace_s

    # Bytes

    async def counted_in(self, data: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The pieces of an upload, passed on one by one."""
        count = self._meters.bytes_in.inc
        async for piece in data:
            count(len(piece))
            yield piece

    async def counted_out(self, data: AsyncIterator[bytes], *, at_most: int | None) -> AsyncIterator[bytes]:
        """The pieces of a download; a file that grows meanwhile does not make the answer longer than its head says."""
        count = self._meters.bytes_out.inc
        left = at_most
        async with closing(data):
            async for piece in data:
                if left is not None:
                    if len(piece) > left:
                        piece = piece[:left]
                    left -= len(piece)
                count(len(piece))
                if piece:
                    yield piece
                if left == 0:
                    return
        if left:
            raise ServerError("the file became shorter while it was read")


def _end(ended: ProcessExit, process_id: ProcessId, timeout_s: float | None) -> bytes:
    if ended.reason == "timeout":
        return error_event(SandboxTimeout(timed_out(timeout_s), process_id=process_id))
    facts: dict[str, Any] = {
        "exit_code": ended.exit_code,
        "signal": ended.signal,
        "reason": ended.reason,
        "duration_ms": ended.duration_ms,
        "process_id": process_id,
        "stdout_bytes": ended.stdout_bytes,
        "stderr_bytes": ended.stderr_bytes,
    }
    return sse("exit", facts)
