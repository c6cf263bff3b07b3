"""A host in memory: the whole `Host` contract, in hundredths of a second, without root.

For tests, and for looking at the API without a sandbox. Steps fail on request (`fake.fail("create", error)`), capacity is a
number, and idle time goes as fast as the test wants (`fake.advance(60)`). It holds everything in one process, so a test
can throw the control plane away, build a new one on the same host, and see what is left.
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Sequence
from typing import Literal

from pandastack.control.fake_shell import FakeProcess
from pandastack.control.fake_states import SAVED_BYTES, FakeSandbox, FakeSnapshot, FakeStates
from pandastack.control.hosts import closing
from pandastack.errors import (
    Conflict,
    ProcessNotFound,
    SandboxNotRunning,
    TemplateNotFound,
)
from pandastack.wire.files import ChangeMode, FileEntry, FileEvent
from pandastack.wire.host import (
    HostCapacity,
    HostEvent,
    HostInfo,
    Output,
    OutputSlice,
    ProcessExit,
)
from pandastack.wire.ids import HostId, ProcessId, SandboxId, SnapshotId, new_process_id
from pandastack.wire.isolation import AUTO
from pandastack.wire.processes import ExecRequest, ProcessStart, ProcessView, PtySize, SignalRequest
from pandastack.wire.sandboxes import SandboxMetrics
from pandastack.wire.templates import BakeProgress, TemplateView
from pandastack.wire.usage import SandboxUsage, StateUsage


class FakeHost(FakeStates):
    """`clock_s` only moves with `advance`, plus real time; `calls` counts what was asked, by step name."""

    def __init__(self, *, sandboxes_max: int = 100, memory_mb: int = 65_536, create_s: float = 0.0) -> None:
        super().__init__(sandboxes_max=sandboxes_max, memory_mb=memory_mb, create_s=create_s)
        self.id = HostId("fake")
        self.bake_steps = 3
        self._next_pid = 100

    async def aclose(self) -> None:
        """End the processes that still run."""
        tasks = [process.task for found in self.sandboxes.values() for process in found.processes.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # The contract

    async def describe(self) -> HostInfo:
        await self._step("describe")
        used, best = self._in_memory(), self.runtimes.best()
        works = [info.name for info in self.runtimes.infos() if info.works]
        return HostInfo(
            id=self.id,
            version="fake",
            runtime=best.name if best is not None else None,
            runtimes=self.runtimes.infos(),
            capacity=HostCapacity(
                memory_mb=self.memory_mb,
                memory_reserved_mb=sum(state.memory_mb for state in used),
                cpu=64,
                cpu_reserved=sum(state.cpu for state in used),
                disk_mb=1 << 20,
                disk_reserved_mb=sum(state.disk_mb for state in used),
                sandboxes=len(used),
                sandboxes_max=self.sandboxes_max,
            ),
            templates=[self._template(name, best.name if best is not None else None, works) for name in self.templates],
        )

    def _template(self, name: str, best: str | None, works: Sequence[str]) -> TemplateView:
        states = {runtime: self.runtimes.template_state(name, runtime) for runtime in works}
        return TemplateView(name=name, actual=name, state=states[best] if best is not None else "missing", runtimes=states)

    async def events(self, after: int, *, timeout_s: float) -> list[HostEvent]:
        await self._step("events")
        try:
            async with asyncio.timeout(timeout_s):
                while not (found := [event for event in self._events if event.seq > after]):
                    await self._news.wait()
        except TimeoutError:
            return []
        return found

    async def metrics(self, sandbox_id: SandboxId) -> SandboxMetrics:
        await self._step("metrics")
        found = self._usable(sandbox_id)
        if found.state.status == "hibernated":
            raise SandboxNotRunning("the sandbox is hibernated", sandbox_status="hibernated", status_reason=found.state.status_reason)
        return SandboxMetrics(
            pid=1,
            uptime_seconds=1.0,
            host_cpu_seconds=0.0,
            host_cpu_percent=0.0,
            host_rss_bytes=1 << 20,
            host_vsz_bytes=1 << 21,
            threads=1,
            memory_limit_bytes=found.state.memory_mb << 20,
        )

    async def usage(self, sandbox_id: SandboxId) -> SandboxUsage:
        await self._step("usage")
        found = self._find(sandbox_id)
        usage = SandboxUsage(id=sandbox_id, status=found.state.status)
        if found.state.status in ("running", "paused"):
            return usage.model_copy(update={"memory_own_bytes": SAVED_BYTES, "disk_own_bytes": found.files.size()})
        if found.stored is None:
            return usage
        stored = self._stored(found.stored)
        return usage.model_copy(update={"stored_own_bytes": stored.own_bytes, "stored_shared_bytes": stored.shared_bytes})

    async def snapshot_usage(self, snapshot_id: SnapshotId) -> StateUsage:
        await self._step("snapshot_usage")
        found = self._saved(snapshot_id)
        return StateUsage(own_bytes=0, shared_bytes=0, location="store") if found.away else self._stored(found.stored)

    def _stored(self, stored: object) -> StateUsage:
        """Shared where a hibernated sandbox and a snapshot, or two snapshots, have the same files."""
        holders: list[FakeSandbox | FakeSnapshot] = [*self.sandboxes.values(), *self.snapshots.values()]
        shared = sum(holder.stored is stored for holder in holders) > 1
        return StateUsage(own_bytes=0 if shared else SAVED_BYTES, shared_bytes=SAVED_BYTES if shared else 0)

    async def run(
        self, sandbox_id: SandboxId, request: ExecRequest, process_id: ProcessId
    ) -> AsyncIterator[ProcessView | Output | ProcessExit]:
        await self._step("run")
        found = await self._live(sandbox_id)
        with self._working(found):
            process = self._start(found, process_id, request)
            given = request.stdin_bytes()
            if given:
                await process.pipe.write(given)
            await process.pipe.close()
            yield process.view()
            async with closing(process.follow(0, 0)) as items:
                async for item in items:
                    yield item

    async def start_process(self, sandbox_id: SandboxId, request: ProcessStart) -> ProcessView:
        await self._step("start_process")
        found = await self._live(sandbox_id)
        process = self._start(found, ProcessId(request.id) if request.id else new_process_id(), request)
        if not request.stdin and request.pty is None:
            await process.pipe.close()
        return process.view()

    async def list_processes(self, sandbox_id: SandboxId) -> builtins.list[ProcessView]:
        await self._step("list_processes")
        return [process.view() for process in (await self._live(sandbox_id)).processes.values()]

    async def get_process(self, sandbox_id: SandboxId, process_id: ProcessId) -> ProcessView:
        await self._step("get_process")
        return (await self._process(sandbox_id, process_id)).view()

    async def attach(
        self, sandbox_id: SandboxId, process_id: ProcessId, *, stdout_offset: int = 0, stderr_offset: int = 0
    ) -> AsyncIterator[ProcessView | Output | ProcessExit]:
        await self._step("attach")
        process = await self._process(sandbox_id, process_id)
        with self._working(await self._live(sandbox_id)):
            yield process.view()
            async with closing(process.follow(stdout_offset, stderr_offset)) as items:
                async for item in items:
                    yield item

    async def read_output(
        self, sandbox_id: SandboxId, process_id: ProcessId, channel: Literal["stdout", "stderr"], *, offset: int, limit: int
    ) -> OutputSlice:
        await self._step("read_output")
        return (await self._process(sandbox_id, process_id)).slice(channel, offset, limit)

    async def write_stdin(self, sandbox_id: SandboxId, process_id: ProcessId, data: AsyncIterator[bytes], *, close: bool) -> int:
        await self._step("write_stdin")
        process = await self._process(sandbox_id, process_id)
        with_stdin = process.command.stdin is True or getattr(process.command, "pty", None) is not None  # type: ignore[attr-defined]
        if not with_stdin or process.ended is not None:
            raise Conflict("the process takes no standard input")
        taken = 0
        async for piece in data:
            await process.pipe.write(piece)
            taken += len(piece)
        if close:
            await process.pipe.close()
        return taken

    async def signal_process(self, sandbox_id: SandboxId, process_id: ProcessId, request: SignalRequest) -> None:
        await self._step("signal_process")
        (await self._process(sandbox_id, process_id)).kill(request.signal)

    async def resize_process(self, sandbox_id: SandboxId, process_id: ProcessId, size: PtySize) -> None:
        await self._step("resize_process")
        process = await self._process(sandbox_id, process_id)
        if getattr(process.command, "pty", None) is None:
            raise Conflict("the process has no terminal")

    async def read_file(
        self, sandbox_id: SandboxId, path: bytes, *, offset: int = 0, length: int | None = None
    ) -> tuple[FileEntry, AsyncIterator[bytes]]:
        await self._step("read_file")
        found = await self._live(sandbox_id)
        entry = found.files.open(path)
        return entry, self._while_working(found, found.files.pieces(path, offset, length))

    async def write_file(
        self, sandbox_id: SandboxId, path: bytes, data: AsyncIterator[bytes], *, mode: int | None = None, owner: str | None = None
    ) -> int:
        await self._step("write_file")
        found = await self._live(sandbox_id)
        with self._working(found):
            return await found.files.write(path, data, mode=mode)

    async def stat_file(self, sandbox_id: SandboxId, path: bytes) -> FileEntry:
        await self._step("stat_file")
        return (await self._live(sandbox_id)).files.stat(path)

    async def list_dir(self, sandbox_id: SandboxId, path: bytes) -> AsyncIterator[builtins.list[FileEntry]]:
        await self._step("list_dir")
        entries = (await self._live(sandbox_id)).files.entries(path)
        for at in range(0, len(entries), 500):
            yield entries[at : at + 500]

    async def make_dir(self, sandbox_id: SandboxId, path: bytes, *, parents: bool, mode: int) -> None:
        await self._step("make_dir")
        (await self._live(sandbox_id)).files.make_dir(path, parents=parents, mode=mode)

    async def move_file(self, sandbox_id: SandboxId, source: bytes, destination: bytes, *, overwrite: bool) -> None:
        await self._step("move_file")
        (await self._live(sandbox_id)).files.move(source, destination, overwrite=overwrite)

    async def remove_file(self, sandbox_id: SandboxId, path: bytes, *, recursive: bool) -> None:
        await self._step("remove_file")
        (await self._live(sandbox_id)).files.remove(path, recursive=recursive)

    async def change_mode(self, sandbox_id: SandboxId, path: bytes, request: ChangeMode) -> None:
        await self._step("change_mode")
        (await self._live(sandbox_id)).files.change_mode(path, request)

    async def watch_files(self, sandbox_id: SandboxId, path: bytes, *, recursive: bool) -> AsyncIterator[builtins.list[FileEvent]]:
        await self._step("watch_files")
        found = await self._live(sandbox_id)
        found.files.stat(path)
        async with closing(found.files.watch(path, recursive=recursive)) as batches:
            async for events in batches:
                yield events

    async def bake(self, template: str, isolation: str = AUTO) -> AsyncIterator[BakeProgress]:
        await self._step("bake")
        runtime = self.runtimes.choose(isolation).name
        if template not in self.templates:
            raise TemplateNotFound("no such template")
        if self.runtimes.template_state(template, runtime) == "ready":
            return
        for step in range(self.bake_steps):
            self.runtimes.set_template(template, runtime, "baking")
            yield BakeProgress(step="copy", message="copying files", done=step, total=self.bake_steps, unit="layers")
            await self._step("bake.step")
        self.runtimes.set_template(template, runtime, "ready")

    # Inside

    async def _process(self, sandbox_id: SandboxId, process_id: ProcessId) -> FakeProcess:
        process = (await self._live(sandbox_id)).processes.get(process_id)
        if process is None:
            raise ProcessNotFound("no such process")
        return process

    def _start(self, found: FakeSandbox, process_id: ProcessId, request: ExecRequest | ProcessStart) -> FakeProcess:
        if process_id in found.processes:
            raise Conflict("a process with this id exists", field="id")
        self._next_pid += 1
        process = FakeProcess(process_id, self._next_pid, request, found.files.content)
        found.processes[process_id] = process
        process.start()
        process.task.add_done_callback(lambda _task: self._touch(found))
        return process

    async def _while_working(self, found: FakeSandbox, data: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        with self._working(found):
            async with closing(data):
                async for piece in data:
                    yield piece
