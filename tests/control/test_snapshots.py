"""Snapshots: captured, verified, listed, used and deleted; and what is left when a step fails or the process dies."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pandastack.control.fake_host import FakeHost
from pandastack.control.store import Store
from pandastack.errors import CapacityError, DiskFull, GuestError, ObjectStoreUnavailable, RuntimeFailed, SnapshotNotFound, SnapshotUnusable
from pandastack.wire.ids import SandboxId, SnapshotId, new_snapshot_id

from .test_restart import Steps
from .world import World, copy_database, eventually, until, world

pytestmark = pytest.mark.anyio
QUIET: dict[str, Any] = {"expiry_interval_s": 3600, "sweep_interval_s": 3600}


async def take(w: World, sandbox: str) -> str:
    answer = await w.ours.post(f"/v1/sandboxes/{sandbox}/snapshots")
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def is_now(w: World, snapshot: str, status: str, reason: str | None = None) -> None:
    async def there() -> bool:
        body = (await w.ours.get(f"/v1/snapshots/{snapshot}")).json()
        return (body["status"], body["status_reason"]) == (status, reason)

    await eventually(there)


async def rows(records: Store) -> list[Any]:
    return list(await records.snapshots.list_of_any_tenant("capturing", "durable", "verified", "failed", "deleting"))


# Capture and verify


async def test_a_snapshot_is_durable_when_it_is_answered_and_then_verified(w: World) -> None:
    sandbox = await w.sandbox(template="base", memory_mb=700)
    w.host.delays_s["verify"] = 0.03
    answer = await w.ours.post(f"/v1/sandboxes/{sandbox}/snapshots", content=b"", headers={"content-type": "text/plain;charset=UTF-8"})
    body = answer.json()
    assert (answer.status_code, body["sandbox_id"], body["status"]) == (201, sandbox, "durable")
    assert (body["template"], body["memory_mb"], body["size_bytes"], body["runtime"]) == ("base", 700, 1 << 20, "fake")
    assert (body["mem_path"], body["state_path"]) == ("", "")
    assert body["created_at"].endswith("Z")
    assert (await w.ours.get(f"/v1/snapshots/{body['id']}")).json() == body | {"own_bytes": 1 << 20, "shared_bytes": 0, "location": "local"}
    await is_now(w, body["id"], "verified")
    assert w.host.calls["verify"] == 1
    assert await w.status(sandbox) == ("running", None)


async def test_an_offloaded_snapshot_says_where_it_is_and_what_is_left_here(w: World) -> None:
    sandbox = await w.sandbox(template="base")
    made = (await w.ours.post(f"/v1/sandboxes/{sandbox}/snapshots")).json()["id"]
    answer = await w.ours.post(f"/v1/snapshots/{made}/offload")
    assert (answer.status_code, answer.json()["location"], answer.json()["own_bytes"]) == (200, "store", 0)
    assert answer.json()["size_bytes"] == 1 << 20, "what it takes in all is what counts"
    assert (await w.ours.get(f"/v1/snapshots/{made}")).json()["location"] == "store"
    assert (await w.theirs.post(f"/v1/snapshots/{made}/offload")).status_code == 404
    w.host.fail("offload", ObjectStoreUnavailable("the object store did not answer in time", reason="timeout"))
    refused = await w.ours.post(f"/v1/snapshots/{made}/offload")
    assert (refused.status_code, refused.json()["code"]) == (503, "object_store_unavailable")
    await w.ours.delete(f"/v1/snapshots/{made}")
    assert (await w.ours.post(f"/v1/snapshots/{made}/offload")).status_code == 404


async def test_snapshots_are_listed_newest_first_and_outlive_their_sandbox(w: World) -> None:
    one, two = await w.sandbox(), await w.sandbox()
    made = [await take(w, sandbox) for sandbox in (one, two, one)]
    await w.ours.delete(f"/v1/sandboxes/{one}")
    listed = (await w.ours.get("/v1/snapshots")).json()
    assert [found["id"] for found in listed["snapshots"]] == made[::-1]
    of_one = (await w.ours.get("/v1/snapshots", params={"sandbox_id": one})).json()
    assert [found["id"] for found in of_one["snapshots"]] == [made[2], made[0]]
    assert (await w.ours.get("/v1/snapshots", params={"sandbox_id": "none"})).json() == {"snapshots": []}


@pytest.mark.parametrize("verb", ["pause", "hibernate"])
async def test_a_snapshot_wakes_nothing(w: World, verb: str) -> None:
    sandbox = await w.sandbox()
    await w.ours.post(f"/v1/sandboxes/{sandbox}/{verb}")
    before = await w.status(sandbox)
    await take(w, sandbox)
    assert await w.status(sandbox) == before
    assert not w.host.wakes


@pytest.mark.parametrize("step", ["snapshot", "snapshot.after"])
@pytest.mark.parametrize(
    ("error", "status"), [(DiskFull("full"), 507), (GuestError("refused"), 502), (RuntimeFailed("no"), 500), (ValueError("secret"), 500)]
)
async def test_a_failed_capture_leaves_nothing(w: World, error: Exception, status: int, step: str) -> None:
    sandbox = await w.sandbox()
    w.host.fail(step, error)
    answer = await w.ours.post(f"/v1/sandboxes/{sandbox}/snapshots")
    assert answer.status_code == status
    assert "secret" not in answer.text
    assert await rows(w.parts.store) == []
    assert not w.host.snapshots
    assert await w.status(sandbox) == ("running", None)


async def test_what_is_being_captured_is_not_listed_and_not_deleted(w: World) -> None:
    sandbox = await w.sandbox()
    captured = w.host.hold("snapshot")
    asking = asyncio.create_task(w.ours.post(f"/v1/sandboxes/{sandbox}/snapshots"))
    await until(lambda: w.host.calls.get("snapshot"))
    (row,) = await rows(w.parts.store)
    assert (await w.ours.get("/v1/snapshots")).json() == {"snapshots": []}
    assert (await w.ours.get(f"/v1/snapshots/{row.id}")).json()["status"] == "capturing"
    refused = await w.ours.delete(f"/v1/snapshots/{row.id}")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    early = await w.ours.post("/v1/sandboxes", json={"from_snapshot": row.id})
    assert (early.status_code, early.json()["reason"]) == (409, "unfinished")
    await w.parts.reconciler.sweep()
    captured.set()
    assert (await asking).status_code == 201
    assert (await w.ours.delete(f"/v1/snapshots/{row.id}")).status_code == 204


async def test_a_capture_is_finished_though_its_client_left(w: World) -> None:
    sandbox = await w.sandbox()
    w.host.delays_s["snapshot"] = 0.03
    asking = asyncio.create_task(w.ours.post(f"/v1/sandboxes/{sandbox}/snapshots"))
    await until(lambda: w.host.calls.get("snapshot"))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)

    async def there() -> Any:
        return (await w.ours.get("/v1/snapshots")).json()["snapshots"]

    assert len(await eventually(there)) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SnapshotUnusable("cut", reason="truncated"), "truncated"),
        (RuntimeFailed("no"), "runtime_failed"),
        (GuestError("no"), "guest_error"),
        (SnapshotNotFound("none"), "missing"),
    ],
)
async def test_one_that_does_not_restore_is_failed_and_can_not_be_used(w: World, error: Exception, reason: str) -> None:
    sandbox = await w.sandbox()
    w.host.fail("verify", error)
    snapshot = await take(w, sandbox)
    await is_now(w, snapshot, "failed", reason)
    answer = await w.ours.post("/v1/sandboxes", json={"from_snapshot": snapshot})
    body = answer.json()
    assert (answer.status_code, body["code"], body["field"], body["reason"]) == (409, "snapshot_unusable", "from_snapshot", reason)
    assert [found["status"] for found in (await w.ours.get("/v1/snapshots")).json()["snapshots"]] == ["failed"]
    assert (await w.ours.delete(f"/v1/snapshots/{snapshot}")).status_code == 204


@pytest.mark.parametrize("error", [CapacityError("full", retry_after_s=1), DiskFull("full"), OSError("away")])
async def test_a_machine_that_can_not_verify_now_does_so_later(database: Path, error: Exception) -> None:
    async with world(database, sweep_interval_s=0.05) as w:
        w.host.fail("verify", error)
        snapshot = await take(w, await w.sandbox())
        await is_now(w, snapshot, "verified")
        assert w.host.calls["verify"] == 2


async def test_a_verification_is_bounded_and_says_nothing_about_the_snapshot_when_it_is_slow(database: Path) -> None:
    async with world(database, state_timeout_s=0.02, **QUIET) as w:
        w.host.delays_s["verify"] = 5
        snapshot = await take(w, await w.sandbox())
        await until(lambda: w.parts.meters.registry.get_sample_value("pandastack_snapshot_verifications_total", {"outcome": "later"}))
        await is_now(w, snapshot, "durable")


async def test_one_that_was_not_verified_is_after_a_restart(database: Path) -> None:
    host = FakeHost()
    async with world(database, host, **QUIET) as w:
        host.delays_s["verify"] = 60
        snapshot = await take(w, await w.sandbox())
        await until(lambda: host.calls.get("verify"))
    host.delays_s.clear()
    async with world(database, host, **QUIET) as w:
        await is_now(w, snapshot, "verified")


# Tenants


async def test_another_tenants_snapshot_looks_like_an_unknown_one(w: World) -> None:
    snapshot = await take(w, await w.sandbox())
    unknown = str(new_snapshot_id())
    for ask in (w.theirs.get, w.theirs.delete):
        one, two = await ask(f"/v1/snapshots/{snapshot}"), await ask(f"/v1/snapshots/{unknown}")
        assert one.status_code == two.status_code == 404
        assert one.json()["code"] == two.json()["code"] == "snapshot_not_found"
        assert one.json()["error"] == two.json()["error"]
    for name in (snapshot, unknown, "x", snapshot.upper()):
        answer = await w.theirs.post("/v1/sandboxes", json={"from_snapshot": name})
        body = answer.json()
        assert (answer.status_code, body["code"], body["field"]) == (400, "snapshot_not_found", "from_snapshot")
    assert (await w.theirs.get("/v1/snapshots")).json() == {"snapshots": []}
    assert SnapshotId(snapshot) in w.host.snapshots


# Delete


async def test_a_delete_is_final_and_a_failed_one_can_be_repeated(w: World) -> None:
    sandbox = await w.sandbox()
    snapshot = await take(w, sandbox)
    w.host.fail("delete_snapshot", RuntimeFailed("busy"))
    assert (await w.ours.delete(f"/v1/snapshots/{snapshot}")).status_code == 500
    assert (await w.ours.get(f"/v1/snapshots/{snapshot}")).status_code == 404
    assert (await w.ours.get("/v1/snapshots")).json() == {"snapshots": []}
    assert (await w.ours.post("/v1/sandboxes", json={"from_snapshot": snapshot})).status_code == 400
    assert (await w.ours.delete(f"/v1/snapshots/{snapshot}")).status_code == 204
    assert (await w.ours.delete(f"/v1/snapshots/{snapshot}")).status_code == 404
    assert not w.host.snapshots


async def test_sandboxes_made_from_a_deleted_snapshot_stay(w: World) -> None:
    snapshot = await take(w, await w.sandbox())
    made = await w.sandbox(from_snapshot=snapshot)
    assert (await w.ours.delete(f"/v1/snapshots/{snapshot}")).status_code == 204
    assert (await w.ours.get(f"/v1/sandboxes/{made}")).json()["from_snapshot"] == snapshot


# Create from


async def test_a_sandbox_from_a_snapshot_has_its_files_template_and_limits(w: World) -> None:
    sandbox = await w.sandbox(template="base", memory_mb=700, disk_mb=3000, cpu=2)
    await w.ours.put(f"/v1/sandboxes/{sandbox}/fs?path=/tmp/f", content=b"then")
    snapshot = await take(w, sandbox)
    await w.ours.put(f"/v1/sandboxes/{sandbox}/fs?path=/tmp/f", content=b"later")
    # Clients always send a template; the snapshot's wins, also over one that is not there.
    for body in ({}, {"template": "code-interpreter"}, {"template": "no-such"}):
        answer = await w.ours.post("/v1/sandboxes", json={"from_snapshot": snapshot, **body})
        made = answer.json()
        assert answer.status_code == 201, answer.text
        assert (made["template"], made["from_snapshot"], made["status"]) == ("base", snapshot, "running")
        assert (made["memory_mb"], made["disk_mb"], made["cpu"]) == (700, 3000, 2)
        assert (await w.ours.get(f"/v1/sandboxes/{made['id']}")).json() == made
        assert (await w.ours.get(f"/v1/sandboxes/{made['id']}/fs?path=/tmp/f")).content == b"then"
    larger = (await w.ours.post("/v1/sandboxes", json={"from_snapshot": snapshot, "memory_mb": 800})).json()
    assert larger["memory_mb"] == 800


@pytest.mark.parametrize("field", ["memory_mb", "disk_mb"])
async def test_less_than_the_snapshot_needs_is_refused(w: World, field: str) -> None:
    snapshot = await take(w, await w.sandbox(memory_mb=700, disk_mb=700))
    answer = await w.ours.post("/v1/sandboxes", json={"from_snapshot": snapshot, field: 699})
    assert (answer.status_code, answer.json()["field"], answer.json()["minimum"]) == (400, field, 700)


async def test_a_snapshot_deleted_while_it_is_used_is_the_requests_mistake(w: World) -> None:
    snapshot = await take(w, await w.sandbox())
    w.host.snapshots.clear()
    answer = await w.ours.post("/v1/sandboxes", json={"from_snapshot": snapshot})
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (400, "snapshot_not_found", "from_snapshot")
    assert len((await w.ours.get("/v1/sandboxes")).json()) == 1


async def test_a_snapshot_of_another_machine_is_not_tried(database: Path) -> None:
    host = FakeHost()
    async with world(database, host, **QUIET) as w:
        snapshot = await take(w, await w.sandbox())
        creates = host.calls["create"]
        database_rows = w.parts.store.snapshots
        row = (await rows(w.parts.store))[0]
        await database_rows.remove_of_any_tenant(row.id)
        await database_rows.insert(row.tenant_id, type(row)(**{**vars(row), "host_id": "elsewhere"}))
        answer = await w.ours.post("/v1/sandboxes", json={"from_snapshot": snapshot})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert host.calls["create"] == creates


# The sweep, and crashes


async def test_the_sweep_makes_snapshots_and_host_agree(database: Path) -> None:
    host = FakeHost()
    async with world(database, host, **QUIET) as w:
        sandbox = await w.sandbox()
        lost, kept = await take(w, sandbox), await take(w, sandbox)
        for snapshot in (lost, kept):
            await is_now(w, snapshot, "verified")
        orphan = new_snapshot_id()
        await host.snapshot(SandboxId(sandbox), orphan)
        del host.snapshots[SnapshotId(lost)]
        await w.parts.reconciler.sweep()
        assert set(host.snapshots) == {kept}
        await is_now(w, lost, "failed", "missing")
        await is_now(w, kept, "verified")


class Watched:
    """A capture, then a delete, in a process that dies at the n-th effect."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    async def begin(self, w: World) -> None:
        await asyncio.sleep(0.02)
        self.steps.watch(w.host, "snapshot", "delete_snapshot")
        self.steps.watch(w.parts.store.creates, "begin", "complete_snapshot")
        self.steps.watch(w.parts.store.snapshots, "mark_deleting", "remove_of_any_tenant")


