"""States, snapshots, forks and explore against the real control plane, over a host in memory."""

from __future__ import annotations

import asyncio
import threading

import pytest

from pandastack import Candidate, ExploreError, errors
from pandastack.sdk import strays
from pandastack.sdk.client import AsyncClient, Client

from .conftest import Live


def test_pause_hibernate_and_what_wakes_a_sandbox(client: Client) -> None:
    with client.sandboxes.create(metadata={"story": "states"}) as sandbox:
        sandbox.filesystem.write("/tmp/x", "kept")
        sandbox.pause()
        assert sandbox.status == "paused"
        assert [found.id for found in client.sandboxes.list(status="paused")] == [sandbox.id]
        sandbox.resume()
        assert sandbox.status == "running"
        sandbox.hibernate()
        assert (sandbox.status, sandbox.status_reason) == ("hibernated", "request")
        facts = sandbox.to_dict()
        assert sandbox.refresh().to_dict() == facts, "what the object said is what the server says"
        sandbox.hibernate()
        sandbox.pause()
        assert sandbox.status == "hibernated"
        assert sandbox.filesystem.read("/tmp/x") == b"kept"
        assert sandbox.refresh().status == "running"
        sandbox.wake()
        assert sandbox.status == "running"
        assert sandbox.keep_awake(60)["keep_awake_until"]
        assert sandbox.keep_awake(0)["keep_awake_until"] is None
    with pytest.raises(errors.SandboxNotFound):
        sandbox.pause()


def test_a_snapshot_outlives_its_sandbox(client: Client) -> None:
    with client.sandboxes.create("base", memory_mb=256) as sandbox:
        sandbox.filesystem.write("/tmp/x", "kept")
        snapshot_id = sandbox.snapshot()
        sandbox.filesystem.write("/tmp/x", "later")
    assert [found.id for found in client.snapshots.list(sandbox.id)] == [snapshot_id]
    snapshot = client.snapshots.wait_verified(snapshot_id, 20)
    assert (snapshot.status, snapshot.sandbox_id, snapshot["template"], snapshot.memory_mb) == ("verified", sandbox.id, "base", 256)
    with client.sandboxes.create(from_snapshot=snapshot_id) as one, client.sandboxes.create(from_snapshot=snapshot_id) as two:
        assert (one.from_snapshot, one.template, one.memory_mb) == (snapshot_id, "base", 256)
        one.filesystem.write("/tmp/x", "mine")
        assert two.filesystem.read("/tmp/x") == b"kept"
    client.snapshots.delete(snapshot_id)
    with pytest.raises(errors.SnapshotNotFound):
        client.snapshots.get(snapshot_id)
    with pytest.raises(errors.SnapshotNotFound):
        client.sandboxes.create(from_snapshot=snapshot_id)


def test_use_is_told_without_waking_anything(client: Client) -> None:
    with client.sandboxes.create("base") as sandbox:
        assert sandbox.usage().memory_own_bytes > 0
        sandbox.hibernate()
        snapshot_id = sandbox.snapshot()
        now = sandbox.usage()
        assert (now.status, now.memory_own_bytes, now.stored_shared_bytes > 0) == ("hibernated", 0, True)
        assert sandbox.refresh().status == "hibernated"
        total = client.usage()
        assert (total.sandboxes.limit, total.stored_bytes.left) == (None, None)
        assert total.stored_bytes.used == total.snapshot_bytes + total.hibernated_bytes > 0
    alone = client.snapshots.get(snapshot_id)
    assert (alone.own_bytes, alone.shared_bytes, alone["own_bytes"]) == (alone.size_bytes, 0, alone.size_bytes)
    assert client.snapshots.list()[0].own_bytes is None
    client.snapshots.delete(snapshot_id)


def test_what_became_of_the_files_is_told(client: Client) -> None:
    with client.sandboxes.create("base") as sandbox:
        with pytest.raises(errors.SnapshotNotFound):
            sandbox.diff()
        sandbox.filesystem.write("/w/text", "one\n")
        snapshot_id = sandbox.snapshot()
        assert sandbox.diff() == []
        sandbox.filesystem.write("/w/text", "two\n")
        sandbox.filesystem.write(b"/w/\xff", "new\n")
        found = sandbox.diff()
        assert [(change.path, change.kind) for change in found] == [("/w/text", "modified"), ("/w/\udcff", "added")]
        assert found[1].before is None
        assert found[1].after is not None
        assert (found[1].after.type, found[1].after.size, found[1].after.mode) == ("file", 4, "0644")
        assert client.diff(client.snapshots.get(snapshot_id), sandbox) == client.diff(snapshot_id, sandbox.id, path=b"/w") == found
        assert [change.kind for change in client.diff(sandbox, snapshot_id)] == ["modified", "removed"]
        patch = sandbox.diff_patch(snapshot_id, path="/w/text")
        assert patch == client.diff_patch(snapshot_id, sandbox, path="/w/text")
        assert b"-one\n+two\n" in patch
        with pytest.raises(errors.FileNotFound):
            sandbox.diff(path="/nowhere")
        with pytest.raises(errors.InvalidRequest):
            sandbox.diff(path="relative")
        with sandbox.fork() as child:
            assert child.diff(sandbox) == []
        client.snapshots.delete(snapshot_id)
    with pytest.raises(errors.NotFoundError):
        client.diff(snapshot_id, sandbox)


