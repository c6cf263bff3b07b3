"""Fork, fork-tree and promote: all or none, once per key, and nobody is deleted who should not be."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pandastack.control.fake_host import FakeHost
from pandastack.control.store.sandboxes import USABLE
from pandastack.errors import CapacityError, DiskFull, GuestError, RuntimeFailed
from pandastack.wire.ids import SandboxId

from .test_restart import Steps
from .world import World, copy_database, eventually, until, world

pytestmark = pytest.mark.anyio
QUIET: dict[str, Any] = {"expiry_interval_s": 3600, "sweep_interval_s": 3600}
KEY = {"idempotency-key": "fork-1"}


async def tree(w: World, parent: str, count: int = 3, **body: Any) -> list[dict[str, Any]]:
    answer = await w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", json={"count": count, **body})
    assert answer.status_code == 201, answer.text
    children: list[dict[str, Any]] = answer.json()["children"]
    return children


async def ids(w: World) -> set[str]:
    return {row["id"] for row in (await w.ours.get("/v1/sandboxes")).json()}


# Fork


@pytest.mark.parametrize(
    ("asked", "ttl"),
    [("600", 600), ("1", 1), ("0", 77), ("-5", 77), ("soon", 77), ("9" * 30, 77), ("\u0663", 77), ("2592001", 77)],
)
async def test_an_existing_clients_explore_bounds_its_candidates(w: World, asked: str, ttl: int) -> None:
    parent = await w.sandbox(ttl_seconds=77)
    children = await tree(w, parent, 2, metadata={"explore": "1", "explore_ttl": asked})
    assert [child["ttl_seconds"] for child in children] == [ttl, ttl]
    (again,) = await tree(w, children[0]["id"], 1)
    assert again["ttl_seconds"] == ttl, "a fork of a candidate has what its parent has, and is no candidate"


@pytest.mark.parametrize("how", [{}, {"content": b"{}"}, {"content": b"", "headers": {"content-type": "text/plain;charset=UTF-8"}}])
async def test_a_bare_fork_is_one_running_copy(w: World, how: dict[str, Any]) -> None:
    parent = await w.sandbox(template="base", memory_mb=700, ttl_seconds=77, persistent=True, metadata={"a": "1", "b": "2"})
    await w.ours.put(f"/v1/sandboxes/{parent}/fs?path=/tmp/f", content=b"then")
    answer = await w.ours.post(f"/v1/sandboxes/{parent}/fork", **how)
    body = answer.json()
    assert answer.status_code == 201, answer.text
    child = body["sandbox"]
    assert body["children"] == [child]
    assert (body["parent_id"], body["snapshot_id"], body["errors"]) == (parent, "", [])
    assert body["at"].endswith("Z")
    assert child["id"] != parent
    assert (child["status"], child["template"], child["memory_mb"], child["ttl_seconds"]) == ("running", "base", 700, 77)
    assert (child["persistent"], child["fork_parent_id"], child["fork_tree_id"]) == (True, parent, body["tree_id"])
    assert child["metadata"] == {"a": "1", "b": "2", "fork_parent_id": parent, "fork_tree_id": body["tree_id"]}
    assert (await w.ours.get(f"/v1/sandboxes/{child['id']}")).json() == child
    await w.ours.put(f"/v1/sandboxes/{parent}/fs?path=/tmp/f", content=b"later")
    assert (await w.ours.get(f"/v1/sandboxes/{child['id']}/fs?path=/tmp/f")).content == b"then"
    found = (await w.ours.get("/v1/sandboxes", params={"metadata": f"fork_tree_id={body['tree_id']}"})).json()
    assert [row["id"] for row in found] == [child["id"]]


async def test_a_tree_has_whole_children_whose_metadata_overlay_their_parents(w: World) -> None:
    parent = await w.sandbox(metadata={"a": "1", "b": "2", "fork_tree_id": "mine"})
    children = await tree(w, parent, 3, metadata={"b": "3", "fork_parent_id": "x", "explore": "1"})
    assert len({child["id"] for child in children}) == 3
    (tree_id,) = {child["fork_tree_id"] for child in children}
    for child in children:
        assert child["metadata"] == {"a": "1", "b": "3", "explore": "1", "fork_tree_id": tree_id, "fork_parent_id": parent}
    (grandchild,) = await tree(w, children[0]["id"], 1)
    assert (grandchild["fork_parent_id"], grandchild["metadata"]["fork_parent_id"]) == (children[0]["id"], children[0]["id"])
    assert grandchild["fork_tree_id"] != tree_id
    bare = await w.ours.post(f"/v1/sandboxes/{parent}/fork-tree")
    assert len(bare.json()["children"]) == 2
    assert len((await w.ours.post(f"/v1/sandboxes/{parent}/fork", json={"count": 2, "mode": "live"})).json()["children"]) == 2


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"count": 0}, "count"),
        ({"count": 17}, "count"),
        ({"count": "2"}, "count"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(n): "x" for n in range(64)}}, "metadata"),
        ({"ttl_seconds": 1}, "ttl_seconds"),
    ],
)
@pytest.mark.parametrize("verb", ["fork", "fork-tree"])
async def test_a_wrong_fork_names_its_field_and_makes_nothing(w: World, verb: str, body: dict[str, Any], field: str) -> None:
    parent = await w.sandbox(metadata={"one": "more"})
    answer = await w.ours.post(f"/v1/sandboxes/{parent}/{verb}", json=body)
    assert (answer.status_code, answer.json()["field"]) == (400, field), answer.text
    assert await ids(w) == {parent}


async def test_a_parent_with_all_the_metadata_there_can_be_is_forked(w: World) -> None:
    parent = await w.sandbox(metadata={str(n): "x" for n in range(64)})
    (child,) = await tree(w, parent, 1)
    assert len((await tree(w, child["id"], 1))[0]["metadata"]) == 66


@pytest.mark.parametrize("verb", ["pause", "hibernate"])
async def test_a_fork_leaves_its_parent_as_it_was(w: World, verb: str) -> None:
    parent = await w.sandbox()
    await w.ours.post(f"/v1/sandboxes/{parent}/{verb}")
    before = await w.status(parent)
    (child,) = await tree(w, parent, 1)
    assert child["status"] == "running"
    assert await w.status(parent) == before
    assert (await w.ours.post(f"/v1/sandboxes/{child['id']}/exec", json={"cmd": "true"})).status_code == 200


@pytest.mark.parametrize("step", ["fork", "fork.after"])
@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (CapacityError("full", retry_after_s=2), 503, "2"),
        (DiskFull("full"), 507, None),
        (GuestError("refused"), 502, None),
        (RuntimeFailed("no"), 500, None),
        (ValueError("secret"), 500, None),
    ],
)
async def test_a_failed_fork_leaves_no_child(w: World, step: str, error: Exception, status: int, retry_after: str | None) -> None:
    parent = await w.sandbox()
    w.host.fail(step, error)
    answer = await w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", json={"count": 4}, headers=KEY)
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry_after)
    assert "secret" not in answer.text
    assert await ids(w) == set(w.host.sandboxes) == {parent}
    # The key is free again.
    assert (await w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", json={"count": 2}, headers=KEY)).status_code == 201


async def test_a_machine_with_room_for_some_makes_none(database: Path) -> None:
    async with world(database, FakeHost(sandboxes_max=4)) as w:
        parent = await w.sandbox()
        refused = await w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", json={"count": 4})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert await ids(w) == {parent}
        assert len(await tree(w, parent, 3)) == 3


async def test_children_count_against_what_may_be_made_at_once(database: Path) -> None:
    async with world(database, creates_in_flight_max=4) as w:
        parent = await w.sandbox()
        made = w.host.hold("create")
        making = asyncio.create_task(w.ours.post("/v1/sandboxes", json={}))
        await until(lambda: w.host.calls.get("create") == 2)
        refused = await w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", json={"count": 4})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        made.set()
        assert (await making).status_code == 201


async def test_a_child_deleted_while_it_is_made_undoes_all(w: World) -> None:
    parent = await w.sandbox()
    forked = w.host.hold("fork")
    asking = asyncio.create_task(w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", json={"count": 3}))

    async def creating() -> Any:
        return (await w.ours.get("/v1/sandboxes?status=creating")).json()

    found = await eventually(creating)
    assert len(found) == 3
    assert {row["fork_parent_id"] for row in found} == {parent}
    assert (await w.ours.delete(f"/v1/sandboxes/{found[1]['id']}")).status_code == 204
    forked.set()
    assert (await asking).status_code == 409
    assert await ids(w) == set(w.host.sandboxes) == {parent}


async def test_a_fork_is_finished_though_its_client_left(w: World) -> None:
    parent = await w.sandbox()
    w.host.delays_s["fork"] = 0.03
    asking = asyncio.create_task(w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", json={"count": 2}))
    await until(lambda: w.host.calls.get("fork"))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)

    async def running() -> bool:
        return len((await w.ours.get("/v1/sandboxes?status=running")).json()) == 3

    await eventually(running)


# Idempotency


async def test_ten_forks_with_one_key_make_one_tree(w: World) -> None:
    parent = await w.sandbox()
    w.host.delays_s["fork"] = 0.02
    asked = (w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", json={"count": 2}, headers=KEY) for _ in range(10))
    answers = await asyncio.gather(*asked)
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replay" not in answer.headers for answer in answers) == 1
    assert w.host.calls["fork"] == 1
    assert len(await ids(w)) == 3


async def test_a_fork_is_replayed_after_a_restart_also_when_nobody_of_the_tree_is_left(database: Path) -> None:
    host = FakeHost()
    async with world(database, host) as w:
        parent = await w.sandbox()
        first = await w.ours.post(f"/v1/sandboxes/{parent}/fork", json={"count": 2}, headers=KEY)
        for sandbox in await ids(w):
            await w.ours.delete(f"/v1/sandboxes/{sandbox}")
    async with world(database, host) as w:
        again = await w.ours.post(f"/v1/sandboxes/{parent}/fork", json={"count": 2}, headers=KEY)
        assert (again.status_code, again.content, again.headers["idempotent-replay"]) == (201, first.content, "true")
        assert not host.sandboxes


async def test_a_key_is_for_one_request_whatever_it_makes(w: World) -> None:
    parent, other = await w.sandbox(), await w.sandbox()
    assert (await w.ours.post(f"/v1/sandboxes/{parent}/fork", headers=KEY)).status_code == 201
    for path, body in (
        (f"/v1/sandboxes/{other}/fork", {}),
        (f"/v1/sandboxes/{parent}/fork", {"count": 2}),
        (f"/v1/sandboxes/{parent}/fork", {"metadata": {"a": "b"}}),
        ("/v1/sandboxes", {}),
    ):
        answer = await w.ours.post(path, json=body, headers=KEY)
        assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_conflict"), path
    assert len(await ids(w)) == 3


async def test_a_key_is_not_free_before_the_last_child_is_undone(database: Path) -> None:
    host = FakeHost()
    async with world(database, host, **QUIET) as w:
        parent = await w.sandbox()
        host.fail("fork", RuntimeFailed("no"))
        host.fail("delete", RuntimeFailed("busy"))
        assert (await w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", headers=KEY)).status_code == 500
        again = await w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", headers=KEY)
        assert (again.status_code, again.headers["retry-after"]) == (503, "1")
        await w.parts.reconciler.sweep()
        assert await ids(w) == {parent}
        assert (await w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", headers=KEY)).status_code == 201


@pytest.mark.parametrize("key", ["", "a b", "a" * 256])
async def test_a_key_that_is_no_key_is_refused(w: World, key: str) -> None:
    parent = await w.sandbox()
    answer = await w.ours.post(f"/v1/sandboxes/{parent}/fork", headers={"idempotency-key": key})
    assert (answer.status_code, answer.json()["field"]) == (400, "Idempotency-Key")


async def test_a_fork_that_crashes_at_any_step_makes_one_tree_when_repeated(empty_database: Path, tmp_path: Path) -> None:
    for crash_at in range(1, 100):
        host, path = FakeHost(), copy_database(empty_database, tmp_path / f"{crash_at}.db")
        steps = Steps(crash_at)
        async with world(path, host, **QUIET) as w:
            parent = await w.sandbox()
            await asyncio.sleep(0.02)
            steps.watch(w.host, "fork", "delete")
            steps.watch(w.parts.store.creates, "begin", "complete")
            steps.watch(w.parts.store.sandboxes, "remove_of_any_tenant")
            told = await w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", json={"count": 2}, headers=KEY)
        for name in ("fork", "delete"):
            host.__dict__.pop(name, None)
        async with world(path, host, **QUIET) as w:
            again = await w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", json={"count": 2}, headers=KEY)
            assert again.status_code == 201
            assert told.status_code != 201 or told.content == again.content
            rows = await w.parts.store.sandboxes.list_of_any_tenant("creating", *USABLE, "failed", "deleting")
            assert {row.status for row in rows} == {"running"}
            assert {row.id for row in rows} == set(host.sandboxes) == {parent, *(child["id"] for child in again.json()["children"])}
        if not steps.dead:
            assert crash_at > 6
            return
    raise AssertionError("the fork never ran to its end")


# Promote


async def test_promote_deletes_the_siblings_and_nothing_else(w: World) -> None:
    parent, stranger = await w.sandbox(), await w.sandbox()
    winner, *losers = await tree(w, parent, 4)
    (grandchild,) = await tree(w, winner["id"], 1)
    (cousin,) = await tree(w, losers[0]["id"], 1)
    others = await tree(w, parent, 2)
    before = (await w.ours.get(f"/v1/sandboxes/{winner['id']}")).json()
    answer = await w.ours.post(f"/v1/sandboxes/{winner['id']}/promote", json={"cleanup_siblings": True})
    body = answer.json()
    assert (answer.status_code, body["winner"], body["tree_id"], body["failures"]) == (200, winner["id"], winner["fork_tree_id"], {})
    assert set(body["deleted"]) == {loser["id"] for loser in losers}
    left = {parent, stranger, winner["id"], grandchild["id"], cousin["id"], *(other["id"] for other in others)}
    assert await ids(w) == set(w.host.sandboxes) == left
    assert (await w.ours.get(f"/v1/sandboxes/{winner['id']}")).json() == before
    again = await w.ours.post(f"/v1/sandboxes/{winner['id']}/promote", json={"cleanup_siblings": True})
    assert (again.status_code, again.json()["deleted"]) == (200, [])


async def test_promote_without_cleanup_deletes_nobody(w: World) -> None:
    parent = await w.sandbox()
    winner, loser = await tree(w, parent, 2)
    for body in ({}, {"tree_id": winner["fork_tree_id"]}):
        answer = await w.ours.post(f"/v1/sandboxes/{winner['id']}/promote", json=body)
        assert (answer.status_code, answer.json()["deleted"]) == (200, [])
    assert await ids(w) == {parent, winner["id"], loser["id"]}


async def test_what_is_no_child_of_that_tree_is_not_promoted(w: World) -> None:
    # Metadata is the client's text: it makes nobody a sibling.
    winner, loser = await tree(w, await w.sandbox(), 2)
    forged = await w.sandbox(metadata={"fork_tree_id": winner["fork_tree_id"], "fork_parent_id": winner["fork_parent_id"]})
    for sandbox, body in ((forged, {}), (forged, {"tree_id": winner["fork_tree_id"]}), (winner["id"], {"tree_id": "other"})):
        answer = await w.ours.post(f"/v1/sandboxes/{sandbox}/promote", json={"cleanup_siblings": True, **body})
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    answer = await w.ours.post(f"/v1/sandboxes/{winner['id']}/promote", json={"cleanup_siblings": True})
    assert answer.json()["deleted"] == [loser["id"]]
    assert forged in await ids(w)


async def test_a_failed_sandbox_does_not_win(w: World) -> None:
    winner, loser = await tree(w, await w.sandbox(), 2)
    w.host.break_sandbox(SandboxId(winner["id"]), "oom")

    async def failed() -> bool:
        return (await w.status(winner["id"]))[0] == "failed"

    await eventually(failed)
    answer = await w.ours.post(f"/v1/sandboxes/{winner['id']}/promote", json={"cleanup_siblings": True})
    assert (answer.status_code, answer.json()["code"]) == (409, "sandbox_not_running")
    assert loser["id"] in await ids(w)


async def test_siblings_that_resist_are_told_and_go_the_next_time(w: World) -> None:
    winner, *losers = await tree(w, await w.sandbox(), 3)
    w.host.fail("delete", RuntimeFailed("busy"))
    body = (await w.ours.post(f"/v1/sandboxes/{winner['id']}/promote", json={"cleanup_siblings": True})).json()
    assert len(body["deleted"]) == 1
    assert list(body["failures"].values()) == ["busy"]
    assert {*body["deleted"], *body["failures"]} == {loser["id"] for loser in losers}
    again = (await w.ours.post(f"/v1/sandboxes/{winner['id']}/promote", json={"cleanup_siblings": True})).json()
    assert (again["deleted"], again["failures"]) == (list(body["failures"]), {})


async def test_forks_are_counted(w: World) -> None:
    await tree(w, await w.sandbox(), 2)
    text = (await w.anyone.get("/metrics")).text
    assert 'pandastack_forks_total{outcome="ok"} 1.0' in text
    assert "pandastack_fork_seconds_count 1.0" in text
