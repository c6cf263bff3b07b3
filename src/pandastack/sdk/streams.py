"""Output while it is written: OutputStream and AsyncOutputStream send what `cursor.Cursor` decides.

A stream begins when it is first iterated or entered. Leaving `with` while the command runs kills it; without `with`
nothing is cleaned up and the command goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import TYPE_CHECKING, Self

from pandastack import errors
from pandastack.sdk.calls import processes as calls
from pandastack.sdk.cursor import Cursor
from pandastack.sdk.results import OutputEvent

if TYPE_CHECKING:
    from pandastack.sdk.client import AsyncClient, Client

OnText = Callable[[str], None]


def with_gap(event: OutputEvent) -> str:
    """The text of an event, after a line that says so where output before it is missing: a gap must not go unseen."""
    return f"\n[... {event.skipped} bytes of output are missing here ...]\n{event.text}" if event.skipped else event.text


class _Outcome:
    """What is known about the command; all None until it is."""

    _cursor: Cursor

    @property
    def process_id(self) -> str | None:
        """The id to attach with; known once the command has started."""
        return self._cursor.process_id

    @property
    def exit_code(self) -> int | None:
        """None until the stream has been read to its end."""
        return self._cursor.exit.exit_code if self._cursor.exit else None

    @property
    def signal(self) -> str | None:
        return self._cursor.exit.signal if self._cursor.exit else None

    @property
    def reason(self) -> str | None:
        return self._cursor.exit.reason if self._cursor.exit else None

    @property
    def duration_ms(self) -> int | None:
        return self._cursor.exit.duration_ms if self._cursor.exit else None


class OutputStream(_Outcome, Iterator[OutputEvent]):
    """An iterator of OutputEvent; when it is exhausted, `exit_code` is set."""

    def __init__(self, client: Client, sandbox_id: str, cursor: Cursor, *, owner: bool = True) -> None:
        self._owner = owner  # Leaving the block ends a command that was started for it, not one that was there before.
        self._client = client
        self._sandbox_id = sandbox_id
        self._cursor = cursor
        self._began = False
        self._events = self._run()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> OutputEvent:
        self._began = True
        for event in self._events:
            if event is not None:
                return event
        raise StopIteration

    def _run(self) -> Generator[OutputEvent | None]:
        """None says that the connection is open; it is what `__enter__` waits for, because output may take its time."""
        cursor = self._cursor
        while cursor.exit is None:
            failure: errors.PandastackError | None = None
            try:
                with self._client._open(cursor.request(time.monotonic())) as opened:
                    cursor.opened(opened.headers)
                    yield None
                    # After the exit the loop goes on to the end of the body, so that the connection can be used again.
                    for data in opened:
                        yield from cursor.feed(data)
                        if cursor.must_reopen(time.monotonic()):
                            break
            except errors.PandastackError as error:
                failure = error
            if cursor.exit is None:
                time.sleep(cursor.after_break(failure, time.monotonic()))

    def wait(self, on_stdout: OnText | None = None, on_stderr: OnText | None = None) -> int:
        """Read to the end, handing text to the callbacks as it arrives; the exit code."""
        for event in self:
            receiver = on_stdout if event.channel == "stdout" else on_stderr
            if receiver is not None and (text := with_gap(event)):
                receiver(text)
        return self._cursor.code()

    def kill(self) -> None:
        """End the command and everything it started; one that has ended already is left alone."""
        if self.process_id is not None and self._cursor.exit is None:
            with contextlib.suppress(errors.NotFoundError, errors.Conflict):
                self._client._call(calls.signal(self._sandbox_id, self.process_id, "KILL", True))

    def close(self) -> None:
        """Stop reading; the command goes on."""
        self._events.close()

    def __enter__(self) -> Self:
        if not self._began:
            self._began = True
            next(self._events, None)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._owner:
                self.kill()
        finally:
            self.close()


class AsyncOutputStream(_Outcome, AsyncIterator[OutputEvent]):
    """An async iterator of OutputEvent; when it is exhausted, `exit_code` is set."""

    def __init__(self, client: AsyncClient, sandbox_id: str, cursor: Cursor, *, owner: bool = True) -> None:
        self._owner = owner
        self._client = client
        self._sandbox_id = sandbox_id
        self._cursor = cursor
        self._began = False
        self._events = self._run()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> OutputEvent:
        self._began = True
        async for event in self._events:
            if event is not None:
                return event
        raise StopAsyncIteration

    async def _run(self) -> AsyncGenerator[OutputEvent | None]:
        """As OutputStream._run."""
        cursor = self._cursor
        while cursor.exit is None:
            failure: errors.PandastackError | None = None
            try:
                async with self._client._open(cursor.request(time.monotonic())) as opened:
                    cursor.opened(opened.headers)
                    yield None
                    async for data in opened:
                        for event in cursor.feed(data):
                            yield event
                        if cursor.must_reopen(time.monotonic()):
                            break
            except errors.PandastackError as error:
                failure = error
            if cursor.exit is None:
                await asyncio.sleep(cursor.after_break(failure, time.monotonic()))

    async def wait(self, on_stdout: OnText | None = None, on_stderr: OnText | None = None) -> int:
        """Read to the end, handing text to the callbacks as it arrives; the exit code."""
        async for event in self:
            receiver = on_stdout if event.channel == "stdout" else on_stderr
            if receiver is not None and (text := with_gap(event)):
                receiver(text)
        return self._cursor.code()

    async def kill(self) -> None:
        """End the command and everything it started; one that has ended already is left alone."""
        if self.process_id is not None and self._cursor.exit is None:
            with contextlib.suppress(errors.NotFoundError, errors.Conflict):
                await self._client._call(calls.signal(self._sandbox_id, self.process_id, "KILL", True))

    async def close(self) -> None:
        """Stop reading; the command goes on."""
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        if not self._began:
            self._began = True
            await anext(self._events, None)
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            # Also when the task is being cancelled: the command must not outlive the block that owns it.
            if self._owner:
                await asyncio.shield(self.kill())
        finally:
            await self.close()
