"""One call within a session: its answer, the bytes in both directions, and their credit.

States: open -> closed by the guest's last frame, or reset by us and kept (as `draining`) until that frame arrives.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, NamedTuple

from pandastack import errors
from pandastack.errors import GuestError, GuestProtocolError, PandastackError
from pandastack.wire import guest as wire
from pandastack.wire.guest import Channel, Frame, GuestFault, Kind

if TYPE_CHECKING:
    from pandastack.host.guest.connection import GuestConnection

CHUNK_BYTES = 256 << 10
_MERGE_BYTES = 4 << 10
_MAX_CREDIT_BYTES = 16 * wire.WINDOW_BYTES

_BY_CODE: dict[str, type[PandastackError]] = {
    "invalid": errors.InvalidRequest,
    "not_found": errors.FileNotFound,
    "not_a_directory": errors.FileConflict,
    "is_a_directory": errors.FileConflict,
    "exists": errors.FileConflict,
    "not_empty": errors.FileConflict,
    "busy": errors.FileConflict,
    "permission": errors.PermissionDenied,
    "read_only": errors.PermissionDenied,
    "no_space": errors.DiskFull,
    "too_large": errors.TooLarge,
    "no_process": errors.ProcessNotFound,
    "process_exists": errors.Conflict,
    "finished": errors.Conflict,
    "no_stdin": errors.Conflict,
    "no_pty": errors.Conflict,
    "not_executable": errors.InvalidRequest,
    "bad_cwd": errors.InvalidRequest,
    "unknown_user": errors.InvalidRequest,
    "hook_failed": errors.HookFailed,
}


def from_guest(fault: GuestFault) -> PandastackError:
    """The error for a guest's ERROR; its fields `guest_code` and `guest_errno` (or None) are what the guest said."""
    cause = _BY_CODE.get(fault.code, GuestError)
    return cause(fault.message[:500], guest_code=fault.code, guest_errno=fault.errno)


class Data(NamedTuple):
    """Bytes from the guest. `offset` is absolute for stdout and stderr, 0 for a body."""

    channel: int
    offset: int
    data: bytes


