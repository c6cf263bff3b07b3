"""Blank machines: who gets one, that a dead one is nobody's, and that none of them is left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hosts import Life, World, run, settled, until, wanted
from pandastack.errors import RuntimeFailed
from pandastack.host import slots
from pandastack.host.machines import Machines
from pandastack.host.service import HostService
from pandastack.wire.host import HostChild, HostFork
from pandastack.wire.ids import SandboxId, new_sandbox_id

pytestmark = pytest.mark.usefixtures("no_leaks")
BLANKS = 2


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(slots, "_REST_S", 0.01)
    monkeypatch.setattr(slots, "_RETRY_FIRST_S", 0.01)
    world = World(tmp_path)
    world.blanks = BLANKS
    yield world
    assert world.left() == {}, "every blank machine is given back at the end"
    world.clear()


@pytest.fixture
async def host(world: World) -> AsyncIterator[HostService]:
    async with world.opened() as host:
        yield host
        for sandbox in await host.list():
            await host.delete(sandbox.id)


def machines(host: HostService) -> Machines:
    return host.backends.list()[0].machines


async def full(host: HostService) -> None:
    await until(lambda: machines(host).blanks.ready == BLANKS)


@pytest.fixture
async def box(world: World, host: HostService) -> SandboxId:
    """A sandbox of a shape for which blank machines wait."""
    request = wanted()
    await host.create(request)
    await full(host)
    world.runtime.steps.clear()
    return request.id


async def fork(host: HostService, box: SandboxId, count: int) -> list[SandboxId]:
    children = [HostChild(id=new_sandbox_id(), hostname=f"child-{number}") for number in range(count)]
    return [made.id for made in await host.fork(HostFork(parent=box, children=children))]


@pytest.mark.anyio
async def test_a_fork_takes_what_waits_and_makes_the_rest(world: World, host: HostService, box: SandboxId) -> None:
    children = await fork(host, box, BLANKS + 1)
    assert [step for step in world.runtime.steps if step == "prepare"] == ["prepare"]
    assert [await run(host, child, "hostname") for child in children] == [(f"child-{number}\n".encode(), 0) for number in range(BLANKS + 1)]
    await full(host)


@pytest.mark.anyio
async def test_a_wake_takes_one(world: World, host: HostService, box: SandboxId) -> None:
    await host.hibernate(box, reason="request")
    await host.wake(box)
    assert "prepare" not in world.runtime.steps
    assert await run(host, box, "echo hi") == (b"hi\n", 0)


@pytest.mark.anyio
async def test_one_that_died_while_it_waited_is_passed_over(world: World, host: HostService, box: SandboxId) -> None:
    mine = host.sandboxes.registry.get(box).machine
    waiting = [machine for machine in world.runtime.machines.values() if machine is not mine]
    assert len(waiting) == BLANKS
    for machine in waiting:
        machine.end("oom")
    (child,) = await fork(host, box, 1)
    assert world.runtime.steps.count("prepare") == 1
    assert await run(host, child, "echo hi") == (b"hi\n", 0)
    await full(host)


@pytest.mark.anyio
async def test_one_that_fails_to_restore_fails_the_fork_and_is_gone(world: World, host: HostService, box: SandboxId) -> None:
    world.runtime.fail("restore")
    with pytest.raises(RuntimeFailed):
        await fork(host, box, 2)
    await settled(host)
    await full(host)
    assert len(world.runtime.machines) == 1 + BLANKS
    assert await fork(host, box, 2)


def test_a_killed_host_leaves_none_after_its_next_start(world: World) -> None:
    first = Life(world)
    first.run(first.host.create(wanted()))
    first.run(full(first.host))
    first.kill()
    assert len(world.runtime.machines) == 1 + BLANKS
    second = Life(world)
    try:
        assert len(world.runtime.machines) == 1
        for sandbox in second.run(second.host.list()):
            second.run(second.host.delete(sandbox.id))
    finally:
        second.close()
