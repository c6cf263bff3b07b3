"""A host with two runtimes at the same time: who gets which, that everything stays where it began, and what becomes of a sandbox
whose runtime is gone after a restart.

`calm` stands where gVisor does and is tried first; `fakevm` has to be handled like QEMU, and emulates.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hosts import IMAGE_MIB, World, fake_vm, run, settled, until, wanted
from pandastack.control.hosts import closing
from pandastack.errors import (
    CapacityError,
    HostUnfit,
    InvalidRequest,
    IsolationTooWeak,
    RuntimeFailed,
    RuntimeUnavailable,
    SandboxNotRunning,
    SnapshotUnusable,
    TemplateNotReady,
)
from pandastack.host import backends, bakery, sandboxes
from pandastack.host.app import HostService
from pandastack.host.runtimes.base import Probe
from pandastack.host.runtimes.fake import FakeRuntime
from pandastack.wire.diff import HostPoint
from pandastack.wire.host import HostChild, HostFork, HostRewind, HostSandbox
from pandastack.wire.ids import SandboxId, SnapshotId, new_sandbox_id, new_snapshot_id

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

CALM, VM = "calm", "fakevm"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, runtimes=[FakeRuntime(CALM, isolation="gvisor"), fake_vm()])


@pytest.fixture
async def host(world: World) -> AsyncIterator[HostService]:
    async with world.opened() as made:
        yield made
        for left in await made.list():
            await made.delete(left.id)
        for snapshot in await made.list_snapshots():
            await made.delete_snapshot(snapshot.id)
    assert world.left() == {}


def vm(world: World) -> FakeRuntime:
    return world.runtimes[1]


def without_vm(world: World) -> None:
    """From the next host on."""
    vm(world).outcome = Probe(works=False, reason="no kernel boots", hint="use another machine")


async def fork(host: HostService, parent: SandboxId, snapshot: SnapshotId | None = None) -> HostSandbox:
    (child,) = await host.fork(HostFork(parent=parent, children=[HostChild(id=new_sandbox_id(), hostname="child")], snapshot=snapshot))
    return child


# Which one


@pytest.mark.parametrize(("isolation", "expected"), [("auto", CALM), ("microvm", VM), (VM, VM), (CALM, CALM)])
async def test_a_create_says_which_and_is_told_what_it_got(world: World, host: HostService, isolation: str, expected: str) -> None:
    made = await host.create(wanted(isolation=isolation))
    facts = {CALM: ("gvisor", None, False), VM: ("microvm", "tcg", True)}
    assert made.runtime == expected
    assert (made.isolation, made.acceleration, made.own_kernel) == facts[expected]
    assert [len(runtime.machines) for runtime in world.runtimes] == ([1, 0] if expected == CALM else [0, 1])
    assert (await run(host, made.id, "echo hello")) == (b"hello\n", 0)
    assert await host.get(made.id) == (await host.list())[0]


async def test_auto_takes_a_microvm_with_kvm_before_gvisor(tmp_path: Path) -> None:
    world = World(tmp_path, runtimes=[FakeRuntime(CALM, isolation="gvisor"), fake_vm(acceleration="kvm")])
    hang = vm(world).hang("probe")
    opening = asyncio.create_task(world.start())
    await until(hang.reached.is_set)
    hang.release()  # The bake that the world starts with waits for it: it could win.
    host, tasks = await opening
    made = await host.create(wanted())
    assert (made.runtime, made.acceleration) == (VM, "kvm")
    await host.delete(made.id)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await host.backends.close()
    await host.sandboxes.close()


async def test_an_unknown_isolation_lists_what_there_is(host: HostService) -> None:
    with pytest.raises(InvalidRequest, match="auto, microvm, calm, fakevm") as error:
        await host.create(wanted(isolation="xen"))
    assert error.value.field == "isolation"


async def test_a_known_one_that_is_not_tried_here_is_not_unknown(host: HostService) -> None:
    with pytest.raises(RuntimeUnavailable, match="PANDASTACK_RUNTIMES leaves it out, or this version") as error:
        await host.create(wanted(isolation="firecracker"))
    assert "doctor" in str(error.value.hint)


@pytest.mark.parametrize("isolation", [VM, "microvm"])
async def test_one_that_does_not_work_says_why(world: World, isolation: str) -> None:
    without_vm(world)
    async with world.opened() as host:
        with pytest.raises(RuntimeUnavailable, match="no kernel boots") as error:
            await host.create(wanted(isolation=isolation))
        assert "doctor" in str(error.value.hint)
        made = await host.create(wanted())
        assert made.runtime == CALM
        await host.delete(made.id)
    assert world.left() == {}


async def test_the_host_tells_of_each(world: World, host: HostService) -> None:
    made = await host.create(wanted(isolation=VM))
    info = await host.describe()
    assert info.runtime == CALM
    assert [(one.name, one.works, one.isolation, one.acceleration) for one in info.runtimes] == [
        (CALM, True, "gvisor", None),
        (VM, True, "microvm", "tcg"),
    ]
    await host.delete(made.id)


# Being tried


async def test_a_slow_probe_holds_up_only_who_needs_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = vm(world).hang("probe")
    async with world.opened() as host:
        assert hang.reached.is_set()
        made = await host.create(wanted())
        assert made.runtime == CALM
        assert [one.reason for one in (await host.describe()).runtimes if not one.works] == ["it is still being tried"]
        with monkeypatch.context() as patch:
            patch.setattr(backends, "PATIENCE_S", 0.05)
            with pytest.raises(RuntimeUnavailable, match="still being tried") as error:
                await host.create(wanted(isolation=VM))
            assert error.value.retry_after_s
        waiting = asyncio.create_task(host.create(wanted(isolation=VM)))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        hang.release()
        second = await waiting
        assert second.runtime == VM
        for one in (made, second):
            await host.delete(one.id)
    assert world.left() == {}


async def test_a_probe_that_never_ends_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRY_TIMEOUT_S", 0.05)
    vm(world).hang("probe")
    async with world.opened() as host:
        with pytest.raises(RuntimeUnavailable, match="could not be tried in"):
            await host.create(wanted(isolation=VM))


async def test_a_host_ends_while_a_runtime_is_tried_that_cannot_be_undone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    trying = asyncio.Event()

    async def stubborn() -> Probe:
        trying.set()
        try:
            await asyncio.sleep(60)
        finally:
            raise OSError("Directory not empty")

    monkeypatch.setattr(vm(world), "probe", stubborn)
    async with asyncio.timeout(20), world.opened():
        await trying.wait()
    assert world.left() == {}


@pytest.mark.parametrize("error", [RuntimeFailed("the probe broke"), ValueError("nobody thought of it")])
async def test_a_probe_that_fails_does_not_take_the_other_down(world: World, error: Any) -> None:
    vm(world).fail("probe", error)
    async with world.opened() as host:
        with pytest.raises(RuntimeUnavailable, match=r"the probe broke|trying it failed: ValueError"):
            await host.create(wanted(isolation=VM))
        made = await host.create(wanted())
        await host.delete(made.id)


async def test_one_that_did_not_work_is_tried_again_until_it_does(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "AGAIN_FIRST_S", 0.02)
    monkeypatch.setattr(backends, "AGAIN_MOST_S", 0.05)
    works = vm(world).outcome
    without_vm(world)
    async with world.opened() as host:
        vm(world).fail("probe", RuntimeFailed("the probe broke"))
        await until(lambda: "the probe broke" in _reason(host))
        await until(lambda: "no kernel boots" in _reason(host))
        with pytest.raises(RuntimeUnavailable, match="no kernel boots"):
            await host.create(wanted(isolation=VM))
        (world.root / "machines-fakevm" / "old").mkdir(parents=True)
        vm(world).outcome = works
        await until(lambda: host.backends.find(VM) is not None)
        # As the others are, it is swept before it is used.
        assert world.left() == {}
        made = await host.create(wanted(isolation=VM))
        assert made.runtime == VM
        await host.delete(made.id)
    assert world.left() == {}


def _reason(host: HostService) -> str:
    return next(one.reason or "" for one in host.backends.infos() if one.name == VM)


async def test_a_host_on_which_only_the_slow_one_works_waits_for_it(world: World) -> None:
    world.runtime.outcome = Probe(works=False, reason="no gVisor")
    async with world.opened() as host:
        made = await host.create(wanted())
        assert (made.runtime, (await host.describe()).runtime) == (VM, VM)
        await host.delete(made.id)
    assert world.left() == {}


async def test_a_host_on_which_none_works_says_why_for_each(world: World) -> None:
    world.runtime.outcome = Probe(works=False, reason="no gVisor")
    without_vm(world)
    with pytest.raises(HostUnfit, match="calm: no gVisor; fakevm: no kernel boots"):
        await world.start()


async def test_what_a_background_runtime_left_behind_is_swept_before_it_is_used(world: World) -> None:
    async with world.opened() as host:
        await host.create(wanted(isolation=VM, id=(box := new_sandbox_id())))
        await host.delete(box)
    (world.root / "machines-fakevm" / "old").mkdir()
    (world.root / "disks-fakevm" / "older").mkdir()
    async with world.opened() as host:
        await until(lambda: host.backends.find(VM) is not None)
        assert world.left() == {}


# Staying where it began


@pytest.mark.parametrize("isolation", [CALM, VM])
async def test_forks_wakes_and_restores_stay_on_their_runtime(world: World, host: HostService, isolation: str) -> None:
    box = (await host.create(wanted(isolation=isolation))).id
    await run(host, box, "echo one > /tmp/note")
    point = (await host.snapshot(box, new_snapshot_id())).id
    runtimes = {(await fork(host, box)).runtime, (await fork(host, box, point)).runtime}
    assert (await host.hibernate(box, reason="request")).runtime == isolation
    runtimes |= {(await fork(host, box)).runtime, (await host.wake(box)).runtime}
    rewound = await host.rewind(HostRewind(sandbox=box, snapshot=point, undo=new_snapshot_id()))
    runtimes |= {rewound.sandbox.runtime, (await host.create(wanted(snapshot=point))).runtime}
    assert runtimes == {isolation}
    await host.verify_snapshot(point)
    assert {one.runtime for one in await host.list_snapshots()} == {isolation}
    assert (await host.usage(box)).memory_own_bytes > 0
    assert (await run(host, box, "cat /tmp/note"))[0] == b"one\n"
    await settled(host)
    other = vm(world) if isolation == CALM else world.runtime
    assert other.machines == {}


@pytest.mark.parametrize(("made_on", "asked"), [(CALM, VM), (VM, CALM), (CALM, "microvm")])
async def test_a_snapshot_of_one_runtime_is_not_restored_by_another(host: HostService, made_on: str, asked: str) -> None:
    box = (await host.create(wanted(isolation=made_on))).id
    point = (await host.snapshot(box, new_snapshot_id())).id
    with pytest.raises(SnapshotUnusable, match=made_on) as error:
        await host.create(wanted(snapshot=point, isolation=asked))
    assert error.value.reason == "runtime"
    with pytest.raises(InvalidRequest):
        await host.create(wanted(snapshot=point, isolation="xen"))


async def test_files_of_two_runtimes_can_be_compared(host: HostService) -> None:
    one, two = [(await host.create(wanted(isolation=isolation))).id for isolation in (CALM, VM)]
    await run(host, two, "echo more > /tmp/more")
    point = (await host.snapshot(two, new_snapshot_id())).id
    for b in (HostPoint(kind="sandbox", id=two), HostPoint(kind="snapshot", id=point)):
        async with closing(host.diff(HostPoint(kind="sandbox", id=one), b, b"/tmp", patch=True)) as changes:
            found = [change async for change in changes]
        assert [(change.change.path, change.change.kind) for change in found] == [("/tmp/more", "added")]


async def test_both_have_slots_and_blanks(world: World) -> None:
    world.slots, world.blanks = 1, 1
    async with world.opened() as host:
        boxes = [(await host.create(wanted(isolation=isolation))).id for isolation in (CALM, VM)]
        for backend in [host.backends.of(name) for name in (CALM, VM)]:
            await until(lambda backend=backend: backend.machines.slots.ready == 1)  # type: ignore[misc]
        assert (await host.describe()).slots_ready == 2
        for isolation in (CALM, VM):
            made = await host.create(wanted(isolation=isolation))
            assert (made.runtime, made.boot_mode) == (isolation, "slot")
            boxes.append(made.id)
        boxes += [(await fork(host, box)).id for box in boxes[:2]]
        for backend in [host.backends.of(name) for name in (CALM, VM)]:
            await until(lambda backend=backend: backend.machines.blanks.ready >= 1)  # type: ignore[misc]
        for box in boxes:
            await host.delete(box)
    assert world.left() == {}


async def test_both_share_the_room_of_the_machine(host: HostService, world: World) -> None:
    for isolation in (CALM, VM):
        await host.create(wanted(isolation=isolation))
    capacity = (await host.describe()).capacity
    assert (capacity.sandboxes, capacity.memory_reserved_mb) == (2, 512)
    world.admission._totals = type(world.totals)(memory_mib=600, cpu=64, disk_mib=100_000, sandboxes=100)
    for isolation in (CALM, VM):
        with pytest.raises(CapacityError):
            await host.create(wanted(isolation=isolation))


# Restarts


async def states_of_all_kinds(host: HostService) -> dict[str, SandboxId]:
    boxes = {}
    for isolation in (CALM, VM):
        for kind in ("running", "paused", "hibernated"):
            box = boxes[f"{kind} {isolation}"] = (await host.create(wanted(isolation=isolation))).id
            await run(host, box, f"echo {kind} > /tmp/note")
            if kind == "paused":
                await host.pause(box)
            elif kind == "hibernated":
                await host.hibernate(box, reason="request")
    await settled(host)
    return boxes


async def test_a_restart_finds_the_sandboxes_of_both(world: World) -> None:
    async with world.opened() as host:
        boxes = await states_of_all_kinds(host)
    async with world.opened() as host:
        assert {name: (await host.get(box)).status for name, box in boxes.items()} == {name: name.split()[0] for name in boxes}
        for name, box in boxes.items():
            assert (await run(host, box, "cat /tmp/note"))[0].decode().strip() == name.split()[0]
            await host.delete(box)
    assert world.left() == {}


async def test_a_restart_without_a_runtime_forgets_and_sweeps_nothing_that_can_come_back(world: World) -> None:
    async with world.opened() as host:
        boxes = await states_of_all_kinds(host)
        point = (await host.snapshot(boxes["running fakevm"], new_snapshot_id())).id
    before, there = vm(world).outcome, list(vm(world).machines)
    assert len(there) == 2
    without_vm(world)
    async with world.opened() as host:
        for kind in ("running", "paused"):
            state = await host.get(boxes[f"{kind} fakevm"])
            assert (state.status, state.status_reason) == ("failed", "runtime_missing")
            with pytest.raises(SandboxNotRunning, match="runtime"):
                await run(host, state.id, "true")
        assert vm(world).machines == {}  # Nobody could use them any more.
        asleep = boxes["hibernated fakevm"]
        told = await host.get(asleep)
        assert (told.status, told.runtime, told.isolation, told.own_kernel) == ("hibernated", VM, "microvm", True)
        assert (await host.usage(asleep)).stored_own_bytes > 0
        calls: list[Any] = [
            host.wake(asleep),
            run(host, asleep, "true"),
            fork(host, asleep),
            host.create(wanted(snapshot=point)),
            host.verify_snapshot(point),
            host.rewind(HostRewind(sandbox=boxes["running fakevm"], snapshot=point)),
        ]
        for call in calls:
            with pytest.raises(RuntimeUnavailable, match="no kernel boots") as error:
                await call
            assert (error.value.runtime, bool(error.value.hint)) == (VM, True)
        assert (await run(host, boxes["running calm"], "cat /tmp/note"))[0] == b"running\n"
        assert (await host.get(asleep)).status == "hibernated"
    vm(world).outcome = before
    async with world.opened() as host:
        assert (await run(host, asleep, "cat /tmp/note"))[0] == b"hibernated\n"
        again = await host.rewind(HostRewind(sandbox=boxes["running fakevm"], snapshot=point))
        assert (await run(host, again.sandbox.id, "cat /tmp/note"))[0] == b"running\n"
        for box in boxes.values():
            await host.delete(box)
        await host.delete_snapshot(point)
    assert world.left() == {}


async def test_a_sandbox_without_its_runtime_can_be_deleted(world: World) -> None:
    async with world.opened() as host:
        box = (await host.create(wanted(isolation=VM))).id
        await host.hibernate(box, reason="request")
    without_vm(world)
    async with world.opened() as host:
        await host.delete(box)
        assert await host.list() == []
    assert world.left() == {}
    assert [path.name for path in (world.root / "snapshots").iterdir()] == [".new"]


async def test_a_state_of_another_build_of_its_runtime_is_refused(world: World) -> None:
    async with world.opened() as host:
        box = (await host.create(wanted(isolation=VM))).id
        await host.hibernate(box, reason="request")
    vm(world).outcome = Probe(works=True, version="2", key="fakevm-2")
    async with world.opened() as host:
        with pytest.raises(SnapshotUnusable, match="another version") as error:
            await host.wake(box)
        assert error.value.reason == "runtime"
        await host.delete(box)


async def test_another_guest_kernel_is_baked_and_loses_nothing_that_was_saved(world: World) -> None:
    async with world.opened() as host:
        asleep, paused = [(await host.create(wanted(isolation=VM))).id for _ in range(2)]
        point = (await host.snapshot(asleep, new_snapshot_id())).id
        await host.hibernate(asleep, reason="request")
        await host.pause(paused)
    vm(world).outcome = replace(vm(world).outcome, boots="the next kernel")
    vm(world).steps.clear()
    async with world.opened() as host:
        assert await run(host, asleep, "true")
        assert await run(host, paused, "true")
        copy = (await host.create(wanted(snapshot=point))).id
        assert "start" not in vm(world).steps, "nothing of it boots"
        new = (await host.create(wanted(isolation=VM))).id
        assert "start" in vm(world).steps, "the template's state is made again"
        for box in (asleep, paused, copy, new):
            await host.delete(box)
        await host.delete_snapshot(point)
    assert world.left() == {}


# The least isolation


async def test_what_is_too_weak_is_refused_on_every_verb(world: World) -> None:
    async with world.opened() as host:
        live, asleep = [(await host.create(wanted(isolation=VM))).id for _ in range(2)]
        point = (await host.snapshot(live, new_snapshot_id())).id
        await host.hibernate(asleep, reason="request")
    world.minimum = "gvisor"
    async with world.opened() as host:
        calls: list[Any] = [
            host.create(wanted(isolation=VM)),
            host.create(wanted(isolation="microvm")),
            host.create(wanted(snapshot=point)),
            fork(host, live),
            fork(host, live, point),
            fork(host, asleep),
            host.wake(asleep),
            run(host, asleep, "true"),
            host.rewind(HostRewind(sandbox=live, snapshot=point)),
        ]
        for call in calls:
            with pytest.raises(IsolationTooWeak, match="gvisor") as error:
                await call
            assert (error.value.minimum, error.value.http_status) == ("gvisor", 403)
        assert (await host.create(wanted())).runtime == CALM
        assert [(await host.get(box)).status for box in (live, asleep)] == ["running", "hibernated"]
    world.minimum = "qemu"
    async with world.opened() as host:
        assert (await host.wake(asleep)).status == "running"
        for left in await host.list():
            await host.delete(left.id)
        await host.delete_snapshot(point)
    assert world.left() == {}


async def test_auto_never_goes_below_the_least(tmp_path: Path) -> None:
    world = World(tmp_path, runtimes=[FakeRuntime(), fake_vm()])
    world.minimum = "qemu"
    async with world.opened() as host:
        made = await host.create(wanted())
        assert made.runtime == VM
        with pytest.raises(IsolationTooWeak):
            await host.create(wanted(isolation="fake"))
        await host.delete(made.id)


async def test_a_host_that_has_nothing_strong_enough_does_not_start(world: World) -> None:
    world.minimum = "qemu-kvm"
    with pytest.raises(HostUnfit, match="PANDASTACK_MIN_ISOLATION is qemu-kvm, and only calm, fakevm works"):
        await world.start()


# Sizes


def snapshots_taken(world: World) -> int:
    return vm(world).steps.count("snapshot")


async def test_another_size_is_baked_once_for_all_who_ask(world: World, host: HostService) -> None:
    await host.create(wanted(isolation=VM))
    before = snapshots_taken(world)
    made = await asyncio.gather(*(host.create(wanted(isolation=VM, cpu=2, memory_mb=300)) for _ in range(5)))
    assert snapshots_taken(world) == before + 1
    assert {(one.cpu, one.memory_mb) for one in made} == {(2, 300)}
    assert (await host.create(wanted(isolation=VM, cpu=1.5, memory_mb=300))).cpu == 1.5  # Two CPUs, and less of their time.
    assert snapshots_taken(world) == before + 1
    await host.create(wanted(isolation=VM, cpu=0.5))
    assert snapshots_taken(world) == before + 1  # The template's own size.
    await host.create(wanted(isolation=CALM, cpu=2, memory_mb=300))
    assert (await host.describe()).capacity.sandboxes == 9  # What was baked holds no room any more.


async def test_a_size_is_found_again_after_a_restart(world: World) -> None:
    async with world.opened() as host:
        await host.delete((await host.create(wanted(isolation=VM, memory_mb=300))).id)
    before = snapshots_taken(world)
    async with world.opened() as host:
        await host.delete((await host.create(wanted(isolation=VM, memory_mb=300))).id)
    assert snapshots_taken(world) == before


async def test_a_size_that_takes_long_is_answered_and_goes_on(world: World, host: HostService, monkeypatch: pytest.MonkeyPatch) -> None:
    await host.create(wanted(isolation=VM))
    hang = vm(world).hang("start")
    monkeypatch.setattr(sandboxes, "TEMPLATE_PATIENCE_S", 0.05)
    with pytest.raises(TemplateNotReady, match="2 CPUs, 300 MiB of memory and a disk of 256 MiB") as error:
        await host.create(wanted(isolation=VM, cpu=2, memory_mb=300))
    assert error.value.retry_after_s
    hang.release()
    monkeypatch.setattr(sandboxes, "TEMPLATE_PATIENCE_S", 20)
    assert (await host.create(wanted(isolation=VM, cpu=2, memory_mb=300))).memory_mb == 300


async def test_only_the_sizes_used_last_are_kept(world: World, host: HostService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bakery, "SIZES_KEPT", 2)

    async def kept(memory_mb: int) -> set[str]:
        await host.delete((await host.create(wanted(isolation=VM, memory_mb=memory_mb))).id)
        await asyncio.sleep(0.01)
        return {path.name.split("-")[0] for path in (world.root / "states-fakevm").iterdir()}

    await kept(300)
    await kept(301)
    await kept(300)
    assert await kept(302) == {"base", "base@1x300x256", "base@1x302x256"}
    before = snapshots_taken(world)
    await kept(256)
    await kept(300)
    assert snapshots_taken(world) == before
    await kept(301)
    assert snapshots_taken(world) == before + 1


@pytest.mark.parametrize("step", ["prepare", "start", "snapshot", "restore"])
async def test_a_size_that_cannot_be_baked_fails_its_create_and_is_tried_again(world: World, host: HostService, step: str) -> None:
    await host.create(wanted(isolation=VM))
    vm(world).fail(step)
    with pytest.raises(RuntimeFailed):
        await host.create(wanted(isolation=VM, memory_mb=300))
    assert (await host.describe()).capacity.sandboxes == 1
    assert (await host.create(wanted(isolation=VM, memory_mb=300))).memory_mb == 300


async def test_a_size_for_which_there_is_no_room_is_not_baked(world: World, host: HostService) -> None:
    await host.create(wanted(isolation=VM))
    before = snapshots_taken(world)
    with pytest.raises(CapacityError):
        await host.create(wanted(isolation=VM, memory_mb=99_900))
    with pytest.raises(InvalidRequest):
        await host.create(wanted(isolation=VM, memory_mb=100_001))
    assert snapshots_taken(world) == before


@pytest.mark.parametrize(("size", "field"), [({"memory_mb": 512}, "memory_mb"), ({"cpu": 2}, "cpu"), ({"memory_mb": 128}, "memory_mb")])
async def test_a_snapshot_of_a_fixed_size_goes_on_with_that_only(host: HostService, size: dict[str, Any], field: str) -> None:
    point = (await host.snapshot((await host.create(wanted(isolation=VM))).id, new_snapshot_id())).id
    with pytest.raises(InvalidRequest) as error:
        await host.create(wanted(snapshot=point, **size))
    assert error.value.field == field
    if "512" in str(size):
        assert "own size only: 1 CPUs and 256 MiB" in error.value.message
    assert (await host.create(wanted(snapshot=point, disk_mb=400))).disk_mb == 400
    box = (await host.create(wanted(isolation=CALM))).id
    calm = (await host.snapshot(box, new_snapshot_id())).id
    assert (await host.create(wanted(snapshot=calm, memory_mb=512))).memory_mb == 512


# Disk images


async def test_a_disk_image_is_made_once_and_grown_to_what_was_asked(world: World, host: HostService) -> None:
    """The file system in a state fills its disk, and does not shrink: a disk smaller than the template's needs a state of its own."""
    for disk_mb, bakes in ((None, 1), (300, 1), (IMAGE_MIB, 2), (100, 2)):
        made = await host.create(wanted(isolation=VM, disk_mb=disk_mb))
        assert (made.disk_mb, snapshots_taken(world)) == (disk_mb or 256, bakes)
    sizes = sorted(file.stat().st_size >> 20 for file in (world.root / "disks-fakevm").glob("*/root.img"))
    assert sizes == [IMAGE_MIB, 100, 256, 300]
    assert world.roots == ["base"]
    with pytest.raises(InvalidRequest, match=f"needs {IMAGE_MIB}") as error:
        await host.create(wanted(isolation=VM, disk_mb=IMAGE_MIB - 1))
    assert (error.value.field, error.value.minimum) == ("disk_mb", IMAGE_MIB)


async def test_a_state_does_not_outlive_the_image_below_it(world: World) -> None:
    async with world.opened() as host:
        await host.delete((await host.create(wanted(isolation=VM))).id)
    (world.root / "base.ext4").unlink()
    before = snapshots_taken(world)
    async with world.opened() as host:
        await host.delete((await host.create(wanted(isolation=VM))).id)
    assert (world.roots, snapshots_taken(world)) == (["base", "base"], before + 1)
