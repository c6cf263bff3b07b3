"""The time machine: points that a sandbox takes by itself, the way back to one, and the way forth again."""

from __future__ import annotations

import os
import signal
import time

import pytest

from pandastack import errors
from pandastack.sdk.client import Client
from pandastack.sdk.sandboxes import Sandbox

from . import notes
from .conftest import MakeSandbox, MakeServer
from .servers import Server, until
from .test_state_crash import killed_during

BALLAST_MIB = 200


def saved(server: Server) -> set[str]:
    return {path.name for path in (server.data / "snapshots").iterdir()} - {".new"}


def test_a_point_after_every_command_and_back_and_forth(any_make: MakeSandbox, any_client: Client) -> None:
    sandbox = any_make(checkpoints={"every_execs": 1})
    notes.begin(sandbox)
    for number in range(3):
        notes.add(sandbox, f"word-{number}")
        sandbox.exec(f"echo {number} > /root/number", check=True)
    # The next change waits for it, a look does not.
    points = until(lambda: len(found := sandbox.history()) == 3 and found, "three points")
    assert [(point.cause, point.label, point.status) for point in points] == [
        ("checkpoint", f"echo {number} > /root/number", "durable") for number in (2, 1, 0)
    ]
    assert any_client.snapshots.list(sandbox.id) == []
    assert {point.id for point in any_client.snapshots.list(sandbox.id, automatic=True)} == {point.id for point in points}
    machine_id = sandbox.filesystem.read_text("/etc/machine-id")
    undo = sandbox.restore(points[2])
    assert (sandbox.status, sandbox.boot_mode) == ("running", "rewind")
    assert sandbox.filesystem.read_text("/root/number") == "0\n"
    assert sandbox.filesystem.read_text("/etc/machine-id") == machine_id
    assert notes.add(sandbox, "again") == ["word-0", "again"]
    assert undo is not None
    assert (sandbox.history(1)[0].id, sandbox.history(1)[0].cause) == (undo, "restore")
    sandbox.restore(undo)
    assert sandbox.filesystem.read_text("/root/number") == "2\n"
    assert notes.add(sandbox, "on") == ["word-0", "word-1", "word-2", "on"]
    # What it was at a point lives on in copies, too.
    with sandbox.fork_at(points[1]) as copy:
        assert (copy.fork_parent_id, copy.lifecycle().get("checkpoints")) == (sandbox.id, None)
        assert copy.filesystem.read_text("/root/number") == "1\n"
        assert notes.add(copy, "copy") == ["word-0", "word-1", "copy"]
        with pytest.raises(errors.Conflict, match="another sandbox"):
            copy.restore(points[1])
    asked_for = sandbox.snapshot()
    sandbox.kill()
    assert [found.id for found in any_client.snapshots.list(automatic=True)] == [asked_for]
    any_client.snapshots.delete(asked_for)


def test_points_by_time_only_where_something_happened(make: MakeSandbox) -> None:
    sandbox = make(checkpoints={"every_seconds": 5})
    sandbox.exec("echo 1 > /root/file", check=True)
    (first,) = until(sandbox.history, "a first point", 20)
    assert (first.cause, first.label) == ("checkpoint", "")
    time.sleep(13)
    assert sandbox.history() == [first]
    sandbox.exec("echo 2 > /root/file", check=True)
    until(lambda: len(sandbox.history()) == 2, "a second point", 20)
    sandbox.hibernate()
    time.sleep(7)
    assert len(sandbox.history()) == 2
    sandbox.refresh()
    assert sandbox.status == "hibernated"
    sandbox.restore(first)
    assert sandbox.filesystem.read_text("/root/file") == "1\n"


def test_points_are_bounded_and_end_with_their_sandbox(server: Server, make: MakeSandbox) -> None:
    sandbox = make()
    sandbox.checkpoints(every_execs=1, keep=3)
    for number in range(6):
        sandbox.exec(f"echo {number} > /root/number", check=True)
    until(lambda: [point.label for point in sandbox.history()[:1]] == ["echo 5 > /root/number"], "the last point")
    points = until(lambda: len(found := sandbox.history()) == 3 and found, "only three points stay")
    assert points[-1].label == "echo 0 > /root/number"
    policy = sandbox.lifecycle()["checkpoints"]
    assert policy is not None
    assert (policy["every_execs"], policy["keep"], policy["points"], policy["last_error"]) == (1, 3, 3, None)
    until(lambda: saved(server) == {point.id for point in points}, "their files are gone")
    sandbox.checkpoints(off=True)
    sandbox.exec("true")
    assert sandbox.lifecycle()["checkpoints"] is None
    assert len(sandbox.history()) == 3
    sandbox.kill()
    assert saved(server) == set()


