"""The sandboxes of `FakeHost`: how they begin, what states they go through, their snapshots and forks. Files are kept by copies.

Processes do not survive hibernation here, and no child or snapshot has any: what a memory image holds is the runtimes'
promise, and is tested on them.
"""

from __future__ import annotations

import asyncio
import builtins
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Literal

from pandastack.control.fake_files import FakeFiles
from pandastack.control.fake_runtimes import FakeRuntimes
from pandastack.control.fake_shell import FakeProcess
from pandastack.errors import (
    CapacityError,
    Conflict,
    SandboxNotFound,
    SandboxNotRunning,
    SnapshotNotFound,
    SnapshotUnusable,
    TemplateNotFound,
    TemplateNotReady,
)
from pandastack.wire.diff import HostChange, HostPoint
from pandastack.wire.host import EventKind, HostCreate, HostEvent, HostFork, HostRewind, HostRewound, HostSandbox, HostSnapshot
from pandastack.wire.ids import ProcessId, SandboxId, SnapshotId

SAVED_BYTES = 1 << 20


@dataclass
class FakeSandbox:
    """`active_at` is when it was last busy; while it is paused the clock stands, so `paused_at` is kept as well.

    `stored` stands for the files of a hibernated one, which its snapshots share.
    """

    request: HostCreate
    state: HostSandbox
    files: FakeFiles = field(default_factory=FakeFiles)
    processes: dict[ProcessId, FakeProcess] = field(default_factory=dict)
    requests: int = 0
    active_at: float = 0.0
    paused_at: float | None = None
    stored: object | None = None
    forced_idle_s: float | None = None

    def become(
        self, status: Literal["running", "paused", "hibernated", "failed"], reason: str | None = None, stored_bytes: int = 0
    ) -> None:
        self.state = self.state.model_copy(update={"status": status, "status_reason": reason, "stored_bytes": stored_bytes})
        self.stored = object() if status == "hibernated" else None


@dataclass
class FakeSnapshot:
    saved: HostSnapshot
    files: FakeFiles
    stored: object
    away: bool = False


