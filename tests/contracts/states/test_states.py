"""The contract of pause, hibernate, wake and snapshots."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from hosts import settled, until
from pandastack.errors import (
    Conflict,
    HookFailed,
    InvalidRequest,
    SandboxNotFound,
    SnapshotNotFound,
    SnapshotUnusable,
)
from pandastack.host.app import HostService
from pandastack.wire.host import HostFork
from pandastack.wire.ids import ProcessId, SandboxId, SnapshotId, new_sandbox_id, new_snapshot_id
from pandastack.wire.processes import SignalRequest

from ..benches import PATIENCE, runsc
from .places import HOOK, Memory, Place, children, flip_last, run, wanted

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300 * PATIENCE)]


class TestPause:
    async def test_a_paused_sandbox_moves_when_it_is_resumed(self, host: HostService, box: SandboxId) -> None:
        assert (await host.pause(box)).status == "paused"
        assert (await host.pause(box)).status == "paused"
        before = (await host.metrics(box)).host_cpu_seconds
        await asyncio.sleep(0.2)
        assert (await host.metrics(box)).host_cpu_seconds - before < 0.02
        assert (await host.get(box)).status == "paused", "to look resumes nothing"
        assert (await host.resume(box)).status == "running"
        assert (await host.resume(box)).status == "running"
        assert await run(host, box, "echo on") == "on\n"

    async def test_a_request_resumes_it(self, host: HostService, box: SandboxId) -> None:
        await host.pause(box)
        assert await run(host, box, "echo on") == "on\n"
        assert (await host.get(box)).status == "running"
        kinds = [event.kind for event in await host.events(0, timeout_s=0)]
        assert kinds == ["paused", "running"]

    async def test_it_stays_paused_over_a_restart(self, place: Place) -> None:
        async with place.opened() as host:
            box = (await host.create(wanted())).id
            await run(host, box, "echo kept > /root/file")
            await host.pause(box)
        async with place.opened() as host:
            assert (await host.get(box)).status == "paused"
            assert await run(host, box, "cat /root/file") == "kept\n"


class TestHibernate:
    async def test_it_holds_nothing_and_comes_back_as_it_was(self, place: Place, host: HostService, box: SandboxId, memory: Memory) -> None:
        await run(host, box, "echo kept > /root/file")
        asleep = await host.hibernate(box, reason="request")
        assert (asleep.status, asleep.status_reason) == ("hibernated", "request")
        assert asleep.stored_bytes > 0
        await settled(host)
        assert list(place.left()) == ["ledger"]
        assert (await host.describe()).capacity.sandboxes == 0
        assert (await host.hibernate(box, reason="request")).status == "hibernated"
        assert (await host.wake(box)).status == "running"
        assert await run(host, box, "cat /root/file; hostname; echo $OWN") == "kept\nparent\nvalue\n"
        await memory.say(box, b"after\n")
        await memory.heard(box, b"begun\nbefore\nafter\n")
        assert (await host.describe()).capacity.sandboxes == 1
        await settled(host)
        assert [path.name for path in place.snapshots.iterdir()] == [".new"]

    async def test_ten_requests_at_once_wake_it_once(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await host.hibernate(box, reason="idle")
        said = await asyncio.gather(*(run(host, box, f"echo {number}") for number in range(10)))
        assert said == [f"{number}\n" for number in range(10)]
        assert [event.kind for event in await host.events(0, timeout_s=0)] == ["hibernated", "running"]
        await memory.heard(box, b"begun\nbefore\n")

    async def test_looking_wakes_nothing(self, host: HostService, box: SandboxId) -> None:
        await host.hibernate(box, reason="idle")
        for _ in range(3):
            assert (await host.get(box)).status == "hibernated"
            assert [one.status for one in await host.list()] == ["hibernated"]
        assert not (await host.get(box)).busy

    async def test_five_rounds_lose_nothing(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        heard = b"begun\nbefore\n"
        for number in range(5):
            await run(host, box, f"echo {number} > /root/{number}")
            await memory.say(box, b"round %d\n" % number)
            heard += b"round %d\n" % number
            await host.hibernate(box, reason="request")
        assert await run(host, box, "cat /root/0 /root/1 /root/2 /root/3 /root/4") == "0\n1\n2\n3\n4\n"
        await memory.heard(box, heard)

    async def test_it_survives_a_restart(self, place: Place) -> None:
        async with place.opened() as host:
            box = (await host.create(wanted())).id
            memory = Memory(host)
            await memory.begin(box)
            await host.hibernate(box, reason="shutdown")
        async with place.opened() as host:
            state = await host.get(box)
            assert (state.status, state.status_reason) == ("hibernated", "shutdown")
            memory = Memory(host)
            await memory.say(box, b"after\n")
            await memory.heard(box, b"begun\nafter\n")

    async def test_one_that_is_not_idle_is_left_alone(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        with pytest.raises(Conflict):
            await host.hibernate(box, reason="idle", idle_for_s=0.0)
        assert (await host.get(box)).status == "running"
        await host.signal_process(box, ProcessId("memory"), SignalRequest(signal="KILL"))
        sandbox = host.sandboxes.registry.get(box)
        await until(lambda: sandbox.idle_for(0.1), 30)
        assert (await host.hibernate(box, reason="idle", idle_for_s=0.1)).status == "hibernated"

    async def test_a_paused_one_can_be_hibernated(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await host.pause(box)
        assert (await host.hibernate(box, reason="request")).status == "hibernated"
        assert (await host.resume(box)).status == "running"
        await memory.heard(box, b"begun\nbefore\n")

    async def test_a_damaged_one_is_refused_and_kept(self, place: Place, host: HostService, box: SandboxId) -> None:
        await host.hibernate(box, reason="request")
        (folder,) = [path for path in place.snapshots.iterdir() if path.name != ".new"]
        victim = max((path for path in folder.iterdir() if path.name != "manifest.json"), key=lambda path: path.stat().st_size)
        flip_last(victim)
        with pytest.raises(SnapshotUnusable) as refused:
            await run(host, box, "echo hi")
        assert refused.value.fields["reason"] == "damaged"
        assert (await host.get(box)).status == "hibernated"
        assert (await host.describe()).capacity.sandboxes == 0
        flip_last(victim)
        assert await run(host, box, "echo hi") == "hi\n"

    async def test_a_deleted_one_leaves_nothing(self, place: Place, host: HostService, box: SandboxId) -> None:
        await host.hibernate(box, reason="request")
        await host.delete(box)
        assert place.left() == {}
        assert [path.name for path in place.snapshots.iterdir()] == [".new"]


class TestSnapshot:
    async def test_sandboxes_made_from_one_go_on_where_it_was_taken(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await run(host, box, "echo kept > /root/file")
        made = await host.snapshot(box, new_snapshot_id())
        assert (made.sandbox_id, made.template, made.memory_mb) == (box, "base", 256)
        assert made.size_bytes > 0
        assert await host.list_snapshots() == [made]
        assert await host.snapshot(box, made.id) == made
        await run(host, box, "echo later > /root/file")
        await memory.say(box, b"later\n")
        await memory.heard(box, b"begun\nbefore\nlater\n")
        await host.delete(box)
        one = await host.create(wanted(snapshot=made.id, hostname="one", env={"MORE": "yes"}, memory_mb=None))
        other = await host.create(wanted(snapshot=made.id, hostname="other"))
        assert (one.memory_mb, one.template_actual) == (256, "base")
        assert await run(host, one.id, "cat /root/file; hostname; echo $OWN $MORE") == "kept\none\nvalue yes\n"
        assert await run(host, other.id, "cat /root/file; hostname") == "kept\nother\n"
        for copy in (one.id, other.id):
            await memory.say(copy, copy.encode())
            await memory.heard(copy, b"begun\nbefore\n" + copy.encode())

    async def test_it_is_proved_by_a_restore_in_which_nothing_runs(self, place: Place, host: HostService, box: SandboxId) -> None:
        made = await host.snapshot(box, new_snapshot_id())
        before = place.left()
        await host.verify_snapshot(made.id)
        assert place.left() == before
        assert (await host.describe()).capacity.sandboxes == 1

    async def test_one_that_was_tampered_with_proves_nothing(self, place: Place, host: HostService, box: SandboxId) -> None:
        made = await host.snapshot(box, new_snapshot_id())
        for path in (place.snapshots / made.id).iterdir():
            if path.name != "manifest.json":
                os.truncate(path, path.stat().st_size - 1)
        for attempt in (host.verify_snapshot(made.id), host.create(wanted(snapshot=made.id))):
            with pytest.raises(SnapshotUnusable) as refused:
                await attempt
            assert refused.value.fields["reason"] == "truncated"
        assert len(await host.list()) == 1

    async def test_an_unknown_one_is_not_found(self, host: HostService, box: SandboxId) -> None:
        unknown = SnapshotId("00000000-0000-4000-8000-00000000000f")
        await host.delete_snapshot(unknown)
        for attempt in (host.verify_snapshot(unknown), host.create(wanted(snapshot=unknown))):
            with pytest.raises(SnapshotNotFound):
                await attempt
        with pytest.raises(SandboxNotFound):
            await host.snapshot(new_sandbox_id(), new_snapshot_id())

    async def test_less_than_it_has_is_refused(self, host: HostService, box: SandboxId) -> None:
        made = await host.snapshot(box, new_snapshot_id())
        with pytest.raises(InvalidRequest) as refused:
            await host.create(wanted(snapshot=made.id, memory_mb=128))
        assert refused.value.fields["field"] == "memory_mb"

    async def test_of_a_hibernated_sandbox_it_wakes_nobody(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await host.hibernate(box, reason="request")
        made = await host.snapshot(box, new_snapshot_id())
        assert (await host.get(box)).status == "hibernated"
        await host.delete(box)
        copy = (await host.create(wanted(snapshot=made.id))).id
        await memory.heard(copy, b"begun\nbefore\n")

    async def test_a_hibernated_sandboxes_own_state_is_none(self, place: Place, host: HostService, box: SandboxId) -> None:
        await host.hibernate(box, reason="request")
        assert await host.list_snapshots() == []
        (folder,) = [path for path in place.snapshots.iterdir() if path.name != ".new"]
        await host.delete_snapshot(SnapshotId(folder.name))
        assert await run(host, box, "echo there") == "there\n"

    async def test_a_hook_that_refuses_stops_it_and_harms_nothing(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        async def script() -> AsyncIterator[bytes]:
            yield b"#!/bin/sh\nexit 1\n"

        await host.write_file(box, HOOK, script(), mode=0o755)
        with pytest.raises(HookFailed):
            await host.snapshot(box, new_snapshot_id())
        with pytest.raises(HookFailed):
            await host.hibernate(box, reason="request")
        with pytest.raises(HookFailed):
            await host.fork(HostFork(parent=box, children=children(2)))
        assert [one.status for one in await host.list()] == ["running"]
        assert await host.list_snapshots() == []
        await memory.say(box, b"on\n")
        await memory.heard(box, b"begun\nbefore\non\n")


async def test_use_follows_a_sandbox_through_its_states(place: Place, host: HostService, box: SandboxId) -> None:
    before = await host.usage(box)
    assert before.memory_own_bytes > 1 << 19
    kept = await host.hibernate(box, reason="request")
    now = await host.usage(box)
    assert (now.status, now.memory_own_bytes, now.disk_own_bytes) == ("hibernated", 0, 0)
    assert now.stored_own_bytes + now.stored_shared_bytes == kept.stored_bytes
    assert (now.stored_own_bytes > 0, now.stored_shared_bytes > 0) == (True, place.shares)
    snapshot = await host.snapshot(box, new_snapshot_id())
    shared = await host.usage(box)
    assert shared.stored_shared_bytes > now.stored_shared_bytes
    assert shared.stored_own_bytes + shared.stored_shared_bytes == kept.stored_bytes
    assert (await host.get(box)).status == "hibernated", "looking wakes nothing"
    await host.wake(box)
    await settled(host)
    # The sandbox has given its saved state back, so what both had is the snapshot's alone.
    alone = await host.snapshot_usage(snapshot.id)
    assert alone.own_bytes + alone.shared_bytes == snapshot.size_bytes
    assert (alone.own_bytes > 0, alone.shared_bytes > 0) == (True, place.shares)
    assert (await host.usage(box)).stored_shared_bytes == 0


def test_the_tests_run_on_what_is_there() -> None:
    """A skip for a runtime that this machine has would be a defect."""
    if os.geteuid() == 0:
        assert runsc("gvisor").exists()
