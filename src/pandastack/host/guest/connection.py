"""One session with the daemon in a sandbox: a byte stream, cut into calls that run side by side.

Runs on the host, in the event loop, without tasks of its own: the loop calls back when the descriptors are ready.
States: opening -> open -> closed. Whatever the guest does wrong closes the session, and every call in it fails with
the same error. Memory is bounded by streams x (1 MiB received + what their callers hand in).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol, TypeVar

from pandastack.errors import GuestError, GuestGone, GuestProtocolError, GuestTimeout, InvalidRequest, PandastackError
from pandastack.host.guest.stream import Stream
from pandastack.wire import guest as wire
from pandastack.wire.guest import Frame, Kind

MAX_STREAMS = 1000
WRITE_BACKLOG_BYTES = 512 << 10
_MAX_BUFFERS = 64  # Per gathering write; the kernel takes up to 1024.

ShapeT = TypeVar("ShapeT", bound=wire.GuestShape)


class ByteStream(Protocol):
    """Two descriptors, equal for a socket. `fresh` false: an older session may have died half way on it."""

    @property
    def read_fd(self) -> int: ...
    @property
    def write_fd(self) -> int: ...
    @property
    def fresh(self) -> bool: ...


class GuestConnection:
    """Open it with `open`, close it with `close`; it owns the descriptors from the call of `open` on."""

    def __init__(self, channel: ByteStream, token: str | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._read_fd, self._write_fd = channel.read_fd, channel.write_fd
        self._tag = secrets.randbelow(2**32 - 1) + 1
        nonce = secrets.token_hex(16)
        self._decoder = wire.FrameDecoder(self._tag, nonce)
        self._opening = wire.hello(self._tag, nonce, token)
        self._greeted: asyncio.Future[None] = self._loop.create_future()
        self._streams: dict[int, Stream] = {}
        self._last_stream = 0
        self._backlog: deque[memoryview] = deque()
        self._backlog_bytes = 0
        self._writing = False
        self._writers: set[asyncio.Future[None]] = set()
        self._closed: PandastackError | None = None
        self._ended: asyncio.Future[PandastackError] = self._loop.create_future()
        self.on_activity: Callable[[int], None] | None = None

    @classmethod
    async def open(cls, channel: ByteStream, *, token: str | None = None, timeout_s: float) -> GuestConnection:
        """Start a session. Raises GuestTimeout, GuestGone, or GuestProtocolError; the descriptors are then closed."""
        connection = cls(channel, token)
        try:
            for descriptor in {channel.read_fd, channel.write_fd}:
                os.set_blocking(descriptor, False)
            connection._loop.add_reader(channel.read_fd, connection._readable)
            if not channel.fresh:
                connection._write(wire.PADDING)
            connection._write(connection._opening)
            async with asyncio.timeout(timeout_s):
                await connection._greeted
        except TimeoutError:
            await connection.close()
            raise GuestTimeout("the sandbox's daemon gave no answer", after_s=timeout_s) from None
        except BaseException:
            await connection.close()
            raise
        return connection

    async def close(self) -> None:
        """End the session; calls under way fail with GuestGone, processes in the sandbox run on. Idempotent."""
        self._shut(GuestGone("the session with the sandbox was closed"))

    @property
    def greeting(self) -> wire.HelloOk:
        """What the guest said of itself when the session began."""
        greeting = self._decoder.greeting
        if greeting is None:
            raise GuestGone("the session with the sandbox did not begin")
        return greeting

    @property
    def closed(self) -> bool:
        return self._closed is not None

    async def ended(self) -> PandastackError:
        """Wait for the end of the session, and say why."""
        return await asyncio.shield(self._ended)

    @contextlib.asynccontextmanager
    async def call(self, method: str, params: Mapping[str, Any], *, data: bool = False) -> AsyncIterator[Stream]:
        """Open a stream. Leaving the block aborts the call if it is not complete. `data`: DATA of ours will follow."""
        stream = self.start(method, params, data=data)
        try:
            yield stream
        finally:
            stream.reset()

    def start(self, method: str, params: Mapping[str, Any], *, data: bool = False) -> Stream:
        """Open a stream that its caller must `reset`, which does nothing once the call is complete."""
        self.check()
        if len(self._streams) >= MAX_STREAMS:
            raise GuestError("too many calls to one sandbox at once", guest_code="too_many")
        try:
            body = wire.encode_json({"method": method, "params": params})
        except ValueError:
            raise InvalidRequest("text for the sandbox must be valid Unicode") from None
        if len(body) > wire.MAX_CALL_BYTES:
            raise InvalidRequest("the request is too large", limit_bytes=wire.MAX_CALL_BYTES)
        self._last_stream += 1
        stream = Stream(self, self._last_stream, data)
        self._streams[stream.id] = stream
        last = 0 if data else wire.FLAG_LAST
        size = wire.MAX_PAYLOAD_BYTES
        for at in range(0, len(body), size):
            more = wire.FLAG_MORE if at + size < len(body) else 0
            self.send(Kind.CALL, stream.id, body[at : at + size], flags=last | more)
        return stream

    async def request(self, method: str, params: Mapping[str, Any], shape: type[ShapeT], *, timeout_s: float | None) -> ShapeT:
        """A call with one answer. Raises what `stream.from_guest` makes of the guest's error, or GuestTimeout."""
        async with deadline(timeout_s), self.call(method, params) as stream:
            return wire.parse(shape, await stream.answer())

    # What streams use.

    def check(self) -> None:
        if self._closed is not None:
            raise type(self._closed)(self._closed.message, **self._closed.fields)

    def forget(self, stream: Stream) -> None:
        self._streams.pop(stream.id, None)

    def send(self, kind: Kind, stream: int, payload: bytes | memoryview, *, flags: int = 0) -> None:
        """Queue a frame. Bulk senders `drain` before each; the others are bounded by the number of streams."""
        if self._closed is None:
            self._write(*wire.encode(kind, stream, payload, self._tag, flags=flags))

    async def drain(self) -> None:
        """Wait until the guest has taken most of what is queued."""
        while self._backlog_bytes > WRITE_BACKLOG_BYTES and self._closed is None:
            waiter = self._loop.create_future()
            self._writers.add(waiter)
            try:
                await waiter
            finally:
                self._writers.discard(waiter)
        self.check()

    # What the loop calls.

    def _write(self, *buffers: bytes | memoryview) -> None:
        for buffer in buffers:
            if len(buffer):
                self._backlog.append(memoryview(buffer))
                self._backlog_bytes += len(buffer)
        if not self._writing:
            self._writable()

    def _writable(self) -> None:
        try:
            while self._backlog:
                buffers = [buffer for buffer, _ in zip(self._backlog, range(_MAX_BUFFERS), strict=False)]
                self._took(os.writev(self._write_fd, buffers))
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._shut(GuestGone("the sandbox's daemon went away"))
            return
        if bool(self._backlog) != self._writing:
            self._writing = bool(self._backlog)
            if self._writing:
                self._loop.add_writer(self._write_fd, self._writable)
            else:
                self._loop.remove_writer(self._write_fd)
        if self._backlog_bytes <= WRITE_BACKLOG_BYTES:
            for waiter in self._writers:
                if not waiter.done():
                    waiter.set_result(None)

    def _took(self, count: int) -> None:
        self._backlog_bytes -= count
        while count:
            first = self._backlog[0]
            if len(first) > count:
                self._backlog[0] = first[count:]
                return
            count -= len(first)
            self._backlog.popleft()

    def _readable(self) -> None:
        try:
            count = os.readv(self._read_fd, [self._decoder.space()])
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        if not count:
            self._shut(GuestGone("the sandbox's daemon went away"))
            return
        try:
            for frame in self._decoder.filled(count):
                self._deliver(frame)
        except GuestProtocolError as error:
            self._shut(error)
            return
        if self._decoder.greeting is not None and not self._greeted.done():
            self._greeted.set_result(None)

    def _deliver(self, frame: Frame) -> None:
        if frame.stream == 0:
            if frame.kind != Kind.EVENT:
                raise GuestProtocolError("the guest sent a frame for no stream")
            event = wire.parse(wire.Activity, frame.payload)
            if self.on_activity is not None:
                self.on_activity(event.live)
            return
        stream = self._streams.get(frame.stream)
        if stream is None:
            raise GuestProtocolError("the guest answered a call that is not open")
        stream.deliver(frame)

    def _shut(self, error: PandastackError) -> None:
        if self._closed is not None:
            return
        self._closed = error
        self._loop.remove_reader(self._read_fd)
        if self._writing:
            self._loop.remove_writer(self._write_fd)
        for descriptor in {self._read_fd, self._write_fd}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._backlog.clear()
        self._backlog_bytes = 0
        for stream in list(self._streams.values()):
            stream.fail(error)
        self._streams.clear()
        for waiter in self._writers:
            if not waiter.done():
                waiter.set_result(None)
        if not self._greeted.done():
            self._greeted.set_exception(error)
            self._greeted.exception()  # Whoever awaits it still gets it; nobody awaiting it is no news.
        if not self._ended.done():
            self._ended.set_result(error)


@contextlib.asynccontextmanager
async def deadline(timeout_s: float | None) -> AsyncIterator[None]:
    """Turn a passed deadline into GuestTimeout."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise GuestTimeout("the sandbox's daemon gave no answer", after_s=timeout_s) from error
