"""What an idempotency key stands for: the sandbox of a create, every child of a fork, or a snapshot. Shared by their stores."""

from __future__ import annotations

from sqlalchemy import and_, delete, exists, select
from sqlalchemy.ext.asyncio import AsyncConnection

from pandastack.control.store import tables


async def release_with(connection: AsyncConnection, thing_id: str) -> None:
    """A thing is gone. The last one of a request that never completed frees its key."""
    creates, created = tables.creates, tables.created
    own = (await connection.execute(select(created).where(created.c.sandbox_id == thing_id))).first()
    await connection.execute(delete(created).where(created.c.sandbox_id == thing_id))
    if own is not None:
        others = exists().where(created.c.tenant_id == creates.c.tenant_id, created.c.key == creates.c.key)
        unfinished = and_(creates.c.tenant_id == own.tenant_id, creates.c.key == own.key, creates.c.response_status.is_(None))
        await connection.execute(delete(creates).where(unfinished, ~others))
