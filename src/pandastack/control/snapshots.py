"""Snapshots: the order of steps from a capture to its end.

    capture: row `capturing` (durable) -> host.snapshot -> row `durable` -> answer
    offload: host.offload_snapshot; where it is, is asked of the host
    verify:  host.verify_snapshot, later and one at a time -> row `verified`, or `failed` with the reason
    delete:  row `deleting` (durable) -> host.delete_snapshot -> no row (in `creates`, because a sandbox takes its automatic ones along)

As with sandboxes: a row is written before its host hears of a snapshot and removed after the host has forgotten it, each
step can be repeated, and `reconcile` runs the second half of `delete` for what was begun and is finished by nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import structlog

from pandastack.control.access import Caller
from pandastack.control.creates import Created, Creates, Request, digest
from pandastack.control.hosts import Host, deadline
from pandastack.control.meters import Meters
from pandastack.control.quotas import Quotas
from pandastack.control.sandboxes import WHICH_SNAPSHOTS, cores, when
from pandastack.control.settings import ControlSettings
from pandastack.control.states import States
from pandastack.control.store import Store
from pandastack.control.store.sandboxes import SandboxRow
from pandastack.control.store.snapshots import RESTORABLE, SnapshotRow
from pandastack.control.work import Crew
from pandastack.errors import (
    CapacityError,
    Conflict,
    DiskFull,
    GuestError,
    RuntimeFailed,
    SnapshotNotFound,
    SnapshotUnusable,
)
from pandastack.wire.host import HostSnapshot
from pandastack.wire.ids import SnapshotId, TenantId, is_uuid, new_snapshot_id
from pandastack.wire.snapshots import SnapshotCause, SnapshotView
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
        location=None if usage is None else usage.location,
        own_bytes=None if usage is None else usage.own_bytes,
        shared_bytes=None if usage is None else usage.shared_bytes,
        created_at=when(row.created_us),
        cpu=cores(row.cpu),
        memory_mb=row.memory_mb,
        disk_mb=row.disk_mb,
        runtime=row.runtime,
        cause=row.cause,
        label=row.label,
    )


class Snapshots:
    """Everything that can be asked about a snapshot, for one host."""

    def __init__(
        self,
        store: Store,
        host: Host,
        creates: Creates,
        states: States,
        crew: Crew,
        quotas: Quotas,
        settings: ControlSettings,
        meters: Meters,
    ) -> None:
        self._store = store
        self._host = host
        self._creates = creates
        self._states = states
        self._crew = crew
        self._quotas = quotas
        self._settings = settings
        self._meters = meters
        # Set when there is one to verify.
        self.verify_due = asyncio.Event()

    # Capture

    async def capture(self, caller: Caller, sandbox_id: str, key: str | None) -> Created:
        """Durable when this returns, at most one per idempotency key. The sandbox goes on as it was: nothing is woken or resumed for it."""
        request = Request(caller.tenant, key, digest({"snapshot": sandbox_id}), count=1)

        async def work() -> Created:
            if (before := await self._creates.answered(request)) is not None:
                return before
            return await self._capture(request, await self._states.usable(caller, sandbox_id))

        return await self._creates.joined(request, work, outcomes=self._meters.snapshots, seconds=self._meters.snapshot_s)

    async def _capture(self, request: Request, sandbox: SandboxRow) -> Created:
        size_bytes, admit = await self._quotas.foresee(sandbox)
        row = self.planned(sandbox, cause="request", size_bytes=size_bytes)
        with self._creates.using(row.id):
            if (raced := await self._creates.begin(request, [row], admit)) is not None:
                return raced
            async with self.undone(row.id):
                facts = await self._saved(row)
                answer = view(_durable(row, facts)).model_dump_json().encode()
                if not await self._store.creates.complete_snapshot(row.tenant_id, row.id, facts, response_status=201, response_body=answer):
                    raise _deleted_meanwhile()
        self.verify_due.set()
        return Created(201, answer)

    async def checkpoint(self, sandbox: SandboxRow, label: str, *, cause: SnapshotCause = "checkpoint") -> SnapshotRow:
        """A point that nobody asked for, durable when this returns. The caller finishes it and counts it."""
        size_bytes, admit = await self._quotas.foresee(sandbox)
        row = self.planned(sandbox, cause=cause, label=label, size_bytes=size_bytes)
        with self._creates.using(row.id):
            await self._store.snapshots.insert(row.tenant_id, row, admit)
            async with self.undone(row.id):
                facts = await self._saved(row)
                await self.complete(row, facts)
        return _durable(row, facts)

    def planned(self, sandbox: SandboxRow, *, cause: SnapshotCause, label: str = "", size_bytes: int = 0) -> SnapshotRow:
        """The row as it begins. `size_bytes` is what it will take, about, where somebody counts."""
        return SnapshotRow(
            id=new_snapshot_id(),
            tenant_id=sandbox.tenant_id,
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
            cause=cause,
            label=label,
            size_bytes=size_bytes,
        )

    @contextlib.asynccontextmanager
    async def undone(self, snapshot_id: SnapshotId) -> AsyncIterator[None]:
        """On any failure in the block nothing is left, or the row stays for `reconcile` to undo."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):
                await self._crew.finish("undo snapshot", self._creates.finish_delete_snapshot(snapshot_id))
            raise

    async def _saved(self, row: SnapshotRow) -> dict[str, Any]:
        async with deadline(self._settings.state_timeout_s, "the snapshot was not finished in time"):
            return facts_of(await self._host.snapshot(row.sandbox_id, row.id))

    async def complete(self, row: SnapshotRow, facts: Mapping[str, Any]) -> None:
        """Raises Conflict where it was deleted meanwhile."""
        if not await self._store.snapshots.complete(row.tenant_id, row.id, facts):
            raise _deleted_meanwhile()

    async def settle(self, row: SnapshotRow) -> None:
        """An undo point whose restore was not seen to its end: kept where its host has it, because it may be all that is left."""
        async with deadline(self._settings.host_timeout_s):
            saved = await self._host.give_up_snapshot(row.id)
        if saved is not None:
            await self._store.snapshots.complete(row.tenant_id, row.id, facts_of(saved))
        else:
            await self._creates.finish_delete_snapshot(row.id)

    # Read

    async def get(self, caller: Caller, snapshot_id: str) -> SnapshotRow:
        """Raises SnapshotNotFound for what is unknown, malformed, on its way out, or another tenant's, with the same words."""
        row = await self._find(caller, snapshot_id)
        if row.status == "deleting":
            raise _unknown()
        return row

    async def list(
        self, caller: Caller, *, sandbox_id: str | None, automatic: bool = False, limit: int | None = None
    ) -> Sequence[SnapshotRow]:
        return await self._store.snapshots.list(caller.tenant, sandbox_id=sandbox_id, automatic=automatic, limit=limit)

    async def _find(self, caller: Caller, snapshot_id: str) -> SnapshotRow:
        row = await self._store.snapshots.find(caller.tenant, SnapshotId(snapshot_id)) if is_uuid(snapshot_id) else None
        if row is None:
            raise _unknown()
        return row

    # Offload

    async def offload(self, caller: Caller, snapshot_id: str) -> SnapshotRow:
        """Its large files are in the object store when this returns. It goes on also when the caller leaves. Idempotent.

        Raises Conflict for one that cannot be restored, or not yet; as `Host.offload_snapshot`.
        """
        row = await self.get(caller, snapshot_id)
        if row.status not in RESTORABLE:
            raise Conflict(f"the snapshot is {row.status}", hint="only one that can be restored goes to the object store")
        async with deadline(self._settings.state_timeout_s, "the snapshot was not put into the object store in time"):
            await self._host.offload_snapshot(row.id)
        return row

    # Verify

    async def verify(self) -> None:
        """Try a restore of each that was not verified yet, oldest first. One at a time, because each takes a sandbox's memory."""
        for row in await self._store.snapshots.unverified_of_any_tenant():
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
        await self._creates.finish_delete_snapshot(row.id)


def facts_of(saved: HostSnapshot) -> dict[str, Any]:
    """What a host's answer adds to the record."""
    return {
        "size_bytes": saved.size_bytes,
        "template_actual": saved.template_actual,
        "runtime": saved.runtime,
        "cpu": saved.cpu,
        "memory_mb": saved.memory_mb,
        "disk_mb": saved.disk_mb,
    }


def _durable(row: SnapshotRow, facts: Mapping[str, Any]) -> SnapshotRow:
    return SnapshotRow(**{**vars(row), **facts, "status": "durable"})


def _deleted_meanwhile() -> Conflict:
    return Conflict("the snapshot was deleted while it was being made")


def _unknown() -> SnapshotNotFound:
    return SnapshotNotFound("no such snapshot", hint=WHICH_SNAPSHOTS)
