"""Tenants: whom a key, a sandbox and an idempotency key belong to."""

from __future__ import annotations

import time
import uuid

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from pandastack.control.store import tables
from pandastack.control.store.database import Database
from pandastack.wire.ids import TenantId


class Tenants:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def ensure(self, name: str) -> TenantId:
        """The id of the tenant called `name`, made if there is none."""
        found = await self.by_name(name)
        if found is not None:
            return found
        made = TenantId(str(uuid.uuid4()))
        try:
            async with self._database.write() as connection:
                await connection.execute(tables.tenants.insert().values(id=made, name=name, created_us=time.time_ns() // 1000))
        except IntegrityError:
            raced = await self.by_name(name)
            if raced is None:
                raise
            return raced
        return made

    async def by_name(self, name: str) -> TenantId | None:
        async with self._database.read() as connection:
            found = await connection.scalar(select(tables.tenants.c.id).where(tables.tenants.c.name == name))
        return TenantId(found) if found is not None else None
