"""Keeps records and hosts in agreement: host events, timers, trial restores, and a sweep over everything.

The sweep is also how the process starts: there is no shutdown that anything depends on. It is free of races by the order
in which it looks: a row is written before its host hears of it, and removed after its host has forgotten it. So
what a host showed and the records, read *later*, do not know is an orphan; and a row that was there *before* the
host was asked, and is still usable when the verdict is written, has lost its sandbox. The same holds for snapshots: they
are `durable` only after their host has them, and `deleting` before it is told to forget them. In which usable state a
sandbox is, the host knows; a row that differs is not judged by a list that is a moment old, but by asking again.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from pandastack.control.access import Keys
from pandastack.control.checkpoints import Checkpoints
from pandastack.control.creates import Creates
from pandastack.control.hosts import Host, deadline
from pandastack.control.meters import Meters
from pandastack.control.sandboxes import Sandboxes
from pandastack.control.settings import ControlSettings
from pandastack.control.snapshots import MISSING, Snapshots
from pandastack.control.states import States, kept_awake
from pandastack.control.store import Store
from pandastack.control.store.sandboxes import LOST, USABLE, SandboxRow
from pandastack.control.store.snapshots import RESTORABLE, SnapshotRow
from pandastack.control.work import Crew
from pandastack.wire.host import HostSandbox
from pandastack.wire.ids import SandboxId, SnapshotId

log = structlog.get_logger(__name__)


def _now_us() -> int:
    return time.time_ns() // 1000


class Reconciler:
    """The loops. `sweep` once before the first request, then `begin`."""

    def __init__(
        self,
        store: Store,
        host: Host,
        creates: Creates,
        sandboxes: Sandboxes,
        states: States,
        snapshots: Snapshots,
        checkpoints: Checkpoints,
        keys: Keys,
        crew: Crew,
        settings: ControlSettings,
        meters: Meters,
    ) -> None:
        self._store = store
        self._crew = crew
        self._host = host
        self._creates = creates
        self._sandboxes = sandboxes
        self._states = states
        self._snapshots = snapshots
        self._checkpoints = checkpoints
        self._keys = keys
        self._settings = settings
        self._meters = meters
        self._seen_event = 0

    def begin(self) -> None:
        self._crew.loop("events", self.follow_events, pause_s=0.0)
        self._crew.loop("expiry", self.expire, pause_s=self._settings.expiry_interval_s, wake=self._sandboxes.expiry_due)
        self._crew.loop("verify", self._snapshots.verify, pause_s=self._settings.sweep_interval_s, wake=self._snapshots.verify_due)
        self._crew.loop("checkpoints", self._checkpoints.tick, pause_s=self._settings.checkpoint_interval_s)
        self._crew.loop("sweep", self.sweep_later, pause_s=self._settings.sweep_interval_s)

    # Events

    async def follow_events(self) -> None:
        """One look at what the host has to say."""
        async with deadline(self._settings.event_wait_s + self._settings.host_timeout_s):
            events = await self._host.events(self._seen_event, timeout_s=self._settings.event_wait_s)
        changed: dict[SandboxId, str | None] = {}
        for event in events:
            if event.kind == "gone":
                reason = event.reason or "exited"
                if await self._store.sandboxes.mark_failed_of_any_tenant(event.sandbox_id, reason, _now_us()):
                    log.info("sandbox.failed", sandbox=event.sandbox_id, reason=reason)
            elif event.kind == "pressure":
                self._crew.start("save under pressure", self._checkpoints.pressed(event.sandbox_id))
            else:
                # One that failed may have been restored since.
                changed[event.sandbox_id] = event.reason
            self._seen_event = max(self._seen_event, event.seq)
        for sandbox_id, why in changed.items():
            # Not waited for: one that is being hibernated has its turn for minutes, and the others have news as well.
            self._crew.start("agree", self._states.agree(sandbox_id, why))
        if not events:
            # A host that answers at once instead of waiting must not make this a busy loop.
            await asyncio.sleep(0.01)

    # Expiry

    async def expire(self) -> None:
        """The end of what was idle for longer than its ttl: persistent sandboxes are hibernated, others deleted.

        Paused ones keep their time, hibernated ones are never due. Failed ones go when nobody fetched the reason.
        """
        rows = await self._store.sandboxes.list_of_any_tenant("running")
        due = [row for row in rows if row.ttl_seconds > 0 and not kept_awake(row)]
        if due:
            known = await self._on_host()
            for row in due:
                if row.id in known and _idle_for(known[row.id], row.ttl_seconds):
                    if row.persistent:
                        self._states.doze(row)
                    else:
                        self._crew.start("expire", self._expire_idle(row))
        old_us = _now_us() - self._settings.failed_keep_s * 1_000_000
        for row in await self._store.sandboxes.list_of_any_tenant("failed"):
            if not row.persistent and row.failed_us is not None and row.failed_us < old_us:
                self._crew.start("expire", self._expire(row.id, ttl_seconds=None, status="failed", cause="failed"))

    async def _expire_idle(self, row: SandboxRow) -> None:
        # Asked once more, because the list is a moment old and deleting can not be undone.
        async with deadline(self._settings.host_timeout_s):
            state = await self._host.get(row.id)
        if _idle_for(state, row.ttl_seconds):
            await self._expire(row.id, ttl_seconds=row.ttl_seconds, status="running", cause="ttl")

    async def _expire(self, sandbox_id: SandboxId, *, ttl_seconds: int | None, status: str, cause: str) -> None:
        # Nothing is saved first: what must outlive its idle time is persistent.
        if await self._store.sandboxes.expire_of_any_tenant(sandbox_id, ttl_seconds=ttl_seconds, statuses=(status,), now_us=_now_us()):
            await self._creates.finish_delete(sandbox_id)
            self._meters.deletes.labels(cause).inc()
            log.info("sandbox.expired", sandbox=sandbox_id, cause=cause)

    # Sweep

    async def sweep(self) -> None:
        """Make records and host agree. Raises where the host cannot be asked: without it there is no truth to compare.

        One thing that resists does not keep the others from being looked after; it is tried again next time.
        """
        work = [*await self._sweep_sandboxes(), *await self._sweep_snapshots()]
        if work:
            await asyncio.wait(work)

    async def _sweep_sandboxes(self) -> list[asyncio.Future[None]]:
        rows = await self._store.sandboxes.list_of_any_tenant(*USABLE, "failed")
        on_host = await self._on_host()
        known = await self._store.sandboxes.ids_of_any_tenant()
        work = []
        for row in rows:
            state = on_host.get(row.id)
            if row.status == "failed":
                if state is not None and state.status in USABLE and not self._states.changing(row.id):
                    work.append(self._crew.start("agree", self._states.agree(row.id)))
            elif state is None:
                await self._store.sandboxes.mark_failed_of_any_tenant(row.id, LOST, _now_us())
            elif state.status == "failed":
                await self._store.sandboxes.mark_failed_of_any_tenant(row.id, state.status_reason or "error", _now_us())
            elif state.status != row.status and not self._states.changing(row.id):
                work.append(self._crew.start("agree", self._states.agree(row.id)))
        work += [self._crew.start("orphan", self._delete_orphan(orphan)) for orphan in on_host.keys() - known]
        for row in await self._store.sandboxes.list_of_any_tenant("creating", "deleting"):
            # A create of this process is alive or has an undo of its own; of any other, nobody will finish it.
            if row.id not in self._creates.in_flight:
                work.append(self._crew.start("finish delete", self._finish(row)))
        return work

    async def _sweep_snapshots(self) -> list[asyncio.Future[None]]:
        rows = await self._store.snapshots.list_of_any_tenant(*RESTORABLE)
        async with deadline(self._settings.host_timeout_s):
            on_host = {saved.id for saved in await self._host.list_snapshots()}
        known = await self._store.snapshots.ids_of_any_tenant()
        for row in rows:
            if row.id not in on_host and await self._store.snapshots.mark_failed_of_any_tenant(row.id, MISSING):
                log.warning("snapshot.missing", snapshot=row.id)
        work = [self._crew.start("orphan", self._delete_orphan_snapshot(orphan)) for orphan in on_host - known]
        for row in await self._store.snapshots.list_of_any_tenant("capturing", "deleting"):
            if not self._creates.is_used(row.id):
                work.append(self._crew.start("finish delete", self._finish_snapshot(row)))
        return work

    async def _delete_orphan(self, sandbox_id: SandboxId) -> None:
        log.warning("sweep.orphan", sandbox=sandbox_id)
        async with deadline(self._settings.host_timeout_s):
            await self._host.delete(sandbox_id)
        self._meters.deletes.labels("orphan").inc()

    async def _finish(self, row: SandboxRow) -> None:
        if await self._store.sandboxes.mark_deleting_of_any_tenant(row.id, (row.status,)):
            await self._creates.finish_delete(row.id)

    async def _delete_orphan_snapshot(self, snapshot_id: SnapshotId) -> None:
        log.warning("sweep.orphan", snapshot=snapshot_id)
        async with deadline(self._settings.host_timeout_s):
            await self._host.delete_snapshot(snapshot_id)

    async def _finish_snapshot(self, row: SnapshotRow) -> None:
        if row.cause == "restore" and row.status == "capturing":
            await self._snapshots.settle(row)
        elif await self._store.snapshots.mark_deleting_of_any_tenant(row.id, (row.status,)):
            await self._creates.finish_delete_snapshot(row.id)

    async def sweep_later(self) -> None:
        """The sweep as a loop runs it, with the housekeeping that needs no hurry."""
        await self.sweep()
        await self._store.creates.prune_of_any_tenant(older_than_us=_now_us() - self._settings.idempotency_keep_s * 1_000_000)
        await self._keys.flush()

    async def _on_host(self) -> dict[SandboxId, HostSandbox]:
        async with deadline(self._settings.host_timeout_s):
            return {state.id: state for state in await self._host.list()}


def _idle_for(state: HostSandbox, ttl_seconds: int) -> bool:
    return state.status == "running" and not state.busy and state.idle_s > ttl_seconds
