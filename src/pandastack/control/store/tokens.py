"""API keys as they are stored: a public prefix, the SHA-256 of the whole key, scopes and times. Never the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update

from pandastack.control.store import tables
from pandastack.control.store.database import Database
from pandastack.wire.ids import TenantId


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """Times are microseconds since 1970; `hash` is 32 bytes."""

    prefix: str
    tenant_id: TenantId
    hash: bytes
    label: str
    scopes: tuple[str, ...]
    created_us: int
    expires_us: int | None = None
    last_used_us: int | None = None


def _row(found: Any) -> TokenRow:
    values = dict(found._mapping)
    values["scopes"] = tuple(values["scopes"].split(","))
    return TokenRow(**values)


class Tokens:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(self, tenant: TenantId, row: TokenRow) -> None:
        if row.tenant_id != tenant:
            raise ValueError("a key belongs to the tenant that made it")
        values = {
            "prefix": row.prefix,
            "tenant_id": tenant,
            "hash": row.hash,
            "label": row.label,
            "scopes": ",".join(row.scopes),
            "created_us": row.created_us,
            "expires_us": row.expires_us,
        }
        async with self._database.write() as connection:
            await connection.execute(tables.tokens.insert().values(**values))

    async def list(self, tenant: TenantId) -> list[TokenRow]:
        """Newest first."""
        query = select(tables.tokens).where(tables.tokens.c.tenant_id == tenant)
        async with self._database.read() as connection:
            rows = await connection.execute(query.order_by(tables.tokens.c.created_us.desc(), tables.tokens.c.prefix))
        return [_row(row) for row in rows]

    async def find(self, tenant: TenantId, prefix: str) -> TokenRow | None:
        query = select(tables.tokens).where(tables.tokens.c.tenant_id == tenant, tables.tokens.c.prefix == prefix)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).first()
        return _row(row) if row is not None else None

    async def delete(self, tenant: TenantId, prefix: str) -> bool:
        """True if there was one."""
        query = delete(tables.tokens).where(tables.tokens.c.tenant_id == tenant, tables.tokens.c.prefix == prefix)
        async with self._database.write() as connection:
            return (await connection.execute(query)).rowcount == 1

    async def by_prefix_of_any_tenant(self, prefix: str) -> TokenRow | None:
        """For the login only: there the tenant is what we want to learn."""
        async with self._database.read() as connection:
            row = (await connection.execute(select(tables.tokens).where(tables.tokens.c.prefix == prefix))).first()
        return _row(row) if row is not None else None

    async def touch_of_any_tenant(self, used_us: Mapping[str, int]) -> None:
        """Write when keys were last used, many at once: nobody waits for it."""
        if not used_us:
            return
        async with self._database.write() as connection:
            for prefix, at_us in used_us.items():
                await connection.execute(update(tables.tokens).where(tables.tokens.c.prefix == prefix).values(last_used_us=at_us))
