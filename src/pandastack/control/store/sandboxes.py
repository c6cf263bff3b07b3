"""Sandboxes as records: who owns which, on which host, in which state.

    creating -> running <-> paused | hibernated -> failed
       |           |                |                 |
       +-----------+----------------+-----------------+-> deleting -> (no row)

Running, paused and hibernated are the usable states; which of the three it is, its host decides. Each change of state is
one conditional statement, and its row count says who won: no check is followed by a separate act. A row that was read is
kept in memory until it changes, because every command asks for it; this is sound while one process writes (the only one
there is with SQLite).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, and_, delete, exists, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from pandastack.control.store import keys, tables
from pandastack.control.store.database import Database
from pandastack.wire.ids import HostId, SandboxId, SnapshotId, TenantId

CACHED_ROWS = 10_000
LOST = "host_restarted"
USABLE = ("running", "paused", "hibernated")
_table = tables.sandboxes


@dataclass(frozen=True, kw_only=True)
class SandboxRow:
    """Sizes in MiB, times in microseconds since 1970."""

    id: SandboxId
    tenant_id: TenantId
    host_id: HostId
    status: str
    template: str
    cpu: float
    memory_mb: int
    disk_mb: int
    persistent: bool
    ttl_seconds: int
    created_us: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    status_reason: str | None = None
    template_actual: str | None = None
    template_note: str | None = None
    failed_us: int | None = None
    boot_ms: int | None = None
    boot_mode: str | None = None
    runtime: str | None = None
    isolation: str | None = None
    acceleration: str | None = None
    own_kernel: bool = False
    from_snapshot: SnapshotId | None = None
    fork_parent_id: SandboxId | None = None
    fork_tree_id: str | None = None
    keep_awake_us: int | None = None
    checkpoints: Mapping[str, Any] | None = None
    checkpoint_error: str | None = None


Position = tuple[int, str]


def _row(found: Any) -> SandboxRow:
    return SandboxRow(**found._mapping)


class Sandboxes:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._cache: OrderedDict[SandboxId, SandboxRow] = OrderedDict()
        self._changes = 0

    # One tenant's

    async def find(self, tenant: TenantId, sandbox_id: SandboxId) -> SandboxRow | None:
        """None for an unknown id and for another tenant's, alike."""
        row = self._cache.get(sandbox_id)
        if row is None:
            before = self._changes
            async with self._database.read() as connection:
                found = (await connection.execute(select(_table).where(_table.c.id == sandbox_id))).first()
            if found is None:
                return None
            row = _row(found)
            # What was read may be older than a change that was committed meanwhile; then it is not kept.
            if before == self._changes:
                self._cache[sandbox_id] = row
                if len(self._cache) > CACHED_ROWS:
                    self._cache.popitem(last=False)
        return row if row.tenant_id == tenant else None

    async def list(
        self,
        tenant: TenantId,
        *,
        status: str | None = None,
        metadata: Mapping[str, str] | None = None,
        limit: int | None = None,
        after: Position | None = None,
    ) -> list[SandboxRow]:
        """Newest first; `after` is the (created_us, id) of the last one seen, which need not exist any more."""
        query = select(_table).where(_table.c.tenant_id == tenant)
        if status is not None:
            query = query.where(_table.c.status == status)
        for key, value in (metadata or {}).items():
            same = and_(tables.labels.c.sandbox_id == _table.c.id, tables.labels.c.key == key, tables.labels.c.value == value)
            query = query.where(exists().where(same))
        if after is not None:
            created_us, sandbox_id = after
            query = query.where(or_(_table.c.created_us < created_us, and_(_table.c.created_us == created_us, _table.c.id < sandbox_id)))
        query = query.order_by(_table.c.created_us.desc(), _table.c.id.desc())
        return list(await self._all(query if limit is None else query.limit(limit)))

    async def siblings(self, tenant: TenantId, row: SandboxRow) -> Sequence[SandboxRow]:
        """The other children of the same fork: same tree and same parent. Empty for one that is no child."""
        if row.fork_tree_id is None or row.fork_parent_id is None:
            return []
        same = and_(_table.c.fork_tree_id == row.fork_tree_id, _table.c.fork_parent_id == row.fork_parent_id, _table.c.id != row.id)
        return await self._all(select(_table).where(_table.c.tenant_id == tenant, same).order_by(_table.c.id))

    async def insert(self, tenant: TenantId, row: SandboxRow) -> None:
        async with self._database.write() as connection:
            await self.insert_with(connection, tenant, row)

    async def insert_with(self, connection: AsyncConnection, tenant: TenantId, row: SandboxRow) -> None:
        """The same inside a transaction of another noun."""
        if row.tenant_id != tenant:
            raise ValueError("a sandbox belongs to the tenant that made it")
        await connection.execute(_table.insert().values(**{**vars(row), "metadata": dict(row.metadata)}))
        if row.metadata:
            pairs = [{"sandbox_id": row.id, "key": key, "value": value} for key, value in row.metadata.items()]
            await connection.execute(tables.labels.insert(), pairs)

    async def mark_running_with(self, connection: AsyncConnection, tenant: TenantId, sandbox_id: SandboxId, **facts: Any) -> bool:
        """False where the row is not `creating` any more: somebody deleted the sandbox while it was being made."""
        return await self._change(connection, sandbox_id, _table.c.tenant_id == tenant, ("creating",), status="running", **facts)

    async def set_lifecycle(
        self,
        tenant: TenantId,
        sandbox_id: SandboxId,
        *,
        ttl_seconds: int | None = None,
        persistent: bool | None = None,
        keep_awake_us: int | None = None,
        checkpoints: Mapping[str, Any] | Literal["off"] | None = None,
    ) -> bool:
        """What is None stays as it is. False for an unknown sandbox and one that is going away."""
        values: dict[str, Any] = {}
        if ttl_seconds is not None:
            values["ttl_seconds"] = ttl_seconds
        if persistent is not None:
            values["persistent"] = persistent
        if keep_awake_us is not None:
            values["keep_awake_us"] = keep_awake_us
        if checkpoints is not None:
            values |= {"checkpoints": None if checkpoints == "off" else checkpoints, "checkpoint_error": None}
        async with self._writing(sandbox_id) as connection:
            own = _table.c.tenant_id == tenant
            return await self._change(connection, sandbox_id, own, ("creating", *USABLE, "failed"), **values)

    async def mark_deleting(self, tenant: TenantId, sandbox_id: SandboxId) -> bool:
        """False for an unknown sandbox; true also where it is being deleted already, because that can be repeated."""
        async with self._writing(sandbox_id) as connection:
            own = _table.c.tenant_id == tenant
            return await self._change(connection, sandbox_id, own, ("creating", *USABLE, "failed", "deleting"), status="deleting")

    async def count(self, tenant: TenantId) -> int:
        """How many there are, or are being made; those that failed or are going away do not count."""
        async with self._database.read() as connection:
            return await self.count_with(connection, tenant)

    async def count_with(self, connection: AsyncConnection, tenant: TenantId) -> int:
        """The same inside a transaction of another noun."""
        query = select(func.count()).where(_table.c.tenant_id == tenant, _table.c.status.in_(("creating", *USABLE)))
        return int((await connection.execute(query)).scalar_one())

    # Every tenant's: for the loops

    async def find_of_any_tenant(self, sandbox_id: SandboxId) -> SandboxRow | None:
        found = await self._all(select(_table).where(_table.c.id == sandbox_id))
        return found[0] if found else None

    async def set_state_of_any_tenant(
        self, sandbox_id: SandboxId, status: str, reason: str | None, *, boot_mode: str | None = None, boot_ms: int | None = None
    ) -> bool:
        """To another usable status, as its host says. False where it is not usable; a row that has it already keeps its reason.

        `boot_mode` and `boot_ms` tell how it came to run the last time; None leaves what is known.
        """
        if status not in USABLE:
            raise ValueError(f"{status!r} is not a state that a usable sandbox can be in")
        others = [known for known in USABLE if known != status]
        values = {"status": status, "status_reason": reason[:256] if reason else None}
        boot = {} if boot_mode is None else {"boot_mode": boot_mode, "boot_ms": boot_ms}
        async with self._writing(sandbox_id) as connection:
            if await self._change(connection, sandbox_id, _table.c.id == sandbox_id, others, **values, **boot):
                return True
            if boot and await self._change(connection, sandbox_id, _table.c.id == sandbox_id, (status,), **boot):
                return True
            same = select(_table.c.id).where(_table.c.id == sandbox_id, _table.c.status == status)
            return (await connection.execute(same)).first() is not None

    async def expire_of_any_tenant(
        self, sandbox_id: SandboxId, *, ttl_seconds: int | None, statuses: Sequence[str], now_us: int | None = None
    ) -> bool:
        """To `deleting`, if it is still not persistent, still has the ttl the decision was made with, and is not kept awake."""
        still: ColumnElement[bool] = _table.c.persistent.is_(False)
        if ttl_seconds is not None:
            still = and_(still, _table.c.ttl_seconds == ttl_seconds)
        if now_us is not None:
            still = and_(still, or_(_table.c.keep_awake_us.is_(None), _table.c.keep_awake_us <= now_us))
        async with self._writing(sandbox_id) as connection:
            return await self._change(connection, sandbox_id, still, statuses, status="deleting")

    async def mark_failed_of_any_tenant(self, sandbox_id: SandboxId, reason: str, failed_us: int) -> bool:
        async with self._writing(sandbox_id) as connection:
            always = _table.c.id == sandbox_id
            return await self._change(
                connection, sandbox_id, always, USABLE, status="failed", status_reason=reason[:256], failed_us=failed_us
            )

    async def mark_found_of_any_tenant(self, sandbox_id: SandboxId, status: str = "running", reason: str | None = None) -> bool:
        """Back to a usable status: it had only been missing from its host, or was restored by somebody who did not live to write so."""
        values = {"status": status, "status_reason": reason[:256] if reason else None, "failed_us": None}
        async with self._writing(sandbox_id) as connection:
            return await self._change(connection, sandbox_id, _table.c.id == sandbox_id, ("failed",), **values)

    async def mark_restored_of_any_tenant(self, sandbox_id: SandboxId, *, boot_mode: str, boot_ms: int) -> bool:
        """It runs, at an earlier point, whatever it was. False where it is going away."""
        values = {"status": "running", "status_reason": None, "failed_us": None, "boot_mode": boot_mode, "boot_ms": boot_ms}
        async with self._writing(sandbox_id) as connection:
            return await self._change(connection, sandbox_id, _table.c.id == sandbox_id, (*USABLE, "failed"), **values)

    async def note_checkpoint_of_any_tenant(self, sandbox_id: SandboxId, error: str | None) -> None:
        """How the last checkpoint went."""
        async with self._writing(sandbox_id) as connection:
            values = {"checkpoint_error": error[:512] if error else None}
            await self._change(connection, sandbox_id, _table.c.checkpoints.is_not(None), USABLE, **values)

    async def mark_deleting_of_any_tenant(self, sandbox_id: SandboxId, statuses: Sequence[str]) -> bool:
        async with self._writing(sandbox_id) as connection:
            return await self._change(connection, sandbox_id, _table.c.id == sandbox_id, statuses, status="deleting")

    async def remove_of_any_tenant(self, sandbox_id: SandboxId) -> None:
        """Forget a sandbox whose host has forgotten it. The last one of a create that never completed frees its idempotency key."""
        async with self._writing(sandbox_id) as connection:
            await keys.release_with(connection, sandbox_id)
            await connection.execute(delete(_table).where(_table.c.id == sandbox_id))

    async def list_with_checkpoints_of_any_tenant(self) -> Sequence[SandboxRow]:
        """Those that can be used and take checkpoints by themselves."""
        return await self._all(select(_table).where(_table.c.status.in_(USABLE), _table.c.checkpoints.is_not(None)))

    async def list_of_any_tenant(self, *statuses: str) -> Sequence[SandboxRow]:
        return await self._all(select(_table).where(_table.c.status.in_(statuses)))

    async def ids_of_any_tenant(self) -> set[SandboxId]:
        async with self._database.read() as connection:
            return set((await connection.execute(select(_table.c.id))).scalars())

    async def count_by_status(self) -> dict[str, int]:
        async with self._database.read() as connection:
            rows = await connection.execute(select(_table.c.status, func.count().label("number")).group_by(_table.c.status))
        return {row.status: row.number for row in rows}

    # Inside

    def forget(self, sandbox_id: SandboxId) -> None:
        """Drop what is kept in memory, before and after each change of the row."""
        self._changes += 1
        self._cache.pop(sandbox_id, None)

    def _writing(self, sandbox_id: SandboxId) -> _Writing:
        return _Writing(self, self._database, sandbox_id)

    async def _change(
        self, connection: AsyncConnection, sandbox_id: SandboxId, condition: ColumnElement[bool], statuses: Sequence[str], **values: Any
    ) -> bool:
        where = and_(_table.c.id == sandbox_id, condition, _table.c.status.in_(statuses))
        return (await connection.execute(update(_table).where(where).values(**values))).rowcount == 1

    async def _all(self, query: Select[Any]) -> Sequence[SandboxRow]:
        async with self._database.read() as connection:
            return [_row(row) for row in await connection.execute(query)]


class _Writing:
    """A write transaction about one sandbox that leaves no stale copy of its row in memory, however it ends."""

    def __init__(self, sandboxes: Sandboxes, database: Database, sandbox_id: SandboxId) -> None:
        self._sandboxes = sandboxes
        self._transaction = database.write()
        self._sandbox_id = sandbox_id

    async def __aenter__(self) -> AsyncConnection:
        connection = await self._transaction.__aenter__()
        self._sandboxes.forget(self._sandbox_id)
        return connection

    async def __aexit__(self, *error: Any) -> bool | None:
        try:
            return await self._transaction.__aexit__(*error)
        finally:
            self._sandboxes.forget(self._sandbox_id)
