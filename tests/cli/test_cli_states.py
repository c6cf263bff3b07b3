"""Commands about whole sandboxes and about snapshots, against a server in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from pandastack.cli.main import app
from pandastack.sdk.testing import MemoryTransport, answer
from sdk.world import World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr("pandastack.sdk.client.transports.HttpTransport", lambda *_: MemoryTransport(world))
    monkeypatch.setenv("PANDASTACK_API", "http://localhost:1")
    monkeypatch.setenv("PANDASTACK_API_KEY", "key")
    return world


def call(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, f"{result.exit_code}: {result.output} {result.exception!r}"
    return result


def as_json(*arguments: str, code: int = 0) -> Any:
    return json.loads(call(*arguments, "--json", code=code).stdout)


@pytest.mark.parametrize(("verb", "status"), [("pause", "paused"), ("resume", "running"), ("hibernate", "hibernated"), ("wake", "running")])
def test_states_change_one_by_one(verb: str, status: str, world: World) -> None:
    one, two = world.make()["id"], world.make()["id"]
    assert call("sandbox", verb, one, two).stdout.split() == [one, two]
    assert [world.sandboxes[one]["status"], world.sandboxes[two]["status"]] == [status, status]
    result = call("sandbox", verb, "nothing", one, "--json", code=1)
    assert json.loads(result.stdout) == [{"id": "nothing", "status": None}, {"id": one, "status": status}]
    assert "nothing: no such sandbox" in result.stderr
    assert call("sandbox", verb, "nothing", code=1).stdout == ""


def test_a_conflict_does_not_keep_the_others_from_it(world: World) -> None:
    one, two = world.make()["id"], world.make()["id"]
    world.after["POST pause"] = lambda: (
        answer({"error": "it failed", "code": "sandbox_not_running"}, 409) if world.asked[-1][1] == one else None
    )
    assert call("sandbox", "pause", one, two, code=1).stdout.split() == [two]


def test_the_list_shows_the_states(world: World) -> None:
    world.make(status="hibernated")
    world.make(status="paused")
    shown = call("sandbox", "list").stdout
    assert "hibernated" in shown
    assert "paused" in shown
    assert "hibernated" in call("sandbox", "list", "--help").stdout


def test_forks_print_their_ids(world: World) -> None:
    parent = world.make()["id"]
    child = call("sandbox", "fork", parent, "-m", "a=b").stdout.strip()
    assert world.sandboxes[child]["metadata"]["a"] == "b"
    assert as_json("sandbox", "fork", parent)["fork_parent_id"] == parent
    assert len(as_json("sandbox", "fork", parent, "--count", "1")) == 1
    assert len(call("sandbox", "fork", parent, "-n", "3").stdout.split()) == 3
    tree = call("sandbox", "fork-tree", parent).stdout.split()
    assert len(tree) == 2
    assert as_json("sandbox", "promote", tree[0], "--cleanup-siblings")["deleted"] == [tree[1]]
    assert "winner" in call("sandbox", "promote", tree[0]).stdout
    call("sandbox", "fork-tree", parent, "-n", "17", code=2)


def test_a_sibling_that_stays_is_exit_code_1(world: World) -> None:
    one = world.make()["id"]
    world.after["POST promote"] = lambda: answer({"winner": one, "tree_id": "t", "deleted": [], "failures": {"x": "busy"}})
    assert "x=busy" in call("sandbox", "promote", one, code=1).stdout


def test_keep_awake(world: World) -> None:
    one = world.make()["id"]
    assert as_json("sandbox", "keep-awake", one, "60")["ttl_seconds"] == 3600
    assert world.asked[-1] == ("PATCH lifecycle", one, {"keep_awake_seconds": 60})


def test_snapshots_from_birth_to_death(world: World) -> None:
    one = world.make()["id"]
    snapshot = call("snapshot", "create", one).stdout.strip()
    assert as_json("snapshot", "create", one)["sandbox_id"] == one
    world.snapshots[snapshot]["status"] = "verified"
    assert snapshot in [item["id"] for item in as_json("snapshot", "list")]
    assert "5.0 MiB" in call("snapshot", "list", "--sandbox", one).stdout
    assert world.asked[-1][1] == f"sandbox_id={one}"
    assert as_json("snapshot", "get", snapshot)["status"] == "verified"
    assert call("snapshot", "offload", snapshot).stdout.strip() == snapshot
    assert as_json("snapshot", "get", snapshot)["location"] == "store"
    made = call("sandbox", "create", "--from-snapshot", snapshot).stdout.strip()
    assert world.sandboxes[made]["from_snapshot"] == snapshot
    assert call("snapshot", "rm", snapshot).stdout.strip() == snapshot
    assert "no such snapshot" in call("snapshot", "rm", snapshot, code=1).stderr


def test_create_can_wait_for_the_trial_of_a_snapshot(world: World) -> None:
    one = world.make()["id"]
    world.after["POST snapshots"] = lambda: [item.update(status="verified") for item in world.snapshots.values()] and None
    call("snapshot", "create", one, "--wait-verified", "5")
    world.after["POST snapshots"] = lambda: [item.update(status="failed") for item in world.snapshots.values()] and None
    assert "can not be restored" in call("snapshot", "create", one, "--wait-verified", "5", code=1).stderr


def test_checkpoints_are_set_shown_and_ended(world: World) -> None:
    one = world.make()["id"]
    assert call("sandbox", "checkpoints", one).stdout == "off\n"
    assert as_json("sandbox", "checkpoints", one, "--every-execs", "2", "--keep", "5")["every_execs"] == 2
    assert world.sandboxes[one]["checkpoints"] == {"every_execs": 2, "keep": 5}
    assert "every_execs" in call("sandbox", "checkpoints", one).stdout
    assert as_json("sandbox", "checkpoints", one, "--off") is None
    call("sandbox", "checkpoints", one, "--every-execs", "1", "--every-seconds", "5", code=1)
    call("sandbox", "checkpoints", one, "--every-seconds", "4", code=2)
    made = call("sandbox", "create", "--checkpoint-execs", "3").stdout.strip()
    assert world.sandboxes[made]["checkpoints"] == {"every_execs": 3}


def test_history_restore_and_a_fork_at_a_point(world: World) -> None:
    one = world.make(status="failed")["id"]
    point = call("snapshot", "create", one).stdout.strip()
    shown = call("sandbox", "history", one).stdout
    assert point in shown
    assert "request" in shown
    assert as_json("sandbox", "history", one, "--limit", "1")[0]["id"] == point
    assert call("sandbox", "restore", one, point).stdout.startswith("snap")
    assert call("sandbox", "restore", one, point, "--no-undo").stdout == ""
    restored = as_json("sandbox", "restore", one, point)
    assert (restored["id"], restored["status"]) == (one, "running")
    assert restored["undo_point"]
    assert "no such snapshot" in call("sandbox", "restore", one, "nothing", code=1).stderr
    call("sandbox", "fork", one, "--at", point)
    call("sandbox", "fork-tree", one, "--at", point)
    assert [body["at"] for verb, _, body in world.asked if verb in ("POST fork", "POST fork-tree")] == [point, point]
