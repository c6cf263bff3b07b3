"""A database of an older version becomes a current one with everything that was in it, or stays as it was."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import create_engine

from pandastack.control.creates import digest
from pandastack.control.fake_host import FakeHost
from pandastack.control.store import migrations
from pandastack.wire.host import HostCreate
from pandastack.wire.ids import SandboxId
from pandastack.wire.sandboxes import SandboxCreate

from .world import world

pytestmark = pytest.mark.anyio
LIVE, GONE, HALF = (f"{n}0000000-0000-4000-8000-000000000000" for n in (1, 2, 3))


def old_database(path: Path) -> Path:
    """Of schema 0001: a sandbox with its key, a key whose sandbox is gone, and a create that never completed."""
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config = migrations._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    # Of the fields that there were then.
    asked = digest(SandboxCreate(template="base").model_dump(mode="json", exclude={"checkpoints", "isolation"}))
    with closing(sqlite3.connect(path)) as old:
        old.execute("INSERT INTO tenants VALUES ('t1', 'default', 1)")
        for sandbox, status in ((LIVE, "running"), (HALF, "creating")):
            old.execute(
                "INSERT INTO sandboxes (id, tenant_id, host_id, status, template, cpu, memory_mb, disk_mb, metadata, persistent,"
                " ttl_seconds, created_us) VALUES (?, 't1', 'fake', ?, 'base', 1, 512, 2048, '{\"a\": \"b\"}', 0, 600, 1)",
                (sandbox, status),
            )
        old.execute("INSERT INTO sandbox_labels VALUES (?, 'a', 'b')", (LIVE,))
        now_us = 1 << 60
        for key, sandbox, answer in (("live", LIVE, b'{"id":"live"}'), ("gone", GONE, b'{"id":"gone"}'), ("half", HALF, None)):
            status = 201 if answer is not None else None
            old.execute("INSERT INTO idempotent_creates VALUES ('t1', ?, ?, ?, ?, ?, ?)", (key, asked, sandbox, status, answer, now_us))
        old.commit()
    return path


async def test_the_records_of_the_first_version_are_all_there_after_the_upgrade(tmp_path: Path) -> None:
    path = old_database(tmp_path / "control.db")
    host = FakeHost()
    await host.create(HostCreate(id=SandboxId(LIVE), template="base", hostname="x"))
    async with world(path, host) as w:
        body = (await w.ours.get(f"/v1/sandboxes/{LIVE}")).json()
        assert (body["status"], body["metadata"], body["from_snapshot"], body["fork_tree_id"]) == ("running", {"a": "b"}, None, None)
        assert (body["acceleration"], body["own_kernel"]) == (None, False)
        assert [row["id"] for row in (await w.ours.get("/v1/sandboxes?metadata=a=b")).json()] == [LIVE]
        for key in ("live", "gone"):
            again = await w.ours.post("/v1/sandboxes", json={"template": "base"}, headers={"idempotency-key": key})
            assert (again.status_code, again.json()) == (201, {"id": key})
        # The start has undone what was half made, and so has freed its key.
        fresh = await w.ours.post("/v1/sandboxes", json={"template": "base"}, headers={"idempotency-key": "half"})
        assert (fresh.status_code, "idempotent-replay" in fresh.headers) == (201, False)
        assert {row["id"] for row in (await w.ours.get("/v1/sandboxes")).json()} == {LIVE, fresh.json()["id"]}
    assert migrations.current(path.with_name(f"control.db.0001-before-{migrations.head()}.bak")) == "0001"


def test_an_upgrade_that_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    path = old_database(tmp_path / "control.db")
    with closing(sqlite3.connect(path)) as old:
        # Its second half can not work.
        old.execute("CREATE TABLE idempotent_sandboxes (x)")
        before = sorted(old.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall())
    with pytest.raises(Exception, match="already exists"):
        migrations.upgrade(path)
    assert migrations.current(path) == "0001"
    with closing(sqlite3.connect(path)) as old:
        assert sorted(old.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()) == before
        old.execute("DROP TABLE idempotent_sandboxes")
    migrations.upgrade(path)
    assert migrations.current(path) == migrations.head()
