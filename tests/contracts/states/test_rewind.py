"""The contract of going back to a point."""

from __future__ import annotations

import asyncio

import pytest

from pandastack.errors import (
    CapacityError,
    Conflict,
    SnapshotNotFound,
)
from pandastack.host.app import HostService
from pandastack.wire.host import HostFork, HostRewind
from pandastack.wire.ids import SandboxId, new_snapshot_id

from ..benches import PATIENCE
from .places import Memory, Place, children, run, wanted, with_room_for

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300 * PATIENCE)]


class TestRewind:
    async def test_memory_processes_and_files_are_back_and_the_way_forth_is_kept(
        self, place: Place, host: HostService, box: SandboxId, memory: Memory
    ) -> None:
        await run(host, box, "echo then > /root/file")
        point, undo = new_snapshot_id(), new_snapshot_id()
        await host.snapshot(box, point)
        await run(host, box, "echo later > /root/file; echo more > /root/more")
        await memory.say(box, b"later\n")
        await memory.heard(box, b"begun\nbefore\nlater\n")
        before = await host.get(box)
        there = place.left()
        done = await host.rewind(HostRewind(sandbox=box, snapshot=point, undo=undo))
        assert (done.sandbox.id, done.sandbox.status, done.sandbox.boot_mode) == (box, "running", "rewind")
        assert done.undo is not None
        assert (done.undo.id, done.undo.sandbox_id) == (undo, box)
        assert (done.sandbox.memory_mb, done.sandbox.template_actual) == (before.memory_mb, before.template_actual)
        assert {kind: len(names) for kind, names in place.left().items()} == {kind: len(names) for kind, names in there.items()}
        assert await run(host, box, "cat /root/file; hostname; echo $OWN") == "then\nparent\nvalue\n"
        await memory.heard(box, b"begun\nbefore\n")
        await memory.say(box, b"again\n")
        await memory.heard(box, b"begun\nbefore\nagain\n")
        # The same point a second time, and then forth again.
        again = await host.rewind(HostRewind(sandbox=box, snapshot=point))
        assert again.undo is None
        await memory.heard(box, b"begun\nbefore\n")
        await host.rewind(HostRewind(sandbox=box, snapshot=undo))
        await memory.heard(box, b"begun\nbefore\nlater\n")
        assert await run(host, box, "cat /root/file /root/more") == "later\nmore\n"
        assert (await host.describe()).capacity.sandboxes == 1
        assert {found.id for found in await host.list_snapshots()} == {point, undo}
        assert [event.kind for event in await host.events(0, timeout_s=0)] == ["running"] * 3

    @pytest.mark.parametrize("verb", ["pause", "hibernate"])
    async def test_one_that_does_not_run_is_brought_back_as_it_was_then(
        self, place: Place, host: HostService, box: SandboxId, memory: Memory, verb: str
    ) -> None:
        point, undo = new_snapshot_id(), new_snapshot_id()
        await host.snapshot(box, point)
        await memory.say(box, b"later\n")
        await memory.heard(box, b"begun\nbefore\nlater\n")
        await (host.pause(box) if verb == "pause" else host.hibernate(box, reason="request"))
        done = await host.rewind(HostRewind(sandbox=box, snapshot=point, undo=undo))
        assert (done.sandbox.status, done.sandbox.stored_bytes) == ("running", 0)
        await memory.heard(box, b"begun\nbefore\n")
        await host.rewind(HostRewind(sandbox=box, snapshot=undo))
        await memory.heard(box, b"begun\nbefore\nlater\n")
        assert sorted(path.name for path in place.snapshots.iterdir()) == sorted([".new", point, undo])

    async def test_a_failed_one_comes_back(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        point = new_snapshot_id()
        await host.snapshot(box, point)
        await host.sandboxes.registry.fail(host.sandboxes.registry.get(box), "guest")
        assert (await host.describe()).capacity.sandboxes == 0
        done = await host.rewind(HostRewind(sandbox=box, snapshot=point, undo=new_snapshot_id()))
        assert (done.sandbox.status, done.sandbox.status_reason, done.undo) == ("running", None, None)
        assert (await host.describe()).capacity.sandboxes == 1
        await memory.say(box, b"on\n")
        await memory.heard(box, b"begun\nbefore\non\n")
        # And it can fail, and be noticed, a second time.
        await host.sandboxes.registry.fail(host.sandboxes.registry.get(box), "guest")
        assert (await host.get(box)).status == "failed"

    async def test_another_sandboxs_point_is_refused(self, host: HostService, box: SandboxId) -> None:
        (child,) = await host.fork(HostFork(parent=box, children=children(1)))
        point = await host.snapshot(child.id, new_snapshot_id())
        with pytest.raises(Conflict):
            await host.rewind(HostRewind(sandbox=box, snapshot=point.id))
        with pytest.raises(Conflict):
            await host.fork(HostFork(parent=box, children=children(1), snapshot=point.id))
        with pytest.raises(SnapshotNotFound):
            await host.rewind(HostRewind(sandbox=box, snapshot=new_snapshot_id()))
        assert await run(host, box, "echo on") == "on\n"

    async def test_without_room_for_both_it_goes_on_and_can_be_hibernated_first(
        self, place: Place, host: HostService, box: SandboxId, memory: Memory
    ) -> None:
        point = await host.snapshot(box, new_snapshot_id())
        before = place.left()
        host._registry.admission._totals = with_room_for(host, 1)
        with pytest.raises(CapacityError) as refused:
            await host.rewind(HostRewind(sandbox=box, snapshot=point.id, undo=new_snapshot_id()))
        assert "hibernate" in (refused.value.hint or "")
        assert place.left() == before
        assert await host.list_snapshots() == [point]
        await memory.say(box, b"on\n")
        await memory.heard(box, b"begun\nbefore\non\n")
        await host.hibernate(box, reason="request")
        assert (await host.rewind(HostRewind(sandbox=box, snapshot=point.id))).sandbox.status == "running"
        await memory.heard(box, b"begun\nbefore\n")

    async def test_a_request_that_was_under_way_learns_what_happened(self, host: HostService, box: SandboxId) -> None:
        point = await host.snapshot(box, new_snapshot_id())
        running = asyncio.create_task(run(host, box, "echo one; sleep 60"))
        await asyncio.sleep(0.3)
        await host.rewind(HostRewind(sandbox=box, snapshot=point.id))
        with pytest.raises(Conflict, match="earlier point"):
            await running

    async def test_it_survives_a_restart(self, place: Place) -> None:
        async with place.opened() as host:
            box = (await host.create(wanted())).id
            memory = Memory(host)
            await memory.begin(box)
            point = await host.snapshot(box, new_snapshot_id())
            await host.rewind(HostRewind(sandbox=box, snapshot=point.id))
        async with place.opened() as host:
            memory = Memory(host)
            await memory.say(box, b"after\n")
            await memory.heard(box, b"begun\nafter\n")
            assert (await host.describe()).capacity.sandboxes == 1
