"""Creates, forks and snapshots with an idempotency key: at most one outcome per (tenant, key), and the same answer for every repetition.

A key stands for all that one request makes: a sandbox, every child of a fork, or a snapshot. The key and their rows
are written in one transaction, and so are the answer and the states `running`. Hence there is no instant at which a
crash leaves a key that names nothing, a sandbox whose key is free, or some children of a fork without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from pandastack.control.store import tables
from pandastack.control.store.database import Database
from pandastack.control.store.sandboxes import Sandboxes, SandboxRow
from pandastack.control.store.snapshots import SnapshotRow, Snapshots
from pandastack.wire.ids import SandboxId, SnapshotId, TenantId

_table = tables.creates
_made = tables.created


@dataclass(frozen=True, kw_only=True)
class CreateRow:
    """`response_status` and `response_body` are null while the create is in progress."""

    tenant_id: TenantId
    key: str
    request_hash: bytes
    created_us: int
    response_status: int | None = None
    response_body: bytes | None = None


class _Gone(Exception):
    """One of the sandboxes was deleted while they were made: rolls the transaction back."""


class Creates:
    def __init__(self, database: Database, sandboxes: Sandboxes, snapshots: Snapshots) -> None:
        self._database = database
        self._sandboxes = sandboxes
        self._snapshots = snapshots

    async def find(self, tenant: TenantId, key: str, *, newer_than_us: int) -> CreateRow | None:
        query = select(_table).where(_table.c.tenant_id == tenant, _table.c.key == key)
        async with self._database.read() as connection:
            found = (await connection.execute(query)).first()
        if found is None:
            return None
        row = CreateRow(**found._mapping)
        return None if row.response_status is not None and row.created_us < newer_than_us else row

    async def begin(
        self,
        tenant: TenantId,
        rows: Sequence[SandboxRow | SnapshotRow],
        *,
        key: str | None,
        request_hash: bytes,
        expire_before_us: int,
        admit: Callable[[int, int], None] = lambda _used, _more: None,
    ) -> bool:
        """Write the intent for all `rows`, durable before any side effect. False where the key is taken (look it up again).

        `admit` gets how many sandboxes the tenant has and how many come, or the `totals` of its snapshots; if it raises, nothing is
        written.
        """
        try:
            async with self._database.write() as connection:
                if key is not None:
                    old = and_(
                        _table.c.tenant_id == tenant,
                        _table.c.key == key,
                        _table.c.response_status.is_not(None),
                        _table.c.created_us < expire_before_us,
                    )
                    await connection.execute(delete(_table).where(old))
                    values = {"tenant_id": tenant, "key": key, "request_hash": request_hash, "created_us": rows[0].created_us}
                    await connection.execute(_table.insert().values(**values))
                    links = [{"sandbox_id": row.id, "tenant_id": tenant, "key": key} for row in rows]
                    await connection.execute(_made.insert(), links)
                # After the key: a repetition is answered, also where there is no room for another one.
                sandboxes = [row for row in rows if isinstance(row, SandboxRow)]
                if sandboxes:
                    admit(await self._sandboxes.count_with(connection, tenant), len(sandboxes))
                for row in rows:
                    if isinstance(row, SnapshotRow):
                        await self._snapshots.insert_with(connection, tenant, row, admit)
                    else:
                        await self._sandboxes.insert_with(connection, tenant, row)
        except IntegrityError:
            if key is None:
                raise
            return False
        return True

    async def complete(
        self, tenant: TenantId, facts: Mapping[SandboxId, Mapping[str, Any]], *, response_status: int, response_body: bytes
    ) -> bool:
        """All of them are running, and this is what every repetition is told. False, and nothing changed, where one was deleted."""
        self._forget(facts)
        try:
            async with self._database.write() as connection:
                for sandbox_id, values in facts.items():
                    if not await self._sandboxes.mark_running_with(connection, tenant, sandbox_id, **values):
                        raise _Gone
                await self._answer(connection, tenant, list(facts), response_status, response_body)
        except _Gone:
            return False
        finally:
            self._forget(facts)
        return True

    async def complete_snapshot(
        self, tenant: TenantId, snapshot_id: SnapshotId, facts: Mapping[str, Any], *, response_status: int, response_body: bytes
    ) -> bool:
        """The same for a snapshot that is durable."""
        async with self._database.write() as connection:
            done = await self._snapshots.complete_with(connection, tenant, snapshot_id, **facts)
            if done:
                await self._answer(connection, tenant, [snapshot_id], response_status, response_body)
        return done

    async def _answer(self, connection: AsyncConnection, tenant: TenantId, things: Sequence[str], status: int, body: bytes) -> None:
        key = select(_made.c.key).where(_made.c.tenant_id == tenant, _made.c.sandbox_id.in_(things))
        own = and_(_table.c.tenant_id == tenant, _table.c.key.in_(key))
        await connection.execute(update(_table).where(own).values(response_status=status, response_body=body))

    async def prune_of_any_tenant(self, *, older_than_us: int) -> int:
        """Forget completed answers that nobody may ask for any more."""
        old = and_(_table.c.created_us < older_than_us, _table.c.response_status.is_not(None))
        async with self._database.write() as connection:
            return (await connection.execute(delete(_table).where(old))).rowcount

    def _forget(self, sandbox_ids: Mapping[SandboxId, Any]) -> None:
        for sandbox_id in sandbox_ids:
            self._sandboxes.forget(sandbox_id)
