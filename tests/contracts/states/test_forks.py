"""The contract of forks."""

from __future__ import annotations

import asyncio

import pytest

from pandastack.errors import (
    CapacityError,
    SandboxNotFound,
)
from pandastack.host.app import HostService
from pandastack.wire.host import HostFork
from pandastack.wire.ids import SandboxId, new_sandbox_id, new_snapshot_id

from ..benches import PATIENCE
from .places import Memory, Place, children, run, with_room_for

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300 * PATIENCE)]


class TestFork:
    async def test_children_have_what_the_parent_had_and_go_their_own_ways(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await run(host, box, "echo kept > /root/file")
        request = HostFork(parent=box, children=children(3))
        made = await host.fork(request)
        assert [child.id for child in made] == [child.id for child in request.children]
        parent = await host.get(box)
        for child in made:
            assert (child.status, child.template_actual, child.memory_mb, child.disk_mb) == (
                "running", parent.template_actual, parent.memory_mb, parent.disk_mb,
            )  # fmt: skip
        assert await host.fork(request) == [await host.get(child.id) for child in made]
        for number, child in enumerate(made):
            assert await run(host, child.id, "cat /root/file; hostname; echo $OWN") == f"kept\nchild-{number}\nvalue\n"
        everyone = [box, *(child.id for child in made)]
        for one in everyone:
            await memory.say(one, one.encode())
            await run(host, one, f"echo {one} > /root/file")
        for one in everyone:
            await memory.heard(one, b"begun\nbefore\n" + one.encode())
            assert await run(host, one, "cat /root/file") == f"{one}\n"

    async def test_a_fork_can_be_forked_and_outlives_its_parent(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        (child,) = await host.fork(HostFork(parent=box, children=children(1)))
        await memory.say(child.id, b"child\n")
        (grandchild,) = await host.fork(HostFork(parent=child.id, children=children(1)))
        await host.delete(box)
        await host.delete(child.id)
        await memory.say(grandchild.id, b"grandchild\n")
        await memory.heard(grandchild.id, b"begun\nbefore\nchild\ngrandchild\n")

    async def test_a_hibernated_parent_is_forked_without_waking(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await host.hibernate(box, reason="request")
        made = await host.fork(HostFork(parent=box, children=children(2)))
        assert (await host.get(box)).status == "hibernated"
        for child in made:
            await memory.heard(child.id, b"begun\nbefore\n")
        await memory.heard(box, b"begun\nbefore\n")

    async def test_a_paused_parent_stays_paused(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        await host.pause(box)
        (child,) = await host.fork(HostFork(parent=box, children=children(1)))
        assert (await host.get(box)).status == "paused"
        assert child.status == "running"
        await memory.heard(child.id, b"begun\nbefore\n")

    async def test_a_request_that_is_under_way_goes_on_in_the_parent(self, host: HostService, box: SandboxId) -> None:
        running = asyncio.create_task(run(host, box, "echo one; sleep 1; echo two"))
        await asyncio.sleep(0.3)
        await host.fork(HostFork(parent=box, children=children(1)))
        assert await running == "one\ntwo\n"

    async def test_requests_meanwhile_are_answered(self, host: HostService, box: SandboxId) -> None:
        forking = asyncio.create_task(host.fork(HostFork(parent=box, children=children(2))))
        said = []
        while not forking.done():
            said.append(await run(host, box, "echo hi"))
        await forking
        assert set(said) == {"hi\n"}

    async def test_an_unknown_parent_is_not_found(self, place: Place, host: HostService) -> None:
        with pytest.raises(SandboxNotFound):
            await host.fork(HostFork(parent=new_sandbox_id(), children=children(1)))
        assert place.left() == {}

    async def test_all_or_none_where_there_is_no_room(self, place: Place, host: HostService, box: SandboxId, memory: Memory) -> None:
        before = place.left()
        host._registry.admission._totals = with_room_for(host, 3)
        with pytest.raises(CapacityError):
            await host.fork(HostFork(parent=box, children=children(3)))
        assert [one.id for one in await host.list()] == [box]
        assert place.left() == before
        assert len(await host.fork(HostFork(parent=box, children=children(2)))) == 2
        await memory.heard(box, b"begun\nbefore\n")

    async def test_sixteen_at_once(self, host: HostService, box: SandboxId, memory: Memory) -> None:
        made = await host.fork(HostFork(parent=box, children=children(16)))
        assert len({child.id for child in made}) == 16
        for child in made:
            await memory.heard(child.id, b"begun\nbefore\n")
        await asyncio.gather(*(host.delete(child.id) for child in made))
        assert [one.id for one in await host.list()] == [box]


class TestForkAtAPoint:
    @pytest.mark.parametrize("parent_is", ["running", "hibernated", "failed"])
    async def test_children_are_what_the_parent_was_and_it_is_not_touched(
        self, host: HostService, box: SandboxId, memory: Memory, parent_is: str
    ) -> None:
        point = await host.snapshot(box, new_snapshot_id())
        await memory.say(box, b"later\n")
        await memory.heard(box, b"begun\nbefore\nlater\n")
        if parent_is == "hibernated":
            await host.hibernate(box, reason="request")
        elif parent_is == "failed":
            await host.sandboxes.registry.fail(host.sandboxes.registry.get(box), "guest")
        made = await host.fork(HostFork(parent=box, children=children(2), snapshot=point.id))
        assert (await host.get(box)).status == parent_is
        assert [child.status for child in made] == ["running", "running"]
        for number, child in enumerate(made):
            await memory.heard(child.id, b"begun\nbefore\n")
            assert await run(host, child.id, "hostname") == f"child-{number}\n"
        if parent_is != "failed":
            await memory.heard(box, b"begun\nbefore\nlater\n")
