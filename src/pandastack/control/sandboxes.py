"""One sandbox's life as the control plane sees it: what a create makes, reading, and the end.

    create:  (snapshot ->) placement -> template ready -> the steps in `creates`
    delete:  row `deleting` (durable) -> host.delete -> no row

Each step can be repeated, and the row says how far the work came; so a crash between any two steps is healed by
`reconcile`, which runs the second half of `delete`. Work that was begun is finished or undone even if its client leaves.
What a sandbox goes through in between is in `states`, `snapshots` and `forks`.
"""

from __future__ import annotations

import asyncio
import builtins
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pandastack.control import placement
from pandastack.control.access import Caller
from pandastack.control.creates import Created, Creates, Plan, Request, digest
from pandastack.control.hosts import Host, deadline
from pandastack.control.meters import Meters
from pandastack.control.settings import ControlSettings
from pandastack.control.store import Store
from pandastack.control.store.sandboxes import Position, SandboxRow
from pandastack.control.store.snapshots import RESTORABLE, SnapshotRow
from pandastack.control.templates import Bakes
from pandastack.control.work import Crew
from pandastack.errors import (
    Conflict,
    InvalidRequest,
    NotFoundError,
    SandboxNotFound,
    SandboxNotRunning,
    SnapshotNotFound,
    SnapshotUnusable,
)
from pandastack.wire.host import HostCreate, HostSandbox
from pandastack.wire.ids import SandboxId, SnapshotId, TenantId, is_uuid
from pandastack.wire.isolation import AUTO
from pandastack.wire.sandboxes import (
    MEMORY_LOST,
    Checkpoints,
    CheckpointState,
    Lifecycle,
    LifecyclePatch,
    SandboxCreate,
    SandboxMetrics,
    SandboxView,
)

_INSIDE = ("tenant_id", "created_us", "failed_us", "keep_awake_us", "checkpoints", "checkpoint_error")

WHICH_SNAPSHOTS = "see `pandastack snapshot list`, and `pandastack sandbox history` for the points of one sandbox"