def test_a_sandbox_that_failed_comes_back(make: MakeSandbox) -> None:
    sandbox = make(checkpoints={"every_execs": 1})
    notes.begin(sandbox)
    notes.add(sandbox, "kept")
    sandbox.exec("true")
    (point,) = until(sandbox.history, "a point")
    os.kill(sandbox.metrics().pid, signal.SIGKILL)
    until(lambda: sandbox.refresh().status == "failed", "it is known to have failed")
    assert sandbox.restore(point) is None
    assert (sandbox.status, sandbox.status_reason) == ("running", None)
    assert notes.add(sandbox, "more") == ["kept", "more"]


def test_a_checkpoint_that_fails_fails_no_command(make: MakeSandbox) -> None:
    sandbox = make(checkpoints={"every_execs": 1})
    hook = "#!/bin/sh\necho not now >&2\nexit 1\n"
    sandbox.filesystem.write("/etc/pandastack/hooks/before-snapshot", hook, mode="0755")
    assert sandbox.exec("echo hi").stdout == "hi\n"
    policy = until(lambda: (found := sandbox.lifecycle()["checkpoints"]) and found["last_error"] and found, "the error")
    assert "not now" in str(policy)
    assert sandbox.exec("echo hi").stdout == "hi\n"
    assert sandbox.history() == []


@pytest.mark.parametrize("delay_s", [0.1, 0.6, 1.2, 2.0])
def test_a_server_killed_while_it_restores_loses_neither(own_server: MakeServer, delay_s: float) -> None:
    server = own_server()
    box = server.client().sandboxes.create("base").id

    def sandbox() -> Sandbox:
        return server.client().sandboxes.get(box)

    notes.begin(sandbox(), ballast_mib=BALLAST_MIB)
    notes.add(sandbox(), "then")
    point = sandbox().snapshot()
    notes.add(sandbox(), "later")
    asked = killed_during(server, box, lambda found: found.restore(point), delay_s)
    words = notes.add(sandbox(), "on")
    undo = [found for found in sandbox().history() if found.cause == "restore"]
    if words == ["then", "on"]:
        (kept,) = undo
        sandbox().restore(kept)
        assert notes.add(sandbox(), "forth") == ["then", "later", "forth"]
    else:
        assert words == ["then", "later", "on"]
        assert not asked.answered


def test_a_snapshot_is_taken_once_per_key_also_over_a_restart(own_server: MakeServer) -> None:
    server = own_server()
    box = server.client().sandboxes.create("base").id
    path, key = f"/v1/sandboxes/{box}/snapshots", {"idempotency-key": "the-key"}
    first = server.http("POST", path, headers=key)
    server.kill()
    server.start()
    again = server.http("POST", path, headers=key)
    assert (first.status_code, again.status_code, again.content) == (201, 201, first.content)
    assert again.headers["idempotent-replay"] == "true"
    assert [found.id for found in server.client().snapshots.list()] == [first.json()["id"]]


def test_a_sandbox_that_runs_out_of_memory_is_brought_back_from_just_before(any_make: MakeSandbox) -> None:
    sandbox = any_make(persistent=True, memory_mb=256)
    notes.begin(sandbox)
    notes.add(sandbox, "before")
    # As a leak does it; what takes everything at once is faster than any look.
    grow = "import time\nkept = []\nwhile True:\n    kept.append(b'x' * (2 << 20))\n    time.sleep(0.1)\n"
    leak = sandbox.processes.start(["python3", "-c", grow])
    until(lambda: sandbox.refresh().status == "failed", "it ran out of memory")
    assert sandbox.status_reason == "oom"
    with pytest.raises(errors.SandboxNotRunning, match="oom") as refused:
        sandbox.exec("true")
    assert "restore" in (refused.value.hint or "")
    (point,) = sandbox.history()
    assert (point.cause, point.status) == ("pressure", "durable")
    assert sandbox.restore(point) is None
    leak.kill()
    assert notes.add(sandbox, "after") == ["before", "after"]
