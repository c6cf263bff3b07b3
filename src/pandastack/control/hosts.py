"""What control can ask of a host. This is the seam between what talks to the network and what needs root.

On one machine the implementation is `pandastack.host.app.HostService`, in the same process; on a fleet it will be a
client on the bus. `FakeHost` (control/fake_host.py) is the third. `tests/contracts/test_host.py` holds them to this text.

Every method may raise `SandboxNotFound` where it takes a sandbox id, `SandboxNotRunning` where it needs one that can be used,
and a `GuestError` where it asks the daemon inside. What needs the daemon resumes a paused sandbox and wakes a hibernated one
first, once for all who ask (CapacityError where it does not fit); `get`, `list`, `metrics` and `usage` wake nothing. Iterators are async
generators: close them (`contextlib.aclosing`) and the work they stand for is given up, except that a started process goes on
until it ends or is signalled.
Paths are bytes, absolute, and are resolved only inside the sandbox.
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Generic, Literal, Protocol, TypeVar

from pandastack.errors import GuestTimeout, PandastackError
from pandastack.wire.diff import HostChange, HostPoint
from pandastack.wire.files import ChangeMode, FileEntry, FileEvent
from pandastack.wire.host import (
    HostCreate,
    HostEvent,
    HostFork,
    HostInfo,
    HostRewind,
    HostRewound,
    HostSandbox,
    HostSnapshot,
    Output,
    OutputSlice,
    ProcessExit,
)
from pandastack.wire.ids import HostId, ProcessId, SandboxId, SnapshotId
from pandastack.wire.isolation import AUTO
from pandastack.wire.processes import ExecRequest, ProcessStart, ProcessView, PtySize, SignalRequest
from pandastack.wire.sandboxes import SandboxMetrics
from pandastack.wire.templates import BakeProgress
from pandastack.wire.usage import SandboxUsage, StateUsage

T = TypeVar("T")


class closing(Generic[T]):
    """Close an iterator of a host when the block ends, however it ends."""

    def __init__(self, items: AsyncIterator[T]) -> None:
        self._items = items

    async def __aenter__(self) -> AsyncIterator[T]:
        return self._items

    async def __aexit__(self, *_error: object) -> None:
        close = getattr(self._items, "aclose", None)
        if close is not None:
            await close()


@asynccontextmanager
async def deadline(seconds: float, message: str = "the host did not answer in time") -> AsyncIterator[None]:
    """Every wait has an end: raises GuestTimeout after `seconds`. (SandboxTimeout, a TimeoutError too, passes through.)"""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        if isinstance(error, PandastackError):
            raise
        raise GuestTimeout(message) from error


class Host(Protocol):
    """One machine that runs sandboxes."""

    id: HostId

    async def describe(self) -> HostInfo:
        """Runtimes, templates, totals and reservations, as of now."""
        ...

    async def events(self, after: int, *, timeout_s: float) -> builtins.list[HostEvent]:
        """Events with `seq` > `after`, oldest first; waits up to `timeout_s` for one; may be empty."""
        ...

    # Sandboxes

    async def create(self, request: HostCreate) -> HostSandbox:
        """Make a running sandbox whose guest has confirmed its identity. All or nothing.

        Raises CapacityError, TemplateNotReady, DiskFull or HostUnfit when nothing was created and it is worth (or
        not worth) trying again, TemplateNotFound, SnapshotNotFound, SnapshotUnusable, RuntimeFailed after the undo.
        """
        ...

    async def get(self, sandbox_id: SandboxId) -> HostSandbox: ...

    async def list(self) -> builtins.list[HostSandbox]: ...

    async def delete(self, sandbox_id: SandboxId) -> None:
        """Idempotent: an unknown id is success."""
        ...

    async def metrics(self, sandbox_id: SandboxId) -> SandboxMetrics: ...

    async def usage(self, sandbox_id: SandboxId) -> SandboxUsage:
        """What it takes now, in whatever state it is; zeros for what it has not. Wakes nothing and is no activity."""
        ...

    # State

    async def pause(self, sandbox_id: SandboxId) -> HostSandbox:
        """Use no CPU until `resume`, and stay in memory. Idempotent; a hibernated sandbox stays as it is."""
        ...

    async def resume(self, sandbox_id: SandboxId) -> HostSandbox:
        """Idempotent. Wakes a hibernated sandbox."""
        ...

    async def hibernate(self, sandbox_id: SandboxId, *, reason: str, idle_for_s: float | None = None) -> HostSandbox:
        """Save memory, processes and disk durably, then give back memory and CPU. Idempotent.

        With `idle_for_s` it raises Conflict unless the sandbox has been idle for longer. When it fails the sandbox goes on
        and nothing is lost: DiskFull, GuestError (its hook refused, or its processes could not be stopped), RuntimeFailed.
        """
        ...

    async def wake(self, sandbox_id: SandboxId) -> HostSandbox:
        """Bring a hibernated sandbox back, once for all who ask at the same time. Idempotent; resumes a paused one.

        Raises CapacityError, DiskFull, SnapshotUnusable, RuntimeFailed; what was saved stays then.
        """
        ...

    async def fork(self, request: HostFork) -> builtins.list[HostSandbox]:
        """Running clones of a live sandbox, in order, each with an identity of its own. All or none; the parent goes on.

        Raises as `hibernate` before there is a child, and as `create` after every child is gone again. With a snapshot the
        parent may be in any state; raises Conflict where it is another sandbox's.
        """
        ...

    async def rewind(self, request: HostRewind) -> HostRewound:
        """A sandbox in any state becomes what it was at one of its own snapshots, and runs; id, name and machine id stay.

        All or nothing: when it fails the sandbox goes on as it was, and there is no `undo`. Repeating it goes back once more.
        Raises Conflict where the snapshot is another sandbox's, as `wake`, and as `hibernate` while `undo` is saved. One that
        is in memory needs room for a second one until it is over (CapacityError).
        """
        ...

    async def snapshot(self, sandbox_id: SandboxId, snapshot_id: SnapshotId) -> HostSnapshot:
        """Save a sandbox durably; it goes on. Repeating it answers the snapshot there is. Raises as `hibernate`."""
        ...

    async def verify_snapshot(self, snapshot_id: SnapshotId) -> None:
        """Prove it by a restore that nobody sees. Raises SnapshotNotFound, SnapshotUnusable; CapacityError, DiskFull (ask again)."""
        ...

    async def list_snapshots(self) -> builtins.list[HostSnapshot]: ...

    async def snapshot_usage(self, snapshot_id: SnapshotId) -> StateUsage:
        """What it takes on disk alone, and together with others. Raises SnapshotNotFound."""
        ...

    async def give_up_snapshot(self, snapshot_id: SnapshotId) -> HostSnapshot | None:
        """Undo the work under way that would make it, if it still can be undone. Afterwards it is there (the answer) or never will be.

        Of a restore: with the answer None the sandbox is as it was before.
        """
        ...

    async def offload_snapshot(self, snapshot_id: SnapshotId) -> HostSnapshot:
        """Put its large files into the object store, prove that they are there, then free their place here. Idempotent.

        What can be done with it stays the same. Raises SnapshotNotFound, SnapshotUnusable, ObjectStoreUnavailable, DiskFull; then it is
        where it was.
        """
        ...

    async def delete_snapshot(self, snapshot_id: SnapshotId) -> None:
        """Idempotent: an unknown id is success. Sandboxes made from it are not touched."""
        ...

    def diff(self, a: HostPoint, b: HostPoint, path: bytes, *, patch: bool) -> AsyncIterator[HostChange]:
        """What became of the files below `path` (a directory or one file) from `a` to `b`, sorted by the parts of their names.

        Nothing is woken but a paused sandbox that is compared as it is. A point compared with itself has no changes. Raises
        FileNotFound where neither has the path, TooLarge where one has too many files below it, Conflict where a saved state is of
        a version that cannot be looked into; SnapshotNotFound, SnapshotUnusable, CapacityError, DiskFull as a restore does.
        """
        ...

    # Processes

    def run(self, sandbox_id: SandboxId, request: ExecRequest, process_id: ProcessId) -> AsyncIterator[ProcessView | Output | ProcessExit]:
        """Start a command and follow it: first a ProcessView, then Output, at last exactly one ProcessExit.

        A slow reader slows the command down; nothing is lost. Closing the iterator early leaves the command running.
        """
        ...

    async def start_process(self, sandbox_id: SandboxId, request: ProcessStart) -> ProcessView: ...

    async def list_processes(self, sandbox_id: SandboxId) -> builtins.list[ProcessView]: ...

    async def get_process(self, sandbox_id: SandboxId, process_id: ProcessId) -> ProcessView: ...

    def attach(
        self, sandbox_id: SandboxId, process_id: ProcessId, *, stdout_offset: int = 0, stderr_offset: int = 0
    ) -> AsyncIterator[ProcessView | Output | ProcessExit]:
        """Follow a process from byte offsets; same items as `run`. The first Output shows where it really starts."""
        ...

    async def read_output(
        self, sandbox_id: SandboxId, process_id: ProcessId, channel: Literal["stdout", "stderr"], *, offset: int, limit: int
    ) -> OutputSlice: ...

    async def write_stdin(self, sandbox_id: SandboxId, process_id: ProcessId, data: AsyncIterator[bytes], *, close: bool) -> int:
        """Feed the standard input of a process started with `stdin`; returns the bytes taken."""
        ...

    async def signal_process(self, sandbox_id: SandboxId, process_id: ProcessId, request: SignalRequest) -> None: ...

    async def resize_process(self, sandbox_id: SandboxId, process_id: ProcessId, size: PtySize) -> None: ...

    # Files

    async def read_file(
        self, sandbox_id: SandboxId, path: bytes, *, offset: int = 0, length: int | None = None
    ) -> tuple[FileEntry, AsyncIterator[bytes]]:
        """The file's entry and its bytes from `offset`, at most `length`; raises FileNotFound, FileConflict (a directory)."""
        ...

    async def write_file(
        self, sandbox_id: SandboxId, path: bytes, data: AsyncIterator[bytes], *, mode: int | None = None, owner: str | None = None
    ) -> int:
        """Replace a file atomically, parents made; an error or a cancelled write leaves the old one. Returns its size."""
        ...

    async def stat_file(self, sandbox_id: SandboxId, path: bytes) -> FileEntry: ...

    def list_dir(self, sandbox_id: SandboxId, path: bytes) -> AsyncIterator[builtins.list[FileEntry]]:
        """Entries in batches, in no particular order, never the whole of a large directory at once."""
        ...

    async def make_dir(self, sandbox_id: SandboxId, path: bytes, *, parents: bool, mode: int) -> None: ...

    async def move_file(self, sandbox_id: SandboxId, source: bytes, destination: bytes, *, overwrite: bool) -> None: ...

    async def remove_file(self, sandbox_id: SandboxId, path: bytes, *, recursive: bool) -> None: ...

    async def change_mode(self, sandbox_id: SandboxId, path: bytes, request: ChangeMode) -> None: ...

    def watch_files(self, sandbox_id: SandboxId, path: bytes, *, recursive: bool) -> AsyncIterator[builtins.list[FileEvent]]:
        """Changes in batches until closed. A first, empty batch may say that watching has begun."""
        ...

    # Templates

    def bake(self, template: str, isolation: str = AUTO) -> AsyncIterator[BakeProgress]:
        """Build and bake a template for one runtime if it is not ready there; one bake runs, later callers follow it.

        `isolation` as in `HostCreate`; raises what a create says of it.
        """
        ...
