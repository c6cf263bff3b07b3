"""A host in memory: the whole `Host` contract, in hundredths of a second, without root.

For tests, and for looking at the API without a sandbox. Steps fail on request (`fake.fail("create", error)`), capacity is a
number, and idle time goes as fast as the test wants (`fake.advance(60)`). It holds everything in one process, so a test
can throw the control plane away, build a new one on the same host, and see what is left.
"""

from __future__ import annotations

import asyncio
import builtins
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from pandastack.control.fake_files import FakeFiles
from pandastack.control.fake_shell import FakeProcess
from pandastack.control.hosts import closing
from pandastack.errors import (
    CapacityError,
    Conflict,
    ProcessNotFound,
    SandboxNotFound,
    SandboxNotRunning,
    TemplateNotFound,
    TemplateNotReady,
)
from pandastack.wire.files import ChangeMode, FileEntry, FileEvent
from pandastack.wire.host import (
    HostCapacity,
    HostCreate,
    HostEvent,
    HostInfo,
    HostSandbox,
    Output,
    OutputSlice,
    ProcessExit,
    RuntimeInfo,
)
from pandastack.wire.ids import HostId, ProcessId, SandboxId, new_process_id
from pandastack.wire.processes import ExecRequest, ProcessStart, ProcessView, PtySize, SignalRequest
from pandastack.wire.sandboxes import SandboxMetrics
from pandastack.wire.templates import BakeProgress, TemplateState, TemplateView

TEMPLATES = ("base", "code-interpreter", "ubuntu-24.04")


@dataclass
class FakeSandbox:
    request: HostCreate
    state: HostSandbox
    files: FakeFiles = field(default_factory=FakeFiles)
    processes: dict[ProcessId, FakeProcess] = field(default_factory=dict)
    requests: int = 0
    active_at: float = 0.0
    forced_idle_s: float | None = None