class Stream:
    """One call. One task receives, one may send."""

    def __init__(self, connection: GuestConnection, number: int, data: bool) -> None:
        self.id = number
        self._connection = connection
        self._queue: deque[tuple[int, int, bytearray | bytes]] = deque()
        self._allowed = wire.WINDOW_BYTES  # What the guest may still send.
        self._consumed = 0
        self._next_offset = {Channel.STDOUT: 0, Channel.STDERR: 0}
        self._credit = wire.WINDOW_BYTES
        self._sending = data
        self._reply: bytes | None = None
        self._end: bytes | None = None
        self._error: PandastackError | None = None
        self._complete = False
        self._draining = False
        self._waiters: list[asyncio.Future[None]] = []

    # For callers.

    async def reply(self) -> bytes:
        """The JSON of the first answer. Raises what the guest said instead."""
        while self._reply is None:
            self._raise()
            if self._complete:
                raise GuestProtocolError("the guest ended a call without an answer")
            await self._wait()
        return self._reply

    async def answer(self) -> bytes:
        """The JSON of an answer that completes the call."""
        reply = await self.reply()
        if not self._complete:
            raise GuestProtocolError("the guest did not complete a call")
        return reply

    async def receive(self) -> Data | None:
        """The next bytes; None after the last."""
        while not self._queue:
            self._raise()
            if self._complete:
                return None
            await self._wait()
        channel, offset, data = self._queue.popleft()
        self._consumed += len(data) + (8 if channel else 0)
        if self._consumed >= wire.WINDOW_BYTES // 4 and not self._complete:
            self._connection.send(Kind.CREDIT, self.id, wire.encode_credit(self._consumed))
            self._allowed += self._consumed
            self._consumed = 0
        return Data(channel, offset, bytes(data))

    async def lines(self) -> AsyncIterator[bytes]:
        """The batches of a call that answers in lines of JSON."""
        pending = b""
        while (data := await self.receive()) is not None:
            *whole, pending = (pending + data.data).split(b"\n")
            for line in whole:
                yield line
            if len(pending) > wire.MAX_PAYLOAD_BYTES:
                raise GuestProtocolError("the guest sent a line without end")
        if pending:
            raise GuestProtocolError("the guest ended a call within a line")

    @property
    def end(self) -> bytes:
        """The JSON of END, once `receive` returned None."""
        if self._end is None:
            raise GuestProtocolError("the guest ended a call without a result")
        return self._end

    @property
    def complete(self) -> bool:
        return self._complete

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes of the call's body or stdin, as fast as the guest takes them."""
        view = memoryview(data)
        while view:
            while self._credit <= 0 and not self._complete and self._error is None:
                await self._wait()
            await self._connection.drain()
            self._raise()
            if self._complete:
                return  # The guest has answered and wants no more.
            piece = view[: min(CHUNK_BYTES, self._credit)]
            self._credit -= len(piece)
            self._connection.send(Kind.DATA, self.id, bytes(piece))
            view = view[len(piece) :]

    def finish_sending(self) -> None:
        if self._sending and not self._complete and not self._draining:
            self._sending = False
            self._connection.send(Kind.END, self.id, b"")

    def reset(self) -> None:
        """Abort the call unless it is complete. Its number stays taken until the guest has said its last word."""
        if not self._complete and not self._draining and not self._connection.closed:
            self._draining = True
            self._queue.clear()
            self._connection.send(Kind.RESET, self.id, b"")
            self._wake()

    # For the connection.

    def fail(self, error: PandastackError) -> None:
        self._error = self._error or error
        self._complete = True
        self._wake()

    def deliver(self, frame: Frame) -> None:
        if frame.kind == Kind.DATA:
            self._data(frame)
        elif frame.kind == Kind.CREDIT:
            self._credit += wire.credit_bytes(frame.payload)
            if self._credit > _MAX_CREDIT_BYTES:
                raise GuestProtocolError("the guest gave more credit than it was sent")
        elif frame.kind == Kind.REPLY:
            if self._reply is not None:
                raise GuestProtocolError("the guest answered twice")
            self._reply = frame.payload
            if frame.flags & wire.FLAG_LAST:
                self._close()
        elif frame.kind == Kind.ERROR:
            self._error = from_guest(wire.parse(GuestFault, frame.payload))
            self._close()
        elif frame.kind == Kind.END:
            self._end = frame.payload
            self._close()
        elif frame.kind == Kind.RESET:
            self._error = GuestError("the sandbox aborted the call", guest_code="aborted")
            self._close()
        else:
            raise GuestProtocolError("the guest sent a frame that hosts send")
        self._wake()

    def _data(self, frame: Frame) -> None:
        if self._reply is None or not frame.payload:
            raise GuestProtocolError("the guest sent data out of order")
        self._allowed -= len(frame.payload)
        if self._allowed < 0:
            raise GuestProtocolError("the guest sent more than it had credit for")
        if self._draining:
            return
        if frame.flags == Channel.BODY:
            self._put(Channel.BODY, 0, frame.payload)
            return
        if frame.flags not in (Channel.STDOUT, Channel.STDERR):
            raise GuestProtocolError("the guest sent data on an unknown channel")
        offset, data = wire.split_output(frame.payload)
        channel = Channel(frame.flags)
        if offset < self._next_offset[channel] or offset + len(data) > 2**63 - 1:
            raise GuestProtocolError("the guest sent output twice")
        self._next_offset[channel] = offset + len(data)
        self._put(channel, offset, bytes(data))

    def _put(self, channel: int, offset: int, data: bytes) -> None:
        # A flood of tiny frames must not cost more memory than the window: small neighbours share one buffer.
        if self._queue and len(data) <= _MERGE_BYTES:
            last_channel, last_offset, last = self._queue[-1]
            adjacent = channel == Channel.BODY or last_offset + len(last) == offset
            if last_channel == channel and adjacent and len(last) < CHUNK_BYTES:
                if isinstance(last, bytes):
                    last = bytearray(last)
                    self._queue[-1] = (last_channel, last_offset, last)
                last += data
                return
        self._queue.append((channel, offset, data))

    def _close(self) -> None:
        self._complete = True
        self._connection.forget(self)

    def _raise(self) -> None:
        if self._error is not None:
            raise type(self._error)(self._error.message, **self._error.fields)
        if self._draining:
            raise GuestError("the call was aborted", guest_code="aborted")

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def _wait(self) -> None:
        # A receiver and a sender may both wait; each looks again when anything changes.
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter
