"""Sandbox, and `client.sandboxes`. Leaving `with` deletes a sandbox unless it is persistent."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, overload

from pandastack import errors
from pandastack.sdk.calls import forks as fork_calls
from pandastack.sdk.calls import processes as process_calls
from pandastack.sdk.calls import sandboxes as calls
from pandastack.sdk.calls import usage as usage_calls
from pandastack.sdk.calls.processes import Cmd, Stdin
from pandastack.sdk.facts import DEFAULT_TEMPLATE
from pandastack.sdk.files import Filesystem
from pandastack.sdk.processes import Processes
from pandastack.sdk.results import ExecResult, Lifecycle, Promoted
from pandastack.sdk.states import States
from pandastack.sdk.streams import OutputStream
from pandastack.wire.isolation import AUTO
from pandastack.wire.processes import ExecRequest
from pandastack.wire.sandboxes import SandboxMetrics, SandboxView
from pandastack.wire.usage import SandboxUsage

if TYPE_CHECKING:
    from pandastack.sdk.client import CancelEvent, Client

OnText = Callable[[str], None]


class Sandbox(States):
    """A sandbox. `with Sandbox.create() as sandbox:` deletes it at the end unless it is persistent; a plain call never cleans up."""

    def __init__(self, client: Client, view: SandboxView) -> None:
        self._client = client
        self._take(view)
        self.filesystem = Filesystem(client, self.id)
        self.processes = Processes(client, self.id)
        self.commands = Commands(self)

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
        client: Client | None = None,
    ) -> Sandbox:
        """As `client.sandboxes.create`, with the client of the configuration unless one is given."""
        return (client or _default_client()).sandboxes.create(
            template, cpu, memory_mb, ttl_seconds, persistent, metadata, from_snapshot, volumes,
            disk_mb=disk_mb, env=env, checkpoints=checkpoints, isolation=isolation,
            idempotency_key=idempotency_key, cancel=cancel,
        )  # fmt: skip

    @classmethod
    def list(
        cls,
        *,
        status: str | None = None,
        metadata: Mapping[str, str] | None = None,
        limit: int | None = None,
        client: Client | None = None,
    ) -> builtins.list[Sandbox]:
        """As `client.sandboxes.list`."""
        return (client or _default_client()).sandboxes.list(status=status, metadata=metadata, limit=limit)

    @classmethod
    def get(cls, sandbox_id: str, *, client: Client | None = None) -> Sandbox:
        """Raises SandboxNotFound."""
        return (client or _default_client()).sandboxes.get(sandbox_id)

    def exec(
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
        return self._execute(body, process_calls.shown(cmd), check)

    def run_code(
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
        return self._execute(body, f"{language} code", check)

    def _execute(self, body: ExecRequest, command: str, check: bool) -> ExecResult:
        try:
            result = self._client._call(process_calls.execute(self.id, body))
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
    ) -> OutputStream:
        """A command whose output can be iterated while it runs; `exit_code` is set at the end.

        It begins when it is iterated or entered. A broken connection is taken up again where it broke: no byte is lost
        or doubled. Raises SandboxTimeout after `timeout_seconds`, ExecInterrupted when the outcome cannot be known.
        """
        cursor = self._stream_cursor(cmd, stdin=stdin, cwd=cwd, env=env, user=user, timeout_seconds=timeout_seconds)
        return OutputStream(self._client, self.id, cursor)

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
    ) -> OutputStream:
        """`stream` for a program given as text, as `run_code` takes it."""
        language = process_calls.language_of(language)
        cursor = self._stream_cursor(
            None, code=code, language=language, stdin=stdin, cwd=cwd, env=env, user=user, timeout_seconds=timeout_seconds
        )
        return OutputStream(self._client, self.id, cursor)

    def exec_stream(
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
        return stream.wait(on_stdout, on_stderr)

    def kill(self) -> None:
        """Delete the sandbox. Raises SandboxNotFound when it is gone already."""
        self._client._call(calls.delete(self.id))

    def set_ttl(self, seconds: int) -> Lifecycle:
        """Delete the sandbox after so many idle seconds; 0: never."""
        return self._client._call(calls.set_lifecycle(self.id, ttl_seconds=seconds))

    def set_persistent(self, persistent: bool) -> Lifecycle:
        """A persistent sandbox outlives `with` and idle time."""
        lifecycle = self._client._call(calls.set_lifecycle(self.id, persistent=persistent))
        self.persistent = persistent
        return lifecycle

    def lifecycle(self) -> Lifecycle:
        return self._client._call(calls.lifecycle(self.id))

    def metrics(self) -> SandboxMetrics:
        """What the sandbox costs its host: bytes and seconds."""
        return self._client._call(calls.metrics(self.id))

    def usage(self) -> SandboxUsage:
        """Bytes of memory and disk, its own and shared; wakes nothing."""
        return self._client._call(usage_calls.of_sandbox(self.id))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.persistent:
            return
        try:
            self.kill()
        except errors.NotFoundError:
            pass
        except errors.PandastackError as failure:
            if error is None:
                raise
            # The error of the block is the one to see; that the sandbox is left over must be said with it.
            error.add_note(f"sandbox {self.id} could not be deleted: {failure}")


class Commands:
    """`sandbox.commands`"""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def run(
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
        return self._sandbox.exec(cmd, timeout, check, cwd=cwd, env=env, stdin=stdin, user=user)


class Sandboxes:
    """`client.sandboxes`"""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
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
    ) -> Sandbox:
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
        sandbox = Sandbox(self._client, self._client._call(call, cancel))
        # Older servers do not say it.
        sandbox.persistent = sandbox.persistent or persistent
        return sandbox

    def list(
        self, *, status: str | None = None, metadata: Mapping[str, str] | None = None, limit: int | None = None
    ) -> builtins.list[Sandbox]:
        """The newest first; all of them, or at most `limit`. Every pair of `metadata` must match."""
        if limit is None:
            views, _ = self._client._call(calls.page(status, metadata, None, None))
            return [Sandbox(self._client, view) for view in views]
        found: builtins.list[Sandbox] = []
        for sandbox in self.iterate(status=status, metadata=metadata, page_size=min(limit, calls.PAGE)):
            found.append(sandbox)
            if len(found) >= limit:
                break
        return found

    def iterate(
        self, *, status: str | None = None, metadata: Mapping[str, str] | None = None, page_size: int = calls.PAGE
    ) -> Generator[Sandbox]:
        """As `list`, but page by page as far as it is read."""
        cursor: str | None = None
        while True:
            views, cursor = self._client._call(calls.page(status, metadata, page_size, cursor))
            for view in views:
                yield Sandbox(self._client, view)
            if cursor is None:
                return

    def get(self, sandbox_id: str) -> Sandbox:
        """Raises SandboxNotFound."""
        return Sandbox(self._client, self._client._call(calls.get(sandbox_id)))

    @overload
    def fork(
        self,
        sandbox_id: str,
        metadata: Mapping[str, str] | None = None,
        *,
        count: None = None,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
        at: str | None = None,
    ) -> Sandbox: ...

    @overload
    def fork(
        self,
        sandbox_id: str,
        metadata: Mapping[str, str] | None = None,
        *,
        count: int,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
        at: str | None = None,
    ) -> builtins.list[Sandbox]: ...

    def fork(
        self,
        sandbox_id: str,
        metadata: Mapping[str, str] | None = None,
        *,
        count: int | None = None,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
        at: str | None = None,
    ) -> Sandbox | builtins.list[Sandbox]:
        """As `sandbox.fork`: one running copy, or with `count` a list of them; `at` is the point of a `fork_at`."""
        views = self._client._call(fork_calls.fork(sandbox_id, metadata, count, idempotency_key, at), cancel)
        children = [Sandbox(self._client, view) for view in views]
        return children[0] if count is None else children

    def fork_tree(
        self,
        sandbox_id: str,
        count: int,
        metadata: Mapping[str, str] | None = None,
        *,
        cancel: CancelEvent | None = None,
        idempotency_key: str | None = None,
        at: str | None = None,
    ) -> builtins.list[Sandbox]:
        """As `sandbox.fork_tree`."""
        views = self._client._call(fork_calls.fork_tree(sandbox_id, count, metadata, idempotency_key, at), cancel)
        return [Sandbox(self._client, view) for view in views]

    def promote(self, sandbox_id: str, *, cleanup_siblings: bool = False, tree_id: str | None = None) -> Promoted:
        """As `sandbox.promote`."""
        return self._client._call(fork_calls.promote(sandbox_id, cleanup_siblings, tree_id))

    def delete(self, sandbox_id: str) -> None:
        """Raises SandboxNotFound."""
        self._client._call(calls.delete(sandbox_id))


def _default_client() -> Client:
    # Imported late: the client's module knows this one.
    from pandastack.sdk import client

    return client.get_default_client()