@pytest.mark.parametrize("verb", ["capture", "delete"])
async def test_a_crash_at_any_step_leaves_a_whole_snapshot_or_none(empty_database: Path, tmp_path: Path, verb: str) -> None:
    for crash_at in range(1, 100):
        host, path = FakeHost(), copy_database(empty_database, tmp_path / f"{crash_at}.db")
        steps = Steps(crash_at)
        async with world(path, host, **QUIET) as w:
            sandbox = await w.sandbox()
            first = await take(w, sandbox)
            await Watched(steps).begin(w)
            if verb == "capture":
                told = await w.ours.post(f"/v1/sandboxes/{sandbox}/snapshots")
            else:
                told = await w.ours.delete(f"/v1/snapshots/{first}")
        for name in ("snapshot", "delete_snapshot"):
            host.__dict__.pop(name, None)
        async with world(path, host, **QUIET) as w:
            left = {found["id"] for found in (await w.ours.get("/v1/snapshots")).json()["snapshots"]}
            assert left == set(host.snapshots) == {row.id for row in await rows(w.parts.store)}
            if verb == "capture":
                # One that was complete when the process died stays: nobody was told of it, but it is listed.
                assert first in left
                assert len(left) <= 2
                assert told.status_code != 201 or told.json()["id"] in left
            elif told.status_code == 204:
                assert left == set()
        if not steps.dead:
            assert crash_at > 4
            return
    raise AssertionError("it never ran to its end")
