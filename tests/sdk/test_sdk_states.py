"""Pause, hibernate, snapshots and forks: what goes over the wire, and how answers of every age are read."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from pandastack import errors
from pandastack.sdk.client import Client
from pandastack.sdk.sandboxes import Sandbox
from pandastack.sdk.testing import MemoryTransport, answer, broken
from pandastack.wire.sandboxes import SandboxView

from .world import World

CHILD = {"id": "c1", "template": "base", "status": "running", "memory_mb": 256, "metadata": {"fork_tree_id": "t1"}}


def using(*replies: Any, **options: Any) -> tuple[Sandbox, MemoryTransport]:
    left = iter(replies)

    def handle(request: Any) -> Any:
        reply = next(left)
        if isinstance(reply, Exception):
            raise reply
        return reply

    transport = MemoryTransport(handle)
    return Sandbox(Client("http://api", "key", transport=transport, **options), SandboxView(id="s1", status="running")), transport


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pandastack.sdk.client.time.sleep", lambda _: None)


@pytest.mark.parametrize(
    ("verb", "reply", "status"),
    [
        ("hibernate", answer({"status": "hibernated"}), "hibernated"),
        ("wake", answer({"status": "running"}), "running"),
        ("wake", answer(status=204), "running"),
    ],
)
def test_the_status_follows_hibernate_and_wake(verb: str, reply: Any, status: str) -> None:
    sandbox, transport = using(broken(), reply)
    assert getattr(sandbox, verb)() is None
    assert sandbox.status == status
    assert sandbox.status_reason == (None if status == "running" else "request")
    # The state is named, not a step, so a lost answer is asked for again; nothing is in the body.
    assert [(request.method, request.path, request.body) for request in transport.requests] == [("POST", f"/sandboxes/s1/{verb}", None)] * 2


@pytest.mark.parametrize(("verb", "status"), [("pause", "paused"), ("pause", "hibernated"), ("resume", "running")])
def test_what_a_pause_led_to_is_asked_for(verb: str, status: str) -> None:
    sandbox, transport = using(broken(), answer(status=204), answer({"id": "s1", "status": status}))
    assert getattr(sandbox, verb)() is None
    assert sandbox.status == status
    assert [request.path for request in transport.requests] == [f"/sandboxes/s1/{verb}"] * 2 + ["/sandboxes/s1"]


def test_a_failed_change_leaves_the_status() -> None:
    sandbox, _ = using(answer({"error": "it failed", "code": "sandbox_not_running", "status_reason": "oom"}, 409))
    with pytest.raises(errors.SandboxNotRunning):
        sandbox.pause()
    assert sandbox.status == "running"


def test_a_snapshot_waits_for_ten_minutes_and_a_lost_answer_is_asked_for_again_with_the_same_key() -> None:
    sandbox, transport = using(answer({"id": "snap1", "sandbox_id": "s1"}, 201), broken(), answer({"snapshot_id": "snap2"}))
    assert (sandbox.snapshot(idempotency_key="mine"), sandbox.snapshot()) == ("snap1", "snap2")
    assert transport.requests[0].read_s == 600
    keys = [request.headers["idempotency-key"] for request in transport.requests]
    assert (keys[0], keys[1] == keys[2], keys[1] != "mine") == ("mine", True, True)


def test_checkpoints_are_part_of_the_lifecycle() -> None:
    policy = {"every_execs": 2, "every_seconds": None, "keep": 5, "max_mb": 4096, "points": 0, "size_bytes": 0, "last_error": None}
    said = {"ttl_seconds": 60, "persistent": False, "idle_seconds": 0}
    sandbox, transport = using(answer({**said, "checkpoints": policy}), answer(said))
    assert sandbox.checkpoints(every_execs=2, keep=5)["checkpoints"] == policy
    assert sandbox.checkpoints(off=True)["checkpoints"] is None
    assert [json.loads(body) for body in transport.bodies] == [{"checkpoints": {"every_execs": 2, "keep": 5}}, {"checkpoints": "off"}]


@pytest.mark.parametrize(
    "given", [{}, {"every_execs": 1, "every_seconds": 5}, {"every_seconds": 4}, {"keep": 3}, {"off": True, "keep": 3}, {"every_execs": 0}]
)
def test_a_policy_that_says_nothing_or_two_things_is_not_sent(given: dict[str, Any]) -> None:
    sandbox, transport = using()
    with pytest.raises(errors.InvalidRequest):
        sandbox.checkpoints(**given)
    assert transport.requests == []


def test_history_and_restore() -> None:
    point = {"id": "p1", "sandbox_id": "s1", "cause": "checkpoint", "label": "make"}
    done = {"id": "s1", "status": "running", "boot_mode": "rewind", "undo_point": "p2"}
    sandbox, transport = using(answer({"points": [point]}), answer(done), answer({**done, "undo_point": None}), broken())
    (found,) = sandbox.history(1)
    assert (found.id, found.cause, found.label) == ("p1", "checkpoint", "make")
    sandbox.status = "failed"
    assert sandbox.restore(found) == "p2"
    assert (sandbox.status, sandbox.boot_mode) == ("running", "rewind")
    assert sandbox.restore("p2", undo=False) is None
    with pytest.raises(errors.APIConnectionError):
        sandbox.restore("p1")
    assert [request.path for request in transport.requests] == ["/sandboxes/s1/history?limit=1", *["/sandboxes/s1/restore"] * 3]
    assert [json.loads(body) for body in transport.bodies[1:]] == [{"point": "p1"}, {"point": "p2", "undo": False}, {"point": "p1"}]


def test_a_fork_at_a_point() -> None:
    sandbox, transport = using(answer({"children": [CHILD]}, 201), answer({"children": [CHILD, {**CHILD, "id": "c2"}]}, 201))
    assert sandbox.fork_at("p1").id == "c1"
    assert [child.id for child in sandbox.fork_at("p1", {"a": "b"}, count=2)] == ["c1", "c2"]
    assert [json.loads(body) for body in transport.bodies] == [
        {"count": 1, "at": "p1"},
        {"count": 2, "metadata": {"a": "b"}, "at": "p1"},
    ]
    with pytest.raises(errors.InvalidRequest, match="count"):
        sandbox.fork_at("p1", count=0)


def test_keep_awake_is_a_lifecycle() -> None:
    sandbox, transport = using(
        answer({"ttl_seconds": 60, "persistent": False, "idle_seconds": 0, "keep_awake_until": "2030-01-01T00:00:00Z"})
    )
    assert sandbox.keep_awake(90)["keep_awake_until"] == "2030-01-01T00:00:00Z"
    assert json.loads(transport.bodies[0]) == {"keep_awake_seconds": 90}


@pytest.mark.parametrize(
    "reply",
    [
        {"sandbox": CHILD, "children": [CHILD], "tree_id": "t1", "parent_id": "s1", "snapshot_id": "n", "at": "now"},
        {"sandbox": CHILD},
        {"children": [CHILD]},
        {"sandbox": CHILD, "children": ["c1"], "tree_id": "t1"},
        CHILD,
        [CHILD],
    ],
)
def test_every_shape_of_answer_to_a_fork_gives_the_child(reply: Any) -> None:
    sandbox, transport = using(answer(reply, 201))
    child = sandbox.fork({"a": "b"})
    assert (child.id, child.template, child.memory_mb, child.fork_parent_id, child.fork_tree_id) == ("c1", "base", 256, "s1", "t1")
    assert child.metadata["fork_parent_id"] == "s1"
    assert (transport.requests[0].path, json.loads(transport.bodies[0])) == ("/sandboxes/s1/fork", {"metadata": {"a": "b"}})


def test_children_that_are_only_ids_are_sandboxes_too() -> None:
    sandbox, _ = using(answer({"tree_id": "t9", "children": ["c1", "c2"]}, 201), answer("c3", 201))
    children = sandbox.fork_tree(2)
    assert [(child.id, child.status, child.fork_tree_id) for child in children] == [("c1", "running", "t9"), ("c2", "running", "t9")]
    assert sandbox.fork().id == "c3"


@pytest.mark.parametrize("name", ["children", "items", "sandboxes"])
def test_every_shape_of_answer_to_a_fork_tree_gives_all_children(name: str) -> None:
    sandbox, transport = using(answer({"tree_id": "t1", name: [CHILD, {**CHILD, "id": "c2"}], "errors": []}, 201))
    assert [child.id for child in sandbox.fork_tree(2, {"k": "v"})] == ["c1", "c2"]
    assert json.loads(transport.bodies[0]) == {"count": 2, "metadata": {"k": "v"}}


def test_fork_gives_a_list_when_a_count_is_given() -> None:
    sandbox, transport = using(answer({"sandbox": CHILD, "children": [CHILD]}, 201))
    assert [child.id for child in sandbox.fork(count=1)] == ["c1"]
    assert json.loads(transport.bodies[0]) == {"count": 1}


@pytest.mark.parametrize("reply", [{}, [], {"children": []}, {"children": [{"no": "id"}]}])
def test_an_answer_without_a_child_is_an_error(reply: Any) -> None:
    with pytest.raises(errors.ServerError, match="answer of the API"):
        using(answer(reply, 201))[0].fork()


@pytest.mark.parametrize("count", [0, 17])
def test_a_count_out_of_range_is_not_sent(count: int) -> None:
    sandbox, transport = using()
    with pytest.raises(errors.InvalidRequest, match="count"):
        sandbox.fork_tree(count)
    with pytest.raises(errors.InvalidRequest, match="count"):
        sandbox.fork(count=count)
    assert transport.requests == []


def test_a_fork_is_repeated_with_its_key_while_the_server_is_full() -> None:
    full = answer({"error": "no room", "code": "no_capacity"}, 503, retry_after="1")
    disk = answer({"error": "no disk", "code": "disk_full"}, 507)
    sandbox, transport = using(full, disk, broken(), answer({"children": [CHILD]}, 201))
    assert sandbox.fork_tree(1)[0].id == "c1"
    assert len({request.headers["idempotency-key"] for request in transport.requests}) == 1
    sandbox, transport = using(answer({"children": [CHILD]}, 201))
    sandbox.fork(idempotency_key="mine")
    assert transport.requests[0].headers["idempotency-key"] == "mine"


def test_a_fork_is_cancelled_as_a_create_is() -> None:
    cancel = threading.Event()
    cancel.set()
    for fork in (lambda s: s.fork(cancel=cancel), lambda s: s.fork_tree(2, cancel=cancel)):
        sandbox, transport = using()
        with pytest.raises(errors.CreateCancelled):
            fork(sandbox)
        assert transport.requests == []


def test_promote_answers_as_a_dict() -> None:
    sandbox, transport = using(
        answer({"winner": "s1", "tree_id": "t1", "deleted": ["c2"], "failures": {"c3": "busy"}}), answer({"winner": "s1"})
    )
    assert sandbox.promote(cleanup_siblings=True, tree_id="t1") == {
        "winner": "s1", "tree_id": "t1", "deleted": ["c2"], "failures": {"c3": "busy"},
    }  # fmt: skip
    assert json.loads(transport.bodies[0]) == {"cleanup_siblings": True, "tree_id": "t1"}
    assert sandbox.promote() == {"winner": "s1", "tree_id": None, "deleted": [], "failures": {}}
    assert json.loads(transport.bodies[1]) == {"cleanup_siblings": False}


def test_snapshots_are_typed_and_still_read_as_dicts() -> None:
    world = World()
    with world.client() as client:
        sandbox = client.sandboxes.get(world.make()["id"])
        snapshot_id = sandbox.snapshot()
        snapshot = client.snapshots.get(snapshot_id)
        assert client.snapshots.list(sandbox_id=sandbox.id) == [snapshot]
        assert (snapshot.sandbox_id, snapshot.status, snapshot.size_bytes) == (sandbox.id, "durable", 5 << 20)
        assert (snapshot["id"], snapshot.get("nothing"), dict(snapshot)["status"]) == (snapshot_id, None, "durable")
        with pytest.raises(AttributeError):
            snapshot.status = "verified"
        with pytest.raises(KeyError):
            snapshot["get"]
        client.snapshots.delete(snapshot_id)
        with pytest.raises(errors.SnapshotNotFound):
            client.snapshots.get(snapshot_id)


@pytest.mark.parametrize("reply", [{"snapshots": [{"id": "n", "sandbox_id": "s"}]}, [{"id": "n", "sandbox_id": "s"}]])
def test_lists_of_snapshots_come_in_two_shapes(reply: Any) -> None:
    sandbox, transport = using(answer(reply))
    assert [snapshot.id for snapshot in sandbox._client.snapshots.list("s 1")] == ["n"]
    assert transport.requests[0].path == "/snapshots?sandbox_id=s%201"


def test_wait_verified_ends_in_one_of_three_ways() -> None:
    def snapshot(status: str) -> Any:
        return answer({"id": "n", "sandbox_id": "s", "status": status, "status_reason": "damaged" if status == "failed" else None})

    sandbox, _ = using(snapshot("durable"), snapshot("verified"), snapshot("failed"), snapshot("capturing"))
    snapshots = sandbox._client.snapshots
    assert snapshots.wait_verified("n").status == "verified"
    with pytest.raises(errors.SnapshotUnusable, match="damaged") as caught:
        snapshots.wait_verified("n")
    assert caught.value.reason == "failed"
    with pytest.raises(TimeoutError, match="still capturing"):
        snapshots.wait_verified("n", timeout_s=0)


def test_a_snapshot_is_where_a_sandbox_begins() -> None:
    sandbox, transport = using(answer({"id": "s2", "status": "running", "from_snapshot": "snap1"}, 201))
    made = sandbox._client.sandboxes.create(from_snapshot="snap1")
    assert made.from_snapshot == "snap1"
    assert json.loads(transport.bodies[0])["from_snapshot"] == "snap1"


@pytest.mark.anyio
async def test_the_async_client_does_the_same() -> None:
    world = World()
    async with world.async_client() as client:
        sandbox = await client.sandboxes.create()
        await sandbox.pause()
        assert sandbox.status == "paused"
        await sandbox.resume()
        await sandbox.hibernate()
        assert sandbox.status == "hibernated"
        await sandbox.wake()
        child, *more = [await sandbox.fork({"a": "b"}), *await sandbox.fork(count=2), *await sandbox.fork_tree(1)]
        assert (child.fork_parent_id, child.metadata["a"], len(more)) == (sandbox.id, "b", 3)
        assert (await more[0].promote(cleanup_siblings=True))["deleted"] == [more[1].id]
        snapshot_id = await sandbox.snapshot()
        assert [found.id for found in await client.snapshots.list()] == [snapshot_id]
        world.snapshots[snapshot_id]["status"] = "verified"
        assert (await client.snapshots.wait_verified(snapshot_id)).status == "verified"
        await client.snapshots.delete(snapshot_id)
        assert (await sandbox.keep_awake(5))["ttl_seconds"] == 3600
