"""AsyncSandbox, and `client.sandboxes` of the async client: the same as `sandboxes.py` but for the sending."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, overload

from pandastack import errors
from pandastack.sdk.calls import forks as fork_calls
from pandastack.sdk.calls import processes as process_calls
from pandastack.sdk.calls import sandboxes as calls
from pandastack.sdk.calls import usage as usage_calls
from pandastack.sdk.calls.processes import Cmd, Stdin
from pandastack.sdk.facts import DEFAULT_TEMPLATE
from pandastack.sdk.files import AsyncFilesystem
from pandastack.sdk.processes import AsyncProcesses
from pandastack.sdk.results import ExecResult, Lifecycle, Promoted
from pandastack.sdk.sandboxes import OnText
from pandastack.sdk.states import AsyncStates
from pandastack.sdk.streams import AsyncOutputStream
from pandastack.wire.isolation import AUTO
from pandastack.wire.processes import ExecRequest
from pandastack.wire.sandboxes import SandboxMetrics, SandboxView
from pandastack.wire.usage import SandboxUsage

if TYPE_CHECKING:
    from pandastack.sdk.client import AsyncClient, CancelEvent


class Creating(Awaitable["AsyncSandbox"]):
    """A sandbox to come: await it, or enter it with `async with`. Nothing is sent before that."""

    def __init__(self, create: Callable[[], Coroutine[Any, Any, AsyncSandbox]]) -> None:
        self._create = create
        self._sandbox: AsyncSandbox | None = None

    def __await__(self) -> Generator[Any, None, AsyncSandbox]:
        return self._create().__await__()

    async def __aenter__(self) -> AsyncSandbox:
        self._sandbox = await self._create()
        return self._sandbox

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._sandbox is not None:
            await self._sandbox.__aexit__(kind, error, trace)


class AsyncSandbox(AsyncStates):
    """A sandbox. `async with AsyncSandbox.create() as sandbox:` deletes it at the end unless it is persistent."""

    def __init__(self, client: AsyncClient, view: SandboxView) -> None:
        self._client = client
        self._take(view)
        self.filesystem = AsyncFilesystem(client, self.id)
        self.processes = AsyncProcesses(client, self.id)
        self.commands = AsyncCommands(self)

    @classmethod
    def create(
        cls,
        template: str = DEFAULT_TEMPLATE,
        cpu: float | None = None,
        memory_mb: int | None = None,
        metadata: Mapping[str, str] | None = None,
        ttl_seconds: int | None = None,
        persistent: bool = False,
        from_snapshot: str | None = None,
        volumes: Sequence[Mapping[str, Any]] | None = None,
        *,
        disk_mb: int | None = None,
        env: Mapping[str, str] | None = None,
        checkpoints: Mapping[str, int] | None = None,
        isolation: str = AUTO,
        idempotency_key: str | None = None,
        cancel: CancelEvent | None = None,
        client: AsyncClient | None = None,
    ) -> Creating:
        """As `client.sandboxes.create`, with the client of the configuration unless one is given.

        `await` gives the sandbox; `async with` also deletes it at the end.
        """
        return Creating(lambda: (client or _default_async_client()).sandboxes.create(
            template, cpu, memory_mb, ttl_seconds, persistent, metadata, from_snapshot, volumes,
            disk_mb=disk_mb, env=env, checkpoints=checkpoints, isolation=isolation,
            idempotency_key=idempotency_key, cancel=cancel,
        ))  # fmt: skip

    @classmethod
    async def list(
        cls,
        *,
        status: str | None = None,
        metadata: Mapping[str, str] | None = None,
        limit: int | None = None,
        client: AsyncClient | None = None,
    ) -> builtins.list[AsyncSandbox]:
        """As `client.sandboxes.list`."""
        return await (client or _default_async_client()).sandboxes.list(status=status, metadata=metadata, limit=limit)

    @classmethod
    async def get(cls, sandbox_id: str, *, client: AsyncClient | None = None) -> AsyncSandbox:
        """Raises SandboxNotFound."""
        return await (client or _default_async_client()).sandboxes.get(sandbox_id)

    async def exec(
        self,
        cmd: Cmd,
        timeout_seconds: float | None = None,
        check: bool = False,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: Stdin | None = None,
        user: str | None = None,
        max_output_bytes: int | None = None,
    ) -> ExecResult:
        """Run a command to its end: a text is a shell line, a list is an argv without a shell.

        Waits as long as the command runs. Raises SandboxTimeout (a TimeoutError) after `timeout_seconds`, when the command
        and everything it started are gone; CommandFailed for an exit code other than 0 if `check`. It is never sent twice:
        after a lost connection the outcome is unknown. `max_output_bytes` (default 1 MiB) bounds stdout and stderr each.
        """
        body = process_calls.exec_request(cmd, stdin, max_output_bytes, cwd=cwd, env=env, user=user, timeout_seconds=timeout_seconds)
        return await self._execute(body, process_calls.shown(cmd), check)

    async def run_code(
        self,
        code: str,
        language: str = "python",
        *,
        timeout_seconds: float | None = None,
        check: bool = False,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: Stdin | None = None,
        user: str | None = None,
        max_output_bytes: int | None = None,
    ) -> ExecResult:
        """Run a program given as text; `language` is "python" or "bash". Otherwise as `exec`."""
        body = process_calls.exec_request(
            None, stdin, max_output_bytes, code=code, language=process_calls.language_of(language),
            cwd=cwd, env=env, user=user, timeout_seconds=timeout_seconds,
        )  # fmt: skip
        return await self._execute(body, f"{language} code", check)

    async def _execute(self, body: ExecRequest, command: str, check: bool) -> ExecResult:
        try:
            result = await self._client._call(process_calls.execute(self.id, body))
        except errors.ServerError as error:
            raise process_calls.as_exec_error(error, command) from None
        return result.check(command) if check else result

    def stream(
        self,
        cmd: Cmd,
        *,
        timeout_seconds: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: Stdin | None = None,
        user: str | None = None,
    ) -> AsyncOutputStream:
        """A command whose output can be iterated while it runs; `exit_code` is set at the end.

        It begins when it is iterated or entered. A broken connection is taken up again where it broke: no byte is lost
        or doubled. Raises SandboxTimeout after `timeout_seconds`, ExecInterrupted when the outcome cannot be known.
        """
        cursor = self._stream_cursor(cmd, stdin=stdin, cwd=cwd, env=env, user=user, timeout_seconds=timeout_seconds)
        return AsyncOutputStream(self._client, self.id, cursor)

    def stream_code(
        self,
        code: str,
        language: str = "python",
        *,
        timeout_seconds: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: Stdin | None = None,
        user: str | None = None,
    ) -> AsyncOutputStream:
        """`stream` for a program given as text, as `run_code` takes it."""
        language = process_calls.language_of(language)
        cursor = self._stream_cursor(
            None, code=code, language=language, stdin=stdin, cwd=cwd, env=env, user=user, timeout_seconds=timeout_seconds
        )
        return AsyncOutputStream(self._client, self.id, cursor)

    async def exec_stream(
        self,
        cmd: Cmd,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        timeout_seconds: float | None = None,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: Stdin | None = None,
        user: str | None = None,
    ) -> int:
        """`stream` with callbacks that receive text; the exit code."""
        stream = self.stream(cmd, timeout_seconds=timeout_seconds, cwd=cwd, env=env, stdin=stdin, user=user)
        return await stream.wait(on_stdout, on_stderr)

    async def kill(self) -> None:
        """Delete the sandbox. Raises SandboxNotFound when it is gone already."""
        await self._client._call(calls.delete(self.id))

    async def set_ttl(self, seconds: int) -> Lifecycle:
        """Delete the sandbox after so many idle seconds; 0: never."""
        return await self._client._call(calls.set_lifecycle(self.id, ttl_seconds=seconds))

    async def set_persistent(self, persistent: bool) -> Lifecycle:
        """A persistent sandbox outlives `with` and idle time."""
        lifecycle = await self._client._call(calls.set_lifecycle(self.id, persistent=persistent))
        self.persistent = persistent
        return lifecycle

    async def lifecycle(self) -> Lifecycle:
        return await self._client._call(calls.lifecycle(self.id))

    async def metrics(self) -> SandboxMetrics:
        """What the sandbox costs its host: bytes and seconds."""
        return await self._client._call(calls.metrics(self.id))

    async def usage(self) -> SandboxUsage:
        """Bytes of memory and disk, its own and shared; wakes nothing."""
        return await self._client._call(usage_calls.of_sandbox(self.id))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.persistent:
            return
        try:
            # Also when the task is being cancelled.
            await asyncio.shield(self.kill())
        except errors.NotFoundError:
            pass
        except errors.PandastackError as failure:
            if error is None:
                raise
            # The error of the block is the one to see; that the sandbox is left over must be said with it.
            error.add_note(f"sandbox {self.id} could not be deleted: {failure}")


class AsyncCommands:
    """`sandbox.commands`"""

    def __init__(self, sandbox: AsyncSandbox) -> None:
        self._sandbox = sandbox

    async def run(
        self,
        cmd: Cmd,
        timeout: float | None = None,
        *,
        check: bool = False,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: Stdin | None = None,
        user: str | None = None,
    ) -> ExecResult:
        """`sandbox.exec` under the name that other platforms use."""
        return await self._sandbox.exec(cmd, timeout, check, cwd=cwd, env=env, stdin=stdin, user=user)


class AsyncSandboxes:
    """`client.sandboxes`"""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(
        self,
        template: str = DEFAULT_TEMPLATE,
        cpu: float | None = None,
        memory_mb: int | None = None,
        ttl_seconds: int | None = None,
        persistent: bool = False,
        metadata: Mapping[str, str] | None = None,
        from_snapshot: str | None = None,
        volumes: Sequence[Mapping[str, Any]] | None = None,
        *,
        disk_mb: int | None = None,
        env: Mapping[str, str] | None = None,
        checkpoints: Mapping[str, int] | None = None,
        isolation: str = AUTO,
        idempotency_key: str | None = None,
        cancel: CancelEvent | None = None,
    ) -> AsyncSandbox:
        """Start a sandbox and wait until it runs. Sizes are MiB; limits left out come from the template.

        `checkpoints` is what `sandbox.checkpoints` takes, such as `{"every_execs": 1}`. `isolation` is `"auto"` (the strongest that
        works on the server), `"microvm"` (a kernel of its own), or a runtime: `"gvisor"`, `"qemu"`. What the sandbox got is in
        `runtime`, `isolation`, `acceleration` and `own_kernel`. Raises InvalidRequest for another word, RuntimeUnavailable where
        it does not work there, IsolationTooWeak where the server asks for more.

        While the server is full it is asked again for up to `max_create_retry_seconds`; setting `cancel` (an event) ends
        that with CreateCancelled. Every create carries a key, so a lost answer never makes a second sandbox.
        """
        call = calls.create(
            template=template, ttl_seconds=ttl_seconds, persistent=persistent, metadata=metadata, env=env, cpu=cpu,
            memory_mb=memory_mb, disk_mb=disk_mb, from_snapshot=from_snapshot, volumes=volumes, checkpoints=checkpoints,
            isolation=isolation, idempotency_key=idempotency_key,
        )  # fmt: skip
        sandbox = AsyncSandbox(self._client, await self._client._call(call, cancel))
        # Older servers do not say it.
        sandbox.persistent = sandbox.persistent or persistent
        return sandbox

    async def list(
        self, *, status: str | None = None, metadata: Mapping[str, str] | None = None, limit: int | None = None
    ) -> builtins.list[AsyncSandbox]:
        """The newest first; all of them, or at most `limit`. Every pair of `metadata` must match."""
        if limit is None:
            views, _ = await self._client._call(calls.page(status, metadata, None, None))
            return [AsyncSandbox(self._client, view) for view in views]
        found: builtins.list[AsyncSandbox] = []
        async for sandbox in self.iterate(status=status, metadata=metadata, page_size=min(limit, calls.PAGE)):
            found.append(sandbox)
            if len(found) >= limit:
                break
        return found

    async def iterate(
        self, *, status: str | None = None, metadata: Mapping[str, str] | None = None, page_size: int = calls.PAGE
    ) -> AsyncGenerator[AsyncSandbox]:
        """As `list`, but page by page as far as it is read."""
        cursor: str | None = None
        while True:
            views, cursor = await self._client._call(calls.page(status, metadata, page_size, cursor))
            for view in views:
                yield AsyncSandbox(self._client, view)
            if cursor is None:
                return

    async def get(self, sandbox_id: str) -> AsyncSandbox:
        """Raises SandboxNotFound."""
        return AsyncSandbox(self._client, await self._client._call(calls.get(sandbox_id)))

    @overload
    async def fork(
        self,
        sandbox_id: str,
        metadata: Mapping[str, str] | None = None,
        *,
        count: None = None,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
        at: str | None = None,
    ) -> AsyncSandbox: ...

    @overload
    async def fork(
        self,
        sandbox_id: str,
        metadata: Mapping[str, str] | None = None,
        *,
        count: int,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
        at: str | None = None,
    ) -> builtins.list[AsyncSandbox]: ...

    async def fork(
        self,
        sandbox_id: str,
        metadata: Mapping[str, str] | None = None,
        *,
        count: int | None = None,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
        at: str | None = None,
    ) -> AsyncSandbox | builtins.list[AsyncSandbox]:
        """As `sandbox.fork`: one running copy, or with `count` a list of them; `at` is the point of a `fork_at`."""
        views = await self._client._call(fork_calls.fork(sandbox_id, metadata, count, idempotency_key, at), cancel)
        children = [AsyncSandbox(self._client, view) for view in views]
        return children[0] if count is None else children

    async def fork_tree(
        self,
        sandbox_id: str,
        count: int,
        metadata: Mapping[str, str] | None = None,
        *,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
        at: str | None = None,
    ) -> builtins.list[AsyncSandbox]:
        """As `sandbox.fork_tree`."""
        views = await self._client._call(fork_calls.fork_tree(sandbox_id, count, metadata, idempotency_key, at), cancel)
        return [AsyncSandbox(self._client, view) for view in views]

    async def promote(self, sandbox_id: str, *, cleanup_siblings: bool = False, tree_id: str | None = None) -> Promoted:
        """As `sandbox.promote`."""
        return await self._client._call(fork_calls.promote(sandbox_id, cleanup_siblings, tree_id))

    async def delete(self, sandbox_id: str) -> None:
        """Raises SandboxNotFound."""
        await self._client._call(calls.delete(sandbox_id))


def _default_async_client() -> AsyncClient:
    # Imported late: the client's module knows this one.
    from pandastack.sdk import client

    return client.get_default_async_client()
