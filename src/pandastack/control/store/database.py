"""Connections and transactions. One writer at a time, short readers, every byte of disk I/O off the event loop.

A `Database` is all that the rest of the store knows; `SqliteDatabase` is the one of a single machine. SQLite runs
in WAL mode with synchronous=FULL, so a commit that returned survives a power cut. Writers begin with BEGIN IMMEDIATE:
a transaction that only later turns out to write could otherwise fail half way, with nobody to retry it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

BUSY_TIMEOUT_MS = 10_000
READERS = 4


class Database(Protocol):
    """Two kinds of transaction. Leaving the block normally commits; an exception rolls back."""

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]: ...

    def write(self) -> AbstractAsyncContextManager[AsyncConnection]: ...

    async def close(self) -> None: ...


def _engine(path: Path, *, begin: str, pool_size: int, pragmas: tuple[str, ...]) -> AsyncEngine:
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}", pool_size=pool_size, max_overflow=0, pool_timeout=30)

    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection: Any, _record: object) -> None:
        # The driver would begin transactions by its own rules; ours are in `begin` below.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "foreign_keys=ON", *pragmas):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def on_begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    return engine


class SqliteDatabase:
    """A file. `path` must already have the current schema (`migrations.upgrade`)."""

    def __init__(self, path: Path) -> None:
        self._writer = _engine(path, begin="BEGIN IMMEDIATE", pool_size=1, pragmas=("journal_mode=WAL", "synchronous=FULL"))
        self._readers = _engine(path, begin="BEGIN", pool_size=READERS, pragmas=("query_only=ON",))
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        async with self._readers.begin() as connection:
            yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        # The lock gives writers their turn in order; without it they would wait inside SQLite, in no order at all.
        async with self._turn, self._writer.begin() as connection:
            yield connection

    async def close(self) -> None:
        await self._readers.dispose()
        await self._writer.dispose()
