"""The life of sandboxes on one host: what is said of them, and in which order. Failures are in tests/faults."""

from __future__ import annotations

import asyncio
import time

import pytest

from hosts import World, run, until, wanted
from pandastack.errors import InvalidRequest, SandboxNotFound, SandboxNotRunning
from pandastack.host.app import HostService
from pandastack.host.runtimes.base import MachineId
from pandastack.wire.ids import ProcessId
from pandastack.wire.processes import ProcessStart, SignalRequest

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


async def test_limits_left_out_come_from_the_template(world: World, host: HostService) -> None:
    plain, sized = await host.create(wanted()), await host.create(wanted(memory_mb=333, disk_mb=444, cpu=0.5))
    assert (plain.cpu, plain.memory_mb, plain.disk_mb) == (1, 256, 256)
    assert (sized.cpu, sized.memory_mb, sized.disk_mb) == (0.5, 333, 444)
    assert sorted(machine.spec.limits.memory_mib for machine in world.runtime.machines.values()) == [256, 333]


async def test_a_request_that_can_never_fit_is_refused(world: World, host: HostService) -> None:
    with pytest.raises(InvalidRequest):
        await host.create(wanted(memory_mb=1_000_000))
    assert world.left() == {}


async def test_env_of_the_request_wins_over_the_template(host: HostService) -> None:
    request = wanted(env={"FROM_TEMPLATE": "no", "MINE": "1"}, hostname="mine")
    await host.create(request)
    assert await run(host, request.id, "echo $FROM_TEMPLATE $MINE $HOSTNAME") == (b"no 1 mine\n", 0)


async def test_each_sandbox_has_a_token_of_its_own(world: World, host: HostService) -> None:
    await host.create(wanted())
    await host.create(wanted())
    tokens = [sandbox.entry.token for sandbox in host.sandboxes.registry.list()]
    assert len(set(tokens)) == 2
    assert all(len(token) == 64 for token in tokens)


async def test_idle_counts_from_the_end_of_the_last_request(host: HostService) -> None:
    request = wanted()
    await host.create(request)
    running = asyncio.create_task(run(host, request.id, "sleep 0.1"))
    await asyncio.sleep(0.03)
    during = await host.get(request.id)
    assert (during.busy, during.idle_s, during.idle_reason) == (True, 0.0, "a request is under way")
    await running
    ended = time.monotonic()
    sandbox = host.sandboxes.registry.get(request.id)
    await until(lambda: not sandbox.busy)
    after = await host.get(request.id)
    # Not idle before somebody looked: the command may have left work behind.
    assert (after.idle_s, after.idle_reason) == (0.0, "no request and no process")
    await until(lambda: sandbox.looked)
    after = await host.get(request.id)
    assert abs(after.idle_s - (time.monotonic() - ended)) < 0.5


async def test_work_without_a_request_is_busy_until_it_ends(host: HostService) -> None:
    request = wanted()
    await host.create(request)
    await host.start_process(request.id, ProcessStart(cmd="sleep 100", id="p"))
    sandbox = host.sandboxes.registry.get(request.id)
    await until(lambda: sandbox.busy)
    assert (await host.get(request.id)).idle_reason == "processes run inside"
    await host.signal_process(request.id, ProcessId("p"), SignalRequest(signal="KILL"))
    await until(lambda: not sandbox.busy)


async def test_a_short_command_leaves_no_trace_of_work(host: HostService) -> None:
    request = wanted()
    await host.create(request)
    for _ in range(20):
        await run(host, request.id, "true")
    await asyncio.sleep(0.05)
    assert not (await host.get(request.id)).busy


async def test_events_are_numbered_and_waited_for(world: World, host: HostService) -> None:
    requests = [wanted(), wanted()]
    for request in requests:
        await host.create(request)
    waiting = asyncio.create_task(host.events(0, timeout_s=10))
    await asyncio.sleep(0.01)
    world.runtime.machines[MachineId(host.sandboxes.registry.get(requests[0].id).entry.machine)].end("oom")
    (first,) = await waiting
    assert (first.seq, first.kind, first.sandbox_id, first.reason) == (1, "failed", requests[0].id, "oom")
    world.runtime.machines[MachineId(host.sandboxes.registry.get(requests[1].id).entry.machine)].end("exited")
    (second,) = await host.events(first.seq, timeout_s=10)
    assert (second.seq, second.reason) == (2, "exited")
    assert await host.events(second.seq, timeout_s=0.01) == []


async def test_a_failed_sandbox_explains_itself_to_every_call(world: World, host: HostService) -> None:
    request = wanted()
    await host.create(request)
    (machine,) = world.runtime.machines.values()
    machine.end("oom")
    await until(lambda: host.sandboxes.registry.get(request.id).status == "failed")
    for call in (host.metrics(request.id), host.stat_file(request.id, b"/"), run(host, request.id, "true")):
        with pytest.raises(SandboxNotRunning, match="memory") as refused:
            await call
        assert refused.value.fields == {"sandbox_status": "failed", "status_reason": "oom"}
        assert refused.value.hint
    assert (await host.create(request)).status == "failed", "a repeated create makes no second one"


async def test_an_unknown_sandbox_is_not_found_by_any_call(host: HostService) -> None:
    nobody = wanted().id
    for call in (host.get(nobody), host.metrics(nobody), host.stat_file(nobody, b"/"), run(host, nobody, "true")):
        with pytest.raises(SandboxNotFound):
            await call
    await host.delete(nobody)


async def test_a_file_being_read_keeps_the_sandbox_busy(host: HostService) -> None:
    request = wanted()
    await host.create(request)
    await run(host, request.id, "head -c 3000000 /dev/zero > /root/big")
    entry, data = await host.read_file(request.id, b"/root/big")
    assert entry.size == 3_000_000
    assert await anext(data)
    assert (await host.get(request.id)).busy
    await data.aclose()  # type: ignore[attr-defined]
    assert not (await host.get(request.id)).busy


async def test_sandboxes_do_not_wait_for_each_other(host: HostService) -> None:
    requests = [wanted() for _ in range(10)]
    await asyncio.gather(*(host.create(request) for request in requests))
    started = asyncio.get_running_loop().time()
    results = await asyncio.gather(*(run(host, request.id, "sleep 0.3; hostname") for request in requests))
    assert results == [(b"sandbox\n", 0)] * 10
    assert asyncio.get_running_loop().time() - started < 2.5
