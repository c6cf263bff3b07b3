"""Rewind: a sandbox becomes what it was at one of its own snapshots, in place. The order of steps, and their undo.

    checked -> reserved -> still, and saved as it is now -> restored in a second machine -> identity -> remembered -> first machine ended

The first machine is ended only when the ledger, on disk, names the second: until then every failure lets it go on where it
stood, and a daemon that dies leaves one of the two whole. Its id, names, machine id and environment stay; a failed sandbox
comes back this way too. Part of the conductor; how a sandbox is brought to stand still is in `states`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import structlog

from pandastack.errors import CapacityError, PandastackError, SandboxNotFound
from pandastack.host import identity
from pandastack.host.guest import Guest
from pandastack.host.machines import Ready
from pandastack.host.runtimes.base import Machine
from pandastack.host.sandbox import Sandbox
from pandastack.host.states import States, describe
from pandastack.host.storage.snapshots import Saved
from pandastack.wire.host import HostRewind, HostSnapshot
from pandastack.wire.ids import SandboxId, SnapshotId

log = structlog.get_logger(__name__)


class Rewinds:
    def __init__(self, states: States) -> None:
        self._states = states
        self._registry = states.registry
        self._snapshots = states.snapshots

    async def rewind(self, request: HostRewind) -> tuple[Sandbox, HostSnapshot | None]:
        """See `control.hosts.Host.rewind`. Deleting the sandbox while it is under way undoes it."""
        sandbox = self._registry.get(request.sandbox)
        undo = await self._states.once(
            f"rewind to {request.snapshot}", sandbox.id, lambda: self._rewind(sandbox, request), also=request.undo
        )
        return sandbox, undo

    async def _rewind(self, sandbox: Sandbox, request: HostRewind) -> HostSnapshot | None:
        started = time.monotonic()
        # Before anything is stopped for it.
        saved = await self._states.own(sandbox, request.snapshot)
        async with sandbox.lock:
            if not self._registry.has(sandbox):
                raise SandboxNotFound("the sandbox was deleted meanwhile", sandbox_id=sandbox.id)
            with self._registry.backends.refills.paused():
                return await self._go_back(sandbox, saved, request.undo, started)

    async def _go_back(self, sandbox: Sandbox, saved: Saved, undo_id: SnapshotId | None, started: float) -> HostSnapshot | None:
        """The caller holds the lock."""
        before, kept = sandbox.entry, None
        backend = await self._registry.backends.usable(before.runtime)
        fresh = identity.fresh(sandbox.id, before.request.hostname, before.env, machine_id=before.machine_id or None)
        async with contextlib.AsyncExitStack() as held, contextlib.AsyncExitStack() as undo:
            await self._reserve(sandbox, held, undo)
            if undo_id is not None and sandbox.status != "failed":
                kept = await self._keep(sandbox, undo_id, held, undo)
            ready = await self._states.start(saved, sandbox.limits, fresh)
            undo.push_async_callback(backend.machines.discard_ready, ready)
            if sandbox.ending is not None and not sandbox.ending.done():
                # It failed meanwhile: what is being taken apart must not be taken for the new one.
                await asyncio.wait([sandbox.ending])
            entry = before.running_in(
                ready.machine.spec.id,
                backend.facts,
                token=fresh.token,
                machine_id=fresh.machine_id,
                boot_mode="rewind",
                boot_ms=round((time.monotonic() - started) * 1000),
            )
            self._registry.require(sandbox)
            self._registry.ledger.write(entry, durable=True)
            undo.pop_all()
            was = (sandbox.machine, sandbox.guest)
            sandbox.entry = entry
            self._exchange(sandbox, ready)
            await asyncio.shield(asyncio.ensure_future(self._let_go(sandbox, *was)))
        if before.state == "hibernated":
            self._states.later(sandbox.id, self._snapshots.delete(before.snapshot))
        return describe(kept) if kept is not None else None

    async def _reserve(self, sandbox: Sandbox, held: contextlib.AsyncExitStack, undo: contextlib.AsyncExitStack) -> None:
        """Room for the second machine: what is in memory needs it beside its own, anything else has given its own back."""
        admission = self._registry.admission
        if sandbox.status in ("running", "paused"):
            name = SandboxId(f"rewind-{sandbox.id}")
            try:
                admission.reserve(name, sandbox.limits)
            except CapacityError as error:
                error.hint = "hibernate the sandbox first: then the restore needs no more memory than the sandbox has"
                raise
            held.callback(admission.release, name)
            return
        if sandbox.machine is not None:
            await self._registry.end(sandbox)
        admission.reserve(sandbox.id, sandbox.limits)
        undo.callback(admission.release, sandbox.id)

    async def _keep(self, sandbox: Sandbox, undo_id: SnapshotId, held: contextlib.AsyncExitStack, undo: contextlib.AsyncExitStack) -> Saved:
        """What it is now, durable. One that is in memory stands still from here on, so that nothing it does is lost."""
        if sandbox.status == "hibernated":
            saved = await self._snapshots.check(sandbox.entry.snapshot)
            undo.push_async_callback(self._delete, undo_id)
            return await self._snapshots.copy(saved, undo_id, "snapshot")
        async with self._snapshots.writing(undo_id) as folder:
            machine = await held.enter_async_context(self._states.still(sandbox, "snapshot"))
            await machine.snapshot(folder, resume=True)
            undo.push_async_callback(self._delete, undo_id)
            return await self._snapshots.publish(undo_id, "snapshot", self._states.origin(sandbox))

    async def _delete(self, snapshot_id: SnapshotId) -> None:
        await asyncio.shield(self._snapshots.delete(snapshot_id))

    def _exchange(self, sandbox: Sandbox, ready: Ready) -> None:
        """From here on it is the second machine. Nothing may wait in here: whoever looks sees the one or the other."""
        if sandbox.watch is not None:
            sandbox.watch.cancel()
        sandbox.machine, sandbox.guest, sandbox.stored_bytes = ready.machine, ready.guest, 0
        sandbox.frozen = sandbox.working = sandbox.strays = False
        sandbox.over = asyncio.Event()
        # Also where the first one failed meanwhile and gave its promise back.
        self._registry.admission.reserve(sandbox.id, sandbox.limits, known=True)
        self._registry.enter(sandbox)
        self._registry.tell("running", sandbox.id)

    async def _let_go(self, sandbox: Sandbox, machine: Machine | None, guest: Guest | None) -> None:
        """End the first machine. What resists is swept by the next start: no entry names it."""
        try:
            if guest is not None:
                await guest.close()
            if machine is not None:
                await self._registry.machines(sandbox).discard(machine)
        except (PandastackError, OSError) as error:
            log.error("what a sandbox held before it was rewound could not be given back", sandbox_id=sandbox.id, error=str(error))
