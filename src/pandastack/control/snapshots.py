"""Snapshots: the order of steps from a capture to its end.

    capture: row `capturing` (durable) -> host.snapshot -> row `durable` -> answer
    verify:  host.verify_snapshot, later and one at a time -> row `verified`, or `failed` with the reason
    delete:  row `deleting` (durable) -> host.delete_snapshot -> no row

As with sandboxes: a row is written before its host hears of a snapshot and removed after the host has forgotten it, each
step can be repeated, and `reconcile` runs the second half of `delete` for what was begun and is finished by nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

import structlog

from pandastack.control.access import Caller
from pandastack.control.hosts import Host, deadline
from pandastack.control.meters import Meters
from pandastack.control.quotas import Quotas
from pandastack.control.sandboxes import cores, when
from pandastack.control.settings import ControlSettings
from pandastack.control.states import States
from pandastack.control.store import Store
from pandastack.control.store.sandboxes import SandboxRow
from pandastack.control.store.snapshots import SnapshotRow
from pandastack.control.work import Crew
from pandastack.errors import (
    CapacityError,
    Conflict,
    DiskFull,
    GuestError,
    PandastackError,
    RuntimeFailed,
    SnapshotNotFound,
    SnapshotUnusable,
)
from pandastack.wire.ids import SnapshotId, TenantId, is_uuid, new_snapshot_id
from pandastack.wire.snapshots import SnapshotView
from pandastack.wire.usage import StateUsage

log = structlog.get_logger(__name__)

MISSING = "missing"


def view(row: SnapshotRow, usage: StateUsage | None = None) -> SnapshotView:
    """The public shape of a record, with what its host says about it."""
    return SnapshotView(
        id=row.id,
        sandbox_id=row.sandbox_id,
        workspace=row.tenant_id,
        template=row.template,
        template_actual=row.template_actual,
        status=row.status,
        status_reason=row.status_reason,
        size_bytes=row.size_bytes,
        own_bytes=None if usage is None else usage.own_bytes,
        shared_bytes=None if usage is None else usage.shared_bytes,
        created_at=when(row.created_us),
        cpu=cores(row.cpu),
        memory_mb=row.memory_mb,
        disk_mb=row.disk_mb,
        runtime=row.runtime,
    )


class Snapshots:
    """Everything that can be asked about a snapshot, for one host."""

    def __init__(
        self, store: Store, host: Host, states: States, crew: Crew, quotas: Quotas, settings: ControlSettings, meters: Meters
    ) -> None:
        self._store = store
        self._host = host
        self._states = states
        self._crew = crew
        self._quotas = quotas
        self._settings = settings
        self._meters = meters
        # Ids that are being captured in this process: the sweep leaves them alone.
        self.in_flight: set[SnapshotId] = set()
        # Set when there is one to verify.
        self.verify_due = asyncio.Event()

    # Capture

    async def capture(self, caller: Caller, sandbox_id: str) -> SnapshotRow:
        """Durable when this returns. The sandbox goes on as it was: nothing is woken or resumed for it."""
        sandbox = await self._states.usable(caller, sandbox_id)
        return await self._crew.finish("snapshot", self._counted(caller.tenant, sandbox))

    async def _counted(self, tenant: TenantId, sandbox: SandboxRow) -> SnapshotRow:
        outcome = "internal"
        try:
            row = await self._capture(tenant, sandbox)
            outcome = "ok"
            return row
        except PandastackError as error:
            outcome = error.code
            raise
        finally:
            self._meters.snapshots.labels(outcome).inc()

    async def _capture(self, tenant: TenantId, sandbox: SandboxRow) -> SnapshotRow:
        size_bytes, admit = await self._quotas.foresee(sandbox)
        row = SnapshotRow(
            id=new_snapshot_id(),
            tenant_id=tenant,
            host_id=sandbox.host_id,
            sandbox_id=sandbox.id,
            status="capturing",
            template=sandbox.template,
            template_actual=sandbox.template_actual,
            runtime=sandbox.runtime,
            cpu=sandbox.cpu,
            memory_mb=sandbox.memory_mb,
            disk_mb=sandbox.disk_mb,
            created_us=time.time_ns() // 1000,
            size_bytes=size_bytes,
        )
        self.in_flight.add(row.id)
        try:
            await self._store.snapshots.insert(tenant, row, admit)
            return await self._save(row)
        finally:
            self.in_flight.discard(row.id)

    async def _save(self, row: SnapshotRow) -> SnapshotRow:
        """The steps with side effects. On any failure nothing is left, or the row stays for `reconcile` to undo."""
        try:
            async with deadline(self._settings.state_timeout_s, "the snapshot was not finished in time"):
                saved = await self._host.snapshot(row.sandbox_id, row.id)
            facts = {
                "size_bytes": saved.size_bytes,
                "template_actual": saved.template_actual,
                "runtime": saved.runtime,
                "cpu": saved.cpu,
                "memory_mb": saved.memory_mb,
                "disk_mb": saved.disk_mb,
            }
            if not await self._store.snapshots.complete(row.tenant_id, row.id, facts):
                raise Conflict("the snapshot was deleted while it was being made")
        except BaseException:
            with contextlib.suppress(Exception):
                await self._crew.finish("undo snapshot", self.finish_delete(row.id))
            raise
        self.verify_due.set()
        return SnapshotRow(**{**vars(row), **facts, "status": "durable"})

    # Read

    async def get(self, caller: Caller, snapshot_id: str) -> SnapshotRow:
        """Raises SnapshotNotFound for what is unknown, malformed, on its way out, or another tenant's, with the same words."""
        row = await self._find(caller, snapshot_id)
        if row.status == "deleting":
            raise _unknown()
        return row

    async def list(self, caller: Caller, *, sandbox_id: str | None) -> Sequence[SnapshotRow]:
        return await self._store.snapshots.list(caller.tenant, sandbox_id=sandbox_id)

    async def _find(self, caller: Caller, snapshot_id: str) -> SnapshotRow:
        row = await self._store.snapshots.find(caller.tenant, SnapshotId(snapshot_id)) if is_uuid(snapshot_id) else None
        if row is None:
            raise _unknown()
        return row

    # Verify

    async def verify(self) -> None:
        """Try a restore of each that was not verified yet, oldest first. One at a time, because each takes a sandbox's memory."""
        for row in await self._store.snapshots.list_of_any_tenant("durable"):
            outcome = "later"
            try:
                outcome = await self._verify(row.id)
            except Exception:
                # One that resists does not keep the others from their turn; it has its own again after the next pause.
                log.exception("snapshot.not_verified", snapshot=row.id)
                self._meters.background_failures.labels("verify").inc()
            self._meters.verifications.labels(outcome).inc()

    async def _verify(self, snapshot_id: SnapshotId) -> str:
        try:
            async with asyncio.timeout(self._settings.state_timeout_s):
                await self._host.verify_snapshot(snapshot_id)
        except (CapacityError, DiskFull, TimeoutError):
            # Says something about the machine just now, and nothing about the snapshot.
            return "later"
        except SnapshotNotFound:
            reason = MISSING
        except (SnapshotUnusable, RuntimeFailed, GuestError) as error:
            reason = str(error.fields.get("reason") or error.code)
            log.warning("snapshot.failed", snapshot=snapshot_id, reason=reason, error=error.message)
        else:
            await self._store.snapshots.mark_verified_of_any_tenant(snapshot_id)
            return "ok"
        await self._store.snapshots.mark_failed_of_any_tenant(snapshot_id, reason)
        return "failed"

    # Delete

    async def delete(self, caller: Caller, snapshot_id: str) -> None:
        """Gone when this returns; sandboxes made from it stay. Raises Conflict while it is being captured."""
        row = await self._find(caller, snapshot_id)
        await self._crew.finish("delete snapshot", self._delete(caller.tenant, row))

    async def _delete(self, tenant: TenantId, row: SnapshotRow) -> None:
        if not await self._store.snapshots.mark_deleting(tenant, row.id):
            if row.status == "capturing":
                raise Conflict("the snapshot is still being captured", hint="delete it when it is durable")
            raise _unknown()
        await self.finish_delete(row.id)

    async def finish_delete(self, snapshot_id: SnapshotId) -> None:
        """The second half of a delete, and the undo of a capture; repeating it is harmless."""
        async with deadline(self._settings.host_timeout_s):
            await self._host.delete_snapshot(snapshot_id)
        await self._store.snapshots.remove_of_any_tenant(snapshot_id)


def _unknown() -> SnapshotNotFound:
    return SnapshotNotFound("no such snapshot")
