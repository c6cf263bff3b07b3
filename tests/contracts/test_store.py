"""What the records promise, on every database we support. A new one is one more line in DATABASES."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from pandastack.control import store
from pandastack.control.store import Store
from pandastack.control.store.sandboxes import SandboxRow
from pandastack.control.store.snapshots import SnapshotRow
from pandastack.control.store.tokens import TokenRow
from pandastack.errors import QuotaExceeded
from pandastack.wire.ids import HostId, TenantId, new_sandbox_id, new_snapshot_id

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def sqlite(folder: Path) -> AsyncIterator[Store]:
    async with store.opened(folder / "records.db") as records:
        yield records


DATABASES: dict[str, Callable[[Path], AbstractAsyncContextManager[Store]]] = {"sqlite": sqlite}


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=DATABASES)
async def records(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    async with DATABASES[request.param](tmp_path) as made:
        yield made


@pytest.fixture
async def ours(records: Store) -> TenantId:
    return await records.tenants.ensure("ours")


@pytest.fixture
async def theirs(records: Store) -> TenantId:
    return await records.tenants.ensure("theirs")


def row(tenant: TenantId, **values: Any) -> SandboxRow:
    known: dict[str, Any] = {
        "id": new_sandbox_id(), "tenant_id": tenant, "host_id": HostId("h"), "status": "creating", "template": "base",
        "cpu": 1.0, "memory_mb": 512, "disk_mb": 2048, "persistent": False, "ttl_seconds": 60, "created_us": 1, "metadata": {"a": "é\"'"},
    }  # fmt: skip
    return SandboxRow(**known | values)


async def test_a_tenant_is_made_once(records: Store) -> None:
    made = await asyncio.gather(*(records.tenants.ensure("same") for _ in range(10)))
    assert len(set(made)) == 1
    assert await records.tenants.by_name("same") == made[0]
    assert await records.tenants.by_name("none") is None


async def test_a_sandbox_is_read_as_it_was_written_and_only_by_its_tenant(records: Store, ours: TenantId, theirs: TenantId) -> None:
    made = row(ours)
    await records.sandboxes.insert(ours, made)
    for _ in range(2):  # From the database, then from memory.
        assert await records.sandboxes.find(ours, made.id) == made
        assert await records.sandboxes.find(theirs, made.id) is None
    assert await records.sandboxes.list(theirs) == []
    assert not await records.sandboxes.mark_deleting(theirs, made.id)
    assert not await records.sandboxes.set_lifecycle(theirs, made.id, ttl_seconds=1)
    assert not await records.creates.complete(theirs, {made.id: {}}, response_status=201, response_body=b"")
    with pytest.raises(ValueError, match="belongs"):
        await records.sandboxes.insert(theirs, row(ours))
    assert await records.sandboxes.find(ours, made.id) == made


async def test_only_the_first_of_two_changes_of_state_wins(records: Store, ours: TenantId) -> None:
    made = row(ours)
    await records.sandboxes.insert(ours, made)
    results = await asyncio.gather(
        *(records.creates.complete(ours, {made.id: {"boot_ms": n}}, response_status=201, response_body=b"") for n in range(5)),
        records.sandboxes.mark_deleting(ours, made.id),
    )
    assert sum(results[:5]) <= 1
    found = await records.sandboxes.find(ours, made.id)
    assert found is not None
    assert found.status == "deleting"
    assert not await records.sandboxes.mark_failed_of_any_tenant(made.id, "oom", 1)
    assert not await records.sandboxes.set_lifecycle(ours, made.id, persistent=True)


async def test_a_cached_row_is_never_older_than_a_finished_change(records: Store, ours: TenantId) -> None:
    made = row(ours, status="running")
    await records.sandboxes.insert(ours, made)

    async def read() -> None:
        for _ in range(20):
            await records.sandboxes.find(ours, made.id)

    for ttl in range(10):
        await asyncio.gather(read(), records.sandboxes.set_lifecycle(ours, made.id, ttl_seconds=ttl), read())
        found = await records.sandboxes.find(ours, made.id)
        assert found is not None
        assert found.ttl_seconds == ttl


async def test_what_was_read_before_a_change_is_not_kept_after_it(records: Store, ours: TenantId, monkeypatch: pytest.MonkeyPatch) -> None:
    made = row(ours, status="running")
    await records.sandboxes.insert(ours, made)
    database, has_read, go_on = records.sandboxes._database, asyncio.Event(), asyncio.Event()
    read = database.read

    @asynccontextmanager
    async def slow() -> AsyncIterator[Any]:
        async with read() as connection:
            yield connection
        has_read.set()
        await go_on.wait()

    with monkeypatch.context() as patch:
        patch.setattr(database, "read", slow)
        finding = asyncio.create_task(records.sandboxes.find(ours, made.id))
        await has_read.wait()
        await records.sandboxes.set_lifecycle(ours, made.id, ttl_seconds=7)
        go_on.set()
        await finding
    found = await records.sandboxes.find(ours, made.id)
    assert found is not None
    assert found.ttl_seconds == 7


async def test_expiry_decides_on_what_is_still_true(records: Store, ours: TenantId) -> None:
    made = row(ours, status="running")
    await records.sandboxes.insert(ours, made)
    assert not await records.sandboxes.expire_of_any_tenant(made.id, ttl_seconds=59, statuses=("running",))
    await records.sandboxes.set_lifecycle(ours, made.id, persistent=True)
    assert not await records.sandboxes.expire_of_any_tenant(made.id, ttl_seconds=60, statuses=("running",))
    await records.sandboxes.set_lifecycle(ours, made.id, persistent=False)
    assert await records.sandboxes.expire_of_any_tenant(made.id, ttl_seconds=60, statuses=("running",))


async def test_a_list_is_newest_first_filtered_and_paged(records: Store, ours: TenantId, theirs: TenantId) -> None:
    rows = [row(ours, created_us=n // 2, metadata={"n": str(n % 3), "k": "v"}) for n in range(8)]
    for one in [*rows, row(theirs)]:
        await records.sandboxes.insert(one.tenant_id, one)
    whole = await records.sandboxes.list(ours)
    assert [(one.created_us, one.id) for one in whole] == sorted(((one.created_us, one.id) for one in rows), reverse=True)
    pages, after = [], None
    while page := await records.sandboxes.list(ours, limit=3, after=after):
        pages += page
        after = (page[-1].created_us, page[-1].id)
        await records.sandboxes.remove_of_any_tenant(page[-1].id)
    assert pages == whole
    left = await records.sandboxes.list(ours, metadata={"n": "1", "k": "v"}, status="creating")
    assert {one.metadata["n"] for one in left} <= {"1"}
    assert await records.sandboxes.list(ours, status="running") == []


@pytest.mark.parametrize("key", [None, "k"])
async def test_a_create_is_begun_once_per_key_and_undone_whole(records: Store, ours: TenantId, key: str | None) -> None:
    rows = [row(ours) for _ in range(20)]
    begun = await asyncio.gather(*(records.creates.begin(ours, [one], key=key, request_hash=bytes(32), expire_before_us=0) for one in rows))
    assert sum(begun) == (20 if key is None else 1)
    assert len(await records.sandboxes.list(ours)) == sum(begun)
    made = rows[begun.index(True)]
    if key is not None:
        found = await records.creates.find(ours, key, newer_than_us=0)
        assert found is not None
        assert found.response_status is None
    await records.sandboxes.remove_of_any_tenant(made.id)
    if key is not None:
        assert await records.creates.find(ours, key, newer_than_us=0) is None
        assert await records.creates.begin(ours, [row(ours)], key=key, request_hash=bytes(32), expire_before_us=0)


async def test_an_answer_outlives_its_sandbox_and_then_expires(records: Store, ours: TenantId, theirs: TenantId) -> None:
    made = row(ours, created_us=100)
    await records.creates.begin(ours, [made], key="k", request_hash=b"h" * 32, expire_before_us=0)
    assert await records.creates.complete(ours, {made.id: {"runtime": "fake"}}, response_status=201, response_body=b"{}")
    await records.sandboxes.remove_of_any_tenant(made.id)
    found = await records.creates.find(ours, "k", newer_than_us=100)
    assert found is not None
    assert (found.response_status, found.response_body, found.request_hash) == (201, b"{}", b"h" * 32)
    assert await records.creates.find(theirs, "k", newer_than_us=0) is None
    assert await records.creates.find(ours, "k", newer_than_us=101) is None
    assert await records.creates.begin(ours, [row(ours, created_us=200)], key="k", request_hash=bytes(32), expire_before_us=101)
    assert await records.creates.prune_of_any_tenant(older_than_us=10**9) == 0


async def test_a_key_of_several_sandboxes_is_free_when_the_last_is_undone(records: Store, ours: TenantId) -> None:
    rows = [row(ours) for _ in range(3)]
    assert await records.creates.begin(ours, rows, key="k", request_hash=bytes(32), expire_before_us=0)
    for one in rows:
        assert await records.creates.find(ours, "k", newer_than_us=0) is not None
        await records.sandboxes.remove_of_any_tenant(one.id)
    assert await records.creates.find(ours, "k", newer_than_us=0) is None


async def test_several_sandboxes_begin_and_complete_together_or_not_at_all(records: Store, ours: TenantId) -> None:
    rows = [row(ours) for _ in range(3)]
    assert not await records.creates.begin(ours, [*rows, rows[0]], key="twice", request_hash=bytes(32), expire_before_us=0)
    assert await records.sandboxes.list(ours) == []
    assert await records.creates.begin(ours, rows, key="k", request_hash=bytes(32), expire_before_us=0)
    for one in rows:
        await records.sandboxes.find(ours, one.id)
    await records.sandboxes.mark_deleting(ours, rows[1].id)
    facts: dict[Any, dict[str, Any]] = {one.id: {"boot_ms": n} for n, one in enumerate(rows)}
    assert not await records.creates.complete(ours, facts, response_status=201, response_body=b"{}")
    found = [await records.sandboxes.find(ours, one.id) for one in rows]
    assert [one.status for one in found if one] == ["creating", "deleting", "creating"]
    del facts[rows[1].id]
    assert await records.creates.complete(ours, facts, response_status=201, response_body=b"{}")
    answer = await records.creates.find(ours, "k", newer_than_us=0)
    assert answer is not None
    assert answer.response_body == b"{}"
    for one in rows:
        await records.sandboxes.remove_of_any_tenant(one.id)
    assert await records.creates.find(ours, "k", newer_than_us=0) is not None


async def test_the_state_of_a_usable_sandbox_follows_its_host(records: Store, ours: TenantId) -> None:
    made = row(ours, status="running")
    await records.sandboxes.insert(ours, made)
    for status, reason in (("paused", "request"), ("hibernated", "idle"), ("hibernated", "request"), ("running", None)):
        assert await records.sandboxes.set_state_of_any_tenant(made.id, status, reason)
        found = await records.sandboxes.find(ours, made.id)
        assert found is not None
        # What it is already keeps the reason for which it became so.
        assert (found.status, found.status_reason) == (status, "idle" if status == "hibernated" else reason)
    for status in ("running", "paused", "paused"):
        assert await records.sandboxes.set_state_of_any_tenant(made.id, status, None, boot_mode=f"to-{status}", boot_ms=7)
        found = await records.sandboxes.find(ours, made.id)
        assert found is not None
        assert (found.boot_mode, found.boot_ms) == (f"to-{status}", 7)
    with pytest.raises(ValueError, match="failed"):
        await records.sandboxes.set_state_of_any_tenant(made.id, "failed", None)
    await records.sandboxes.set_state_of_any_tenant(made.id, "paused", None)
    assert await records.sandboxes.set_lifecycle(ours, made.id, keep_awake_us=5)
    assert await records.sandboxes.mark_failed_of_any_tenant(made.id, "host_restarted", 1)
    assert not await records.sandboxes.set_state_of_any_tenant(made.id, "running", None)
    assert await records.sandboxes.mark_found_of_any_tenant(made.id, "hibernated", "shutdown")
    assert await records.sandboxes.mark_deleting(ours, made.id)
    assert not await records.sandboxes.set_state_of_any_tenant(made.id, "running", None)
    assert not await records.sandboxes.set_state_of_any_tenant(new_sandbox_id(), "running", None)


async def test_expiry_waits_until_a_sandbox_is_not_kept_awake_any_more(records: Store, ours: TenantId) -> None:
    made = row(ours, status="running", keep_awake_us=100)
    await records.sandboxes.insert(ours, made)
    assert not await records.sandboxes.expire_of_any_tenant(made.id, ttl_seconds=60, statuses=("running",), now_us=99)
    assert await records.sandboxes.expire_of_any_tenant(made.id, ttl_seconds=60, statuses=("running",), now_us=100)


async def test_siblings_are_the_other_children_of_the_same_fork(records: Store, ours: TenantId, theirs: TenantId) -> None:
    def child(tenant: TenantId, tree: str | None, parent: str | None) -> SandboxRow:
        return row(tenant, fork_tree_id=tree, fork_parent_id=parent)

    same = [child(ours, "t", "p") for _ in range(3)]
    for one in [*same, child(theirs, "t", "p"), child(ours, "t", "q"), child(ours, "u", "p"), child(ours, None, None)]:
        await records.sandboxes.insert(one.tenant_id, one)
    assert {one.id for one in await records.sandboxes.siblings(ours, same[0])} == {same[1].id, same[2].id}
    assert await records.sandboxes.siblings(ours, child(ours, None, None)) == []


def snapshot(tenant: TenantId, **values: Any) -> SnapshotRow:
    known: dict[str, Any] = {
        "id": new_snapshot_id(), "tenant_id": tenant, "host_id": HostId("h"), "sandbox_id": new_sandbox_id(), "status": "capturing",
        "template": "base", "cpu": 1.0, "memory_mb": 512, "disk_mb": 2048, "created_us": 1,
    }  # fmt: skip
    return SnapshotRow(**known | values)


async def test_what_is_refused_in_the_transaction_is_not_written(records: Store, ours: TenantId, theirs: TenantId) -> None:
    def refuse(used: int, more: int) -> None:
        seen.append((used, more))
        if used + more > 2:
            raise QuotaExceeded("full")

    seen: list[tuple[int, int]] = []
    how: dict[str, Any] = {"request_hash": bytes(32), "expire_before_us": 0, "admit": refuse}
    assert await records.creates.begin(ours, [row(ours)], key=None, **how)
    for key in (None, "k"):
        with pytest.raises(QuotaExceeded):
            await records.creates.begin(ours, [row(ours), row(ours)], key=key, **how)
    assert await records.creates.find(ours, "k", newer_than_us=0) is None, "the key of what was refused is free"
    assert await records.creates.begin(theirs, [row(theirs), row(theirs)], key=None, **how)
    assert seen == [(0, 1), (1, 2), (1, 2), (0, 2)]
    assert (await records.sandboxes.count(ours), await records.sandboxes.count(theirs)) == (1, 2)


async def test_snapshots_are_added_up_also_while_they_are_captured(records: Store, ours: TenantId, theirs: TenantId) -> None:
    first, second = snapshot(ours, size_bytes=5), snapshot(ours, size_bytes=7)
    for one in (first, second, snapshot(theirs, size_bytes=100)):
        await records.snapshots.insert(one.tenant_id, one)
    assert await records.snapshots.complete(ours, first.id, {"size_bytes": 6})
    assert await records.snapshots.totals(ours) == (2, 13)
    await records.snapshots.mark_deleting(ours, first.id)
    assert await records.snapshots.totals(ours) == (1, 7)

    def refuse(used: int, used_bytes: int) -> None:
        raise QuotaExceeded(f"{used} {used_bytes}")

    with pytest.raises(QuotaExceeded, match="1 7"):
        await records.snapshots.insert(ours, snapshot(ours), refuse)
    assert await records.snapshots.totals(ours) == (1, 7)


async def test_a_snapshot_goes_through_its_states_in_order_and_is_its_tenants(records: Store, ours: TenantId, theirs: TenantId) -> None:
    made = snapshot(ours)
    await records.snapshots.insert(ours, made)
    with pytest.raises(ValueError, match="belongs"):
        await records.snapshots.insert(theirs, snapshot(ours))
    assert await records.snapshots.find(ours, made.id) == made
    assert await records.snapshots.find(theirs, made.id) is None
    assert await records.snapshots.list(ours) == []
    assert not await records.snapshots.mark_deleting(ours, made.id)
    assert not await records.snapshots.mark_verified_of_any_tenant(made.id)
    assert not await records.snapshots.mark_failed_of_any_tenant(made.id, "x")
    assert not await records.snapshots.complete(theirs, made.id, {})
    assert await records.snapshots.complete(ours, made.id, {"size_bytes": 1 << 40})
    assert not await records.snapshots.complete(ours, made.id, {})
    assert await records.snapshots.mark_verified_of_any_tenant(made.id)
    assert await records.snapshots.mark_failed_of_any_tenant(made.id, "missing")
    assert not await records.snapshots.mark_verified_of_any_tenant(made.id)
    (found,) = await records.snapshots.list(ours)
    assert (found.status, found.status_reason, found.size_bytes) == ("failed", "missing", 1 << 40)
    assert not await records.snapshots.mark_deleting(theirs, made.id)
    for _ in range(2):
        assert await records.snapshots.mark_deleting(ours, made.id)
    assert await records.snapshots.list(ours) == []
    assert await records.snapshots.ids_of_any_tenant() == {made.id}
    await records.snapshots.remove_of_any_tenant(made.id)
    assert await records.snapshots.find(ours, made.id) is None


async def test_snapshots_are_listed_newest_first_by_sandbox(records: Store, ours: TenantId, theirs: TenantId) -> None:
    rows = [snapshot(ours, status="durable", created_us=n // 2, sandbox_id=f"s{n % 2}") for n in range(6)]
    for one in [*rows, snapshot(theirs, status="durable")]:
        await records.snapshots.insert(one.tenant_id, one)
    listed = await records.snapshots.list(ours)
    assert [one.id for one in listed] == [one.id for one in sorted(rows, key=lambda one: (one.created_us, one.id), reverse=True)]
    assert {one.sandbox_id for one in await records.snapshots.list(ours, sandbox_id="s1")} == {"s1"}


async def test_tokens_belong_to_their_tenant(records: Store, ours: TenantId, theirs: TenantId) -> None:
    token = TokenRow(prefix="pds_00000001", tenant_id=ours, hash=bytes(32), label="l", scopes=("read", "write"), created_us=1, expires_us=9)
    await records.tokens.insert(ours, token)
    assert await records.tokens.list(ours) == [token]
    assert await records.tokens.list(theirs) == []
    assert await records.tokens.find(theirs, token.prefix) is None
    assert not await records.tokens.delete(theirs, token.prefix)
    await records.tokens.touch_of_any_tenant({token.prefix: 5, "pds_00000002": 5})
    found = await records.tokens.by_prefix_of_any_tenant(token.prefix)
    assert found is not None
    assert found.last_used_us == 5
    assert await records.tokens.delete(ours, token.prefix)
    assert not await records.tokens.delete(ours, token.prefix)


async def test_many_writers_take_turns(records: Store, ours: TenantId) -> None:
    rows = [row(ours) for _ in range(60)]
    await asyncio.gather(*(records.sandboxes.insert(ours, one) for one in rows))
    assert await records.sandboxes.count_by_status() == {"creating": 60}
    assert await records.sandboxes.ids_of_any_tenant() == {one.id for one in rows}


async def test_sqlite_is_set_up_to_survive_a_power_cut(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    async with store.opened(path) as records:
        database = records.tenants._database
        async with database.write() as connection:
            assert (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar() == "wal"
            assert (await connection.exec_driver_sql("PRAGMA synchronous")).scalar() == 2
            # The writer has the lock from its first statement on, so another one is turned away, not half let in.
            with closing(sqlite3.connect(path, timeout=0)) as other, pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
        async with database.read() as connection:
            with pytest.raises(Exception, match="readonly"):
                await connection.exec_driver_sql("DELETE FROM tenants")
