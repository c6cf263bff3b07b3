"""The life of each sandbox on this host: the order of steps, and their undo. The conductor.

A sandbox here is a running machine with a confirmed guest, or a failed one that is remembered with its reason until it
is deleted. `use` is the only way to its guest: it thaws the machine, counts the request as activity, and finds out
what happened when the guest is gone. An idle sandbox is frozen, so that it costs no CPU; "idle" means that no request
is under way and nothing runs inside but what the template started.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import structlog

from pandastack.errors import (
    GuestError,
    GuestGone,
    GuestProtocolError,
    GuestTimeout,
    InvalidRequest,
    PandastackError,
    RuntimeFailed,
    SandboxNotFound,
    SandboxNotRunning,
)
from pandastack.host import identity
from pandastack.host.admission import Admission
from pandastack.host.bakery import Baked, Bakery
from pandastack.host.guest import Guest
from pandastack.host.ledger import Entry, Ledger
from pandastack.host.machines import CONNECT_TIMEOUT_S, Machines, Ready, SlotKey
from pandastack.host.runtimes.base import Limits, Machine, MachineId
from pandastack.host.slots import Slots
from pandastack.wire.host import HostCreate, HostEvent, HostSandbox, MachineStatus
from pandastack.wire.ids import SandboxId

log = structlog.get_logger(__name__)

TEMPLATE_PATIENCE_S = 20.0
FREEZE_AFTER_S = 2.0
LOOK_AT_WORK_S = 15.0
HEALTH_TIMEOUT_S = 15.0
SILENCES_FORGIVEN = 1  # A machine may be so busy that a daemon is late once.
_EVENTS_KEPT = 10_000


class Sandbox:
    """One sandbox of this host, and the way to its guest."""

    def __init__(self, entry: Entry, machine: Machine | None) -> None:
        self.entry = entry
        self.machine = machine
        self.status: MachineStatus = "failed" if entry.state == "failed" else "starting"
        self.guest: Guest | None = None
        self.requests = 0
        self.working = False  # Commands run inside.
        self.strays = False  # Processes run inside that commands left behind; only looking tells.
        self.heard = time.monotonic()  # When the guest last gave a sign of life.
        self.looked = False  # Since the last sign of life; before, nobody knows whether it is idle.
        self.frozen = False
        self.last_busy = time.monotonic()
        self.lock = asyncio.Lock()  # Guards freeze, thaw and reconnect.
        self.over = asyncio.Event()  # Set when it has failed.
        self.watch: asyncio.Task[None] | None = None
        self.ending: asyncio.Task[None] | None = None
        self.silences = 0  # How often in a row the guest did not answer while nothing was asked of it.

    @property
    def id(self) -> SandboxId:
        return self.entry.request.id

    @property
    def busy(self) -> bool:
        return self.status == "running" and (self.requests > 0 or self.working or self.strays)

    def touch(self) -> None:
        self.last_busy = self.heard = time.monotonic()
        self.looked = False

    def activity(self, live: int) -> None:
        """The guest says how many user processes run."""
        self.working = live > 0
        self.touch()

    def view(self, runtime: str, isolation: str) -> HostSandbox:
        idle_s = 0.0 if self.busy or not self.looked else round(time.monotonic() - self.last_busy, 3)
        reason = (
            "a request is under way"
            if self.requests
            else "processes run inside"
            if self.working or self.strays
            else "no request and no process"
        )
        entry = self.entry
        return HostSandbox(
            id=self.id,
            status=self.status,
            status_reason=entry.reason,
            template=entry.request.template,
            template_actual=entry.template_actual,
            template_note=entry.template_note,
            runtime=entry.runtime or runtime,
            isolation=isolation,
            cpu=entry.cpu,
            memory_mb=entry.memory_mb,
            disk_mb=entry.disk_mb,
            boot_mode=entry.boot_mode,
            boot_ms=entry.boot_ms,
            busy=self.busy,
            idle_s=idle_s,
            idle_reason=reason,
        )


class Sandboxes:
    """All sandboxes of this host."""

    def __init__(self, ledger: Ledger, bakery: Bakery, machines: Machines, admission: Admission, *, slots: int) -> None:
        self._ledger = ledger
        self._bakery = bakery
        self._machines = machines
        self._admission = admission
        self.slots: Slots[SlotKey, Ready] = Slots(machines.slot, machines.discard_ready, size=slots)
        self._all: dict[SandboxId, Sandbox] = {}
        self._creating: dict[SandboxId, asyncio.Task[HostSandbox]] = {}
        self._events: deque[HostEvent] = deque(maxlen=_EVENTS_KEPT)
        self._sequence = 0
        self._event = asyncio.Event()
        # Restores are bound by CPU: more of them at once than cores only makes each of them later.
        self._starts = asyncio.Semaphore(max(2, os.cpu_count() or 1))

    # Looking

    def get(self, sandbox_id: SandboxId) -> Sandbox:
        sandbox = self._all.get(sandbox_id)
        if sandbox is None:
            raise SandboxNotFound("no such sandbox", sandbox_id=sandbox_id)
        return sandbox

    def list(self) -> list[Sandbox]:
        return list(self._all.values())

    def machine(self, sandbox: Sandbox) -> Machine:
        """The machine of a running sandbox. Raises SandboxNotRunning."""
        if sandbox.machine is None or sandbox.status != "running":
            raise _not_running(sandbox, sandbox.entry.reason)
        return sandbox.machine

    def machine_ids(self) -> set[str]:
        return {sandbox.machine.spec.id for sandbox in self._all.values() if sandbox.machine is not None}

    def view(self, sandbox: Sandbox) -> HostSandbox:
        return sandbox.view(self._machines.runtime.name, self._machines.runtime.isolation)

    async def events(self, after: int, timeout_s: float) -> builtins.list[HostEvent]:
        if not (self._events and self._events[-1].seq > after):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._event.wait()
        return [event for event in self._events if event.seq > after]

    def _tell(self, kind: Literal["failed", "adopted", "gone"], sandbox_id: SandboxId, reason: str | None = None) -> None:
        self._sequence += 1
        self._events.append(HostEvent(seq=self._sequence, kind=kind, sandbox_id=sandbox_id, reason=reason))
        self._event.set()
        self._event = asyncio.Event()

    # Create and delete

    async def create(self, request: HostCreate) -> HostSandbox:
        """See `control.hosts.Host.create`. A second call with the same id joins the first."""
        if request.id in self._all:
            return self.view(self._all[request.id])
        task = self._creating.get(request.id)
        if task is None:
            task = asyncio.create_task(self._create(request), name=f"create {request.id}")
            self._creating[request.id] = task
            task.add_done_callback(lambda _: self._creating.pop(request.id, None))
        # The caller may go; the sandbox is then finished or undone, never left half way.
        return await asyncio.shield(task)

    async def _create(self, request: HostCreate) -> HostSandbox:
        started = time.monotonic()
        baked = await self._bakery.wait(request.template, patience_s=TEMPLATE_PATIENCE_S)
        limits = Limits(
            cpu=request.cpu or baked.limits.cpu,
            memory_mib=request.memory_mb or baked.limits.memory_mib,
            disk_mib=request.disk_mb or baked.limits.disk_mib,
        )
        if limits.memory_mib < baked.memory_floor_mib:
            raise InvalidRequest(
                f"memory_mb is {limits.memory_mib}, but template {baked.image.name} needs {baked.memory_floor_mib} to start",
                field="memory_mb",
                minimum=baked.memory_floor_mib,
            )
        fresh = identity.fresh(request.id, request.hostname, {**baked.image.recipe.env, **request.env})
        entry = Entry(
            request=request,
            state="creating",
            runtime=self._machines.runtime.name,
            template_actual=baked.image.name,
            template_note=baked.image.note,
            rootfs=str(baked.image.rootfs),
            cpu=limits.cpu,
            memory_mb=limits.memory_mib,
            disk_mb=limits.disk_mib,
            token=fresh.token,
        )
        async with contextlib.AsyncExitStack() as undo:
            self._admission.reserve(request.id, limits)
            undo.callback(self._admission.release, request.id)
            self._ledger.write(entry)
            undo.callback(self._ledger.remove, request.id)
            async with self._starts:
                with self.slots.quiet():
                    sandbox = await self._start(entry, baked, limits, fresh, undo)
            entry.state = "running"
            entry.boot_ms = round((time.monotonic() - started) * 1000)
            self._ledger.write(entry)
            undo.pop_all()
        self._enter(sandbox)
        return self.view(sandbox)

    async def _start(
        self, entry: Entry, baked: Baked, limits: Limits, fresh: identity.Identity, undo: contextlib.AsyncExitStack
    ) -> Sandbox:
        key = SlotKey(baked.image.rootfs, limits, baked.snapshot)
        if limits == baked.limits and (slot := self.slots.take(key)) is not None:
            try:
                return await self._become(entry, slot, fresh, undo, mode="slot")
            except (GuestError, RuntimeFailed) as error:
                # A slot may have died while it waited; that is no reason to fail a create.
                log.warning("a slot was unusable", machine=slot.machine.spec.id, error=error.message)
        return await self._become(entry, await self._machines.restored(key), fresh, undo, mode="restore")

    async def _become(self, entry: Entry, ready: Ready, fresh: identity.Identity, undo: contextlib.AsyncExitStack, *, mode: str) -> Sandbox:
        """Make a ready machine the sandbox of this entry. When that fails the machine is gone."""
        try:
            entry.boot_mode, entry.machine = mode, ready.machine.spec.id
            self._ledger.write(entry)
            sandbox = Sandbox(entry, ready.machine)
            sandbox.guest = ready.guest
            await ready.machine.thaw()
            await identity.confirm(ready.guest, fresh)
        except BaseException:
            await self._machines.discard_ready(ready)
            raise
        undo.push_async_callback(self._machines.discard_ready, ready)
        ready.guest.connection.on_activity = sandbox.activity
        return sandbox

    def _enter(self, sandbox: Sandbox) -> None:
        sandbox.status = "running"
        sandbox.touch()
        self._all[sandbox.id] = sandbox
        sandbox.watch = asyncio.create_task(self._watch(sandbox), name=f"watch {sandbox.id}")

    async def delete(self, sandbox_id: SandboxId) -> None:
        """Idempotent; a sandbox still being made is undone first."""
        if task := self._creating.get(sandbox_id):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        sandbox = self._all.get(sandbox_id)
        if sandbox is not None:
            await self._end(sandbox)
            self._all.pop(sandbox_id, None)
            sandbox.over.set()  # Nobody needs to wait for a reason.
            self._ledger.remove(sandbox_id)

    async def _end(self, sandbox: Sandbox) -> None:
        """Give back all that a sandbox holds; the caller says what it is from now on.

        Finishes even if its caller is cancelled; who asks meanwhile joins it, and after a failure it can be repeated.
        """
        watch, sandbox.watch = sandbox.watch, None
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()
        if sandbox.ending is None or sandbox.ending.done():
            sandbox.ending = asyncio.create_task(self._give_back(sandbox), name=f"end {sandbox.id}")
        await asyncio.shield(sandbox.ending)

    async def _give_back(self, sandbox: Sandbox) -> None:
        guest, sandbox.guest = sandbox.guest, None
        if guest is not None:
            await guest.close()
        if sandbox.machine is not None:
            await self._machines.discard(sandbox.machine)
            sandbox.machine = None  # Only now: a stop that failed must be tried again.
        self._admission.release(sandbox.id)

    async def _watch(self, sandbox: Sandbox) -> None:
        machine = sandbox.machine
        assert machine is not None  # noqa: S101
        reason = await machine.ended()
        if reason != "stopped":
            await self._fail(sandbox, reason)

    async def _fail(self, sandbox: Sandbox, reason: str) -> None:
        if sandbox.status == "failed" or self._all.get(sandbox.id) is not sandbox:
            return  # Known already, or deleted meanwhile: an entry written now would be a ghost after the next restart.
        sandbox.status = "failed"
        sandbox.entry.state = "failed"
        sandbox.entry.reason = reason
        sandbox.over.set()
        sandbox.working = False
        try:
            self._ledger.write(sandbox.entry)
        except PandastackError as error:
            # What it holds must be given back even so; the next life would say "host_restarted" instead.
            log.error("the reason of a failure could not be kept", sandbox_id=sandbox.id, error=error.message)
        log.warning("sandbox failed", sandbox_id=sandbox.id, reason=reason)
        self._tell("failed", sandbox.id, reason)
        await self._end(sandbox)

    # Use

    @contextlib.asynccontextmanager
    async def use(self, sandbox_id: SandboxId) -> AsyncIterator[Guest]:
        """The guest of a running sandbox, for one request; thawed, connected, and counted as activity.

        Raises SandboxNotFound, SandboxNotRunning; a guest that breaks its protocol fails its sandbox.
        """
        sandbox = self.get(sandbox_id)
        sandbox.requests += 1
        try:
            guest = sandbox.guest
            if guest is None or sandbox.frozen or guest.closed or sandbox.status != "running":
                guest = await self._reach(sandbox)
            yield guest
        except GuestProtocolError as error:
            log.error("guest broke the protocol", sandbox_id=sandbox.id, error=str(error))
            await self._fail(sandbox, "guest")
            raise
        except GuestTimeout as error:
            # A slow answer, or a daemon that was stopped from inside and will never answer again.
            if await self._answers(sandbox):
                raise
            await self._fail(sandbox, "guest")
            raise _not_running(sandbox, "guest") from error
        except (GuestGone, RuntimeFailed) as error:
            # Either the machine is over, which `_watch` is about to say and this waits for, or only the stream is.
            reason = await self._why_gone(sandbox)
            if reason:
                raise _not_running(sandbox, reason) from error
            if self._all.get(sandbox.id) is not sandbox:
                raise SandboxNotFound("the sandbox was deleted meanwhile", sandbox_id=sandbox.id) from error
            raise
        finally:
            sandbox.requests -= 1
            sandbox.touch()

    async def _answers(self, sandbox: Sandbox) -> bool:
        try:
            if sandbox.guest is not None:
                await sandbox.guest.health(timeout_s=HEALTH_TIMEOUT_S)
        except GuestTimeout:
            return False
        except GuestError:
            pass  # Gone, or broken: others find out and say so.
        return True

    async def _why_gone(self, sandbox: Sandbox) -> str | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await sandbox.over.wait()
        return sandbox.entry.reason if sandbox.status == "failed" else None

    async def _reach(self, sandbox: Sandbox) -> Guest:
        async with sandbox.lock:
            machine = sandbox.machine
            if sandbox.status != "running" or machine is None:
                raise _not_running(sandbox, sandbox.entry.reason)
            if sandbox.frozen:
                await machine.thaw()
                sandbox.frozen = False
            if sandbox.guest is None or sandbox.guest.closed:
                sandbox.guest = await self._connect(sandbox, machine)
            return sandbox.guest

    async def _connect(self, sandbox: Sandbox, machine: Machine) -> Guest:
        guest = await Guest.open(await machine.connect(), token=sandbox.entry.token, timeout_s=CONNECT_TIMEOUT_S)
        guest.connection.on_activity = sandbox.activity
        return guest

    async def freeze_idle(self) -> None:
        """Freeze what has been idle for a moment. Runs for ever; owned by the host's task group."""
        while True:
            await asyncio.sleep(FREEZE_AFTER_S / 2)
            # Side by side: one guest that does not answer must not keep the others warm.
            await asyncio.gather(*(self._try_to_freeze(sandbox) for sandbox in self.list() if self._may_look(sandbox)))

    async def _try_to_freeze(self, sandbox: Sandbox) -> None:
        try:
            await self._freeze(sandbox)
        except GuestProtocolError as error:
            log.error("guest broke the protocol", sandbox_id=sandbox.id, error=str(error))
            await self._fail(sandbox, "guest")
        except GuestTimeout:
            # Somebody inside may have stopped the daemon: a sandbox that nobody can use must not seem to run.
            sandbox.silences += 1
            if sandbox.silences > SILENCES_FORGIVEN:
                await self._fail(sandbox, "guest")
        except PandastackError as error:
            log.warning("idle sandbox could not be frozen", sandbox_id=sandbox.id, error=error.message)

    def _may_look(self, sandbox: Sandbox) -> bool:
        """Whether nothing is known to happen in there, for long enough to ask whether that is true.

        Work is looked at too, now and then: the guest that reported it may have been stopped by it.
        """
        silent_s = time.monotonic() - max(sandbox.last_busy, sandbox.heard if sandbox.working else 0.0)
        patience_s = LOOK_AT_WORK_S if sandbox.working else FREEZE_AFTER_S
        return sandbox.status == "running" and not sandbox.frozen and not sandbox.requests and silent_s >= patience_s

    async def _freeze(self, sandbox: Sandbox) -> None:
        async with sandbox.lock:
            if not self._may_look(sandbox) or sandbox.machine is None or sandbox.guest is None or sandbox.guest.closed:
                return
            health = await sandbox.guest.health(timeout_s=HEALTH_TIMEOUT_S)
            sandbox.silences, sandbox.heard = 0, time.monotonic()
            if sandbox.working:
                if not health.live:
                    sandbox.activity(0)  # Its own word of that was lost.
                return
            # A daemon that a command left behind is work too; it ends without telling, so it is looked for again and again.
            sandbox.strays = health.live > 0
            if sandbox.strays:
                sandbox.touch()
            elif self._may_look(sandbox):
                sandbox.looked = True
                # Said first: a request that comes while it is being frozen must wait here for its turn and thaw.
                sandbox.frozen = True
                await sandbox.machine.freeze()

    # Restart

    async def recover(self) -> None:
        """Find the sandboxes of an earlier life of this daemon; clear what was half made. Before any request is served."""
        entries = self._ledger.open()
        keep: set[MachineId] = set()
        for entry in entries:
            if entry.state == "creating":
                self._ledger.remove(entry.request.id)
                self._tell("gone", entry.request.id, "half created")
                continue
            if entry.state == "failed":
                self._all[entry.request.id] = Sandbox(entry, None)
                continue
            limits = Limits(cpu=entry.cpu, memory_mib=entry.memory_mb, disk_mib=entry.disk_mb)
            try:
                machine = await self._machines.adopt(MachineId(entry.machine), Path(entry.rootfs), limits)
            except (PandastackError, OSError) as error:
                # One that resists must not keep this host, and all the others with it, from starting.
                log.error("sandbox could not be looked for", sandbox_id=entry.request.id, error=str(error))
                machine = None
            sandbox = Sandbox(entry, machine)
            if machine is not None:
                try:
                    sandbox.guest = await self._connect(sandbox, machine)
                    sandbox.activity((await sandbox.guest.health()).live)
                    self._admission.reserve(sandbox.id, limits, known=True)
                    keep.add(MachineId(entry.machine))
                    self._enter(sandbox)
                    self._tell("adopted", sandbox.id)
                    continue
                except (GuestError, RuntimeFailed, OSError) as error:
                    log.warning("sandbox was found but does not answer", sandbox_id=sandbox.id, error=str(error))
                    sandbox.machine = None
                    with contextlib.suppress(PandastackError):  # What is left then is swept below.
                        await self._machines.discard(machine)
            entry.state, entry.reason = "failed", "host_restarted"
            sandbox.status = "failed"
            self._ledger.write(entry)
            self._all[sandbox.id] = sandbox
            self._tell("failed", sandbox.id, "host_restarted")
        swept = await self._machines.sweep(keep)
        if entries or swept:
            log.info("recovered", adopted=len(keep), known=len(entries), cleared=swept)

    async def close(self) -> None:
        """Let go of running sandboxes without stopping them; the next start adopts them."""
        for task in list(self._creating.values()):
            task.cancel()
        await asyncio.gather(*self._creating.values(), return_exceptions=True)
        for sandbox in self.list():
            async with sandbox.lock:
                if sandbox.watch is not None:
                    sandbox.watch.cancel()
                if sandbox.guest is not None:
                    await sandbox.guest.close()


def _not_running(sandbox: Sandbox, reason: str | None) -> SandboxNotRunning:
    why = {
        "oom": "it used more memory than its limit and was ended",
        "exited": "its first process ended",
        "host_restarted": "its host was restarted and it could not be found again",
        "guest": "the daemon inside broke its protocol or stopped answering",
    }.get(reason or "", reason or "unknown")
    return SandboxNotRunning(
        f"the sandbox is {sandbox.status}: {why}" if sandbox.status == "failed" else f"the sandbox is {sandbox.status}",
        hint="create a new one" if sandbox.status == "failed" else None,
        sandbox_status=sandbox.status,
        status_reason=reason,
    )
