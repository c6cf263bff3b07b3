"""A crash between any two steps, then a start on the same database and the same host: records and host agree."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pandastack.control.fake_host import FakeHost
from pandastack.control.store import migrations
from pandastack.control.store.sandboxes import USABLE
from pandastack.wire.host import HostCreate
from pandastack.wire.ids import SandboxId, new_sandbox_id

from .world import World, copy_database, until, world

pytestmark = pytest.mark.anyio
QUIET: dict[str, Any] = {"expiry_interval_s": 3600, "sweep_interval_s": 3600}
KEY = {"idempotency-key": "the-key"}


class Crash(Exception):
    """The process is dead: nothing it does from here on has an effect."""


class Steps:
    """Counts the effects of one process, and ends it at the n-th."""

    def __init__(self, crash_at: int) -> None:
        self.taken = 0
        self.crash_at = crash_at

    @property
    def dead(self) -> bool:
        return self.taken >= self.crash_at

    def take(self) -> None:
        self.taken += 1
        if self.dead:
            raise Crash

    def watch(self, owner: Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, self._around(getattr(owner, name)))

    def _around(self, effect: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def stepped(*args: Any, **kwargs: Any) -> Any:
            self.take()  # A crash before the effect,
            result = await effect(*args, **kwargs)
            self.take()  # and one after it, before anybody hears of it.
            return result

        return stepped


async def crashing(w: World, steps: Steps) -> None:
    await asyncio.sleep(0.02)  # The loops have had their first turn.
    steps.watch(w.host, "create", "delete")
    steps.watch(w.parts.store.creates, "begin", "complete")
    steps.watch(w.parts.store.sandboxes, "mark_deleting", "remove_of_any_tenant")


def revive(host: FakeHost) -> None:
    for name in ("create", "delete"):
        host.__dict__.pop(name, None)


async def agree(w: World) -> list[str]:
    """The oracle: every row is a running sandbox of the host, and the other way round."""
    rows = await w.parts.store.sandboxes.list_of_any_tenant("creating", *USABLE, "failed", "deleting")
    assert {row.status for row in rows} <= {"running"}
    assert {row.id for row in rows} == set(w.host.sandboxes)
    return [row.id for row in rows]


async def test_a_create_that_crashes_at_any_step_makes_one_sandbox_when_repeated(empty_database: Path, tmp_path: Path) -> None:
    for crash_at in range(1, 100):
        host, path = FakeHost(), copy_database(empty_database, tmp_path / f"{crash_at}.db")
        steps = Steps(crash_at)
        async with world(path, host, **QUIET) as w:
            await crashing(w, steps)
            told = await w.ours.post("/v1/sandboxes", json={}, headers=KEY)
        revive(host)
        async with world(path, host, **QUIET) as w:
            survivors = await agree(w)
            if told.status_code == 201:
                assert survivors == [told.json()["id"]]
            again = await w.ours.post("/v1/sandboxes", json={}, headers=KEY)
            assert again.status_code == 201
            assert await agree(w) == [again.json()["id"]]
        if not steps.dead:
            assert crash_at > 6
            return
    raise AssertionError("the create never ran to its end")


async def test_a_delete_that_crashes_at_any_step_is_finished_or_never_was(empty_database: Path, tmp_path: Path) -> None:
    for crash_at in range(1, 100):
        host, path = FakeHost(), copy_database(empty_database, tmp_path / f"{crash_at}.db")
        steps = Steps(crash_at)
        async with world(path, host, **QUIET) as w:
            sandbox, other = await w.sandbox(), await w.sandbox()
            await crashing(w, steps)
            told = await w.ours.delete(f"/v1/sandboxes/{sandbox}")
        revive(host)
        async with world(path, host, **QUIET) as w:
            survivors = await agree(w)
            assert other in survivors
            if told.status_code == 204:
                assert survivors == [other]
        if not steps.dead:
            assert crash_at > 4
            return
    raise AssertionError("the delete never ran to its end")


async def test_sandboxes_outlive_the_control_plane(database: Path) -> None:
    host = FakeHost()
    async with world(database, host) as w:
        sandbox = await w.sandbox(ttl_seconds=600)
        started = await w.ours.post(f"/v1/sandboxes/{sandbox}/processes", json={"cmd": "echo kept; sleep 100", "id": "p1"})
        assert started.status_code == 201
    async with world(database, host) as w:
        body = (await w.ours.get(f"/v1/sandboxes/{sandbox}")).json()
        assert (body["status"], body["ttl_seconds"]) == ("running", 600)
        output = await w.ours.get(f"/v1/sandboxes/{sandbox}/processes/p1/output")
        assert (output.content, output.headers["x-output-running"]) == (b"kept\n", "true")
    await host.aclose()


async def test_sandboxes_their_host_has_lost_are_failed(database: Path) -> None:
    host = FakeHost()
    async with world(database, host) as w:
        sandbox = await w.sandbox()
    lost = host.sandboxes[SandboxId(sandbox)]
    host.lose_everything()
    async with world(database, host) as w:
        body = (await w.ours.get(f"/v1/sandboxes/{sandbox}")).json()
        assert (body["status"], body["status_reason"]) == ("failed", "host_restarted")
        # The host finds it after all, and says so.
        host.sandboxes[SandboxId(sandbox)] = lost
        host._tell("adopted", SandboxId(sandbox), None)
        async with asyncio.timeout(5):
            while (await w.ours.get(f"/v1/sandboxes/{sandbox}")).json()["status"] != "running":
                pass


async def test_orphans_of_the_host_are_deleted_and_sandboxes_being_made_are_not(database: Path) -> None:
    host = FakeHost()
    orphan = new_sandbox_id()
    await host.create(HostCreate(id=orphan, template="base", hostname="x"))
    async with world(database, host, **QUIET) as w:
        assert not host.sandboxes
        await host.create(HostCreate(id=SandboxId(orphan), template="base", hostname="x"))
        host.delays_s["create.after"] = 0.1
        making = asyncio.create_task(w.ours.post("/v1/sandboxes", json={}))
        await until(lambda: len(host.sandboxes) == 2)
        await w.parts.reconciler.sweep()
        made = await making
        assert made.status_code == 201
        assert set(host.sandboxes) == {made.json()["id"]}


async def test_the_control_plane_starts_and_recovers_while_its_host_is_away(database: Path) -> None:
    host = FakeHost()
    async with world(database, host) as w:
        sandbox = await w.sandbox()
    host.fail("list", RuntimeError("away"), times=2)
    async with world(database, host, **QUIET) as w:
        assert (await w.ours.get(f"/v1/sandboxes/{sandbox}")).json()["status"] == "running"
        text = (await w.anyone.get("/metrics")).text
        assert 'pandastack_background_failures_total{task="sweep"}' in text


async def test_a_failing_loop_is_tried_again(w: World) -> None:
    w.host.fail("events", RuntimeError("away"), times=2)
    sandbox = await w.sandbox()
    w.host.break_sandbox(SandboxId(sandbox), "oom")
    async with asyncio.timeout(5):
        while (await w.ours.get(f"/v1/sandboxes/{sandbox}")).json()["status"] != "failed":
            pass


def test_a_migration_leaves_a_copy_of_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3
    from contextlib import closing

    path = tmp_path / "control.db"
    with closing(sqlite3.connect(path)) as old:
        old.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        old.execute("INSERT INTO alembic_version VALUES ('9999')")
        old.commit()
    with pytest.raises(RuntimeError, match="newer version"):
        migrations.upgrade(path)
    fresh = tmp_path / "fresh.db"
    assert migrations.upgrade(fresh) is None
    assert migrations.current(fresh) == migrations.head()
    assert fresh.stat().st_mode & 0o777 == 0o600
    assert migrations.upgrade(fresh) is None
    copy = migrations._copy(fresh, "0000")
    assert migrations.current(copy) == migrations.head()


def test_the_migrations_make_the_tables_the_code_works_with(empty_database: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from sqlalchemy import create_engine

    from pandastack.control.store import tables

    engine = create_engine(f"sqlite:///{empty_database}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
    engine.dispose()