class FakeStates:
    """`calls` counts what was asked, by step name; `wakes` how often a hibernated sandbox really came back."""

    def __init__(self, *, sandboxes_max: int, memory_mb: int, create_s: float) -> None:
        self.sandboxes: dict[SandboxId, FakeSandbox] = {}
        self.snapshots: dict[SnapshotId, FakeSnapshot] = {}
        self.sandboxes_max = sandboxes_max
        self.memory_mb = memory_mb
        self.delays_s: dict[str, float] = {"create": create_s}
        self.calls: dict[str, int] = {}
        self.wakes: dict[SandboxId, int] = {}
        self.runtimes = FakeRuntimes()
        self.templates = self.runtimes.templates
        self._failures: dict[str, list[BaseException]] = {}
        self._held: dict[str, asyncio.Event] = {}
        self._events: list[HostEvent] = []
        self._news = asyncio.Event()
        self._advanced_s = 0.0
        self._locks: dict[str, asyncio.Lock] = {}

    # For tests

    def fail(self, step: str, error: BaseException, *, times: int = 1) -> None:
        """The next `times` calls of `step` raise; "create.after" and the like fail after the thing was done."""
        self._failures.setdefault(step, []).extend([error] * times)

    def hold(self, step: str) -> asyncio.Event:
        """From now on `step` waits until the event is set: a test decides what happens meanwhile, not the clock."""
        return self._held.setdefault(step, asyncio.Event())

    def advance(self, seconds: float) -> None:
        """Idle time passes."""
        self._advanced_s += seconds

    def set_idle(self, sandbox_id: SandboxId, idle_s: float) -> None:
        self.sandboxes[sandbox_id].forced_idle_s = idle_s

    def press_sandbox(self, sandbox_id: SandboxId) -> None:
        """It needs nearly all of its memory."""
        self._tell("pressure", sandbox_id, None)

    def break_sandbox(self, sandbox_id: SandboxId, reason: str) -> None:
        """The sandbox fails by itself, and the host says so."""
        self.sandboxes[sandbox_id].become("failed", reason)
        self._tell("failed", sandbox_id, reason)

    def lose_everything(self) -> None:
        """As if the machine had been restarted: what was in memory is gone, and nobody is told."""
        self.sandboxes = {name: found for name, found in self.sandboxes.items() if found.state.status == "hibernated"}

    async def shut_down(self) -> None:
        """As a host that ends in order: what runs is hibernated."""
        for name, found in self.sandboxes.items():
            if found.state.status in ("running", "paused"):
                self._put_away(found)
                found.become("hibernated", "shutdown", SAVED_BYTES)
                self._tell("hibernated", name, "shutdown")

    # The contract: life

    async def create(self, request: HostCreate) -> HostSandbox:
        async with self._lock(request.id):
            if request.id in self.sandboxes:
                return self.sandboxes[request.id].state
            saved = None
            if request.snapshot is not None:
                saved = self._saved(request.snapshot)
                runtime = self.runtimes.choose(saved.saved.runtime)
                if not self.runtimes.meets(request.isolation, runtime.name):
                    raise SnapshotUnusable("this snapshot was made on another runtime", field="isolation", reason="runtime")
            else:
                runtime = self.runtimes.choose(request.isolation)
                if request.template not in self.templates:
                    raise TemplateNotFound(f"no template is called {request.template!r}")
                if self.runtimes.template_state(request.template, runtime.name) != "ready":
                    raise TemplateNotReady("the template is not ready", retry_after_s=5)
            self._check_room(request.memory_mb or 512)
            await self._step("create")
            # Other creates went on meanwhile.
            self._check_room(request.memory_mb or 512)
            state = HostSandbox(
                id=request.id,
                status="running",
                template=request.template,
                template_actual=request.template,
                runtime=runtime.name,
                isolation=runtime.isolation,
                acceleration=runtime.acceleration,
                own_kernel=runtime.capabilities["own_kernel"],
                cpu=request.cpu or 1,
                memory_mb=request.memory_mb or 512,
                disk_mb=request.disk_mb or 2048,
                boot_mode="fake" if saved is None else "snapshot",
                boot_ms=1,
            )
            files = FakeFiles() if saved is None else saved.files.copied()
            self.sandboxes[request.id] = FakeSandbox(request, state, files, active_at=self._now())
            await self._step("create.after", undo=[request.id])
            return state

    async def get(self, sandbox_id: SandboxId) -> HostSandbox:
        await self._step("get")
        return self._state(self._find(sandbox_id))

    async def list(self) -> builtins.list[HostSandbox]:
        await self._step("list")
        return [self._state(found) for found in self.sandboxes.values()]

    async def delete(self, sandbox_id: SandboxId) -> None:
        await self._step("delete")
        found = self.sandboxes.pop(sandbox_id, None)
        self._locks.pop(sandbox_id, None)
        if found is not None:
            self._kill_all(found)
        await self._step("delete.after")

    # The contract: states

    async def pause(self, sandbox_id: SandboxId) -> HostSandbox:
        await self._step("pause")
        async with self._lock(sandbox_id):
            found = self._usable(sandbox_id)
            if found.state.status == "running":
                found.paused_at = self._now()
                found.become("paused", "request")
                self._tell("paused", sandbox_id, "request")
            await self._step("pause.after")
            return self._state(found)

    async def resume(self, sandbox_id: SandboxId) -> HostSandbox:
        await self._step("resume")
        found = await self._live(sandbox_id)
        await self._step("resume.after")
        return self._state(found)

    async def hibernate(self, sandbox_id: SandboxId, *, reason: str, idle_for_s: float | None = None) -> HostSandbox:
        async with self._lock(sandbox_id):
            found = self._usable(sandbox_id)
            if found.state.status != "hibernated":
                state = self._state(found)
                if idle_for_s is not None and (state.busy or state.idle_s <= idle_for_s):
                    raise Conflict("the sandbox is not idle")
                await self._step("hibernate")
                self._usable(sandbox_id)  # It may have been deleted, or have failed, meanwhile.
                self._put_away(found)
                found.become("hibernated", reason, SAVED_BYTES)
                self._tell("hibernated", sandbox_id, reason)
            await self._step("hibernate.after")
            return self._state(found)

    async def wake(self, sandbox_id: SandboxId) -> HostSandbox:
        await self._step("wake")
        found = await self._live(sandbox_id)
        await self._step("wake.after")
        return self._state(found)

    async def fork(self, request: HostFork) -> builtins.list[HostSandbox]:
        async with self._lock(request.parent):
            ids = [child.id for child in request.children]
            if all(child in self.sandboxes for child in ids):
                return [self.sandboxes[child].state for child in ids]
            if request.snapshot is None:
                parent, files = self._usable(request.parent), self._find(request.parent).files
            else:
                parent, files = self._find(request.parent), self._own(request.parent, request.snapshot).files
            await self._step("fork")
            self._check_room(parent.state.memory_mb, count=len(ids))
            for child in request.children:
                wanted = parent.request.model_copy(update={"id": child.id, "hostname": child.hostname, "snapshot": None})
                facts = {"id": child.id, "status": "running", "status_reason": None, "boot_mode": "fork", "stored_bytes": 0}
                state = parent.state.model_copy(update=facts)
                self.sandboxes[child.id] = FakeSandbox(wanted, state, files.copied(), active_at=self._now())
            await self._step("fork.after", undo=ids)
            return [self.sandboxes[child].state for child in ids]

    async def rewind(self, request: HostRewind) -> HostRewound:
        async with self._lock(request.sandbox):
            found, saved = self._find(request.sandbox), self._own(request.sandbox, request.snapshot)
            await self._step("rewind")
            self._check_room(found.state.memory_mb, count=0 if found.state.status == "failed" else 1)
            undo = None
            if request.undo is not None and found.state.status != "failed":
                undo = self._save(found, request.undo)
            await self._step("rewind.after", undo_snapshot=request.undo)
            self._put_away(found)
            found.files, found.active_at = saved.files.copied(), self._now()
            found.state = found.state.model_copy(update={"boot_mode": "rewind", "boot_ms": 1})
            found.become("running")
            self._tell("running", request.sandbox, None)
            await self._step("rewind.done")
            return HostRewound(sandbox=self._state(found), undo=undo)

    # The contract: snapshots

    async def snapshot(self, sandbox_id: SandboxId, snapshot_id: SnapshotId) -> HostSnapshot:
        async with self._lock(sandbox_id):
            if snapshot_id in self.snapshots:
                return self.snapshots[snapshot_id].saved
            await self._step("snapshot")
            saved = self._save(self._usable(sandbox_id), snapshot_id)
            await self._step("snapshot.after", undo_snapshot=snapshot_id)
            return saved

    async def verify_snapshot(self, snapshot_id: SnapshotId) -> None:
        await self._step("verify")
        self._check_room(self._saved(snapshot_id).saved.memory_mb)

    async def list_snapshots(self) -> builtins.list[HostSnapshot]:
        await self._step("list_snapshots")
        return [found.saved for found in self.snapshots.values()]

    async def give_up_snapshot(self, snapshot_id: SnapshotId) -> HostSnapshot | None:
        await self._step("give_up_snapshot")
        found = self.snapshots.get(snapshot_id)
        return None if found is None else found.saved

    async def offload_snapshot(self, snapshot_id: SnapshotId) -> HostSnapshot:
        await self._step("offload")
        found = self._saved(snapshot_id)
        found.away = True
        await self._step("offload.after")
        return found.saved

    async def delete_snapshot(self, snapshot_id: SnapshotId) -> None:
        await self._step("delete_snapshot")
        self.snapshots.pop(snapshot_id, None)
        await self._step("delete_snapshot.after")

    async def diff(self, a: HostPoint, b: HostPoint, path: bytes, *, patch: bool) -> AsyncIterator[HostChange]:
        await self._step("diff")
        one, two = await self._files(a), await self._files(b)
        for found in one.differences(two, path) if a != b else ():
            yield found if patch else found._replace(patch=b"")

    # Inside

    async def _files(self, point: HostPoint) -> FakeFiles:
        """A hibernated sandbox sleeps on; a paused one is resumed."""
        if point.kind == "snapshot":
            found = self._saved(SnapshotId(point.id))
            self._check_room(found.saved.memory_mb)
            return found.files
        sandbox = self._usable(SandboxId(point.id))
        if sandbox.state.status == "hibernated":
            self._check_room(sandbox.state.memory_mb)
        else:
            await self._live(SandboxId(point.id))
        return sandbox.files

    async def _step(self, name: str, *, undo: Sequence[SandboxId] = (), undo_snapshot: SnapshotId | None = None) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        delay_s = self.delays_s.get(name, 0.0)
        if delay_s:
            await asyncio.sleep(delay_s)
        if name in self._held:
            await self._held[name].wait()
        failures = self._failures.get(name)
        if failures:
            # A real host undoes what it failed to finish.
            if isinstance(failures[0], Exception):
                for sandbox_id in undo:
                    self.sandboxes.pop(sandbox_id, None)
                if undo_snapshot is not None:
                    self.snapshots.pop(undo_snapshot, None)
            raise failures.pop(0)

    def _now(self) -> float:
        return time.monotonic() + self._advanced_s

    @asynccontextmanager
    async def _lock(self, name: str) -> AsyncIterator[None]:
        async with self._locks.setdefault(name, asyncio.Lock()):
            yield

    def _find(self, sandbox_id: SandboxId) -> FakeSandbox:
        found = self.sandboxes.get(sandbox_id)
        if found is None:
            raise SandboxNotFound("no such sandbox")
        return found

    def _usable(self, sandbox_id: SandboxId) -> FakeSandbox:
        """Running, paused or hibernated."""
        found = self._find(sandbox_id)
        if found.state.status == "failed":
            raise SandboxNotRunning(
                f"the sandbox is {found.state.status}", sandbox_status=found.state.status, status_reason=found.state.status_reason
            )
        return found

    async def _live(self, sandbox_id: SandboxId) -> FakeSandbox:
        """Running, brought back first where need be: once, for all who ask at the same time."""
        found = self._usable(sandbox_id)
        if found.state.status == "running":
            return found
        async with self._lock(sandbox_id):
            found = self._usable(sandbox_id)
            if found.state.status == "paused" and found.paused_at is not None:
                found.active_at += self._now() - found.paused_at
                found.paused_at = None
            elif found.state.status == "hibernated":
                self._check_room(found.state.memory_mb)
                await self._step("restore")
                self.wakes[sandbox_id] = self.wakes.get(sandbox_id, 0) + 1
                found.active_at = self._now()
                found.state = found.state.model_copy(update={"boot_mode": "wake", "boot_ms": 1})
            else:
                return found
            found.become("running")
            self._tell("running", sandbox_id, None)
            return found

    def _saved(self, snapshot_id: SnapshotId) -> FakeSnapshot:
        if snapshot_id not in self.snapshots:
            raise SnapshotNotFound("no such snapshot")
        return self.snapshots[snapshot_id]

    def _save(self, found: FakeSandbox, snapshot_id: SnapshotId) -> HostSnapshot:
        state = found.state
        saved = HostSnapshot(
            id=snapshot_id,
            sandbox_id=state.id,
            template=state.template,
            template_actual=state.template_actual,
            runtime=state.runtime,
            cpu=state.cpu,
            memory_mb=state.memory_mb,
            disk_mb=state.disk_mb,
            size_bytes=SAVED_BYTES,
            created_us=time.time_ns() // 1000,
        )
        self.snapshots[snapshot_id] = FakeSnapshot(saved, found.files.copied(), found.stored or object())
        return saved

    def _own(self, sandbox_id: SandboxId, snapshot_id: SnapshotId) -> FakeSnapshot:
        found = self._saved(snapshot_id)
        if found.saved.sandbox_id != sandbox_id:
            raise Conflict("this snapshot is of another sandbox", hint="create a sandbox from it instead (from_snapshot)")
        return found

    def _in_memory(self) -> builtins.list[HostSandbox]:
        return [found.state for found in self.sandboxes.values() if found.state.status != "hibernated"]

    def _check_room(self, memory_mb: int, *, count: int = 1) -> None:
        used = self._in_memory()
        if len(used) + count > self.sandboxes_max or sum(state.memory_mb for state in used) + memory_mb * count > self.memory_mb:
            raise CapacityError("the machine is full", retry_after_s=1)

    def _put_away(self, found: FakeSandbox) -> None:
        self._kill_all(found)
        found.paused_at = found.forced_idle_s = None

    def _kill_all(self, found: FakeSandbox) -> None:
        for process in found.processes.values():
            if process.ended is None:
                process.kill("KILL")

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

    def _state(self, found: FakeSandbox) -> HostSandbox:
        busy = found.requests > 0 or any(process.ended is None for process in found.processes.values())
        idle_s = 0.0 if busy else (found.paused_at or self._now()) - found.active_at
        if found.forced_idle_s is not None:
            busy, idle_s = False, found.forced_idle_s
        if found.state.status == "hibernated":
            busy, idle_s = False, 0.0
        reason = "processes run inside" if busy else "since the last work inside ended"
        return found.state.model_copy(update={"busy": busy, "idle_s": idle_s, "idle_reason": reason})

    def _tell(self, kind: EventKind, sandbox_id: SandboxId, reason: str | None) -> None:
        self._events.append(HostEvent(seq=len(self._events) + 1, kind=kind, sandbox_id=sandbox_id, reason=reason))
        news, self._news = self._news, asyncio.Event()
        news.set()
