"""Points that sandboxes take by themselves, the way back to one, and what is left when a step fails or the process dies."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pandastack.control.checkpoints import label_of
from pandastack.control.fake_host import FakeHost
from pandastack.errors import CapacityError, DiskFull, HookFailed, RuntimeFailed
from pandastack.wire.ids import SandboxId, SnapshotId, new_snapshot_id
from pandastack.wire.processes import ExecRequest

from .test_restart import Steps
from .test_snapshots import QUIET, rows, take
from .world import World, copy_database, eventually, until, world

pytestmark = pytest.mark.anyio
EVERY = {"checkpoints": {"every_execs": 1}}


async def history(w: World, sandbox: str) -> list[dict[str, Any]]:
    answer = await w.ours.get(f"/v1/sandboxes/{sandbox}/history")
    assert answer.status_code == 200, answer.text
    return list(answer.json()["points"])


async def points(w: World, sandbox: str, count: int) -> list[dict[str, Any]]:
    async def there() -> list[dict[str, Any]] | None:
        found = await history(w, sandbox)
        return found if len(found) == count else None

    found: list[dict[str, Any]] = await eventually(there)
    return found


async def execute(w: World, sandbox: str, cmd: str = "echo hi") -> None:
    answer = await w.ours.post(f"/v1/sandboxes/{sandbox}/exec", json={"cmd": cmd})
    assert answer.status_code == 200, answer.text


async def policy(w: World, sandbox: str) -> Any:
    return (await w.ours.get(f"/v1/sandboxes/{sandbox}/lifecycle")).json()["checkpoints"]


async def set_policy(w: World, sandbox: str, value: Any) -> Any:
    answer = await w.ours.patch(f"/v1/sandboxes/{sandbox}/lifecycle", json={"checkpoints": value})
    assert answer.status_code == 200, answer.text
    return answer.json()["checkpoints"]


async def restore(w: World, sandbox: str, point: str, **body: Any) -> Any:
    return await w.ours.post(f"/v1/sandboxes/{sandbox}/restore", json={"point": point, **body})


async def put(w: World, sandbox: str, text: str) -> None:
    assert (await w.ours.put(f"/v1/sandboxes/{sandbox}/fs?path=/tmp/f", content=text.encode())).status_code == 200


async def text(w: World, sandbox: str) -> str:
    return (await w.ours.get(f"/v1/sandboxes/{sandbox}/fs?path=/tmp/f")).text


# The policy


@pytest.mark.parametrize(
    "wrong",
    [{}, {"every_execs": 1, "every_seconds": 5}, {"every_execs": 0}, {"every_seconds": 4}, {"every_execs": 1, "keep": 501}, "on", 3],
)
async def test_a_policy_has_one_trigger_and_bounds(w: World, wrong: Any) -> None:
    sandbox = await w.sandbox()
    for answer in (
        await w.ours.patch(f"/v1/sandboxes/{sandbox}/lifecycle", json={"checkpoints": wrong}),
        await w.ours.post("/v1/sandboxes", json={"checkpoints": wrong}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
    assert await policy(w, sandbox) is None


async def test_a_policy_is_set_shown_and_ended_and_a_child_has_none(w: World) -> None:
    sandbox = await w.sandbox(checkpoints={"every_seconds": 60, "keep": 5})
    shown = {"every_execs": None, "every_seconds": 60, "keep": 5, "max_mb": 4096, "points": 0, "size_bytes": 0, "last_error": None}
    assert await policy(w, sandbox) == shown
    await w.ours.patch(f"/v1/sandboxes/{sandbox}/lifecycle", json={"ttl_seconds": 60, "checkpoints": None})
    assert await policy(w, sandbox) == shown
    child = (await w.ours.post(f"/v1/sandboxes/{sandbox}/fork", json={})).json()["sandbox"]["id"]
    assert await policy(w, child) is None
    assert (await set_policy(w, sandbox, {"every_execs": 3}))["every_execs"] == 3
    assert await set_policy(w, sandbox, "off") is None


def test_a_label_is_one_line_and_short() -> None:
    assert label_of(ExecRequest(cmd="a\n b")) == "a b"
    assert label_of(ExecRequest(argv=["a", "b c"])) == "a 'b c'"
    assert label_of(ExecRequest(code="x" * 1000)) == "x" * 200


# After commands


async def test_every_nth_command_leaves_a_point(w: World) -> None:
    sandbox = await w.sandbox(checkpoints={"every_execs": 2})
    for number in range(4):
        await execute(w, sandbox, f"echo {number}")
    found = await points(w, sandbox, 2)
    assert [(point["cause"], point["label"], point["status"]) for point in found] == [
        ("checkpoint", "echo 3", "durable"),
        ("checkpoint", "echo 1", "durable"),
    ]
    assert (await w.ours.get("/v1/snapshots")).json() == {"snapshots": []}
    listed = (await w.ours.get("/v1/snapshots", params={"automatic": "true"})).json()["snapshots"]
    assert [point["id"] for point in listed] == [point["id"] for point in found]
    assert "verify" not in w.host.calls


async def test_streams_and_processes_count_once_when_their_end_is_seen(w: World) -> None:
    sandbox = await w.sandbox(**EVERY)
    await w.ours.post(f"/v1/sandboxes/{sandbox}/exec/stream", json={"cmd": "echo streamed"})
    await points(w, sandbox, 1)
    await w.ours.post(f"/v1/sandboxes/{sandbox}/processes", json={"cmd": "echo started", "id": "p1"})
    assert len(await history(w, sandbox)) == 1
    for _ in range(2):
        await w.ours.get(f"/v1/sandboxes/{sandbox}/processes/p1/stream")
        await w.ours.get(f"/v1/sandboxes/{sandbox}/processes/p1")
    assert [point["label"] for point in await points(w, sandbox, 2)] == ["echo started", "echo streamed"]


async def test_what_changes_something_waits_for_the_point_and_what_looks_does_not(w: World) -> None:
    sandbox = await w.sandbox(**EVERY)
    saving = w.host.hold("snapshot")
    await execute(w, sandbox, "echo first")
    await until(lambda: w.host.calls.get("snapshot"))
    asking = asyncio.create_task(execute(w, sandbox, "echo second"))
    writing = asyncio.create_task(put(w, sandbox, "x"))
    assert (await w.ours.get(f"/v1/sandboxes/{sandbox}/processes")).status_code == 200
    await asyncio.sleep(0.05)
    assert (w.host.calls["run"], w.host.calls.get("write_file")) == (1, None)
    saving.set()
    await asyncio.gather(asking, writing)
    assert [point["label"] for point in await points(w, sandbox, 2)] == ["echo second", "echo first"]


@pytest.mark.parametrize("error", [DiskFull("full"), HookFailed("not now"), RuntimeFailed("no"), ValueError("secret")])
async def test_a_checkpoint_that_fails_fails_no_command_and_is_not_tried_again_at_once(w: World, error: Exception) -> None:
    sandbox = await w.sandbox(**EVERY)
    w.host.fail("snapshot", error)
    await execute(w, sandbox)

    async def told() -> Any:
        return (await policy(w, sandbox))["last_error"]

    assert str(error) in await eventually(told) or isinstance(error, ValueError)
    assert "secret" not in await told()
    await execute(w, sandbox)
    assert w.host.calls["snapshot"] == 1
    assert await rows(w.parts.store) == []
    # A policy that is set anew is a new beginning.
    await set_policy(w, sandbox, {"every_execs": 1})
    await execute(w, sandbox)
    await points(w, sandbox, 1)
    assert await told() is None


# By time


async def test_points_by_time_only_of_what_runs_and_was_busy(database: Path) -> None:
    async with world(database, checkpoint_interval_s=0.02) as w:
        busy, asleep = [await w.sandbox(checkpoints={"every_seconds": 5}) for _ in range(2)]
        await w.ours.post(f"/v1/sandboxes/{asleep}/hibernate")
        tracks = w.parts.checkpoints._tracks
        await until(lambda: SandboxId(busy) in tracks)

        async def time_passes() -> None:
            for track in tracks.values():
                track.due = 0.0
            await asyncio.sleep(0.1)

        await time_passes()
        await points(w, busy, 1)
        w.host.set_idle(SandboxId(busy), 1000)
        await time_passes()
        assert len(await history(w, busy)) == 1
        w.host.set_idle(SandboxId(busy), 0)
        await time_passes()
        await points(w, busy, 2)
        assert await history(w, asleep) == []
        assert not w.host.wakes


# Before memory runs out


async def test_what_must_not_be_lost_is_saved_when_memory_is_nearly_full(w: World) -> None:
    persistent, policed = await w.sandbox(persistent=True), await w.sandbox(checkpoints={"every_execs": 5})
    other, asleep = await w.sandbox(), await w.sandbox(persistent=True)
    await w.ours.post(f"/v1/sandboxes/{asleep}/hibernate")
    for sandbox in (other, asleep, persistent, policed):
        w.host.press_sandbox(SandboxId(sandbox))
    for sandbox in (persistent, policed):
        (point,) = await points(w, sandbox, 1)
        assert (point["cause"], point["label"], point["status"]) == ("pressure", "", "durable")
    assert (await history(w, other), await history(w, asleep)) == ([], [])
    # It comes too late for this one, and from there it is brought back.
    w.host.break_sandbox(SandboxId(persistent), "oom")

    async def failed() -> bool:
        return await w.status(persistent) == ("failed", "oom")

    await eventually(failed)
    body = (await restore(w, persistent, (await history(w, persistent))[0]["id"])).json()
    assert (body["status"], body["undo_point"]) == ("running", None)


async def test_without_room_nothing_is_saved_and_it_is_told(w: World) -> None:
    sandbox = await w.sandbox(persistent=True)
    w.host.fail("snapshot", DiskFull("no room"))
    w.host.press_sandbox(SandboxId(sandbox))

    async def tried() -> bool:
        return w.host.calls.get("snapshot", 0) > 0

    await eventually(tried)
    w.host.press_sandbox(SandboxId(sandbox))
    await asyncio.sleep(0.1)
    assert w.host.calls["snapshot"] == 1, "not again at once"
    assert await history(w, sandbox) == []
    assert await w.status(sandbox) == ("running", None)


async def test_pressure_during_a_capture_is_not_forgotten_and_swinging_is_no_flood(w: World) -> None:
    sandbox = await w.sandbox(persistent=True, checkpoints={"every_execs": 1})
    going_on = w.host.hold("snapshot")
    await execute(w, sandbox)
    await until(lambda: w.host.calls.get("snapshot", 0) == 1)
    w.host.press_sandbox(SandboxId(sandbox))
    await asyncio.sleep(0.05)
    going_on.set()
    found = await points(w, sandbox, 2)
    assert [point["cause"] for point in found] == ["pressure", "checkpoint"]
    for _ in range(5):
        w.host.press_sandbox(SandboxId(sandbox))
        await asyncio.sleep(0.02)
    assert len(await history(w, sandbox)) == 2


# Bounds and the end


async def test_a_point_that_is_being_read_is_not_thinned_out(w: World) -> None:
    sandbox = await w.sandbox(checkpoints={"every_execs": 1, "keep": 1})
    await execute(w, sandbox, "echo first")
    (first,) = await points(w, sandbox, 1)
    made = w.host.calls["create"]
    going_on = w.host.hold("create")
    making = asyncio.create_task(w.ours.post("/v1/sandboxes", json={"from_snapshot": first["id"]}))
    await until(lambda: w.host.calls["create"] > made)
    await execute(w, sandbox, "echo second")
    await points(w, sandbox, 2)
    await asyncio.sleep(0.2)
    assert first["id"] in [point["id"] for point in await history(w, sandbox)]
    going_on.set()
    assert (await making).status_code == 201


async def test_quotas_hold_for_restores_too(database: Path) -> None:
    async with world(database, quota_sandboxes=1, quota_snapshots=1) as w:
        sandbox = await w.sandbox()
        point = await take(w, sandbox)
        refused = await restore(w, sandbox, point)
        assert (refused.status_code, refused.json()["code"]) == (403, "quota_exceeded")
        assert "undo" in refused.json()["hint"]
        assert (await restore(w, sandbox, point, undo=False)).status_code == 200
        w.host.break_sandbox(SandboxId(sandbox), "oom")

        async def failed() -> bool:
            return (await w.status(sandbox))[0] == "failed"

        await eventually(failed)
        other = await w.sandbox()
        refused = await restore(w, sandbox, point)
        assert (refused.status_code, refused.json()["code"]) == (403, "quota_exceeded")
        await w.ours.delete(f"/v1/sandboxes/{other}")
        assert (await restore(w, sandbox, point)).status_code == 200


async def test_they_are_thinned_out_and_what_was_asked_for_stays(w: World) -> None:
    sandbox = await w.sandbox(checkpoints={"every_execs": 1, "keep": 2})
    mine = await take(w, sandbox)
    for number in range(5):
        await execute(w, sandbox, f"echo {number}")
    await points(w, sandbox, 3)

    async def last() -> bool:
        return [point["label"] for point in await history(w, sandbox)] == ["echo 4", "echo 0", ""]

    await eventually(last)
    await until(lambda: len(w.host.snapshots) == 3)
    await set_policy(w, sandbox, {"every_execs": 1, "max_mb": 1})
    assert [point["label"] for point in await points(w, sandbox, 2)] == ["echo 4", ""]
    assert SnapshotId(mine) in w.host.snapshots


async def test_they_end_with_their_sandbox(w: World) -> None:
    sandbox = await w.sandbox(**EVERY)
    mine = await take(w, sandbox)
    await execute(w, sandbox)
    await points(w, sandbox, 2)
    w.host.fail("delete_snapshot", OSError("away"))
    assert (await w.ours.delete(f"/v1/sandboxes/{sandbox}")).status_code == 500
    assert (await w.status(sandbox))[0] == "deleting"
    await w.parts.reconciler.sweep()
    assert set(w.host.snapshots) == {mine}
    assert [row.id for row in await rows(w.parts.store)] == [mine]
    assert (await w.ours.get(f"/v1/sandboxes/{sandbox}/history")).status_code == 404


async def test_one_that_is_being_taken_when_its_sandbox_is_deleted_leaves_nothing(w: World) -> None:
    sandbox = await w.sandbox(**EVERY)
    saving = w.host.hold("snapshot")
    await execute(w, sandbox)
    await until(lambda: w.host.calls.get("snapshot"))
    assert (await w.ours.delete(f"/v1/sandboxes/{sandbox}")).status_code == 204
    saving.set()
    await until(lambda: not any(track.job for track in w.parts.checkpoints._tracks.values()))
    await w.parts.reconciler.sweep()
    assert (await rows(w.parts.store), w.host.snapshots) == ([], {})


# Restore


async def test_a_restore_can_be_undone(w: World) -> None:
    sandbox = await w.sandbox(metadata={"a": "b"})
    await put(w, sandbox, "then")
    point = await take(w, sandbox)
    await put(w, sandbox, "later")
    answer = await restore(w, sandbox, point)
    body = answer.json()
    assert (answer.status_code, body["id"], body["status"], body["boot_mode"], body["metadata"]) == (
        200, sandbox, "running", "rewind", {"a": "b"},
    )  # fmt: skip
    assert await text(w, sandbox) == "then"
    undo = body["undo_point"]
    assert [(found["id"], found["cause"]) for found in await history(w, sandbox)] == [(undo, "restore"), (point, "request")]
    assert (await restore(w, sandbox, undo, undo=False)).json()["undo_point"] is None
    assert await text(w, sandbox) == "later"


@pytest.mark.parametrize("verb", ["pause", "hibernate"])
async def test_one_that_does_not_run_is_restored_too(w: World, verb: str) -> None:
    sandbox = await w.sandbox()
    point = await take(w, sandbox)
    await w.ours.post(f"/v1/sandboxes/{sandbox}/{verb}")
    assert (await restore(w, sandbox, point)).json()["undo_point"]
    assert await w.status(sandbox) == ("running", None)


async def test_a_failed_one_comes_back_and_stays(w: World) -> None:
    sandbox = await w.sandbox()
    point = await take(w, sandbox)
    w.host.break_sandbox(SandboxId(sandbox), "oom")

    async def failed() -> bool:
        return await w.status(sandbox) == ("failed", "oom")

    await eventually(failed)
    body = (await restore(w, sandbox, point)).json()
    assert (body["status"], body["status_reason"], body["undo_point"]) == ("running", None, None)
    await w.parts.reconciler.sweep()
    assert await w.status(sandbox) == ("running", None)
    await execute(w, sandbox)
    assert [row.id for row in await rows(w.parts.store)] == [point]


async def test_news_of_a_failure_that_is_over_change_nothing(w: World) -> None:
    """It was restored before its row heard of the failure."""
    sandbox = await w.sandbox()
    point = await take(w, sandbox)
    news = w.host.hold("get")
    w.host.break_sandbox(SandboxId(sandbox), "oom")
    assert (await restore(w, sandbox, point)).json()["undo_point"] is None
    news.set()
    await w.parts.reconciler.sweep()
    await asyncio.sleep(0.05)
    assert await w.status(sandbox) == ("running", None)


@pytest.mark.parametrize("step", ["rewind", "rewind.after"])
@pytest.mark.parametrize(("error", "status"), [(CapacityError("full", retry_after_s=1), 503), (DiskFull("full"), 507), (OSError("x"), 500)])
async def test_a_restore_that_fails_changes_nothing(w: World, step: str, error: Exception, status: int) -> None:
    sandbox = await w.sandbox()
    point = await take(w, sandbox)
    await put(w, sandbox, "later")
    w.host.fail(step, error)
    assert (await restore(w, sandbox, point)).status_code == status
    assert await w.status(sandbox) == ("running", None)
    assert await text(w, sandbox) == "later"
    assert [row.id for row in await rows(w.parts.store)] == [point]


async def test_only_its_own_points_are_taken(w: World) -> None:
    sandbox, other = await w.sandbox(), await w.sandbox()
    foreign = await take(w, other)
    for path, field in (("restore", "point"), ("fork", "at"), ("fork-tree", "at")):
        refused = await w.ours.post(f"/v1/sandboxes/{sandbox}/{path}", json={field: foreign})
        body = refused.json()
        assert (refused.status_code, body["code"], body["field"], body["sandbox_id"]) == (409, "conflict", field, other)
        assert "from_snapshot" in body["hint"]
        for unknown in (str(new_snapshot_id()), "x"):
            answer = await w.ours.post(f"/v1/sandboxes/{sandbox}/{path}", json={field: unknown})
            assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (400, "snapshot_not_found", field)
    assert (await w.theirs.post(f"/v1/sandboxes/{sandbox}/restore", json={"point": foreign})).status_code == 404
    assert (await w.theirs.get(f"/v1/sandboxes/{sandbox}/history")).status_code == 404
    assert (await w.ours.post(f"/v1/sandboxes/{sandbox}/restore", json={})).status_code == 400
    assert not w.host.calls.get("rewind")


async def test_a_crash_at_any_step_of_a_restore_loses_neither(empty_database: Path, tmp_path: Path) -> None:
    for crash_at in range(1, 100):
        host, path = FakeHost(), copy_database(empty_database, tmp_path / f"{crash_at}.db")
        steps = Steps(crash_at)
        async with world(path, host, **QUIET) as w:
            sandbox = await w.sandbox()
            await put(w, sandbox, "then")
            point = await take(w, sandbox)
            await put(w, sandbox, "later")
            await asyncio.sleep(0.02)
            steps.watch(w.host, "rewind", "delete_snapshot", "list_snapshots")
            steps.watch(w.parts.store.snapshots, "insert", "complete", "remove_of_any_tenant")
            steps.watch(w.parts.store.sandboxes, "mark_restored_of_any_tenant")
            told = await restore(w, sandbox, point)
        for name in ("rewind", "delete_snapshot", "list_snapshots"):
            host.__dict__.pop(name, None)
        async with world(path, host, **QUIET) as w:
            assert await w.status(sandbox) == ("running", None)
            found = await history(w, sandbox)
            assert {point["id"] for point in found} == set(host.snapshots)
            if await text(w, sandbox) == "then":
                (undo,) = [point["id"] for point in found if point["cause"] == "restore"]
                await restore(w, sandbox, undo)
                assert await text(w, sandbox) == "later"
            else:
                assert told.status_code != 200
        await host.aclose()
        if not steps.dead:
            assert crash_at > 6
            return
    raise AssertionError("it never ended")


async def test_a_failed_one_that_was_restored_by_a_process_that_died_is_found_running(database: Path) -> None:
    host = FakeHost()
    async with world(database, host, **QUIET) as w:
        sandbox = await w.sandbox()
        point = await take(w, sandbox)
        host.break_sandbox(SandboxId(sandbox), "oom")

        async def failed() -> bool:
            return (await w.status(sandbox))[0] == "failed"

        await eventually(failed)
        steps = Steps(1)
        steps.watch(w.parts.store.sandboxes, "mark_restored_of_any_tenant")
        assert (await restore(w, sandbox, point)).status_code == 500
    async with world(database, host, **QUIET) as w:

        async def running() -> bool:
            return await w.status(sandbox) == ("running", None)

        await eventually(running)
    await host.aclose()


# Fork at a point


async def test_children_of_a_point_and_their_key(w: World) -> None:
    sandbox = await w.sandbox()
    await put(w, sandbox, "then")
    point = await take(w, sandbox)
    await put(w, sandbox, "later")
    await w.ours.post(f"/v1/sandboxes/{sandbox}/hibernate")
    key = {"idempotency-key": "one"}
    made = await w.ours.post(f"/v1/sandboxes/{sandbox}/fork-tree", json={"at": point}, headers=key)
    body = made.json()
    assert (made.status_code, body["snapshot_id"], body["parent_id"], len(body["children"])) == (201, point, sandbox, 2)
    for child in body["children"]:
        assert (child["fork_parent_id"], child["fork_tree_id"]) == (sandbox, body["tree_id"])
        assert await text(w, child["id"]) == "then"
    assert (await w.status(sandbox))[0] == "hibernated"
    assert (await w.ours.post(f"/v1/sandboxes/{sandbox}/fork-tree", json={"at": point}, headers=key)).json() == body
    other = await w.ours.post(f"/v1/sandboxes/{sandbox}/fork-tree", json={}, headers=key)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")


# The key of a snapshot


async def test_a_snapshot_is_taken_once_per_key(w: World) -> None:
    sandbox, other = await w.sandbox(), await w.sandbox()
    key = {"idempotency-key": "one"}
    path = f"/v1/sandboxes/{sandbox}/snapshots"
    w.host.delays_s["snapshot"] = 0.03
    first, second = await asyncio.gather(w.ours.post(path, headers=key), w.ours.post(path, headers=key))
    third = await w.ours.post(path, headers=key)
    assert first.status_code == 201
    assert first.content == second.content == third.content
    assert third.headers["idempotent-replay"] == "true"
    assert len(w.host.snapshots) == 1
    for refused in (
        await w.ours.post(f"/v1/sandboxes/{other}/snapshots", headers=key),
        await w.ours.post("/v1/sandboxes", json={}, headers=key),
    ):
        assert (refused.status_code, refused.json()["code"]) == (409, "idempotency_conflict")
    assert (await w.theirs.post(path, headers=key)).status_code == 404
    # An answer outlives what it names, as that of a create does.
    await w.ours.delete(f"/v1/snapshots/{first.json()['id']}")
    assert (await w.ours.post(path, headers=key)).content == first.content


async def test_a_snapshot_that_failed_frees_its_key(w: World) -> None:
    sandbox, key = await w.sandbox(), {"idempotency-key": "one"}
    w.host.fail("snapshot", DiskFull("full"))
    assert (await w.ours.post(f"/v1/sandboxes/{sandbox}/snapshots", headers=key)).status_code == 507
    assert (await w.ours.post(f"/v1/sandboxes/{sandbox}/snapshots", headers=key)).status_code == 201


async def test_a_key_of_a_capture_that_died_is_free_after_the_restart(database: Path) -> None:
    host, key = FakeHost(), {"idempotency-key": "one"}
    async with world(database, host, shutdown_grace_s=0.01, **QUIET) as w:
        sandbox = await w.sandbox()
        steps = Steps(1)
        steps.watch(w.host, "snapshot", "delete_snapshot")
        assert (await w.ours.post(f"/v1/sandboxes/{sandbox}/snapshots", headers=key)).status_code == 500
        again = await w.ours.post(f"/v1/sandboxes/{sandbox}/snapshots", headers=key)
        assert (again.status_code, again.json()["code"]) == (503, "no_capacity")
    for name in ("snapshot", "delete_snapshot"):
        host.__dict__.pop(name, None)
    async with world(database, host, **QUIET) as w:
        assert (await w.ours.post(f"/v1/sandboxes/{sandbox}/snapshots", headers=key)).status_code == 201
        assert len(host.snapshots) == 1
    await host.aclose()
