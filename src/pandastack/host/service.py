"""What control sees of a host (`control.hosts.Host`): each method finds the sandbox, and hands on to who does the work."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from importlib import metadata
from typing import Any, Literal

from pandastack.errors import PandastackError
from pandastack.host import files, processes, usage
from pandastack.host.diff import Diffs
from pandastack.host.forks import Forks
from pandastack.host.rewind import Rewinds
from pandastack.host.sandboxes import Sandboxes
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

Items = AsyncGenerator[ProcessView | Output | ProcessExit, None]
_CPU_SAMPLE_S = 0.1


class HostService:
    """See `control.hosts.Host`, where each method is described."""

    def __init__(self, host_id: HostId, sandboxes: Sandboxes, forks: Forks) -> None:
        self.id = host_id
        self.sandboxes = sandboxes
        self._registry = sandboxes.registry
        self._states = sandboxes.states
        self._forks = forks
        self._rewinds = Rewinds(self._states)
        self._diffs = Diffs(sandboxes)
        self.backends = self._registry.backends

    @property
    def runtime_name(self) -> str:
        """What `auto` means now."""
        best = self.backends.best()
        return best.name if best is not None else "none"

    async def describe(self) -> HostInfo:
        best, here = self.backends.best(), self.backends.list()
        views = []
        if best is not None:
            for name in best.bakery.names():
                with contextlib.suppress(PandastackError):  # A broken recipe is in the log; the others are still there.
                    states = {backend.name: backend.bakery.state(name) for backend in here}
                    views.append(best.bakery.view(name).model_copy(update={"runtimes": states}))
        return HostInfo(
            id=self.id,
            version=_version(),
            runtime=best.name if best is not None else None,
            runtimes=list(self.backends.infos()),
            capacity=self._registry.admission.capacity(),
            templates=views,
            slots_ready=sum(backend.machines.slots.ready for backend in self.backends.list()),
            slots_wanted=sum(backend.machines.slots.wanted for backend in self.backends.list()),
        )

    async def events(self, after: int, *, timeout_s: float) -> builtins.list[HostEvent]:
        return await self._registry.events(after, timeout_s)

    async def create(self, request: HostCreate) -> HostSandbox:
        return await self.sandboxes.create(request)

    async def get(self, sandbox_id: SandboxId) -> HostSandbox:
        return self._registry.view(self._registry.get(sandbox_id))

    async def list(self) -> builtins.list[HostSandbox]:
        return [self._registry.view(sandbox) for sandbox in self._registry.list()]

    async def delete(self, sandbox_id: SandboxId) -> None:
        await self.sandboxes.delete(sandbox_id)

    async def metrics(self, sandbox_id: SandboxId) -> SandboxMetrics:
        """Two readings a moment apart give the CPU share; looking does not count as activity and thaws nothing."""
        sandbox = self._registry.get(sandbox_id)
        machine = self.sandboxes.machine(sandbox)
        before, began = await machine.usage(), time.monotonic()
        await asyncio.sleep(_CPU_SAMPLE_S)
        now = await machine.usage()
        share = (now.cpu_s - before.cpu_s) / max(time.monotonic() - began, 1e-6)
        return SandboxMetrics(
            pid=now.pid,
            uptime_seconds=round(now.uptime_s, 3),
            host_cpu_seconds=round(now.cpu_s, 3),
            host_cpu_percent=round(100 * share, 1),
            host_rss_bytes=now.resident_bytes,
            host_vsz_bytes=now.virtual_bytes,
            threads=now.threads,
            memory_limit_bytes=sandbox.entry.memory_mb << 20,
        )

    async def usage(self, sandbox_id: SandboxId) -> SandboxUsage:
        return await usage.of_sandbox(self._registry, self._states.snapshots, self._registry.get(sandbox_id))

    # State

    async def pause(self, sandbox_id: SandboxId) -> HostSandbox:
        sandbox = self._registry.get(sandbox_id)
        await self._states.pause(sandbox)
        return self._registry.view(sandbox)

    async def resume(self, sandbox_id: SandboxId) -> HostSandbox:
        return await self.wake(sandbox_id)

    async def hibernate(self, sandbox_id: SandboxId, *, reason: str, idle_for_s: float | None = None) -> HostSandbox:
        sandbox = self._registry.get(sandbox_id)
        await self._states.hibernate(sandbox, reason=reason, idle_for_s=idle_for_s)
        return self._registry.view(sandbox)

    async def wake(self, sandbox_id: SandboxId) -> HostSandbox:
        sandbox = self._registry.get(sandbox_id)
        await self._states.wake(sandbox)
        return self._registry.view(sandbox)

    async def fork(self, request: HostFork) -> builtins.list[HostSandbox]:
        return [self._registry.view(child) for child in await self._forks.fork(request)]

    async def rewind(self, request: HostRewind) -> HostRewound:
        sandbox, undo = await self._rewinds.rewind(request)
        return HostRewound(sandbox=self._registry.view(sandbox), undo=undo)

    async def snapshot(self, sandbox_id: SandboxId, snapshot_id: SnapshotId) -> HostSnapshot:
        return await self._states.snapshot(self._registry.get(sandbox_id), snapshot_id)

    async def verify_snapshot(self, snapshot_id: SnapshotId) -> None:
        await self._states.verify(snapshot_id)

    async def list_snapshots(self) -> builtins.list[HostSnapshot]:
        return self._states.list_snapshots()

    async def snapshot_usage(self, snapshot_id: SnapshotId) -> StateUsage:
        return await usage.of_snapshot(self._states.snapshots, snapshot_id)

    async def give_up_snapshot(self, snapshot_id: SnapshotId) -> HostSnapshot | None:
        return await self._states.give_up_snapshot(snapshot_id)

    async def offload_snapshot(self, snapshot_id: SnapshotId) -> HostSnapshot:
        return await self._states.offload(snapshot_id)

    async def delete_snapshot(self, snapshot_id: SnapshotId) -> None:
        await self._states.delete_snapshot(snapshot_id)

    async def diff(self, a: HostPoint, b: HostPoint, path: bytes, *, patch: bool) -> AsyncGenerator[HostChange, None]:
        async with contextlib.aclosing(self._diffs.diff(a, b, path, patch=patch)) as changes:
            async for change in changes:
                yield change

    # Processes

    async def run(self, sandbox_id: SandboxId, request: ExecRequest, process_id: ProcessId) -> Items:
        async with self.sandboxes.use(sandbox_id) as guest, contextlib.aclosing(processes.run(guest, request, process_id)) as items:
            async for item in items:
                yield item

    async def attach(self, sandbox_id: SandboxId, process_id: ProcessId, *, stdout_offset: int = 0, stderr_offset: int = 0) -> Items:
        async with (
            self.sandboxes.use(sandbox_id) as guest,
            contextlib.aclosing(processes.attach(guest, process_id, stdout_offset=stdout_offset, stderr_offset=stderr_offset)) as items,
        ):
            async for item in items:
                yield item

    async def start_process(self, sandbox_id: SandboxId, request: ProcessStart) -> ProcessView:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await processes.start(guest, request)

    async def list_processes(self, sandbox_id: SandboxId) -> builtins.list[ProcessView]:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await processes.every(guest)

    async def get_process(self, sandbox_id: SandboxId, process_id: ProcessId) -> ProcessView:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await processes.get(guest, process_id)

    async def read_output(
        self, sandbox_id: SandboxId, process_id: ProcessId, channel: Literal["stdout", "stderr"], *, offset: int, limit: int
    ) -> OutputSlice:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await processes.read_output(guest, process_id, channel, offset=offset, limit=limit)

    async def write_stdin(self, sandbox_id: SandboxId, process_id: ProcessId, data: AsyncIterator[bytes], *, close: bool) -> int:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await processes.write_stdin(guest, process_id, data, close=close)

    async def signal_process(self, sandbox_id: SandboxId, process_id: ProcessId, request: SignalRequest) -> None:
        async with self.sandboxes.use(sandbox_id) as guest:
            await processes.send_signal(guest, process_id, request)

    async def resize_process(self, sandbox_id: SandboxId, process_id: ProcessId, size: PtySize) -> None:
        async with self.sandboxes.use(sandbox_id) as guest:
            await guest.resize(process_id, size.rows, size.cols)

    # Files

    async def read_file(
        self, sandbox_id: SandboxId, path: bytes, *, offset: int = 0, length: int | None = None
    ) -> tuple[FileEntry, AsyncIterator[bytes]]:
        stack = contextlib.AsyncExitStack()
        try:
            guest = await stack.enter_async_context(self.sandboxes.use(sandbox_id))
            entry, body = await files.read(guest, path, offset=offset, length=length)
        except BaseException as error:
            await stack.__aexit__(type(error), error, error.__traceback__)
            raise
        return entry, _until_closed(body, stack)

    async def write_file(
        self, sandbox_id: SandboxId, path: bytes, data: AsyncIterator[bytes], *, mode: int | None = None, owner: str | None = None
    ) -> int:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await guest.write_file(path, data, mode=mode, owner=owner)

    async def stat_file(self, sandbox_id: SandboxId, path: bytes) -> FileEntry:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await files.stat(guest, path)

    async def list_dir(self, sandbox_id: SandboxId, path: bytes) -> AsyncGenerator[builtins.list[FileEntry], None]:
        async with self.sandboxes.use(sandbox_id) as guest, contextlib.aclosing(files.listing(guest, path)) as batches:
            async for batch in batches:
                yield batch

    async def make_dir(self, sandbox_id: SandboxId, path: bytes, *, parents: bool, mode: int) -> None:
        async with self.sandboxes.use(sandbox_id) as guest:
            await guest.mkdir(path, parents=parents, mode=mode)

    async def move_file(self, sandbox_id: SandboxId, source: bytes, destination: bytes, *, overwrite: bool) -> None:
        async with self.sandboxes.use(sandbox_id) as guest:
            await guest.move(source, destination, overwrite=overwrite)

    async def remove_file(self, sandbox_id: SandboxId, path: bytes, *, recursive: bool) -> None:
        async with self.sandboxes.use(sandbox_id) as guest:
            await guest.remove(path, recursive=recursive)

    async def change_mode(self, sandbox_id: SandboxId, path: bytes, request: ChangeMode) -> None:
        async with self.sandboxes.use(sandbox_id) as guest:
            await files.change_mode(guest, path, request)

    async def watch_files(self, sandbox_id: SandboxId, path: bytes, *, recursive: bool) -> AsyncGenerator[builtins.list[FileEvent], None]:
        async with self.sandboxes.use(sandbox_id) as guest, contextlib.aclosing(files.watch(guest, path, recursive=recursive)) as batches:
            async for batch in batches:
                yield batch

    # Templates

    async def bake(self, template: str, isolation: str = AUTO) -> AsyncGenerator[BakeProgress, None]:
        backend = await self.backends.choose(isolation)
        async with contextlib.aclosing(backend.bakery.follow(template)) as said:
            async for progress in said:
                yield progress


async def _until_closed(body: AsyncIterator[bytes], stack: contextlib.AsyncExitStack) -> AsyncIterator[bytes]:
    """The bytes of a file; the request counts as under way until the reader is done or closes this."""
    async with stack:
        close: Any = body
        try:
            async for piece in body:
                yield piece
        finally:
            await close.aclose()


def _version() -> str:
    try:
        return metadata.version("pandastack")
    except metadata.PackageNotFoundError:
        return "dev"
