"""The life of each sandbox on this host: the order of steps, and their undo. The conductor.

A sandbox here is a running machine with a confirmed guest, a paused or hibernated one, or a failed one that is remembered
with its reason until it is deleted. `use` is the only way to its guest: it wakes or thaws the machine, counts the request as
activity, and finds out what happened when the guest is gone. An idle sandbox is frozen, so that it costs no CPU; "idle"
means that no request is under way and nothing runs inside but what the template started.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import structlog

from pandastack.errors import (
    Conflict,
    GuestError,
    GuestGone,
    GuestProtocolError,
    GuestTimeout,
    InvalidRequest,
    PandastackError,
    RuntimeFailed,
    SandboxNotFound,
    SandboxNotRunning,
    SnapshotUnusable,
)
from pandastack.host import identity
from pandastack.host.backends import Backend
from pandastack.host.guest import Guest
from pandastack.host.ledger import Entry
from pandastack.host.machines import Ready, SlotKey
from pandastack.host.registry import Registry
from pandastack.host.runtimes.base import Limits, Machine
from pandastack.host.sandbox import Sandbox, not_running
from pandastack.host.states import States
from pandastack.wire.host import HostCreate, HostSandbox
from pandastack.wire.ids import SandboxId

log = structlog.get_logger(__name__)

TEMPLATE_PATIENCE_S = 20.0
FREEZE_AFTER_S = 2.0
LOOK_AT_WORK_S = 15.0
LOOK_AT_MEMORY_S = 0.5
PRESSURE_SHARE, RELIEF_SHARE = 0.85, 0.75  # Of the memory limit: when pressure is told, and when it is over.
HEALTH_TIMEOUT_S = 15.0
CLOSE_PATIENCE_S = 30.0
SILENCES_FORGIVEN = 1  # A machine may be so busy that a daemon is late once.


@dataclass(frozen=True)
class _Source:
    """What a sandbox is made of, and on which runtime. `pooled`: ready machines are kept for it."""

    backend: Backend
    key: SlotKey
    template_actual: str
    template_note: str | None
    env: Mapping[str, str]
    pooled: bool


class Sandboxes:
    """All sandboxes of this host. `registry` is where they are, `states` what else may become of them."""

    def __init__(self, registry: Registry, states: States) -> None:
        self.registry = registry
        self.states = states
        self._creating: dict[SandboxId, asyncio.Task[HostSandbox]] = {}

    # Looking

    def machine(self, sandbox: Sandbox) -> Machine:
        """The machine of one that is in memory, as it is: nothing is resumed for that. Raises SandboxNotRunning."""
        if sandbox.machine is None or sandbox.status not in ("running", "paused"):
            raise not_running(sandbox, sandbox.entry.reason)
        return sandbox.machine

    def machine_ids(self) -> set[str]:
        return {sandbox.machine.spec.id for sandbox in self.registry.list() if sandbox.machine is not None}

    # Create and delete

    async def create(self, request: HostCreate) -> HostSandbox:
        """See `control.hosts.Host.create`. A second call with the same id joins the first."""
        if known := self.registry.find(request.id):
            return self.registry.view(known)
        task = self._creating.get(request.id)
        if task is None:
            task = asyncio.create_task(self._create(request), name=f"create {request.id}")
            self._creating[request.id] = task
            task.add_done_callback(lambda _: self._creating.pop(request.id, None))
        # The caller may go; the sandbox is then finished or undone, never left half way.
        return await asyncio.shield(task)

    async def _create(self, request: HostCreate) -> HostSandbox:
        started = time.monotonic()
        async with self._of_snapshot(request) if request.snapshot else self._of_template(request) as source:
            return await self._made(request, source, started)

    async def _made(self, request: HostCreate, source: _Source, started: float) -> HostSandbox:
        machines = source.backend.machines
        fresh = identity.fresh(request.id, request.hostname, {**source.env, **request.env})
        entry = Entry(
            request=request,
            state="creating",
            **source.backend.facts,
            template_actual=source.template_actual,
            template_note=source.template_note,
            rootfs=str(source.key.rootfs),
            cpu=source.key.limits.cpu,
            memory_mb=source.key.limits.memory_mib,
            disk_mb=source.key.limits.disk_mib,
            token=fresh.token,
            machine_id=fresh.machine_id,
            env=fresh.env,
            guest=(source.key.guest or machines.guest).name,
        )
        async with contextlib.AsyncExitStack() as undo:
            self.registry.admission.reserve(request.id, source.key.limits)
            undo.callback(self.registry.admission.release, request.id)
            self.registry.ledger.write(entry)
            undo.callback(self.registry.ledger.remove, request.id)
            async with self.registry.starts:
                with self.registry.backends.refills.paused():
                    sandbox = await self._start(entry, source, fresh, undo)
            entry.state = "running"
            entry.boot_ms = round((time.monotonic() - started) * 1000)
            self.registry.ledger.write(entry)
            undo.pop_all()
        self.registry.enter(sandbox)
        return self.registry.view(sandbox)

    @contextlib.asynccontextmanager
    async def _of_template(self, request: HostCreate) -> AsyncIterator[_Source]:
        backend = await self.registry.backends.choose(request.isolation)
        baked = own = await backend.bakery.wait(request.template, patience_s=TEMPLATE_PATIENCE_S)
        limits, image = _limits(request, own.limits), own.image
        for field, wanted, least in (
            ("memory_mb", limits.memory_mib, own.memory_floor_mib),
            ("disk_mb", limits.disk_mib, own.disk_floor_mib),
        ):
            if wanted < least:
                raise InvalidRequest(f"{field} is {wanted}, but template {image.name} needs {least} to start", field=field, minimum=least)
        if backend.runtime.capabilities.fixed_size and (size := own.other_size(limits)) is not None:
            self.registry.admission.require_possible(limits)
            baked = await backend.bakery.wait(request.template, patience_s=TEMPLATE_PATIENCE_S, size=size)
        key = SlotKey(baked.rootfs, limits, baked.snapshot)
        yield _Source(backend, key, image.name, image.note, image.recipe.env, pooled=limits == own.limits)

    @contextlib.asynccontextmanager
    async def _of_snapshot(self, request: HostCreate) -> AsyncIterator[_Source]:
        saved = await self.states.snapshots.check(request.snapshot or "")
        origin = saved.manifest.origin
        backend = await self.registry.backends.usable(origin.runtime)
        if not self.registry.backends.meets(request.isolation, backend):
            raise SnapshotUnusable(
                f"this snapshot was made on the runtime {origin.runtime}, and can be restored on that only",
                hint=f"leave isolation out, or ask for {origin.runtime}",
                field="isolation",
                reason="runtime",
            )
        limits = _limits(request, Limits(cpu=origin.cpu, memory_mib=origin.memory_mb, disk_mib=origin.disk_mb))
        for field, wanted, least in (("memory_mb", limits.memory_mib, origin.memory_mb), ("disk_mb", limits.disk_mib, origin.disk_mb)):
            if wanted < least:
                raise InvalidRequest(f"{field} is {wanted}, but the snapshot has {least}", field=field, minimum=least)
        cpus, memory_mib = math.ceil(origin.cpu), origin.memory_mb
        if backend.runtime.capabilities.fixed_size and (math.ceil(limits.cpu), limits.memory_mib) != (cpus, memory_mib):
            raise InvalidRequest(
                f"a snapshot of the runtime {backend.name} goes on with its own size only: {cpus} CPUs and {memory_mib} MiB",
                field="memory_mb" if limits.memory_mib != memory_mib else "cpu",
                cpu=origin.cpu,
                memory_mb=origin.memory_mb,
            )
        async with self.states.opened(saved) as there:
            key = self.states.key(there, limits)
            yield _Source(backend, key, origin.template_actual, origin.template_note, origin.env, pooled=False)

    async def _start(self, entry: Entry, source: _Source, fresh: identity.Identity, undo: contextlib.AsyncExitStack) -> Sandbox:
        machines = source.backend.machines
        if source.pooled and (slot := machines.slots.take(source.key)) is not None:
            try:
                return await self._become(entry, source, slot, fresh, undo, mode="slot")
            except (GuestError, RuntimeFailed) as error:
                # A slot may have died while it waited; that is no reason to fail a create.
                log.warning("a slot was unusable", machine=slot.machine.spec.id, error=error.message)
        mode = "snapshot" if entry.request.snapshot else "restore"
        ready = await machines.restored(source.key, quiet=not entry.request.snapshot, blank=True)
        return await self._become(entry, source, ready, fresh, undo, mode=mode)

    async def _become(
        self, entry: Entry, source: _Source, ready: Ready, fresh: identity.Identity, undo: contextlib.AsyncExitStack, *, mode: str
    ) -> Sandbox:
        """Make a ready machine the sandbox of this entry. When that fails the machine is gone."""
        try:
            entry.boot_mode, entry.machine = mode, ready.machine.spec.id
            self.registry.ledger.write(entry)
            sandbox = Sandbox(entry, ready.machine)
            sandbox.guest = ready.guest
            await ready.machine.thaw()
            await identity.confirm(ready.guest, fresh)
        except BaseException:
            await source.backend.machines.discard_ready(ready)
            raise
        undo.push_async_callback(source.backend.machines.discard_ready, ready)
        return sandbox

    async def delete(self, sandbox_id: SandboxId) -> None:
        """Idempotent; a sandbox still being made is undone first, and whatever else is under way for it."""
        if task := self._creating.get(sandbox_id):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        sandbox = self.registry.find(sandbox_id)
        if sandbox is not None:
            sandbox.going = True
        try:
            await self.states.abandon(sandbox_id)
            if sandbox is None:
                return
            await self.registry.end(sandbox)
        except BaseException:
            if sandbox is not None:
                sandbox.going = False
            raise
        self.registry.forget(sandbox)
        await self.states.snapshots.delete(sandbox.entry.snapshot)

    # Use

    @contextlib.asynccontextmanager
    async def use(self, sandbox_id: SandboxId) -> AsyncIterator[Guest]:
        """The guest of a sandbox, for one request; woken if need be, thawed, connected, and counted as activity.

        Raises SandboxNotFound, SandboxNotRunning, and what a wake raises; a guest that breaks its protocol fails its sandbox.
        """
        sandbox = self.registry.get(sandbox_id)
        sandbox.requests += 1
        machine = sandbox.machine
        try:
            guest = sandbox.guest
            if guest is None or sandbox.frozen or sandbox.held or guest.closed or sandbox.status != "running":
                guest = await self._reach(sandbox)
            machine = sandbox.machine
            yield guest
        except GuestProtocolError as error:
            log.error("guest broke the protocol", sandbox_id=sandbox.id, error=str(error))
            await self.registry.fail(sandbox, "guest")
            raise
        except GuestTimeout as error:
            # A slow answer, or a daemon that was stopped from inside and will never answer again.
            if await self._answers(sandbox):
                raise
            await self.registry.fail(sandbox, "guest")
            raise not_running(sandbox, "guest") from error
        except (GuestGone, RuntimeFailed) as error:
            # Either the machine is over, which `_watch` is about to say and this waits for, or only the stream is.
            reason = await self._why_gone(sandbox)
            if reason:
                raise not_running(sandbox, reason) from error
            if not self.registry.has(sandbox):
                raise SandboxNotFound("the sandbox was deleted meanwhile", sandbox_id=sandbox.id) from error
            if sandbox.machine is not machine and sandbox.entry.boot_mode == "rewind":
                raise Conflict("the sandbox was restored to an earlier point while this request was under way") from error
            if sandbox.status == "hibernated":
                raise SandboxNotRunning(
                    "the sandbox was hibernated while this request was under way",
                    hint="its processes were saved with it: ask again, or attach to the process",
                    sandbox_status=sandbox.status,
                    status_reason=sandbox.entry.reason,
                ) from error
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
        if sandbox.status != "hibernated":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await sandbox.over.wait()
        return sandbox.entry.reason if sandbox.status == "failed" else None

    async def _reach(self, sandbox: Sandbox) -> Guest:
        while True:
            if sandbox.status in ("paused", "hibernated"):
                await self.states.wake(sandbox)
            async with sandbox.lock:
                # Somebody may have saved or paused it again before this turn came.
                if sandbox.status not in ("paused", "hibernated"):
                    return (await self.registry.reach(sandbox))[1]

    async def freeze_idle(self) -> None:
        """Freeze what has been idle for a moment. Runs for ever; owned by the host's task group."""
        looking: set[SandboxId] = set()

        async def look(sandbox: Sandbox) -> None:
            try:
                await self._try_to_freeze(sandbox)
            finally:
                looking.discard(sandbox.id)

        # Each on its own: one guest that does not answer must not keep the others warm.
        async with asyncio.TaskGroup() as looks:
            while True:
                await asyncio.sleep(FREEZE_AFTER_S / 2)
                for sandbox in self.registry.list():
                    if self._may_look(sandbox) and sandbox.id not in looking:
                        looking.add(sandbox.id)
                        looks.create_task(look(sandbox), name=f"look at {sandbox.id}")

    async def watch_memory(self) -> None:
        """Tell when a sandbox is about to use more memory than it may, while there is time to save it. Runs for ever; owned as above."""
        while True:
            await asyncio.sleep(LOOK_AT_MEMORY_S)
            for sandbox in self.registry.list():
                if sandbox.status == "running" and not sandbox.frozen and sandbox.machine is not None:
                    share = sandbox.machine.memory_share()
                    if not sandbox.pressed and share > PRESSURE_SHARE:
                        sandbox.pressed = True
                        self.registry.tell("pressure", sandbox.id)
                    elif share < RELIEF_SHARE:
                        sandbox.pressed = False

    async def _try_to_freeze(self, sandbox: Sandbox) -> None:
        try:
            await self._freeze(sandbox)
        except GuestProtocolError as error:
            log.error("guest broke the protocol", sandbox_id=sandbox.id, error=str(error))
            await self.registry.fail(sandbox, "guest")
        except GuestTimeout:
            # Somebody inside may have stopped the daemon: a sandbox that nobody can use must not seem to run.
            sandbox.silences += 1
            if sandbox.silences > SILENCES_FORGIVEN:
                await self.registry.fail(sandbox, "guest")
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

    async def close(self) -> None:
        """Let go of running sandboxes without stopping them; the next start adopts them."""
        await self.states.close(CLOSE_PATIENCE_S)
        for task in list(self._creating.values()):
            task.cancel()
        await asyncio.gather(*self._creating.values(), return_exceptions=True)
        for sandbox in self.registry.list():
            async with sandbox.lock:
                if sandbox.watch is not None:
                    sandbox.watch.cancel()
                if sandbox.guest is not None:
                    await sandbox.guest.close()
                if sandbox.machine is not None:
                    sandbox.machine.let_go()


def _limits(request: HostCreate, default: Limits) -> Limits:
    return Limits(
        cpu=request.cpu or default.cpu,
        memory_mib=request.memory_mb or default.memory_mib,
        disk_mib=request.disk_mb or default.disk_mib,
    )
