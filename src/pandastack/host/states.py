"""What becomes of a sandbox's state: pause, hibernate, wake, snapshot. The order of steps, and their undo.

    running <-> paused          in memory, no CPU
    running  -> hibernated      still -> saved -> durable -> remembered -> machine given back
    hibernated -> running       reserved -> restored and checked -> identity -> remembered -> saved state given back

A sandbox that is being saved is *still*: its processes are stopped and its daemon is sealed, so what is saved is one instant, and
a copy of it runs no instruction before it has an identity of its own. Whatever fails, either what was saved or what runs is
whole, and the ledger says which. Part of the conductor; `forks` is built on it. Each verb runs once for all who ask for it at
the same time, and to its end even if they leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import structlog

from pandastack.errors import Conflict, DiskFull, PandastackError, SnapshotNotFound, SnapshotUnusable
from pandastack.host import identity
from pandastack.host.guest import HOOK_TIMEOUT_S, Guest
from pandastack.host.ledger import Entry
from pandastack.host.machines import Machines, Ready, SlotKey
from pandastack.host.registry import Registry
from pandastack.host.runtimes.base import Limits, Machine
from pandastack.host.sandbox import Sandbox, not_running
from pandastack.host.storage.offloads import Offloads
from pandastack.host.storage.snapshots import Origin, Saved, Snapshots
from pandastack.wire.host import HostSnapshot
from pandastack.wire.ids import SandboxId, SnapshotId, new_snapshot_id

log = structlog.get_logger(__name__)

T = TypeVar("T")
_LET_GO_AFTER_S = 0.5  # At the latest.
STILL_TIMEOUT_S = 30.0  # For stopping every process, beside the hook's time.


class States:
    """The verbs that change the state of a sandbox."""

    def __init__(self, registry: Registry, snapshots: Snapshots, offloads: Offloads) -> None:
        self.registry = registry
        self.snapshots = snapshots
        self.offloads = offloads
        self._jobs: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._returns: dict[asyncio.Task[None], str] = {}
        self._patient: dict[asyncio.Timeout, str] = {}  # Those of them that wait for a calm moment.

    # Jobs

    async def once(self, verb: str, name: str, work: Callable[[], Coroutine[Any, Any, T]], *, also: str | None = None) -> T:
        """Run `work`, or join the run of it that is under way. It is finished also when nobody waits any more.

        `also`: another name under which it can be abandoned.
        """
        task = self._jobs.get((verb, name))
        if task is None:
            task = asyncio.create_task(work(), name=f"{verb} {name}")
            for key in {(verb, name), (verb, also or name)}:
                self._jobs[key] = task
                task.add_done_callback(functools.partial(self._forget_job, key))
            task.add_done_callback(_seen)
        return await asyncio.shield(task)

    def _forget_job(self, key: tuple[str, str], _done: asyncio.Task[Any]) -> None:
        self._jobs.pop(key, None)

    def later(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Give back something that a sandbox has done with. Nobody waits for it but who deletes the sandbox, or stops the host."""
        task = asyncio.create_task(work, name=f"give back {name}")
        self._returns[task] = name
        task.add_done_callback(lambda _: self._returns.pop(task, None))
        task.add_done_callback(_seen)

    async def abandon(self, name: str) -> None:
        """Undo what is under way for a sandbox that is to be deleted, and see to the end of what is being given back."""
        tasks = [task for (_verb, of), task in self._jobs.items() if of == name]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._hurry([patience for patience, of in self._patient.items() if of == name])
        await asyncio.gather(*(task for task, of in self._returns.items() if of == name), return_exceptions=True)

    def _hurry(self, patient: Iterable[asyncio.Timeout]) -> None:
        for patience in patient:
            if not patience.expired():
                patience.reschedule(0)

    async def close(self, patience_s: float) -> None:
        """Let what is under way finish, for so long; undo the rest."""
        self._hurry(self._patient)
        tasks = [*self._jobs.values(), *self._returns]
        if tasks:
            await asyncio.wait(tasks, timeout=patience_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Pause

    async def pause(self, sandbox: Sandbox) -> None:
        await self.once("pause", sandbox.id, lambda: self._pause(sandbox))

    async def _pause(self, sandbox: Sandbox) -> None:
        async with sandbox.lock:
            if sandbox.status in ("paused", "hibernated"):
                return
            machine, _ = await self.registry.reach(sandbox)
            before = sandbox.entry.model_copy()
            sandbox.entry.paused, sandbox.entry.reason = True, "request"
            try:
                self.registry.ledger.write(sandbox.entry)
                # Said first: a request that comes while it is being frozen must wait here for its turn and resume it.
                sandbox.status, sandbox.frozen = "paused", True
                await machine.freeze()
            except BaseException:
                self._running_again(sandbox, before)
                raise
            self.registry.tell("paused", sandbox.id, "request")

    async def wake(self, sandbox: Sandbox) -> None:
        """Make it run, whether it was paused or hibernated. Raises SandboxNotRunning where it never will again."""
        await self.once("wake", sandbox.id, lambda: self._wake(sandbox))

    async def _wake(self, sandbox: Sandbox) -> None:
        async with sandbox.lock:
            if sandbox.status == "paused":
                await self._resume(sandbox)
            elif sandbox.status == "hibernated":
                with self.registry.backends.refills.paused():
                    await self._restore(sandbox)
            elif sandbox.status != "running":
                raise not_running(sandbox, sandbox.entry.reason)

    async def _resume(self, sandbox: Sandbox) -> None:
        await self.registry.reach(sandbox)
        before = sandbox.entry.model_copy()
        before.paused, before.reason = False, None
        self._running_again(sandbox, before)
        sandbox.touch()
        self.registry.tell("running", sandbox.id)
        try:
            self.registry.ledger.write(sandbox.entry)
        except DiskFull as error:
            # Only a restart of this process would make it paused again, and the next request resume it.
            log.warning("that a sandbox was resumed could not be kept", sandbox_id=sandbox.id, error=error.message)

    def _running_again(self, sandbox: Sandbox, entry: Entry) -> None:
        sandbox.entry = entry
        if sandbox.status == "paused":
            sandbox.status = "running"

    # Being saved

    @contextlib.asynccontextmanager
    async def still(self, sandbox: Sandbox, reason: str) -> AsyncIterator[Machine]:
        """The machine of a sandbox in memory, at one instant: no process inside moves. Afterwards it goes on as it was.

        The caller holds the lock. Raises GuestError (HookFailed) where it cannot be brought to stand still; then it goes on too.
        """
        machine, guest = await self._ready_to_save(sandbox)
        async with self._still(sandbox, machine, guest, reason):
            yield machine

    async def capture(self, sandbox: Sandbox, folder: Path, reason: str, *, copies: int | None = None) -> None:
        """Save it as it is at one instant, and have it go on as soon as the runtime can; otherwise as `still`.

        `copies` as of `Machine.snapshot`.
        """
        machine, guest = await self._ready_to_save(sandbox)
        await machine.snapshot(folder, resume=True, still=self._still(sandbox, machine, guest, reason), copies=copies)

    async def _ready_to_save(self, sandbox: Sandbox) -> tuple[Machine, Guest]:
        machine, guest = await self.registry.reach(sandbox)
        usage = await machine.usage()
        self.snapshots.require_space(usage.memory_bytes)
        return machine, guest

    @contextlib.asynccontextmanager
    async def _still(self, sandbox: Sandbox, machine: Machine, guest: Guest, reason: str) -> AsyncIterator[None]:
        sandbox.held = True
        try:
            try:
                # Inside: one that was refused has been undone, but of one without an answer nobody knows.
                await guest.seal(freeze=True, reason=reason, hook_timeout_s=HOOK_TIMEOUT_S, timeout_s=STILL_TIMEOUT_S)
                yield
            finally:
                # With another machine by now, this one is over.
                if sandbox.machine is machine and sandbox.status in ("running", "paused"):
                    await asyncio.shield(asyncio.ensure_future(self._go_on(sandbox, machine, guest)))
        finally:
            sandbox.held = False

    async def _go_on(self, sandbox: Sandbox, machine: Machine, guest: Guest) -> None:
        try:
            await guest.unseal()
            if sandbox.status == "paused":
                sandbox.frozen = True
                await machine.freeze()
        except PandastackError as error:
            # One whose processes stay stopped must not look as if it worked. If the machine is over, its watch knows why.
            log.error("sandbox could not go on after it was saved", sandbox_id=sandbox.id, error=error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await sandbox.over.wait()
            await self.registry.fail(sandbox, "guest")

    def origin(self, sandbox: Sandbox) -> Origin:
        entry = sandbox.entry
        return Origin(
            sandbox_id=sandbox.id,
            template=entry.request.template,
            template_actual=entry.template_actual,
            template_note=entry.template_note,
            runtime=entry.runtime,
            runtime_key=self.registry.backends.of(entry.runtime).probe.key,
            guest=entry.guest,
            rootfs=entry.rootfs,
            cpu=entry.cpu,
            memory_mb=entry.memory_mb,
            disk_mb=entry.disk_mb,
            env=entry.env,
        )

    def key(self, saved: Saved, limits: Limits | None = None) -> SlotKey:
        """What restores a saved state, on the `machines` of its runtime.

        Raises RuntimeUnavailable where that is not here, SnapshotUnusable where it, as it is now, cannot.
        """
        origin = saved.manifest.origin
        backend = self.registry.backends.of(origin.runtime)
        rootfs, guest = Path(origin.rootfs), backend.machines.guest.parent / origin.guest
        if origin.runtime_key != backend.probe.key:
            raise SnapshotUnusable(
                "the saved state was made by another version of the runtime, or on another kind of processor",
                hint=f"run the {origin.runtime} that made it" + (" (PANDASTACK_RUNSC)" if origin.runtime == "gvisor" else ""),
                reason="runtime",
            )
        for path, what in ((rootfs, "image"), (guest, "guest daemon")):
            if not path.exists():
                log.error("what a saved state needs is gone", snapshot_id=saved.manifest.id, path=str(path))
                raise SnapshotUnusable(
                    f"the {what} that the saved state needs is gone from this host",
                    hint=f"bring it back: pandastack template bake {origin.template_actual}",
                    reason="missing",
                )
        saved_limits = Limits(cpu=origin.cpu, memory_mib=origin.memory_mb, disk_mib=origin.disk_mb)
        return SlotKey(rootfs, limits or saved_limits, saved.folder, guest)

    def machines(self, saved: Saved) -> Machines:
        """Those of the runtime that saved it. Raises RuntimeUnavailable."""
        return self.registry.backends.of(saved.manifest.origin.runtime).machines

    @contextlib.asynccontextmanager
    async def opened(self, saved: Saved) -> AsyncIterator[Saved]:
        """A saved state with all of its files, for as long as the block lasts: what restores it takes its `key` from this one.

        Raises as `key` and `Offloads.opened`.
        """
        self.key(saved)  # Nothing is fetched for one that cannot be restored here.
        backend = self.registry.backends.of(saved.manifest.origin.runtime)
        async with self.offloads.opened(saved, backend.runtime.capabilities.memory_file) as there:
            yield there

    async def own(self, sandbox: Sandbox, snapshot_id: SnapshotId) -> Saved:
        """A snapshot of this very sandbox, checked. Raises as `Snapshots.check`, and Conflict for another sandbox's."""
        saved = await self.snapshots.check(snapshot_id)
        if saved.manifest.origin.sandbox_id != sandbox.id or saved.manifest.kind != "snapshot":
            raise Conflict("this snapshot is of another sandbox", hint="create a sandbox from it instead (from_snapshot)")
        return saved

    # Hibernate

    async def hibernate(self, sandbox: Sandbox, *, reason: str, idle_for_s: float | None = None) -> None:
        await self.once("hibernate", sandbox.id, lambda: self._hibernate(sandbox, reason, idle_for_s))

    async def _hibernate(self, sandbox: Sandbox, reason: str, idle_for_s: float | None) -> None:
        async with sandbox.lock:
            with self.registry.backends.refills.paused():
                await self._put_to_sleep(sandbox, reason, idle_for_s)

    async def _put_to_sleep(self, sandbox: Sandbox, reason: str, idle_for_s: float | None) -> None:
        if sandbox.status == "hibernated":
            return
        if idle_for_s is not None and not sandbox.idle_for(idle_for_s):
            raise Conflict("the sandbox is not idle")
        snapshot_id = new_snapshot_id()
        async with self.snapshots.writing(snapshot_id) as folder, self.still(sandbox, "hibernate") as machine:
            try:
                # It goes on after the copy was taken, though nothing inside moves: until the copy is durable there is a way back.
                await machine.snapshot(folder, resume=True)
                saved = await self.snapshots.publish(snapshot_id, "hibernation", self.origin(sandbox))
                if sandbox.status not in ("running", "paused") or not self.registry.has(sandbox):
                    raise not_running(sandbox, sandbox.entry.reason)
                changes = {"state": "hibernated", "snapshot": snapshot_id, "reason": reason, "paused": False}
                entry = sandbox.entry.model_copy(update=changes)
                self.registry.ledger.write(entry, durable=True)
            except BaseException:
                await asyncio.shield(self.snapshots.delete(snapshot_id))
                raise
            sandbox.entry, sandbox.status, sandbox.stored_bytes = entry, "hibernated", saved.size_bytes
        sandbox.frozen = sandbox.working = sandbox.strays = False
        left = self.registry.part(sandbox)
        self.later(sandbox.id, self._let_go(sandbox, left))
        self.registry.tell("hibernated", sandbox.id, reason)

    async def _let_go(self, sandbox: Sandbox, left: Ready) -> None:
        """Give back what a hibernated sandbox had, in a moment in which nobody waits for anything; but soon, for its memory is missed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LET_GO_AFTER_S) as patience:
                self._patient[patience] = sandbox.id
                try:
                    await self.registry.backends.refills.calm()
                finally:
                    del self._patient[patience]
        try:
            await self.registry.machines(sandbox).discard_ready(left)
        except (PandastackError, OSError) as error:
            log.error("what a hibernated sandbox held could not be given back", sandbox_id=sandbox.id, error=str(error))
            if sandbox.machine is None:
                sandbox.machine = left.machine  # Tried again before the next restore; otherwise the next start sweeps it.

    async def _restore(self, sandbox: Sandbox) -> None:
        """Bring a hibernated sandbox back; the caller holds its lock. When it fails, what was saved stays."""
        if sandbox.machine is not None:
            await self.registry.end(sandbox)
        before = sandbox.entry
        started = time.monotonic()
        backend = await self.registry.backends.usable(before.runtime)
        async with contextlib.AsyncExitStack() as undo:
            self.registry.admission.reserve(sandbox.id, sandbox.limits)
            undo.callback(self.registry.admission.release, sandbox.id)
            saved = self.snapshots.get(before.snapshot)
            fresh = identity.fresh(sandbox.id, before.request.hostname, before.env, machine_id=before.machine_id or None)
            ready = await self.start(saved, sandbox.limits, fresh)
            undo.push_async_callback(backend.machines.discard_ready, ready)
            entry = before.running_in(
                ready.machine.spec.id,
                backend.facts,
                token=fresh.token,
                machine_id=fresh.machine_id,
                boot_mode="wake",
                boot_ms=round((time.monotonic() - started) * 1000),
            )
            self.registry.require(sandbox)
            self.registry.ledger.write(entry, durable=True)
            undo.pop_all()
        sandbox.entry, sandbox.machine, sandbox.guest, sandbox.stored_bytes = entry, ready.machine, ready.guest, 0
        self.registry.enter(sandbox)
        self.registry.tell("running", sandbox.id)
        self.later(sandbox.id, self.snapshots.delete(saved.manifest.id))

    async def start(self, saved: Saved, limits: Limits, fresh: identity.Identity) -> Ready:
        """A machine that goes on from a saved state with this identity, as soon as that has proved to be what was saved.

        All or nothing.
        """
        async with self.opened(saved) as there:
            return await self._started(there, limits, fresh)

    async def _started(self, saved: Saved, limits: Limits, fresh: identity.Identity) -> Ready:
        machines = self.machines(saved)
        # Reading all of it twice, one after the other, would double the time. What is restored does nothing yet.
        restoring = asyncio.create_task(self._restored(machines, self.key(saved, limits)))
        try:
            await self.snapshots.check(saved.manifest.id)
            ready = await asyncio.shield(restoring)
        except BaseException:
            restoring.cancel()
            (outcome,) = await asyncio.gather(restoring, return_exceptions=True)
            if not isinstance(outcome, BaseException):
                await machines.discard_ready(outcome)
            raise
        try:
            await identity.confirm(ready.guest, fresh)
        except BaseException:
            await machines.discard_ready(ready)
            raise
        return ready

    async def _restored(self, machines: Machines, key: SlotKey) -> Ready:
        async with self.registry.starts:
            return await machines.restored(key, quiet=False, blank=True)

    # Snapshots

    async def snapshot(self, sandbox: Sandbox, snapshot_id: SnapshotId) -> HostSnapshot:
        return await self.once("snapshot", snapshot_id, lambda: self._snapshot(sandbox, snapshot_id))

    async def _snapshot(self, sandbox: Sandbox, snapshot_id: SnapshotId) -> HostSnapshot:
        if any(saved.manifest.id == snapshot_id for saved in self.snapshots.list("snapshot")):
            return describe(self.snapshots.get(snapshot_id))
        async with contextlib.AsyncExitStack() as stack:
            async with sandbox.lock:
                if sandbox.status == "hibernated":
                    saved = await self.snapshots.check(sandbox.entry.snapshot)
                    return describe(await self.snapshots.copy(saved, snapshot_id, "snapshot"))
                folder = await stack.enter_async_context(self.snapshots.writing(snapshot_id))
                await self.capture(sandbox, folder, "snapshot")
                origin = self.origin(sandbox)
            # The sandbox goes on, and takes requests, while its state is made durable.
            return describe(await self.snapshots.publish(snapshot_id, "snapshot", origin))

    async def verify(self, snapshot_id: SnapshotId) -> None:
        """See `control.hosts.Host.verify_snapshot`. No process in the copy runs: it never gets an identity."""
        saved = await self.snapshots.check(snapshot_id)
        machines = (await self.registry.backends.reach(saved.manifest.origin.runtime)).machines
        async with self.opened(saved) as there:
            await self._tried(machines, self.key(there), snapshot_id)

    async def _tried(self, machines: Machines, key: SlotKey, snapshot_id: SnapshotId) -> None:
        # It takes room like a sandbox, under a name that no sandbox has.
        name = SandboxId(f"verify-{snapshot_id}")
        self.registry.admission.reserve(name, key.limits)
        try:
            async with self.registry.starts:
                ready = await machines.restored(key, quiet=False)
            try:
                health = await ready.guest.health()
                if not (health.sealed and health.frozen):
                    raise SnapshotUnusable("the restored copy is not as it was saved", hint="take another snapshot", reason="damaged")
            finally:
                await machines.discard_ready(ready)
        finally:
            self.registry.admission.release(name)

    def list_snapshots(self) -> list[HostSnapshot]:
        return [describe(saved) for saved in self.snapshots.list("snapshot")]

    async def give_up_snapshot(self, snapshot_id: SnapshotId) -> HostSnapshot | None:
        """See `control.hosts.Host.give_up_snapshot`."""
        await self.abandon(snapshot_id)
        return next((describe(saved) for saved in self.snapshots.list("snapshot") if saved.manifest.id == snapshot_id), None)

    async def delete_snapshot(self, snapshot_id: SnapshotId) -> None:
        await self.abandon(snapshot_id)
        # A hibernated sandbox's own state is none that anybody can delete by its id.
        for saved in self.snapshots.list("snapshot"):
            if saved.manifest.id == snapshot_id:
                await self.snapshots.delete(snapshot_id)
                if saved.away is not None:
                    self.offloads.sweep_soon()

    async def offload(self, snapshot_id: SnapshotId) -> HostSnapshot:
        """See `control.hosts.Host.offload_snapshot`."""
        saved = self.snapshots.get(snapshot_id)
        if saved.manifest.kind != "snapshot":
            raise SnapshotNotFound("no such snapshot", snapshot_id=snapshot_id)
        return describe(await self.once("offload", snapshot_id, lambda: self.offloads.offload(snapshot_id)))


def describe(saved: Saved) -> HostSnapshot:
    manifest = saved.manifest
    origin = manifest.origin
    return HostSnapshot(
        id=manifest.id,
        sandbox_id=origin.sandbox_id,
        template=origin.template,
        template_actual=origin.template_actual,
        runtime=origin.runtime,
        cpu=origin.cpu,
        memory_mb=origin.memory_mb,
        disk_mb=origin.disk_mb,
        size_bytes=saved.size_bytes,
        created_us=manifest.created_us,
    )


def _seen(task: asyncio.Task[Any]) -> None:
    """Whoever asked may have left: an error that nobody fetches is no news for asyncio."""
    if not task.cancelled():
        task.exception()
