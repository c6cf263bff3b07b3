"""Brings a database file to the current schema, with a copy beside it before anything changes.

Alembic runs in a worker thread, before the first request. `upgrade` is the only way a schema changes.
"""

from __future__ import annotations

import functools
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event

HERE = Path(__file__).parent


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(HERE))
    return config


@functools.cache
def head() -> str:
    """The revision this version of PandaStack works with."""
    found = ScriptDirectory.from_config(_config()).get_current_head()
    if found is None:
        raise RuntimeError("the package holds no migrations")
    return found


def current(path: Path) -> str | None:
    """The revision of a database file, or None for a new or empty one."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    with closing(sqlite3.connect(path)) as connection:
        known = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if known else None
    return str(row[0]) if row else None


def upgrade(path: Path) -> Path | None:
    """Create or migrate the file at `path`; blocking. Returns the backup that was made, if there was one to make.

    Raises RuntimeError where the file was written by a newer version: going back is restoring the backup.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = current(path)
    if found == head():
        return None
    known = {revision.revision for revision in ScriptDirectory.from_config(_config()).walk_revisions()}
    if found is not None and found not in known:
        raise RuntimeError(f"{path} was made by a newer version (schema {found}); restore its backup or update PandaStack")
    backup = _copy(path, found) if found is not None else None
    # Keys' hashes and metadata are in there: nobody but the owner reads it.
    path.touch(mode=0o600)
    engine = create_engine(f"sqlite:///{path}")
    _all_or_nothing(engine)
    try:
        with engine.begin() as connection:
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()
    return backup


def _all_or_nothing(engine: Engine) -> None:
    """Make changes of the schema part of the transaction; the driver by its own rules would commit each by itself.

    Without this a process that dies half way leaves a file that is of no version.
    """

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _copy(path: Path, revision: str) -> Path:
    """A consistent copy, WAL included, as `<name>.before-<next>.bak`; complete or not there."""
    target = path.with_name(f"{path.name}.{revision}-before-{head()}.bak")
    partial = target.with_name(f"{target.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(partial)) as copy:
        source.backup(copy)
    partial.replace(target)
    return target
