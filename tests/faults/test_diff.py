"""A comparison that fails at any step, or is killed, leaves nothing of its views."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hosts import Life, World, until, wanted
from pandastack.control.hosts import closing
from pandastack.errors import GuestGone, GuestProtocolError, PandastackError, RuntimeFailed
from pandastack.host.app import HostService
from pandastack.wire.diff import HostPoint
from pandastack.wire.ids import SandboxId, new_snapshot_id

pytestmark = pytest.mark.anyio

STEPS = [
    "prepare",
    "prepared",
    "restore",
    "restored",
    "connect",
    "disk.create",
    "disk.created",
    "hello",
    "file.scan",
    "file.digests",
    "file.read",
]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


async def _write(host: HostService, box: SandboxId, data: bytes) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield data

    await host.write_file(box, b"/w/file", pieces())


async def _points(host: HostService) -> tuple[SandboxId, list[HostPoint]]:
    box = (await host.create(wanted())).id
    points = []
    for data in (b"one\n", b"two\n"):
        await _write(host, box, data)
        name = new_snapshot_id()
        await host.snapshot(box, name)
        points.append(HostPoint(kind="snapshot", id=name))
    return box, points


async def _compare(host: HostService, a: HostPoint, b: HostPoint) -> list[str]:
    async with closing(host.diff(a, b, b"/w", patch=True)) as found:
        return [change.change.path async for change in found]


@pytest.mark.parametrize("error", [RuntimeFailed, GuestGone, GuestProtocolError])
@pytest.mark.parametrize("step", STEPS)
async def test_a_step_fails(tmp_path: Path, step: str, error: type[PandastackError]) -> None:
    if (step, error) == ("hello", RuntimeFailed):
        pytest.skip("a greeting cannot refuse")
    world = World(tmp_path)
    async with world.opened() as host:
        box, (one, two) = await _points(host)
        before = world.left()
        world.runtime.fail(step, error("made to fail"))
        with pytest.raises(PandastackError):
            await _compare(host, one, two)
        assert world.left() == before
        assert (await host.describe()).capacity.sandboxes == 1
        assert await _compare(host, one, two) == ["/w/file"]
        await host.delete(box)
    world.clear()


async def test_a_view_that_breaks_the_protocol_does_not_harm_a_sandbox(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.opened() as host:
        box, (one, _) = await _points(host)
        world.runtime.fail("file.scan", GuestProtocolError("made to fail"))
        with pytest.raises(GuestProtocolError):
            await _compare(host, one, HostPoint(kind="sandbox", id=box))
        assert (await host.get(box)).status == "running"
        assert await _compare(host, one, HostPoint(kind="sandbox", id=box)) == ["/w/file"]
        await host.delete(box)
    world.clear()


def test_kill_9_in_the_middle(tmp_path: Path) -> None:
    world = World(tmp_path)
    life = Life(world)
    box, (one, two) = life.run(_points(life.host))
    before = world.left()
    hang = world.runtime.hang("restored")
    life.begin(_compare(life.host, one, two))
    life.until(hang)
    assert world.left() != before
    life.kill()
    life = Life(world)
    life.run(until(lambda: world.left() == before))
    assert life.run(_compare(life.host, one, two)) == ["/w/file"]
    life.run(life.host.delete(box))
    life.close()
    world.clear()