class FakeHost:
    """`clock_s` only moves with `advance`, plus real time; `calls` counts what was asked, by step name."""

    def __init__(self, *, sandboxes_max: int = 100, memory_mb: int = 65_536, create_s: float = 0.0) -> None:
        self.id = HostId("fake")
        self.sandboxes: dict[SandboxId, FakeSandbox] = {}
        self.sandboxes_max = sandboxes_max
        self.memory_mb = memory_mb
        self.delays_s: dict[str, float] = {"create": create_s}
        self.calls: dict[str, int] = {}
        self.templates: dict[str, TemplateState] = dict.fromkeys(TEMPLATES, "ready")
        self.bake_steps = 3
        self.runtime_works = True
        self._failures: dict[str, list[BaseException]] = {}
        self._events: list[HostEvent] = []
        self._news = asyncio.Event()
        self._advanced_s = 0.0
        self._next_pid = 100
        self._starting: dict[SandboxId, asyncio.Lock] = {}

    # For tests

    def fail(self, step: str, error: BaseException, *, times: int = 1) -> None:
        """The next `times` calls of `step` raise; "create.after" and the like fail after the thing was done."""
        self._failures.setdefault(step, []).extend([error] * times)

    def advance(self, seconds: float) -> None:
        """Idle time passes."""
        self._advanced_s += seconds

    def set_idle(self, sandbox_id: SandboxId, idle_s: float) -> None:
        self.sandboxes[sandbox_id].forced_idle_s = idle_s

    def break_sandbox(self, sandbox_id: SandboxId, reason: str) -> None:
        """The sandbox fails by itself, and the host says so."""
        found = self.sandboxes[sandbox_id]
        found.state = found.state.model_copy(update={"status": "failed", "status_reason": reason})
        self._tell("failed", sandbox_id, reason)

    def lose_everything(self) -> None:
        """As if the machine had been restarted: no sandbox is left, and nobody is told."""
        self.sandboxes.clear()

    async def aclose(self) -> None:
        """End the processes that still run."""
        tasks = [process.task for found in self.sandboxes.values() for process in found.processes.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # The contract

    async def describe(self) -> HostInfo:
        await self._step("describe")
        used = [found.state for found in self.sandboxes.values()]
        return HostInfo(
            id=self.id,
            version="fake",
            runtime="fake" if self.runtime_works else None,
            runtimes=[RuntimeInfo(name="fake", works=self.runtime_works, isolation="none: for tests", hint="use a real host")],
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
            templates=[TemplateView(name=name, actual=name, state=state) for name, state in self.templates.items()],
        )

    async def events(self, after: int, *, timeout_s: float) -> list[HostEvent]:
        await self._step("events")
        try:
            async with asyncio.timeout(timeout_s):
                while not (found := [event for event in self._events if event.seq > after]):
                    await self._news.wait()
        except TimeoutError:
            return []
        return found

    async def create(self, request: HostCreate) -> HostSandbox:
        async with self._starting.setdefault(request.id, asyncio.Lock()):
            if request.id in self.sandboxes:
                return self.sandboxes[request.id].state
            if request.template not in self.templates:
                raise TemplateNotFound(f"no template is called {request.template!r}")
            if self.templates[request.template] != "ready":
                raise TemplateNotReady("the template is not ready", retry_after_s=5)
            self._check_room(request)
            await self._step("create")
            # Other creates went on meanwhile.
            self._check_room(request)
            state = HostSandbox(
                id=request.id,
                status="running",
                template=request.template,
                template_actual=request.template,
                runtime="fake",
                isolation="none: for tests",
                cpu=request.cpu or 1,
                memory_mb=request.memory_mb or 512,
                disk_mb=request.disk_mb or 2048,
                boot_mode="fake",
                boot_ms=1,
            )
            self.sandboxes[request.id] = FakeSandbox(request, state, active_at=self._now())
            await self._step("create.after", undo=request.id)
            return state

    def _check_room(self, request: HostCreate) -> None:
        used_mb = sum(found.state.memory_mb for found in self.sandboxes.values())
        if len(self.sandboxes) >= self.sandboxes_max or used_mb + (request.memory_mb or 512) > self.memory_mb:
            raise CapacityError("the machine is full", retry_after_s=1)

    async def get(self, sandbox_id: SandboxId) -> HostSandbox:
        await self._step("get")
        return self._state(self._find(sandbox_id))

    async def list(self) -> list[HostSandbox]:
        await self._step("list")
        return [self._state(found) for found in self.sandboxes.values()]

    async def delete(self, sandbox_id: SandboxId) -> None:
        await self._step("delete")
        found = self.sandboxes.pop(sandbox_id, None)
        self._starting.pop(sandbox_id, None)
        for process in found.processes.values() if found else ():
            if process.ended is None:
                process.kill("KILL")
        await self._step("delete.after")

    async def metrics(self, sandbox_id: SandboxId) -> SandboxMetrics:
        await self._step("metrics")
        found = self._running(sandbox_id)
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

    async def run(
        self, sandbox_id: SandboxId, request: ExecRequest, process_id: ProcessId
    ) -> AsyncIterator[ProcessView | Output | ProcessExit]:
        await self._step("run")
        found = self._running(sandbox_id)
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
        found = self._running(sandbox_id)
        process = self._start(found, ProcessId(request.id) if request.id else new_process_id(), request)
        if not request.stdin and request.pty is None:
            await process.pipe.close()
        return process.view()

    async def list_processes(self, sandbox_id: SandboxId) -> builtins.list[ProcessView]:
        await self._step("list_processes")
        return [process.view() for process in self._running(sandbox_id).processes.values()]

    async def get_process(self, sandbox_id: SandboxId, process_id: ProcessId) -> ProcessView:
        await self._step("get_process")
        return self._process(sandbox_id, process_id).view()

    async def attach(
        self, sandbox_id: SandboxId, process_id: ProcessId, *, stdout_offset: int = 0, stderr_offset: int = 0
    ) -> AsyncIterator[ProcessView | Output | ProcessExit]:
        await self._step("attach")
        process = self._process(sandbox_id, process_id)
        with self._working(self._running(sandbox_id)):
            yield process.view()
            async with closing(process.follow(stdout_offset, stderr_offset)) as items:
                async for item in items:
                    yield item

    async def read_output(
        self, sandbox_id: SandboxId, process_id: ProcessId, channel: Literal["stdout", "stderr"], *, offset: int, limit: int
    ) -> OutputSlice:
        await self._step("read_output")
        return self._process(sandbox_id, process_id).slice(channel, offset, limit)

    async def write_stdin(self, sandbox_id: SandboxId, process_id: ProcessId, data: AsyncIterator[bytes], *, close: bool) -> int:
        await self._step("write_stdin")
        process = self._process(sandbox_id, process_id)
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
        self._process(sandbox_id, process_id).kill(request.signal)

    async def resize_process(self, sandbox_id: SandboxId, process_id: ProcessId, size: PtySize) -> None:
        await self._step("resize_process")
        process = self._process(sandbox_id, process_id)
        if getattr(process.command, "pty", None) is None:
            raise Conflict("the process has no terminal")

    async def read_file(
        self, sandbox_id: SandboxId, path: bytes, *, offset: int = 0, length: int | None = None
    ) -> tuple[FileEntry, AsyncIterator[bytes]]:
        await self._step("read_file")
        found = self._running(sandbox_id)
        entry = found.files.open(path)
        return entry, self._while_working(found, found.files.pieces(path, offset, length))

    async def write_file(
        self, sandbox_id: SandboxId, path: bytes, data: AsyncIterator[bytes], *, mode: int | None = None, owner: str | None = None
    ) -> int:
        await self._step("write_file")
        found = self._running(sandbox_id)
        with self._working(found):
            return await found.files.write(path, data, mode=mode)

    async def stat_file(self, sandbox_id: SandboxId, path: bytes) -> FileEntry:
        await self._step("stat_file")
        return self._running(sandbox_id).files.stat(path)

    async def list_dir(self, sandbox_id: SandboxId, path: bytes) -> AsyncIterator[builtins.list[FileEntry]]:
        await self._step("list_dir")
        entries = self._running(sandbox_id).files.entries(path)
        for at in range(0, len(entries), 500):
            yield entries[at : at + 500]

    async def make_dir(self, sandbox_id: SandboxId, path: bytes, *, parents: bool, mode: int) -> None:
        await self._step("make_dir")
        self._running(sandbox_id).files.make_dir(path, parents=parents, mode=mode)

    async def move_file(self, sandbox_id: SandboxId, source: bytes, destination: bytes, *, overwrite: bool) -> None:
        await self._step("move_file")
        self._running(sandbox_id).files.move(source, destination, overwrite=overwrite)

    async def remove_file(self, sandbox_id: SandboxId, path: bytes, *, recursive: bool) -> None:
        await self._step("remove_file")
        self._running(sandbox_id).files.remove(path, recursive=recursive)

    async def change_mode(self, sandbox_id: SandboxId, path: bytes, request: ChangeMode) -> None:
        await self._step("change_mode")
        self._running(sandbox_id).files.change_mode(path, request)

    async def watch_files(self, sandbox_id: SandboxId, path: bytes, *, recursive: bool) -> AsyncIterator[builtins.list[FileEvent]]:
        await self._step("watch_files")
        found = self._running(sandbox_id)
        found.files.stat(path)
        async with closing(found.files.watch(path, recursive=recursive)) as batches:
            async for events in batches:
                yield events

    async def bake(self, template: str) -> AsyncIterator[BakeProgress]:
        await self._step("bake")
        if template not in self.templates:
            raise TemplateNotFound("no such template")
        if self.templates[template] == "ready":
            return
        for step in range(self.bake_steps):
            self.templates[template] = "baking"
            yield BakeProgress(step="copy", message="copying files", done=step, total=self.bake_steps, unit="layers")
            await self._step("bake.step")
        self.templates[template] = "ready"

    # Inside

    async def _step(self, name: str, *, undo: SandboxId | None = None) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        delay_s = self.delays_s.get(name, 0.0)
        if delay_s:
            await asyncio.sleep(delay_s)
        failures = self._failures.get(name)
        if failures:
            # A real host undoes its own failed create.
            if undo is not None and isinstance(failures[0], Exception):
                self.sandboxes.pop(undo, None)
            raise failures.pop(0)

    def _now(self) -> float:
        return time.monotonic() + self._advanced_s

    def _find(self, sandbox_id: SandboxId) -> FakeSandbox:
        found = self.sandboxes.get(sandbox_id)
        if found is None:
            raise SandboxNotFound("no such sandbox")
        return found

    def _running(self, sandbox_id: SandboxId) -> FakeSandbox:
        found = self._find(sandbox_id)
        if found.state.status != "running":
            raise SandboxNotRunning(
                f"the sandbox is {found.state.status}", sandbox_status=found.state.status, status_reason=found.state.status_reason
            )
        return found

    def _process(self, sandbox_id: SandboxId, process_id: ProcessId) -> FakeProcess:
        process = self._running(sandbox_id).processes.get(process_id)
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

    def _touch(self, found: FakeSandbox) -> None:
        found.active_at = self._now()

    @contextmanager
    def _working(self, found: FakeSandbox) -> Iterator[None]:
        found.requests += 1
        try:
            yield
        finally:
            found.requests -= 1
            self._touch(found)

    async def _while_working(self, found: FakeSandbox, data: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        with self._working(found):
            async with closing(data):
                async for piece in data:
                    yield piece

    def _state(self, found: FakeSandbox) -> HostSandbox:
        busy = found.requests > 0 or any(process.ended is None for process in found.processes.values())
        idle_s = 0.0 if busy else self._now() - found.active_at
        if found.forced_idle_s is not None:
            busy, idle_s = False, found.forced_idle_s
        reason = "processes run inside" if busy else "since the last work inside ended"
        return found.state.model_copy(update={"busy": busy, "idle_s": idle_s, "idle_reason": reason})

    def _tell(self, kind: Literal["failed", "adopted", "gone"], sandbox_id: SandboxId, reason: str | None) -> None:
        self._events.append(HostEvent(seq=len(self._events) + 1, kind=kind, sandbox_id=sandbox_id, reason=reason))
        news, self._news = self._news, asyncio.Event()
        news.set()