def when(at_us: int) -> str:
    """RFC 3339 in UTC, to the microsecond."""
    return datetime.fromtimestamp(at_us / 1e6, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def view(row: SandboxRow) -> SandboxView:
    """The public shape of a record."""
    values: dict[str, Any] = {key: value for key, value in vars(row).items() if key not in _INSIDE}
    values["cpu"] = cores(row.cpu)
    values["created_at"] = when(row.created_us)
    return SandboxView(**values)


def cores(cpu: float) -> float | int:
    """A whole number as one: existing clients read an integer."""
    return int(cpu) if cpu == int(cpu) else cpu


class Sandboxes:
    """Everything that can be asked about a sandbox, for one host."""

    def __init__(
        self, store: Store, host: Host, creates: Creates, bakes: Bakes, crew: Crew, settings: ControlSettings, meters: Meters
    ) -> None:
        self._store = store
        self._host = host
        self._creates = creates
        self._bakes = bakes
        self._crew = crew
        self._settings = settings
        self._meters = meters
        # Set when something may have become due earlier than the expiry loop thinks.
        self.expiry_due = asyncio.Event()

    # Create

    async def create(self, caller: Caller, request: SandboxCreate, key: str | None) -> Created:
        """Make a sandbox, at most one per idempotency key. Raises what placement, the store and the host raise."""
        # What is not given is left out, so that a key of an earlier version means the same.
        left_out = {name for name, unset in (("checkpoints", None), ("isolation", AUTO)) if getattr(request, name) == unset}
        asked = Request(caller.tenant, key, digest(request.model_dump(mode="json", exclude=left_out)), count=1)

        async def plan(ids: Sequence[SandboxId]) -> Plan:
            return await self._plan(caller, request, ids[0])

        return await self._creates.once(asked, plan, outcomes=self._meters.creates, seconds=self._meters.create_s)

    async def _plan(self, caller: Caller, request: SandboxCreate, sandbox_id: SandboxId) -> Plan:
        source = request.from_snapshot
        snapshot = await self._snapshot(caller, source, field="from_snapshot") if source is not None else None
        async with deadline(self._settings.host_timeout_s):
            info = await self._host.describe()
        place = placement.choose(request, [info], self._settings, snapshot)
        if place.template is not None and place.runtime is not None and place.template.runtimes.get(place.runtime) != "ready":
            await self._bakes.ensure(request.template, request.isolation, wait_s=self._settings.template_wait_s)
        row = SandboxRow(
            id=sandbox_id,
            tenant_id=caller.tenant,
            host_id=place.host_id,
            status="creating",
            template=snapshot.template if snapshot is not None else request.template,
            cpu=place.cpu,
            memory_mb=place.memory_mb,
            disk_mb=place.disk_mb,
            persistent=request.persistent,
            ttl_seconds=place.ttl_seconds,
            created_us=time.time_ns() // 1000,
            metadata=request.metadata,
            from_snapshot=snapshot.id if snapshot is not None else None,
            checkpoints=request.checkpoints.model_dump() if request.checkpoints is not None else None,
        )
        wanted = HostCreate(
            id=row.id,
            template=row.template,
            hostname=f"sandbox-{row.id[:8]}",
            env=request.env,
            cpu=row.cpu,
            memory_mb=row.memory_mb,
            disk_mb=row.disk_mb,
            snapshot=row.from_snapshot,
            isolation=request.isolation,
        )

        async def make() -> builtins.list[HostSandbox]:
            try:
                with self._creates.using(wanted.snapshot):
                    return [await self._host.create(wanted)]
            except SnapshotNotFound as error:
                # Deleted between our look and the host's.
                raise _no_snapshot("from_snapshot") from error

        # A restore reads what was in memory, which may take longer than any boot.
        timeout_s = self._settings.create_timeout_s if snapshot is None else self._settings.state_timeout_s
        return Plan([row], make, timeout_s, lambda ends: view(ends[0]).model_dump_json().encode())

    async def _snapshot(self, caller: Caller, snapshot_id: str, *, field: str) -> SnapshotRow:
        """The snapshot to start from. A 400, because the request is wrong, not its address."""
        row = await self._store.snapshots.find(caller.tenant, SnapshotId(snapshot_id)) if is_uuid(snapshot_id) else None
        if row is None or row.status == "deleting":
            raise _no_snapshot(field)
        if row.status not in RESTORABLE:
            reason = (row.status_reason or "failed") if row.status == "failed" else "unfinished"
            raise SnapshotUnusable(f"this snapshot can not be used ({reason})", field=field, reason=reason)
        return row

    async def point(self, caller: Caller, sandbox: SandboxRow, snapshot_id: str, *, field: str) -> SnapshotRow:
        """A snapshot of this very sandbox. Raises Conflict for another one's."""
        row = await self._snapshot(caller, snapshot_id, field=field)
        if row.sandbox_id != sandbox.id:
            raise Conflict(
                "this point belongs to another sandbox",
                hint="`create` with `from_snapshot` makes a sandbox of it",
                field=field,
                sandbox_id=row.sandbox_id,
            )
        return row

    # Read

    async def get(self, caller: Caller, sandbox_id: str) -> SandboxRow:
        """Raises SandboxNotFound for what is unknown, malformed, or another tenant's, with the same words."""
        row = await self._store.sandboxes.find(caller.tenant, SandboxId(sandbox_id)) if is_uuid(sandbox_id) else None
        if row is None:
            raise SandboxNotFound("no such sandbox")
        return row

    async def list(
        self, caller: Caller, *, status: str | None, metadata: Mapping[str, str], limit: int | None, after: Position | None
    ) -> list[SandboxRow]:
        return await self._store.sandboxes.list(caller.tenant, status=status, metadata=metadata, limit=limit, after=after)

    async def lifecycle(self, caller: Caller, sandbox_id: str) -> Lifecycle:
        """Wakes nothing."""
        row = await self.get(caller, sandbox_id)
        idle_s, reason = 0.0, row.status if row.status not in ("running", "paused") else None
        if reason is None:
            try:
                async with deadline(self._settings.host_timeout_s):
                    known = await self._host.get(row.id)
                idle_s, reason = (0.0 if known.busy else known.idle_s), _idleness(known)
            except NotFoundError:
                reason = "unknown to its host"
        until = None
        if row.keep_awake_us is not None and row.keep_awake_us > time.time_ns() // 1000:
            until = when(row.keep_awake_us)
            reason = f"kept awake until {until}" + (f"; {reason}" if reason else "")
        return Lifecycle(
            ttl_seconds=row.ttl_seconds,
            persistent=row.persistent,
            idle_seconds=int(idle_s),
            idle_reason=reason,
            status=row.status,
            keep_awake_until=until,
            checkpoints=await self._checkpoints(row),
        )

    async def _checkpoints(self, row: SandboxRow) -> CheckpointState | None:
        if row.checkpoints is None:
            return None
        points = await self._store.snapshots.automatic_of_any_tenant(row.id)
        size_bytes = sum(point.size_bytes for point in points)
        return CheckpointState(**row.checkpoints, points=len(points), size_bytes=size_bytes, last_error=row.checkpoint_error)

    async def set_lifecycle(self, caller: Caller, sandbox_id: str, patch: LifecyclePatch) -> Lifecycle:
        """Effective at once, also where it makes the sandbox due now."""
        row = await self.get(caller, sandbox_id)
        if all(value is None for value in (patch.ttl_seconds, patch.persistent, patch.keep_awake_seconds, patch.checkpoints)):
            raise InvalidRequest("give ttl_seconds, persistent, keep_awake_seconds or checkpoints", field="ttl_seconds")
        if patch.ttl_seconds is not None:
            placement.check_ttl(patch.ttl_seconds, self._settings)
        awake_us = None if patch.keep_awake_seconds is None else time.time_ns() // 1000 + patch.keep_awake_seconds * 1_000_000
        changed = await self._store.sandboxes.set_lifecycle(
            caller.tenant,
            row.id,
            ttl_seconds=patch.ttl_seconds,
            persistent=patch.persistent,
            keep_awake_us=awake_us,
            checkpoints=patch.checkpoints.model_dump() if isinstance(patch.checkpoints, Checkpoints) else patch.checkpoints,
        )
        if not changed:
            raise SandboxNotFound("no such sandbox")
        self.expiry_due.set()
        return await self.lifecycle(caller, sandbox_id)

    async def metrics(self, caller: Caller, sandbox_id: str) -> SandboxMetrics:
        """Of one that is in memory; wakes nothing."""
        row = await self.get(caller, sandbox_id)
        if row.status not in ("running", "paused"):
            raise not_usable(row)
        async with deadline(self._settings.host_timeout_s):
            return await self._host.metrics(row.id)

    # Delete

    async def delete(self, caller: Caller, sandbox_id: str) -> None:
        """Gone when this returns. A second one finds nothing; two at once both succeed."""
        row = await self.get(caller, sandbox_id)
        await self._crew.finish("delete", self.delete_of(caller.tenant, row.id, cause="request"))

    async def delete_of(self, tenant: TenantId, sandbox_id: SandboxId, *, cause: str) -> None:
        """The same for somebody inside, who says why."""
        if not await self._store.sandboxes.mark_deleting(tenant, sandbox_id):
            raise SandboxNotFound("no such sandbox")
        await self._creates.finish_delete(sandbox_id)
        self._meters.deletes.labels(cause).inc()


def not_usable(row: SandboxRow) -> SandboxNotRunning:
    """What is told about a sandbox in a state in which the thing asked for can not be done."""
    reason = f" ({MEMORY_LOST.get(row.status_reason, row.status_reason)})" if row.status_reason else ""
    hint = "restore one of its points, or create a new one" if row.status == "failed" else None
    return SandboxNotRunning(f"the sandbox is {row.status}{reason}", hint=hint, sandbox_status=row.status, status_reason=row.status_reason)


def _no_snapshot(field: str) -> SnapshotNotFound:
    return SnapshotNotFound("no such snapshot", hint=WHICH_SNAPSHOTS, http_status=400, field=field)


def _idleness(known: HostSandbox) -> str | None:
    """Why it is or is not idle, in words."""
    if known.status == "paused":
        return "paused: the clock stands still"
    return "hibernated" if known.status == "hibernated" else known.idle_reason
