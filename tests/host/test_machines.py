"""Machines: disk, folder and runtime are had together or not at all."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from hosts import World
from pandastack.errors import DiskFull, GuestError, GuestTimeout, InvalidRequest, RuntimeFailed
from pandastack.host import identity
from pandastack.host import machines as module
from pandastack.host.app import HostService
from pandastack.host.machines import Machines, SlotKey
from pandastack.host.runtimes.base import Limits
from pandastack.host.runtimes.fake import FakeMachine

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]
LIMITS = Limits(cpu=1, memory_mib=128, disk_mib=256)


@pytest.fixture
def machines(host: HostService) -> Machines:
    return host.backends.list()[0].machines


@pytest.fixture
def key(world: World, host: HostService) -> SlotKey:
    baked = host.backends.list()[0].bakery.ready("base")
    assert baked is not None
    return SlotKey(baked.image.rootfs, baked.limits, baked.snapshot)


async def test_a_prepared_machine_has_all_it_needs_and_gives_it_back(world: World, machines: Machines) -> None:
    machine = await machines.prepare(world.root / "rootfs", LIMITS)
    assert machine.spec.limits == LIMITS
    assert machine.spec.disk.is_dir()
    assert machine.spec.state.stat().st_mode & 0o777 == 0o700
    await machines.discard(machine)
    await machines.discard(machine)
    assert world.left() == {}


@pytest.mark.parametrize("step", ["disk.create", "disk.created", "prepare", "prepared"])
async def test_a_step_of_prepare_that_fails_leaves_nothing(world: World, machines: Machines, step: str) -> None:
    world.runtime.fail(step)
    with pytest.raises(RuntimeFailed):
        await machines.prepare(world.root / "rootfs", LIMITS)
    assert world.left() == {}


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EMFILE, RuntimeFailed)])
async def test_what_the_kernel_refuses_is_typed(
    world: World, machines: Machines, number: int, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "refused")

    for target in (Path, FakeMachine):
        with monkeypatch.context() as patch:
            patch.setattr(target, "mkdir" if target is Path else "__init__", refuse)
            with pytest.raises(expected):
                await machines.prepare(world.root / "rootfs", LIMITS)
    assert world.left() == {}


@pytest.mark.parametrize("step", ["restore", "restored", "connect"])
async def test_a_restore_that_fails_leaves_nothing(world: World, machines: Machines, key: SlotKey, step: str) -> None:
    world.runtime.fail(step)
    with pytest.raises(RuntimeFailed):
        await machines.restored(key)
    assert world.left() == {}


async def test_a_saved_state_that_vanished_is_typed(world: World, machines: Machines, key: SlotKey) -> None:
    with pytest.raises(RuntimeFailed):
        await machines.restored(SlotKey(key.rootfs, key.limits, world.root / "nothing"))
    assert world.left() == {}


async def test_a_restore_that_hangs_ends(world: World, machines: Machines, key: SlotKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESTORE_TIMEOUT_S", 0.1)
    world.runtime.hang("restore")
    with pytest.raises(RuntimeFailed, match="in time"):
        await machines.restored(key)
    assert world.left() == {}


async def test_a_guest_that_does_not_greet_is_given_up(
    world: World, machines: Machines, key: SlotKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.1)
    world.runtime.fail("hello", GuestTimeout())
    with pytest.raises(GuestTimeout):
        await machines.restored(key)
    assert world.left() == {}


async def test_a_slot_is_sealed_and_frozen(world: World, machines: Machines, key: SlotKey) -> None:
    ready = await machines.slot(key)
    (machine,) = world.runtime.machines.values()
    assert machine.frozen
    assert ready.guest.connection.greeting.sealed
    await machines.discard_ready(ready)
    assert world.left() == {}


async def test_a_slot_that_cannot_be_frozen_leaves_nothing(world: World, machines: Machines, key: SlotKey) -> None:
    world.runtime.fail("freeze")
    with pytest.raises(RuntimeFailed):
        await machines.slot(key)
    assert world.left() == {}


async def test_a_slot_with_a_kernel_of_its_own_has_rehearsed(world: World) -> None:
    """One that cannot leaves nothing; the identity comes once, and last."""
    world.runtime.capabilities = replace(world.runtime.capabilities, own_kernel=True)
    async with world.opened() as host:
        machines = host.backends.list()[0].machines
        baked = host.backends.list()[0].bakery.ready("base")
        assert baked is not None
        key = SlotKey(baked.image.rootfs, baked.limits, baked.snapshot)
        world.runtime.steps.clear()
        ready = await machines.slot(key)
        assert [step for step in world.runtime.steps if step in ("restore", "machine.rehearse", "freeze")] == [
            "restore", "machine.rehearse", "freeze",
        ]  # fmt: skip
        await ready.machine.thaw()
        assert (await ready.guest.health()).sealed
        await identity.confirm(ready.guest, identity.fresh("s", "box", {}))
        with pytest.raises(InvalidRequest, match="sealed"):
            await identity.rehearse(ready.guest)
        await machines.discard_ready(ready)
        world.runtime.fail("machine.rehearse")
        with pytest.raises(GuestError):
            await machines.slot(key)
        assert world.left() == {}


async def test_a_stop_that_fails_still_frees_the_disk(world: World, machines: Machines) -> None:
    machine = await machines.prepare(world.root / "rootfs", LIMITS)
    world.runtime.fail("stop")
    with pytest.raises(RuntimeFailed):
        await machines.discard(machine)
    assert list(world.left()) == ["runtime"]
    await machines.discard(machine)


async def test_a_sweep_clears_what_each_of_the_three_has(world: World, machines: Machines) -> None:
    kept, lost = await machines.prepare(world.root / "r", LIMITS), await machines.prepare(world.root / "r", LIMITS)
    (world.root / "machines" / "old").mkdir()
    (world.root / "disks" / "older").mkdir()
    assert await machines.sweep([kept.spec.id]) == 3
    assert world.left() == {"runtime": [kept.spec.id], "disks": [kept.spec.id], "machines": [kept.spec.id]}
    assert lost.spec.id not in world.runtime.machines
    await machines.discard(kept)
