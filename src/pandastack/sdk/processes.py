"""Processes: commands with an id that outlive the connection, and whose output can be read again from an offset."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from pandastack import errors
from pandastack.sdk.calls import processes as calls
from pandastack.sdk.calls.processes import Cmd
from pandastack.sdk.cursor import Cursor
from pandastack.sdk.results import Channel, OutputSlice
from pandastack.sdk.streams import AsyncOutputStream, OutputStream
from pandastack.wire.processes import ProcessView

if TYPE_CHECKING:
    from pandastack.sdk.client import AsyncClient, Client


class _Seen:
    """A process as it was when last looked at (`refresh` looks again)."""

    def __init__(self, sandbox_id: str, view: ProcessView) -> None:
        self._sandbox_id = sandbox_id
        self._view = view

    @property
    def id(self) -> str:
        return self._view.id

    @property
    def pid(self) -> int:
        """Its number inside the sandbox."""
        return self._view.pid

    @property
    def command(self) -> str:
        return self._view.command

    @property
    def user(self) -> str:
        return self._view.user

    @property
    def running(self) -> bool:
        return self._view.running

    @property
    def started_at(self) -> str:
        return self._view.started_at

    @property
    def ended_at(self) -> str | None:
        return self._view.ended_at

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._view.exit_code

    @property
    def signal_name(self) -> str | None:
        """The signal that ended it."""
        return self._view.signal

    @property
    def reason(self) -> str | None:
        return self._view.reason

    @property
    def stdout_bytes(self) -> int:
        """How many bytes it has written to stdout so far."""
        return self._view.stdout_bytes

    @property
    def stderr_bytes(self) -> int:
        return self._view.stderr_bytes

    def __repr__(self) -> str:
        state = "running" if self.running else f"exit {self.exit_code}"
        return f"{type(self).__name__}(id={self.id!r}, command={self.command[:60]!r}, {state})"

    def _cursor(self, stdout_offset: int, stderr_offset: int, deadline: float | None = None) -> Cursor:
        offsets: dict[Channel, int] = {"stdout": stdout_offset, "stderr": stderr_offset}
        return Cursor(self._sandbox_id, process_id=self.id, offsets=offsets, command=self.command, deadline=deadline)


class Process(_Seen):
    def __init__(self, client: Client, sandbox_id: str, view: ProcessView) -> None:
        super().__init__(sandbox_id, view)
        self._client = client

    def refresh(self) -> Self:
        self._view = self._client._call(calls.get(self._sandbox_id, self.id))
        return self

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises SandboxTimeout (a TimeoutError) after `timeout` seconds; the process goes on."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.running:
            self.refresh()
        if self.exit_code is not None:
            return self.exit_code
        # Its output from here on is read and dropped: the end is seen the moment it happens, without asking again and again.
        try:
            OutputStream(self._client, self._sandbox_id, self._cursor(self.stdout_bytes, self.stderr_bytes, deadline)).wait()
        except errors.SandboxTimeout:
            # Ours, or that of the process, which has then ended and has an exit code.
            if (self.refresh()).exit_code is None:
                raise
        return _exit_code(self if self.exit_code is not None else self.refresh())

    def output(self, *, stdout_offset: int = 0, stderr_offset: int = 0) -> OutputStream:
        """Everything it wrote from these byte offsets on, and what it goes on to write; ends when the process ends.

        Leaving a `with` block of it early only stops reading.
        """
        return OutputStream(self._client, self._sandbox_id, self._cursor(stdout_offset, stderr_offset), owner=False)

    def read_output(self, stream: Channel = "stdout", offset: int = 0, limit: int | None = None) -> OutputSlice:
        """What is there now, at most `limit` bytes; does not wait."""
        return self._client._call(calls.read_output(self._sandbox_id, self.id, stream, offset, limit))

    def write_stdin(self, data: bytes | str) -> None:
        """Needs `start(..., stdin=True)`. Returns when the sandbox has taken the bytes."""
        self._client._call(calls.write_stdin(self._sandbox_id, self.id, _bytes(data), close=False))

    def close_stdin(self) -> None:
        """The process reads an end of file."""
        self._client._call(calls.write_stdin(self._sandbox_id, self.id, b"", close=True))

    def signal(self, name: str = "TERM", *, tree: bool = True) -> None:
        """`tree` (the default) reaches everything that the process started."""
        self._client._call(calls.signal(self._sandbox_id, self.id, name, tree))

    def kill(self, *, tree: bool = True) -> None:
        self.signal("KILL", tree=tree)

    def resize(self, rows: int, cols: int) -> None:
        """The size of its terminal; needs `start(..., pty=...)`."""
        self._client._call(calls.resize(self._sandbox_id, self.id, rows, cols))


class Processes:
    """`sandbox.processes`"""

    def __init__(self, client: Client, sandbox_id: str) -> None:
        self._client = client
        self._sandbox_id = sandbox_id

    def start(
        self,
        cmd: Cmd,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        timeout_seconds: float | None = None,
        stdin: bool = False,
        pty: tuple[int, int] | None = None,
        id: str | None = None,
    ) -> Process:
        """Start a command and return at once. `stdin` keeps its standard input open; `pty` is (rows, columns)."""
        call = calls.start(
            self._sandbox_id, cmd, stdin=stdin, pty=pty, process_id=id, cwd=cwd, env=env, user=user, timeout_seconds=timeout_seconds
        )
        try:
            view = self._client._call(call)
        except errors.ConnectionError as error:
            # The answer was lost, but perhaps not the request. The id is ours: look for it instead of starting twice.
            if not error.fields.get("maybe_sent", True):
                raise
            try:
                view = self._client._call(calls.get(self._sandbox_id, calls.id_of(call)))
            except errors.PandastackError:
                raise error from None
        return Process(self._client, self._sandbox_id, view)

    def list(self) -> list[Process]:
        return [Process(self._client, self._sandbox_id, view) for view in self._client._call(calls.list_processes(self._sandbox_id))]

    def get(self, process_id: str) -> Process:
        """Raises ProcessNotFound."""
        return Process(self._client, self._sandbox_id, self._client._call(calls.get(self._sandbox_id, process_id)))

    def attach(self, process_id: str) -> Process:
        """The same as `get`: everything about a process is behind its id."""
        return self.get(process_id)


class AsyncProcess(_Seen):
    def __init__(self, client: AsyncClient, sandbox_id: str, view: ProcessView) -> None:
        super().__init__(sandbox_id, view)
        self._client = client

    async def refresh(self) -> Self:
        self._view = await self._client._call(calls.get(self._sandbox_id, self.id))
        return self

    async def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises SandboxTimeout (a TimeoutError) after `timeout` seconds; the process goes on."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.running:
            await self.refresh()
        if self.exit_code is not None:
            return self.exit_code
        try:
            await AsyncOutputStream(self._client, self._sandbox_id, self._cursor(self.stdout_bytes, self.stderr_bytes, deadline)).wait()
        except errors.SandboxTimeout:
            # Ours, or that of the process, which has then ended and has an exit code.
            if (await self.refresh()).exit_code is None:
                raise
        return _exit_code(self if self.exit_code is not None else await self.refresh())

    def output(self, *, stdout_offset: int = 0, stderr_offset: int = 0) -> AsyncOutputStream:
        """Everything it wrote from these byte offsets on, and what it goes on to write; ends when the process ends.

        Leaving a `with` block of it early only stops reading.
        """
        return AsyncOutputStream(self._client, self._sandbox_id, self._cursor(stdout_offset, stderr_offset), owner=False)

    async def read_output(self, stream: Channel = "stdout", offset: int = 0, limit: int | None = None) -> OutputSlice:
        """What is there now, at most `limit` bytes; does not wait."""
        return await self._client._call(calls.read_output(self._sandbox_id, self.id, stream, offset, limit))

    async def write_stdin(self, data: bytes | str) -> None:
        """Needs `start(..., stdin=True)`. Returns when the sandbox has taken the bytes."""
        await self._client._call(calls.write_stdin(self._sandbox_id, self.id, _bytes(data), close=False))

    async def close_stdin(self) -> None:
        """The process reads an end of file."""
        await self._client._call(calls.write_stdin(self._sandbox_id, self.id, b"", close=True))

    async def signal(self, name: str = "TERM", *, tree: bool = True) -> None:
        """`tree` (the default) reaches everything that the process started."""
        await self._client._call(calls.signal(self._sandbox_id, self.id, name, tree))

    async def kill(self, *, tree: bool = True) -> None:
        await self.signal("KILL", tree=tree)

    async def resize(self, rows: int, cols: int) -> None:
        """The size of its terminal; needs `start(..., pty=...)`."""
        await self._client._call(calls.resize(self._sandbox_id, self.id, rows, cols))


class AsyncProcesses:
    """`sandbox.processes`"""

    def __init__(self, client: AsyncClient, sandbox_id: str) -> None:
        self._client = client
        self._sandbox_id = sandbox_id

    async def start(
        self,
        cmd: Cmd,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        timeout_seconds: float | None = None,
        stdin: bool = False,
        pty: tuple[int, int] | None = None,
        id: str | None = None,
    ) -> AsyncProcess:
        """Start a command and return at once. `stdin` keeps its standard input open; `pty` is (rows, columns)."""
        call = calls.start(
            self._sandbox_id, cmd, stdin=stdin, pty=pty, process_id=id, cwd=cwd, env=env, user=user, timeout_seconds=timeout_seconds
        )
        try:
            view = await self._client._call(call)
        except errors.ConnectionError as error:
            if not error.fields.get("maybe_sent", True):
                raise
            try:
                view = await self._client._call(calls.get(self._sandbox_id, calls.id_of(call)))
            except errors.PandastackError:
                raise error from None
        return AsyncProcess(self._client, self._sandbox_id, view)

    async def list(self) -> list[AsyncProcess]:
        views = await self._client._call(calls.list_processes(self._sandbox_id))
        return [AsyncProcess(self._client, self._sandbox_id, view) for view in views]

    async def get(self, process_id: str) -> AsyncProcess:
        """Raises ProcessNotFound."""
        return AsyncProcess(self._client, self._sandbox_id, await self._client._call(calls.get(self._sandbox_id, process_id)))

    async def attach(self, process_id: str) -> AsyncProcess:
        """The same as `get`: everything about a process is behind its id."""
        return await self.get(process_id)


def _bytes(data: bytes | str) -> bytes:
    return data.encode("utf-8", "surrogatepass") if isinstance(data, str) else bytes(data)


def _exit_code(process: _Seen) -> int:
    if process.exit_code is None:
        raise errors.ServerError(f"process {process.id} has ended but the API does not say how")
    return process.exit_code
