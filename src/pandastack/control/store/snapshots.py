"""Snapshots as records: who owns which, on which host, and how far each came.

    capturing -> durable -> verified
        |          | |          |
        |          | +-> failed |
        +----------+-----+------+-> deleting -> (no row)

`cause` says who took it: `request` (a client asked), or, automatically, `checkpoint`, `pressure` and `restore`. Those, the points that
nobody asked for, are bounded in number and end with their sandbox. Each change of state is one conditional statement, and its
row count says who won. `capturing` and `deleting` rows are not shown in lists: the one is not a snapshot yet, the other is none
any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from pandastack.control.store import keys, tables
from pandastack.control.store.database import Database
from pandastack.wire.ids import HostId, SandboxId, SnapshotId, TenantId

LISTED = ("durable", "verified", "failed")
RESTORABLE = ("durable", "verified")
AUTOMATIC = ("checkpoint", "pressure", "restore")
_table = tables.snapshots

Admit = Callable[[int, int], None]


def _always(_used: int, _more: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SnapshotRow:
    """Sizes in MiB, except `size_bytes`, which is a guess while it is being captured; times in microseconds since 1970."""

    id: SnapshotId
    tenant_id: TenantId
    host_id: HostId
    sandbox_id: SandboxId
    status: str
    template: str
    cpu: float
    memory_mb: int
    disk_mb: int
    created_us: int
    size_bytes: int = 0
    status_reason: str | None = None
    template_actual: str | None = None
    runtime: str | None = None
    cause: str = "request"
    label: str = ""


class Snapshots:
    def __init__(self, database: Database) -> None:
        self._database = database

    # One tenant's

    async def find(self, tenant: TenantId, snapshot_id: SnapshotId) -> SnapshotRow | None:
        """None for an unknown id and for another tenant's, alike."""
        found = await self._all(select(_table).where(_table.c.tenant_id == tenant, _table.c.id == snapshot_id))
        return found[0] if found else None

    async def list(
        self, tenant: TenantId, *, sandbox_id: str | None = None, automatic: bool = False, limit: int | None = None
    ) -> Sequence[SnapshotRow]:
        """Newest first; with `automatic` also those that nobody asked for."""
        query = select(_table).where(_table.c.tenant_id == tenant, _table.c.status.in_(LISTED))
        if sandbox_id is not None:
            query = query.where(_table.c.sandbox_id == sandbox_id)
        if not automatic:
            query = query.where(_table.c.cause == "request")
        query = query.order_by(_table.c.created_us.desc(), _table.c.id.desc())
        return await self._all(query if limit is None else query.limit(limit))

    async def totals(self, tenant: TenantId) -> tuple[int, int]:
        """How many there are, or are being made, and what they take on disk, in bytes."""
        async with self._database.read() as connection:
            return await self._totals(connection, tenant)

    async def insert(self, tenant: TenantId, row: SnapshotRow, admit: Admit = _always) -> None:
        """Write the intent, durable before any side effect. `admit` gets the `totals` of before; if it raises, nothing is written."""
        async with self._database.write() as connection:
            await self.insert_with(connection, tenant, row, admit)

    async def insert_with(self, connection: AsyncConnection, tenant: TenantId, row: SnapshotRow, admit: Admit = _always) -> None:
        """The same inside a transaction of another noun."""
        if row.tenant_id != tenant:
            raise ValueError("a snapshot belongs to the tenant that made it")
        admit(*await self._totals(connection, tenant))
        await connection.execute(_table.insert().values(**vars(row)))

    async def complete(self, tenant: TenantId, snapshot_id: SnapshotId, facts: Mapping[str, Any]) -> bool:
        """Its bytes are on disk. False where somebody undid it meanwhile."""
        async with self._database.write() as connection:
            return await self.complete_with(connection, tenant, snapshot_id, **facts)

    async def complete_with(self, connection: AsyncConnection, tenant: TenantId, snapshot_id: SnapshotId, **facts: Any) -> bool:
        """The same inside a transaction of another noun."""
        where = and_(_table.c.id == snapshot_id, _table.c.tenant_id == tenant, _table.c.status == "capturing")
        return (await connection.execute(update(_table).where(where).values(status="durable", **facts))).rowcount == 1

    async def mark_deleting(self, tenant: TenantId, snapshot_id: SnapshotId) -> bool:
        """False for an unknown snapshot and one that is being captured; true also where it is being deleted already."""
        return await self._change(snapshot_id, (*LISTED, "deleting"), _table.c.tenant_id == tenant, status="deleting")

    # Every tenant's: for the loops

    async def mark_verified_of_any_tenant(self, snapshot_id: SnapshotId) -> bool:
        return await self._change(snapshot_id, ("durable",), status="verified", status_reason=None)

    async def mark_failed_of_any_tenant(self, snapshot_id: SnapshotId, reason: str) -> bool:
        return await self._change(snapshot_id, RESTORABLE, status="failed", status_reason=reason[:256])

    async def mark_deleting_of_any_tenant(self, snapshot_id: SnapshotId, statuses: Sequence[str]) -> bool:
        return await self._change(snapshot_id, statuses, status="deleting")

    async def remove_of_any_tenant(self, snapshot_id: SnapshotId) -> None:
        """Forget a snapshot whose host has forgotten it. One that never completed frees its idempotency key."""
        async with self._database.write() as connection:
            await keys.release_with(connection, snapshot_id)
            await connection.execute(delete(_table).where(_table.c.id == snapshot_id))

    async def list_of_any_tenant(self, *statuses: str) -> Sequence[SnapshotRow]:
        """Oldest first."""
        return await self._all(select(_table).where(_table.c.status.in_(statuses)).order_by(_table.c.created_us, _table.c.id))

    async def unverified_of_any_tenant(self) -> Sequence[SnapshotRow]:
        """Oldest first. Automatic ones are not tried: each trial takes the memory of a sandbox."""
        query = select(_table).where(_table.c.status == "durable", _table.c.cause == "request")
        return await self._all(query.order_by(_table.c.created_us, _table.c.id))

    async def automatic_of_any_tenant(self, sandbox_id: SandboxId) -> Sequence[SnapshotRow]:
        """Of one sandbox, oldest first."""
        own = and_(_table.c.sandbox_id == sandbox_id, _table.c.cause.in_(AUTOMATIC), _table.c.status.in_(LISTED))
        return await self._all(select(_table).where(own).order_by(_table.c.created_us, _table.c.id))

    async def mark_automatic_deleting_of_any_tenant(self, sandbox_id: SandboxId) -> Sequence[SnapshotId]:
        """Those of a sandbox that its host has forgotten, also if one is still being made."""
        own = and_(_table.c.sandbox_id == sandbox_id, _table.c.cause.in_(AUTOMATIC))
        async with self._database.write() as connection:
            await connection.execute(update(_table).where(own).values(status="deleting"))
            return list((await connection.execute(select(_table.c.id).where(own))).scalars())

    async def ids_of_any_tenant(self) -> set[SnapshotId]:
        async with self._database.read() as connection:
            return set((await connection.execute(select(_table.c.id))).scalars())

    # Inside

    async def _totals(self, connection: AsyncConnection, tenant: TenantId) -> tuple[int, int]:
        kept = and_(_table.c.tenant_id == tenant, _table.c.status.in_(("capturing", *LISTED)))
        found = (await connection.execute(select(func.count(), func.coalesce(func.sum(_table.c.size_bytes), 0)).where(kept))).one()
        return int(found[0]), int(found[1])

    async def _change(self, snapshot_id: SnapshotId, statuses: Sequence[str], *conditions: ColumnElement[bool], **values: Any) -> bool:
        where = and_(_table.c.id == snapshot_id, _table.c.status.in_(statuses), *conditions)
        async with self._database.write() as connection:
            return (await connection.execute(update(_table).where(where).values(**values))).rowcount == 1

    async def _all(self, query: Select[Any]) -> Sequence[SnapshotRow]:
        async with self._database.read() as connection:
            return [SnapshotRow(**row._mapping) for row in await connection.execute(query)]
