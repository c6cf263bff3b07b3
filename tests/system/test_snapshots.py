"""Snapshots outlive their sandbox, are proved by a trial restore, and are refused when they are not what was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.sdk.client import Client

from . import notes
from .conftest import MakeSandbox, MakeServer
from .servers import Server


def test_a_snapshot_outlives_its_sandbox_and_is_proved(any_make: MakeSandbox, any_client: Client) -> None:
    sandbox = any_make()
    notes.begin(sandbox)
    notes.add(sandbox, "before")
    sandbox.filesystem.write("/var/kept", "kept")
    name = sandbox.snapshot()
    try:
        assert notes.add(sandbox, "later") == ["before", "later"]
        sandbox.kill()
        found = any_client.snapshots.wait_verified(name, 120)
        assert (found.status, found.sandbox_id, found.template_actual) == ("verified", sandbox.id, "base")
        assert found.size_bytes > 0
        assert [one.id for one in any_client.snapshots.list(sandbox.id)] == [name]
        with any_client.sandboxes.create(from_snapshot=name) as one, any_client.sandboxes.create(from_snapshot=name) as other:
            assert (one.from_snapshot, one.filesystem.read_text("/var/kept")) == (name, "kept")
            assert notes.add(one, "one") == ["before", "one"]
            assert notes.add(other, "other") == ["before", "other"]
            assert one.exec("hostname; cat /etc/machine-id").stdout != other.exec("hostname; cat /etc/machine-id").stdout
    finally:
        any_client.snapshots.delete(name)
    with pytest.raises(errors.SnapshotNotFound):
        any_client.sandboxes.create(from_snapshot=name)


def largest(server: Server, snapshot_id: str) -> Path:
    return max((server.data / "snapshots" / snapshot_id).iterdir(), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


HARM: dict[str, Callable[[Path], None]] = {"damaged": flip, "truncated": cut, "missing": Path.unlink}


def test_a_snapshot_that_is_not_what_was_saved_is_refused(own_server: MakeServer) -> None:
    server = own_server()
    client = server.client()
    sandbox = client.sandboxes.create("base")
    notes.begin(sandbox)
    harmed = {reason: sandbox.snapshot() for reason in HARM}
    for name in harmed.values():
        client.snapshots.wait_verified(name, 120)
    whole, unproved = sandbox.snapshot(), sandbox.snapshot()
    # Before it has been tried.
    server.kill()
    sandbox_id = sandbox.id
    for reason, name in [*harmed.items(), ("damaged", unproved)]:
        HARM[reason](largest(server, name))
    server.start()
    client = server.client()
    client.sandboxes.delete(sandbox_id)
    with pytest.raises(errors.SnapshotUnusable):
        client.snapshots.wait_verified(unproved, 120)
    found = client.snapshots.get(unproved)
    assert (found.status, found.status_reason) == ("failed", "damaged")

    def all_refused() -> None:
        for reason, name in [*harmed.items(), ("damaged", unproved)]:
            with pytest.raises(errors.SnapshotUnusable) as refused:
                client.sandboxes.create(from_snapshot=name)
            assert (refused.value.fields["reason"], refused.value.http_status) == (reason, 409), refused.value
            assert refused.value.message
        assert client.sandboxes.list() == []
        assert server.machines() == set()

    all_refused()
    assert client.snapshots.wait_verified(whole, 120).status == "verified"
    server.stop()
    server.start()
    client = server.client()
    all_refused()
    with client.sandboxes.create(from_snapshot=whole) as copy:
        assert notes.add(copy, "word") == ["word"]
