"""Every step of hibernate, wake, snapshot, fork and rewind fails once, hangs once and is killed once. Nothing is lost, nothing is left.

The steps are enumerated by a run that goes well: a new one without a case here fails `test_every_step_has_a_case`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from hosts import Life, World, disk_full, reached, run, settled, until, wanted
from pandastack.errors import (
    CapacityError,
    DiskFull,
    GuestError,
    GuestGone,
    GuestTimeout,
    PandastackError,
    RuntimeFailed,
    SandboxNotFound,
    SnapshotUnusable,
)
from pandastack.host import identity, machines, registry, states
from pandastack.host.app import HostService
from pandastack.wire.host import HostChild, HostFork, HostRewind
from pandastack.wire.ids import ProcessId, SandboxId, SnapshotId, new_sandbox_id, new_snapshot_id
from pandastack.wire.processes import ProcessStart

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

# How each step of each verb may fail, and what the caller then learns.
_STILL: dict[str, list[tuple[PandastackError, type[PandastackError]]]] = {
    "usage": [(RuntimeFailed("no cgroup"), RuntimeFailed)],
    "machine.seal": [(GuestError(), GuestError), (GuestTimeout(), GuestTimeout)],
    "snapshot": [(RuntimeFailed("refused"), RuntimeFailed), (disk_full(), DiskFull)],
}
_NEW: dict[str, list[tuple[PandastackError, type[PandastackError]]]] = {
    "disk.create": [(disk_full(), DiskFull)],
    "disk.created": [(RuntimeFailed("mount"), RuntimeFailed)],
    "prepare": [(RuntimeFailed("runsc create"), RuntimeFailed)],
    "prepared": [(RuntimeFailed("no state"), RuntimeFailed)],
    "restore": [(RuntimeFailed("refused"), RuntimeFailed)],
    "restored": [(RuntimeFailed("died"), RuntimeFailed)],
    "connect": [(RuntimeFailed("no channel"), RuntimeFailed)],
    "hello": [(GuestTimeout(), GuestTimeout), (GuestGone(), GuestGone)],
    "machine.identity": [(GuestError(), GuestError), (GuestTimeout(), GuestTimeout), (GuestGone(), GuestGone)],
}
FAILURES: dict[str, dict[str, list[tuple[PandastackError, type[PandastackError]]]]] = {
    "hibernate": {
        **_STILL,
        "saved.publish": [(disk_full(), DiskFull)],
        "saved.published": [(disk_full(), DiskFull)],
        "ledger.write": [(disk_full(), DiskFull)],
    },
    "snapshot": {**_STILL, "saved.publish": [(disk_full(), DiskFull)], "machine.unseal": [(GuestError(), PandastackError)]},
    "wake": {
        **_NEW,
        "saved.check": [(SnapshotUnusable("damaged", reason="damaged"), SnapshotUnusable)],
        "ledger.write": [(disk_full(), DiskFull)],
    },
    "fork": {**_NEW, **_STILL, "ledger.write": [(disk_full(), DiskFull)], "machine.unseal": [(GuestError(), PandastackError)]},
    "rewind": {
        **_NEW,
        **_STILL,
        "saved.check": [(SnapshotUnusable("damaged", reason="damaged"), SnapshotUnusable)],
        "saved.publish": [(disk_full(), DiskFull)],
        "saved.published": [(disk_full(), DiskFull)],
        "ledger.write": [(disk_full(), DiskFull)],
    },
}
# What comes after the point of no return, where a failure is put right later: it is not the caller's.
LATER = {
    "hibernate": {"stop", "disk.delete"},
    "wake": {"saved.delete"},
    "fork": set[str](),
    "snapshot": {"saved.published"},
    "rewind": {"stop", "disk.delete"},
}
CASES = [
    (verb, step, error, expected)
    for verb, steps in FAILURES.items()
    for step, ways in steps.items()
    for error, expected in ways
    if step != "machine.unseal"
]
HANGS = [(verb, step) for verb, steps in FAILURES.items() for step in steps if not step.startswith(("ledger", "hello", "machine."))]


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (machines, registry):
        monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(identity, "IDENTITY_TIMEOUT_S", 0.3)
    monkeypatch.setattr(states, "HOOK_TIMEOUT_S", 0.3)
    monkeypatch.setattr(states, "STILL_TIMEOUT_S", 0.3)


async def do(host: HostService, verb: str, box: SandboxId, child: SandboxId) -> None:
    if verb == "hibernate":
        await host.hibernate(box, reason="request")
        await settled(host)
    elif verb == "wake":
        await host.wake(box)
        await settled(host)
    elif verb == "snapshot":
        await host.snapshot(box, new_snapshot_id())
    elif verb == "rewind":
        (point,) = [found.id for found in await host.list_snapshots() if found.id != child]
        await host.rewind(HostRewind(sandbox=box, snapshot=point, undo=SnapshotId(child)))
    else:
        await host.fork(HostFork(parent=box, children=[HostChild(id=child, hostname="child")]))


async def alive(host: HostService, verb: str) -> SandboxId:
    """A sandbox with something in memory, as the verb needs it."""
    request = wanted()
    await host.create(request)
    await host.start_process(request.id, ProcessStart(id="memory", cmd="echo begun; cat", stdin=True))
    if verb == "wake":
        await host.hibernate(request.id, reason="request")
        await settled(host)
    if verb == "rewind":
        await host.snapshot(request.id, new_snapshot_id())
        await run(host, request.id, "echo later > /later")
    return request.id


async def is_later(host: HostService, box: SandboxId) -> bool:
    """Whether it has what happened after the point of a rewind."""
    return await run(host, box, "cat /later") == (b"later\n", 0)


async def remembers(host: HostService, box: SandboxId) -> None:
    """It is woken if need be, and its process goes on with what it had."""

    async def data() -> AsyncIterator[bytes]:
        yield b"after\n"

    await host.write_stdin(box, ProcessId("memory"), data(), close=True)
    async with asyncio.timeout(20):
        while True:
            piece = await host.read_output(box, ProcessId("memory"), "stdout", offset=0, limit=1000)
            if piece.data == b"begun\nafter\n":
                return
            await asyncio.sleep(0.01)


def saved(world: World) -> list[str]:
    return sorted(path.name for path in (world.root / "snapshots").rglob("*") if path.name != ".new")


@pytest.mark.parametrize("verb", FAILURES)
async def test_every_step_has_a_case(world: World, host: HostService, verb: str) -> None:
    box = await alive(host, verb)
    world.runtime.steps.clear()
    await do(host, verb, box, new_sandbox_id())
    assert set(world.runtime.steps) - {"thaw", "machine.health", "freeze"} == set(FAILURES[verb]) | LATER[verb]


@pytest.mark.parametrize(
    ("verb", "step", "error", "expected"), CASES, ids=lambda value: value if isinstance(value, str) else type(value).__name__
)
async def test_a_step_that_fails_loses_nothing_and_leaves_nothing(
    world: World, host: HostService, verb: str, step: str, error: PandastackError, expected: type[PandastackError]
) -> None:
    box = await alive(host, verb)
    before = (world.left(), saved(world), (await host.get(box)).status, (await host.describe()).capacity)
    world.runtime.fail(step, error)
    child = new_sandbox_id()
    with pytest.raises(expected):
        await do(host, verb, box, child)
    await settled(host)
    assert (world.left(), saved(world), (await host.get(box)).status, (await host.describe()).capacity) == before
    assert [one.id for one in await host.list()] == [box]
    assert verb != "rewind" or await is_later(host, box)
    # And nothing stands in the way of the next try, not even with the same id.
    await do(host, verb, box, child)
    for one in await host.list():
        await remembers(host, one.id)


@pytest.mark.parametrize("verb", ["snapshot", "fork"])
async def test_a_sandbox_that_cannot_go_on_says_so(world: World, host: HostService, verb: str) -> None:
    box = await alive(host, verb)
    world.runtime.fail("machine.unseal", GuestError("it cannot"))
    await do(host, verb, box, new_sandbox_id())
    state = await host.get(box)
    assert (state.status, state.status_reason) == ("failed", "guest")


async def test_what_could_not_be_given_back_is_before_the_next_restore(world: World, host: HostService) -> None:
    box = await alive(host, "hibernate")
    world.runtime.fail("stop")
    await host.hibernate(box, reason="request")
    assert (await host.get(box)).status == "hibernated"
    await settled(host)
    assert len(world.runtime.machines) == 1
    await remembers(host, box)
    assert len(world.runtime.machines) == 1


async def test_a_delete_does_not_wait_for_a_calm_moment(world: World, host: HostService) -> None:
    """What a hibernated sandbox had is given back when nobody waits for anything, but at once where it is deleted."""
    box = await alive(host, "hibernate")
    with host.sandboxes.registry.backends.refills.paused():
        await host.hibernate(box, reason="request")
        await asyncio.sleep(0.05)
        assert len(world.runtime.machines) == 1
        await asyncio.wait_for(host.delete(box), 0.4)
        assert world.runtime.machines == {}


@pytest.mark.parametrize(("verb", "step"), HANGS)
async def test_deleted_in_a_step_that_hangs_it_leaves_nothing(world: World, host: HostService, verb: str, step: str) -> None:
    box = await alive(host, verb)
    hang = world.runtime.hang(step)
    child = new_sandbox_id()
    doing = asyncio.create_task(do(host, verb, box, child))
    await reached(hang)
    asyncio.get_running_loop().call_later(0.05, hang.release)
    await host.delete(box)
    await host.delete(child)
    await asyncio.gather(doing, return_exceptions=True)
    for snapshot in await host.list_snapshots():
        await host.delete_snapshot(snapshot.id)
    for one in await host.list():
        await host.delete(one.id)
    await settled(host)
    assert (world.left(), saved(world), (await host.describe()).capacity.sandboxes) == ({}, [], 0)
    with pytest.raises(SandboxNotFound):
        await host.get(box)


@pytest.mark.parametrize(("verb", "step"), HANGS)
async def test_a_caller_who_leaves_changes_nothing(world: World, host: HostService, verb: str, step: str) -> None:
    box = await alive(host, verb)
    hang = world.runtime.hang(step)
    child = new_sandbox_id()
    doing = asyncio.create_task(do(host, verb, box, child))
    await reached(hang)
    doing.cancel()
    await asyncio.gather(doing, return_exceptions=True)
    hang.release()
    expected = {"hibernate": "hibernated"}.get(verb, "running")
    await until(lambda: not host.sandboxes.states._jobs)
    assert (await host.get(box)).status == expected
    assert len(await host.list()) == (2 if verb == "fork" else 1)
    for one in await host.list():
        await remembers(host, one.id)


@pytest.fixture
def born(world: World) -> Iterator[list[Life]]:
    """Lives to be closed; the last one is closed after the test."""
    lives: list[Life] = []
    yield lives
    for life in lives[-1:]:
        life.close()


KILLED = [*HANGS, *[(verb, step) for verb, steps in LATER.items() for step in sorted(steps)]]


@pytest.mark.parametrize(("verb", "step"), KILLED)
def test_a_host_killed_in_any_step_starts_again_with_everything(world: World, born: list[Life], verb: str, step: str) -> None:
    born.append(first := Life(world))
    box = first.run(alive(first.host, verb))
    hang = world.runtime.hang(step)
    child = new_sandbox_id()
    first.begin(do(first.host, verb, box, child))
    first.until(hang)
    first.kill()
    born.append(second := Life(world))

    async def check() -> None:
        host = second.host
        assert [one.id for one in await host.list()] == [box]
        assert (await host.get(box)).status in ("running", "hibernated")
        await remembers(host, box)
        await settled(host)
        # Either one of the two is whole; and what is not there any more was kept.
        assert verb != "rewind" or await is_later(host, box) or child in {found.id for found in await host.list_snapshots()}
        assert (await host.describe()).capacity.sandboxes == 1
        assert {kind: len(names) for kind, names in world.left().items()} == {"runtime": 1, "disks": 1, "machines": 1, "ledger": 1}
        for snapshot in await host.list_snapshots():
            await host.verify_snapshot(snapshot.id)
            await host.delete_snapshot(snapshot.id)
        await settled(host)
        assert saved(world) == []

    second.run(check())


async def test_no_room_to_wake_keeps_what_was_saved(world: World, host: HostService) -> None:
    box = await alive(host, "wake")
    other = wanted(memory_mb=99_900)
    await host.create(other)
    with pytest.raises(CapacityError):
        await run(host, box, "echo hi")
    assert (await host.get(box)).status == "hibernated"
    await host.delete(other.id)
    await remembers(host, box)


async def test_two_verbs_at_once_take_turns(host: HostService) -> None:
    box = await alive(host, "fork")
    child, snapshot_id = new_sandbox_id(), new_snapshot_id()
    done: list[Any] = await asyncio.gather(
        host.fork(HostFork(parent=box, children=[HostChild(id=child, hostname="child")])),
        host.snapshot(box, snapshot_id),
        host.pause(box),
        run(host, box, "echo hi"),
        host.hibernate(box, reason="request"),
    )
    assert done[3] == (b"hi\n", 0)
    for one in (box, child):
        await remembers(host, one)
    await host.delete_snapshot(snapshot_id)


@pytest.mark.parametrize("asleep", [False, True])
async def test_a_sandbox_that_was_hibernated_or_failed_is_what_it_was_when_its_rewind_fails(
    world: World, host: HostService, asleep: bool
) -> None:
    box = await alive(host, "rewind")
    if asleep:
        await host.hibernate(box, reason="request")
        await settled(host)
    else:
        await host.sandboxes.registry.fail(host.sandboxes.registry.get(box), "guest")
    before = (world.left(), saved(world), await host.get(box), (await host.describe()).capacity)
    world.runtime.fail("restore")
    with pytest.raises(RuntimeFailed):
        await do(host, "rewind", box, new_sandbox_id())
    assert (world.left(), saved(world), await host.get(box), (await host.describe()).capacity) == before
    await do(host, "rewind", box, new_sandbox_id())
    await remembers(host, box)
    assert not await is_later(host, box)


async def test_a_sandbox_that_fails_while_it_is_rewound_comes_back(world: World, host: HostService) -> None:
    box = await alive(host, "rewind")
    hang = world.runtime.hang("restore")
    doing = asyncio.create_task(do(host, "rewind", box, new_sandbox_id()))
    await reached(hang)
    await host.sandboxes.registry.fail(host.sandboxes.registry.get(box), "guest")
    hang.release()
    await doing
    assert (await host.get(box)).status == "running"
    assert (await host.describe()).capacity.sandboxes == 1
    await remembers(host, box)


@pytest.mark.parametrize("step", ["snapshot", "saved.publish", "restore", "machine.identity"])
async def test_a_rewind_that_is_given_up_has_not_happened(world: World, host: HostService, step: str) -> None:
    box, undo = await alive(host, "rewind"), new_snapshot_id()
    before = (world.left(), saved(world))
    guest_step = step.startswith("machine.")
    hang = None if guest_step else world.runtime.hang(step)
    doing = asyncio.create_task(do(host, "rewind", box, undo))
    if hang is not None:
        await reached(hang)
    else:
        await asyncio.sleep(0)
    assert await host.give_up_snapshot(undo) is None
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(doing, 5)
    assert await is_later(host, box)
    assert (world.left(), saved(world)) == before
    await remembers(host, box)


async def test_a_rewind_that_is_over_cannot_be_given_up(world: World, host: HostService) -> None:
    box, undo = await alive(host, "rewind"), new_snapshot_id()
    await do(host, "rewind", box, undo)
    kept = await host.give_up_snapshot(undo)
    assert kept is not None
    assert kept.id == undo
    assert not await is_later(host, box)


async def test_a_request_does_not_bring_back_what_is_being_deleted(world: World, host: HostService) -> None:
    box = await alive(host, "hibernate")
    hang = world.runtime.hang("stop")
    await host.hibernate(box, reason="request")
    await reached(hang)
    deleting = asyncio.create_task(host.delete(box))
    await asyncio.sleep(0.01)
    waking = asyncio.create_task(run(host, box, "echo hi"))
    await asyncio.sleep(0.1)
    hang.release()
    await deleting
    with pytest.raises(SandboxNotFound):
        await waking
    await settled(host)
    assert (world.left(), saved(world), await host.list()) == ({}, [], [])
    assert (await host.describe()).capacity.sandboxes == 0