@pytest.mark.anyio
async def test_the_async_client_tells_it_too(live: Live) -> None:
    async with AsyncClient(live.api_url, live.api_key) as client, await client.sandboxes.create("base") as sandbox:
        snapshot_id = await sandbox.snapshot()
        await sandbox.filesystem.write("/w/new", "new\n")
        assert [change.path for change in await sandbox.diff(path="/w")] == ["/w", "/w/new"]
        assert [change.path for change in await client.diff(sandbox, snapshot_id)] == ["/w", "/w/new"]
        assert b"+new\n" in await sandbox.diff_patch()
        assert b"-new\n" in await client.diff_patch(sandbox, snapshot_id)
        await client.snapshots.delete(snapshot_id)


def test_forks_are_apart_and_know_where_they_come_from(client: Client) -> None:
    with client.sandboxes.create(metadata={"job": "17"}) as parent:
        parent.filesystem.write("/tmp/x", "shared")
        with parent.fork({"branch": "a"}, idempotency_key="fork-1") as child:
            assert child == parent.fork({"branch": "a"}, idempotency_key="fork-1")
            assert (child.fork_parent_id, child.status, child.template) == (parent.id, "running", parent.template)
            assert (child.metadata["job"], child.metadata["branch"]) == ("17", "a")
            child.filesystem.write("/tmp/x", "mine")
            assert parent.filesystem.read("/tmp/x") == b"shared"
            with child.fork() as grandchild:
                assert grandchild.filesystem.read("/tmp/x") == b"mine"
                assert grandchild.fork_parent_id == child.id
            assert client.sandboxes.get(child.id).fork_tree_id == child.fork_tree_id
        one, two = parent.fork(count=2)
        assert one.promote(cleanup_siblings=True) == {"winner": one.id, "tree_id": one.fork_tree_id, "deleted": [two.id], "failures": {}}
        with pytest.raises(errors.SandboxNotFound):
            two.refresh()
        one.kill()
        with pytest.raises(errors.Conflict):
            parent.promote()


def everything(client: Client) -> set[str]:
    return {sandbox.id for sandbox in client.sandboxes.list()}


def test_explore_keeps_the_best_copy_only(client: Client) -> None:
    with client.sandboxes.create(ttl_seconds=0, persistent=True) as parent:
        before = everything(client)
        parent.filesystem.write("/tmp/x", "12")
        result = parent.explore(
            ["echo 3", "exit 4", Candidate.call("read", lambda copy: copy.filesystem.read("/tmp/x"))],
            score_fn=lambda copy, outcome: float(outcome.value or outcome.stdout_tail or 0),
        )
        assert result.winner is not None
        assert (result.winner_outcome.label, result.winner_outcome.score) == ("read", 12.0)
        assert result.reap_failures == {}
        assert everything(client) == before | {result.winner.id}
        assert (result.winner.lifecycle()["ttl_seconds"], result.winner.lifecycle()["persistent"]) == (0, True)
        result.winner.kill()
        with pytest.raises(ExploreError):
            parent.explore(["exit 1", "exit 2"])
        assert everything(client) == before
        parent.kill()


def test_copies_are_found_by_their_mark_when_the_answer_is_lost(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with client.sandboxes.create() as parent:
        before = everything(client)
        real = client.sandboxes.fork_tree

        def lost(*arguments: object, **options: object) -> object:
            assert len(real(*arguments, **options)) == 2
            raise errors.ConnectionError("the connection broke off", maybe_sent=True)

        monkeypatch.setattr(client.sandboxes, "fork_tree", lost)
        with pytest.raises(errors.ConnectionError), strays.forked(parent, 2):
            pass
        assert everything(client) == before


@pytest.mark.anyio
async def test_the_async_client_does_the_same(live: Live, client: Client) -> None:
    async with AsyncClient(live.api_url, live.api_key) as api, await api.sandboxes.create() as parent:
        before = await asyncio.to_thread(everything, client)
        await parent.hibernate()
        assert parent.status == "hibernated"
        result = await parent.explore(["echo 1", "echo 2"], score_fn=lambda copy, outcome: int(outcome.stdout_tail))
        assert result.winner is not None
        assert result.winner_outcome.label == "echo 2"
        assert await asyncio.to_thread(everything, client) == before | {result.winner.id}
        await result.winner.kill()
        exploring = asyncio.create_task(parent.explore(["sleep 30", "sleep 30"]))
        while len(await asyncio.to_thread(everything, client)) == len(before):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        exploring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exploring
        assert await asyncio.to_thread(everything, client) == before
        snapshot_id = await parent.snapshot()
        assert (await api.snapshots.wait_verified(snapshot_id, 20)).status == "verified"
        await api.snapshots.delete(snapshot_id)


def test_many_forks_at_once_from_one_client(client: Client) -> None:
    with client.sandboxes.create() as parent:
        found: list[str] = []
        threads = [threading.Thread(target=lambda: found.extend(child.id for child in parent.fork_tree(2))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 8
        for sandbox_id in found:
            client.sandboxes.delete(sandbox_id)
