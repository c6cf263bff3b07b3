"""Each step of a create fails once, hangs once and is cancelled once; each time nothing may be left of it.

The steps are enumerated by a create that goes well: a new one without a case here fails `test_every_step_has_a_case`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any

import pytest

from hosts import World, disk_full, reached, run, slots, until, wanted
from pandastack.errors import (
    CapacityError,
    DiskFull,
    GuestError,
    GuestGone,
    GuestProtocolError,
    GuestTimeout,
    HostUnfit,
    PandastackError,
    RuntimeFailed,
    SandboxNotFound,
    SandboxNotRunning,
    TemplateNotFound,
)
from pandastack.host import identity, machines, registry, sandboxes
from pandastack.host.app import HostService

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

# How each step of a create may fail, and what the caller then learns.
FAILURES: dict[str, list[tuple[PandastackError, type[PandastackError]]]] = {
    "ledger.write": [(disk_full(), DiskFull)],
    "disk.create": [(disk_full(), DiskFull), (HostUnfit("no loop devices"), HostUnfit)],
    "disk.created": [(RuntimeFailed("mount"), RuntimeFailed)],
    "prepare": [(RuntimeFailed("runsc create"), RuntimeFailed), (HostUnfit("no cgroup"), HostUnfit)],
    "prepared": [(RuntimeFailed("no state"), RuntimeFailed)],
    "restore": [(RuntimeFailed("refused"), RuntimeFailed)],
    "restored": [(RuntimeFailed("died"), RuntimeFailed)],
    "connect": [(RuntimeFailed("no channel"), RuntimeFailed)],
    "hello": [(GuestTimeout(), GuestTimeout), (GuestProtocolError(), GuestProtocolError), (GuestGone(), GuestGone)],
    "thaw": [(RuntimeFailed("refused"), RuntimeFailed)],
    "machine.identity": [
        (GuestError(), GuestError),
        (RuntimeFailed(), GuestError),
        (GuestTimeout(), GuestTimeout),
        (GuestProtocolError(), GuestProtocolError),
        (GuestGone(), GuestGone),
    ],
}
CASES = [(step, error, expected) for step, ways in FAILURES.items() for error, expected in ways]


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (machines, registry):
        monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(identity, "IDENTITY_TIMEOUT_S", 0.3)


def reserved(host: HostService) -> int:
    return host._registry.admission.capacity().sandboxes


async def test_every_step_has_a_case(world: World, host: HostService) -> None:
    await host.create(wanted())
    assert set(world.runtime.steps) == set(FAILURES)


@pytest.mark.parametrize(("step", "error", "expected"), CASES, ids=lambda value: value if isinstance(value, str) else type(value).__name__)
async def test_a_step_that_fails_leaves_nothing(
    world: World, host: HostService, step: str, error: PandastackError, expected: type[PandastackError]
) -> None:
    world.runtime.fail(step, error)
    request = wanted()
    with pytest.raises(expected):
        await host.create(request)
    assert (world.left(), await host.list(), reserved(host)) == ({}, [], 0)
    # And nothing stands in the way of the next try, not even with the same id.
    assert (await host.create(request)).status == "running"


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_each_write_of_the_ledger_may_fail(world: World, host: HostService, nth: int) -> None:
    written = 0

    def fault(step: str) -> PandastackError | None:
        nonlocal written
        written += step == "ledger.write"
        return disk_full() if step == "ledger.write" and written == nth else None

    world.runtime.guest_fault = fault  # type: ignore[method-assign]
    with pytest.raises(DiskFull):
        await host.create(wanted())
    assert (world.left(), reserved(host)) == ({}, 0)


@pytest.mark.parametrize("step", [step for step in FAILURES if not step.startswith(("ledger", "hello", "machine."))])
async def test_a_create_deleted_in_a_step_that_hangs_leaves_nothing(world: World, host: HostService, step: str) -> None:
    hang = world.runtime.hang(step)
    request = wanted()
    creating = asyncio.create_task(host.create(request))
    await reached(hang)
    await host.delete(request.id)
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert (world.left(), await host.list(), reserved(host)) == ({}, [], 0)


async def test_a_create_whose_caller_left_is_finished(world: World, host: HostService) -> None:
    hang = world.runtime.hang("restore")
    request = wanted()
    creating = asyncio.create_task(host.create(request))
    await reached(hang)
    creating.cancel()
    await asyncio.gather(creating, return_exceptions=True)
    hang.release()
    assert (await host.create(request)).status == "running"
    assert len(world.runtime.machines) == 1


@coroutine
def counted(work: Coroutine[Any, Any, Any], waits: Callable[[], None]) -> Generator[Any, Any, Any]:
    """Run a coroutine and call `waits` each time it waits for something."""
    step, value = work.send, None
    while True:
        try:
            awaited = step(value)  # type: ignore[arg-type]
        except StopIteration as end:
            return end.value
        waits()
        try:
            step, value = work.send, (yield awaited)
        except BaseException as error:
            step, value = work.throw, error  # type: ignore[assignment]


async def test_a_create_cancelled_at_any_wait_leaves_nothing(world: World, host: HostService) -> None:
    loop = asyncio.get_running_loop()
    nth = seen = 0

    def factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        if getattr(work, "__name__", "") != "_create":
            return asyncio.Task(work, loop=loop, **options)

        def waits() -> None:
            nonlocal seen
            seen += 1
            if seen == nth:
                loop.call_soon(task.cancel)

        task: asyncio.Task[Any] = asyncio.Task(counted(work, waits), loop=loop, **options)
        return task

    loop.set_task_factory(factory)
    try:
        while True:
            nth, seen = nth + 1, 0
            try:
                await host.create(wanted())
            except asyncio.CancelledError:
                await until(lambda: not world.left(), 5)
                assert (await host.list(), reserved(host)) == ([], 0), f"after wait {nth}"
            else:
                break
    finally:
        loop.set_task_factory(None)
    assert nth > 10


async def test_creates_of_one_id_at_once_make_one(world: World, host: HostService) -> None:
    request = wanted()
    made = await asyncio.gather(*(host.create(request) for _ in range(20)))
    assert {one.id for one in made} == {request.id}
    assert len(world.runtime.machines) == 1


async def test_creates_that_fail_together_all_learn_why(world: World, host: HostService) -> None:
    world.runtime.fail("restore")
    request = wanted()
    made = await asyncio.gather(*(host.create(request) for _ in range(5)), return_exceptions=True)
    assert [type(one) for one in made] == [RuntimeFailed] * 5
    assert world.left() == {}


async def test_many_creates_and_deletes_at_once_leave_nothing(world: World, host: HostService) -> None:
    async def one(number: int) -> None:
        request = wanted()
        creating = asyncio.create_task(host.create(request))
        await asyncio.sleep(0.001 * number)
        await host.delete(request.id)
        await asyncio.gather(creating, return_exceptions=True)
        await host.delete(request.id)

    await asyncio.gather(*(one(number) for number in range(20)))
    await until(lambda: not world.left(), 5)
    assert (await host.list(), reserved(host)) == ([], 0)


async def test_an_unknown_template_touches_nothing(world: World, host: HostService) -> None:
    with pytest.raises(TemplateNotFound):
        await host.create(wanted(template="nothing"))
    assert (world.left(), world.runtime.steps) == ({}, [])


async def test_a_full_host_refuses_before_it_touches_anything(world: World) -> None:
    world.totals = machines_for(2)
    async with world.opened() as host:
        await host.create(wanted())
        await host.create(wanted())
        world.runtime.steps.clear()
        with pytest.raises(CapacityError) as refused:
            await host.create(wanted())
        assert refused.value.retry_after_s
        assert world.runtime.steps == []
        assert len(await host.list()) == 2


def machines_for(count: int) -> Any:
    from pandastack.host.admission import Totals

    return Totals(memory_mib=100_000, cpu=64, disk_mib=100_000, sandboxes=count)


async def test_a_stop_that_fails_during_an_undo_is_made_good_by_the_next_start(world: World, host: HostService) -> None:
    world.runtime.fail("stop")
    world.runtime.fail("identity")
    with pytest.raises(PandastackError):
        await host.create(wanted())
    assert reserved(host) == 0
    assert "ledger" not in world.left()
    await host.sandboxes.close()
    async with world.opened():
        assert world.left() == {}


class TestPool:
    """Creates from prepared machines."""

    @pytest.fixture
    async def pooled(self, world: World) -> Any:
        world.slots = 1
        async with world.opened() as host:
            await host.create(wanted())
            await until(lambda: slots(host).ready == 1)
            yield host
        await until(lambda: "disks" not in world.left() or len(world.left()["disks"]) <= len(host.sandboxes.registry.list()))

    async def test_a_create_takes_a_slot(self, world: World, pooled: HostService) -> None:
        world.runtime.steps.clear()
        made = await pooled.create(wanted())
        assert made.boot_mode == "slot"
        assert "restore" not in world.runtime.steps

    async def test_a_slot_that_died_while_it_waited_fails_no_create(self, world: World, pooled: HostService) -> None:
        used = pooled.sandboxes.machine_ids()
        (slot,) = (machine for machine in world.runtime.machines.values() if machine.spec.id not in used)
        slot.end("exited")
        request = wanted()
        made = await pooled.create(request)
        assert (made.status, made.boot_mode) == ("running", "restore")
        assert await run(pooled, request.id, "echo hi") == (b"hi\n", 0)
        assert slot.spec.id not in world.runtime.machines

    async def test_a_slot_whose_guest_is_spoilt_fails_no_create(self, world: World, pooled: HostService) -> None:
        world.runtime.fail("identity", GuestProtocolError())
        assert (await pooled.create(wanted())).boot_mode == "restore"

    async def test_two_failures_in_a_row_fail_the_create(self, world: World, pooled: HostService) -> None:
        world.runtime.fail("identity", times=2)
        before = len(pooled.sandboxes.registry.list())
        with pytest.raises(GuestError):
            await pooled.create(wanted())
        assert len(pooled.sandboxes.registry.list()) == before

    async def test_other_limits_do_not_take_a_slot(self, world: World, pooled: HostService) -> None:
        assert (await pooled.create(wanted(memory_mb=333))).boot_mode == "restore"
        assert slots(pooled).ready == 1

    async def test_no_slot_outlives_its_host(self, world: World) -> None:
        world.slots = 2
        async with world.opened() as host:
            request = wanted()
            await host.create(request)
            await until(lambda: slots(host).ready == 2)
            await host.delete(request.id)
        assert world.left() == {}


class TestUse:
    """Requests that meet a sandbox in a bad moment."""

    async def test_a_guest_that_breaks_its_protocol_fails_its_sandbox_only(self, world: World, host: HostService) -> None:
        bad, good = wanted(), wanted()
        await host.create(bad)
        await host.create(good)
        world.runtime.fail("process.run", GuestProtocolError())
        with pytest.raises(GuestProtocolError):
            await run(host, bad.id, "echo hi")
        state = await host.get(bad.id)
        assert (state.status, state.status_reason) == ("failed", "guest")
        assert await run(host, good.id, "echo hi") == (b"hi\n", 0)
        with pytest.raises(SandboxNotRunning):
            await run(host, bad.id, "echo hi")
        await until(lambda: len(world.runtime.machines) == 1)

    @pytest.mark.parametrize("reason", ["oom", "exited"])
    async def test_a_machine_that_ends_says_why_and_gives_everything_back(self, world: World, host: HostService, reason: Any) -> None:
        request = wanted()
        await host.create(request)
        running = asyncio.create_task(run(host, request.id, "sleep 100"))
        await until(lambda: "process.run" in world.runtime.steps)
        (machine,) = world.runtime.machines.values()
        machine.end(reason)
        with pytest.raises(SandboxNotRunning) as ended:
            await running
        assert ended.value.fields["status_reason"] == reason
        state = await host.get(request.id)
        assert (state.status, state.status_reason) == ("failed", reason)
        await until(lambda: list(world.left()) == ["ledger"] and reserved(host) == 0)
        assert [(event.kind, event.reason) for event in await host.events(0, timeout_s=0)] == [("failed", reason)]
        await host.delete(request.id)
        assert world.left() == {}

    async def test_a_failure_is_cleared_up_on_a_full_disk_too(self, world: World, host: HostService) -> None:
        request = wanted()
        await host.create(request)
        (machine,) = world.runtime.machines.values()
        world.runtime.fail("ledger.write", disk_full())
        machine.end("oom")
        await until(lambda: list(world.left()) == ["ledger"] and reserved(host) == 0)
        assert (await host.get(request.id)).status == "failed"

    async def test_a_request_that_meets_a_freeze_is_answered(
        self, world: World, host: HostService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sandboxes, "FREEZE_AFTER_S", 0.0)
        request = wanted()
        await host.create(request)
        hang = world.runtime.hang("freeze")
        freezing = asyncio.create_task(host.sandboxes._freeze(host.sandboxes.registry.get(request.id)))
        await reached(hang)
        running = asyncio.create_task(run(host, request.id, "echo hi"))
        await asyncio.sleep(0.01)
        hang.release()
        assert await running == (b"hi\n", 0)
        await freezing

    async def test_idle_sandboxes_are_frozen_and_thawed_by_the_next_request(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandboxes, "FREEZE_AFTER_S", 0.05)
        async with world.opened() as host:
            request = wanted()
            await host.create(request)
            (machine,) = world.runtime.machines.values()
            await until(lambda: machine.frozen)
            before = (await host.metrics(request.id)).host_cpu_seconds
            assert (await host.metrics(request.id)).host_cpu_seconds == before
            assert machine.frozen, "to look is no activity"
            assert await run(host, request.id, "echo hi") == (b"hi\n", 0)
            assert not machine.frozen

    async def test_a_sandbox_with_work_inside_is_not_frozen(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandboxes, "FREEZE_AFTER_S", 0.05)
        async with world.opened() as host:
            request = wanted()
            await host.create(request)
            await run(host, request.id, "sleep 100 &")
            await asyncio.sleep(0.3)
            (machine,) = world.runtime.machines.values()
            assert not machine.frozen
            assert (await host.get(request.id)).busy

    async def test_memory_pressure_is_told_once_until_it_is_over(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandboxes, "LOOK_AT_MEMORY_S", 0.01)
        async with world.opened() as host:
            request = wanted()
            await host.create(request)
            (machine,) = world.runtime.machines.values()
            for share, told in ((0.8, 0), (0.9, 1), (0.8, 1), (0.9, 1), (0.5, 1), (0.95, 2)):
                machine.share = share
                await asyncio.sleep(0.1)
                events = await host.events(0, timeout_s=0)
                assert [(event.kind, event.sandbox_id) for event in events] == [("pressure", request.id)] * told, share

    async def test_one_silent_guest_does_not_keep_the_others_warm(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandboxes, "FREEZE_AFTER_S", 0.05)
        monkeypatch.setattr(sandboxes, "HEALTH_TIMEOUT_S", 1.0)
        async with world.opened() as host:
            world.runtime.fail("machine.health", GuestTimeout())
            await host.create(wanted())
            await host.create(wanted())
            await until(lambda: sum(machine.frozen for machine in world.runtime.machines.values()) == 1, 0.9)

    async def test_a_guest_that_breaks_its_protocol_while_idle_fails(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandboxes, "FREEZE_AFTER_S", 0.05)
        async with world.opened() as host:
            world.runtime.fail("machine.health", GuestProtocolError())
            request = wanted()
            await host.create(request)
            await until(lambda: host.sandboxes.registry.get(request.id).status == "failed")
            assert (await host.get(request.id)).status_reason == "guest"

    async def test_a_machine_that_ended_while_frozen_says_so(self, world: World, host: HostService) -> None:
        request = wanted()
        await host.create(request)
        (machine,) = world.runtime.machines.values()
        host.sandboxes.registry.get(request.id).frozen = True
        machine.end("oom")
        with pytest.raises(SandboxNotRunning) as ended:
            await run(host, request.id, "true")
        assert ended.value.fields["status_reason"] == "oom"

    async def test_a_thaw_that_fails_is_tried_again_by_the_next_request(self, world: World, host: HostService) -> None:
        request = wanted()
        await host.create(request)
        (machine,) = world.runtime.machines.values()
        await machine.freeze()
        host.sandboxes.registry.get(request.id).frozen = True
        world.runtime.fail("thaw")
        with pytest.raises(RuntimeFailed):
            await run(host, request.id, "true")
        assert await run(host, request.id, "echo hi") == (b"hi\n", 0)

    async def test_a_lost_session_is_opened_again(self, world: World, host: HostService) -> None:
        request = wanted()
        await host.create(request)
        guest = host.sandboxes.registry.get(request.id).guest
        assert guest is not None
        await guest.close()
        assert await run(host, request.id, "echo hi") == (b"hi\n", 0)

    async def test_a_request_under_way_in_a_deleted_sandbox_ends_at_once(self, world: World, host: HostService) -> None:
        request = wanted()
        await host.create(request)
        running = asyncio.create_task(run(host, request.id, "sleep 100"))
        await until(lambda: "process.run" in world.runtime.steps)
        await host.delete(request.id)
        async with asyncio.timeout(0.9):
            with pytest.raises(SandboxNotFound):
                await running
        assert world.left() == {}

    async def test_a_delete_whose_stop_fails_can_be_repeated(self, world: World, host: HostService) -> None:
        request = wanted()
        await host.create(request)
        world.runtime.fail("stop")
        with pytest.raises(RuntimeFailed):
            await host.delete(request.id)
        assert [one.id for one in await host.list()] == [request.id]
        await host.delete(request.id)
        assert (world.left(), reserved(host)) == ({}, 0)

    async def test_deletes_at_once_are_one(self, world: World, host: HostService) -> None:
        request = wanted()
        await host.create(request)
        await asyncio.gather(*(host.delete(request.id) for _ in range(5)))
        assert (world.left(), world.runtime.steps.count("stop")) == ({}, 1)
