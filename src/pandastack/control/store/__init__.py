"""The records: the only SQL in the project. Runs in the control plane; one file per noun, one class per file.

Every question about a tenant's things takes the tenant: what belongs to another one does not exist. The few methods
that look across tenants are for the loops in `reconcile` and the login itself, and their names say so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from pandastack.control.store import migrations
from pandastack.control.store.creates import Creates
from pandastack.control.store.database import Database, SqliteDatabase
from pandastack.control.store.sandboxes import Sandboxes
from pandastack.control.store.snapshots import Snapshots
from pandastack.control.store.tenants import Tenants
from pandastack.control.store.tokens import Tokens

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Store:
    """One object per noun over one database."""

    tenants: Tenants
    tokens: Tokens
    sandboxes: Sandboxes
    snapshots: Snapshots
    creates: Creates


def over(database: Database) -> Store:
    """The store on a database whose schema is current."""
    sandboxes, snapshots = Sandboxes(database), Snapshots(database)
    return Store(Tenants(database), Tokens(database), sandboxes, snapshots, Creates(database, sandboxes, snapshots))


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Store]:
    """The store in the file at `path`, made or migrated first; a migration leaves a copy of the old file beside it."""
    backup = await asyncio.to_thread(migrations.upgrade, path)
    if backup is not None:
        log.info("store.migrated", backup=str(backup))
    database = SqliteDatabase(path)
    try:
        yield over(database)
    finally:
        await database.close()
