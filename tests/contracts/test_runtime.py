"""The promises of `host/runtimes/base.py`, over every runtime of this machine: the fake, gVisor with each runsc, QEMU, Firecracker.

What is real needs root and the image of the template `base`, which is built (minutes) if the cache directory
(PANDASTACK_TEST_CACHE, else the default one) has none. A newer runsc is named by PANDASTACK_TEST_RUNSC_NEW. QEMU needs a guest
kernel (fetched if the cache has none), and its files are on an XFS made for the tests, so that copies share blocks; most of its
machines are restored from one state that is made once, because emulated a boot takes seconds. `qemu` emulates; `qemu-kvm` is for
machines whose /dev/kvm runs guests, or for the outer machine of tests/nested: that one names a folder with the finished root
(PANDASTACK_TEST_ROOTS), is slow (PANDASTACK_TEST_PATIENCE: how many times), and must have KVM (PANDASTACK_TEST_KVM=required).
`firecracker-kvm` is for machines of that kind, too, where PANDASTACK_FIRECRACKER names a Firecracker with its jailer beside it.
After each test nothing may be left: no process, cgroup, mount, loop device, state file or descriptor.
"""

# ruff: noqa: ASYNC240, S604 - `shell` is a field of ProcessSpec and runs inside a sandbox
from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from hosts import until
from pandastack.errors import GuestError, HookFailed, HostUnfit, PandastackError, RuntimeFailed
from pandastack.host import identity
from pandastack.host.guest import ProcessSpec
from pandastack.host.runtimes.base import Machine, MachineSpec, Runtime
from pandastack.host.runtimes.fake import FakeRuntime
from pandastack.host.runtimes.gvisor.driver import GvisorRuntime
from pandastack.host.storage import space
from pandastack.wire.guest import Sealed

from .benches import (
    LIMITS,
    PATIENCE,
    Bench,
    forget,
    made_folder,
    reborn,
    say,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300 * PATIENCE)]


async def test_a_probe_names_version_and_key(bench: Bench) -> None:
    probe = await bench.runtime.probe()
    assert probe.works
    assert probe.version
    assert probe.key
    assert probe.key == (await bench.runtime.probe()).key


async def test_a_started_machine_has_a_guest_that_answers(bench: Bench) -> None:
    async with bench.started(cold=True) as (_, guest):
        assert not (await guest.health()).sealed
        assert await say(guest, "echo hi; exit 3") == ("hi\n", 3)


async def test_what_is_written_stays_inside(bench: Bench) -> None:
    before = bench.rootfs.stat().st_mtime_ns
    async with bench.started() as (one, guest):
        await guest.write_file("/root/secret", b"x" * 1000)
        async with bench.started() as (_, other):
            with pytest.raises(FileNotFoundError):
                await other.stat("/root/secret")
        if one.spec.rootfs.is_dir():
            assert not (one.spec.rootfs / "root/secret").exists()
        else:
            assert one.spec.rootfs.stat().st_mtime_ns == before


async def test_a_machine_stopped_before_it_started_leaves_nothing(bench: Bench) -> None:
    machine = await bench.prepared()
    await machine.stop()
    await machine.stop()


async def test_a_prepare_that_fails_leaves_nothing(bench: Bench) -> None:
    spec = await bench.spec()
    if isinstance(bench.runtime, FakeRuntime):
        bench.runtime.fail("prepared")
        broken = spec
    else:
        broken = MachineSpec(id=spec.id, rootfs=bench.root / "nothing", guest=spec.guest, disk=spec.disk, state=spec.state, limits=LIMITS)
    with pytest.raises((RuntimeFailed, HostUnfit)):
        await bench.runtime.prepare(broken)
    (spec.state / "runsc.log").unlink(missing_ok=True)
    assert {kind: what for kind, what in bench.left().items() if kind not in ("mounts", "loops")} == {}


@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.01, 0.03, 0.1])
async def test_a_prepare_that_is_cancelled_leaves_nothing(bench: Bench, after_s: float) -> None:
    preparing = asyncio.create_task(bench.runtime.prepare(await bench.spec()))
    await asyncio.sleep(after_s)
    if preparing.done():
        bench.made.append(preparing.result())
        return
    preparing.cancel()
    await asyncio.gather(preparing, return_exceptions=True)
    if not preparing.cancelled():
        bench.made.append(preparing.result())
        return
    await until(lambda: not set(bench.left()) - {"mounts", "loops"}, 10)


async def test_a_restored_machine_goes_on_where_the_saved_one_was(bench: Bench) -> None:
    into = bench.root / "saved"
    into.mkdir()
    async with bench.started(cold=True) as (machine, guest):
        await guest.write_file("/root/file", b"content")
        await guest.start(ProcessSpec(shell="echo before; cat", stdin=True, id="p"))
        await asyncio.sleep(0.3)
        await guest.close()
        await machine.snapshot(into, resume=False)
        await machine.stop()
    copies = [await bench.prepared(), await bench.prepared()]
    for copy in copies:
        await copy.restore(into)
        async with bench.guest_of(copy) as guest:
            _, body = await guest.read_file("/root/file")
            assert b"".join([piece async for piece in body]) == b"content"
            assert "p" in [one.id for one in await guest.list_processes() if one.running]
            assert await guest.write_stdin("p", b"after\n", close=True) == 6
            async with asyncio.timeout(60 * PATIENCE), await guest.attach("p") as stream:
                assert b"".join([data async for _, _, data in stream]) == b"before\nafter\n"
            await guest.write_file("/root/file", b"of this copy")
        # What it has not touched yet comes from there, if it says so.
        mapped, source = bench.runtime.capabilities.memory_file, copy.memory_source
        assert (None if source is None else source.file) == ((into / mapped).resolve() if mapped else None)


async def test_a_machine_saved_on_the_way_goes_on(bench: Bench) -> None:
    into = bench.root / "saved"
    into.mkdir()
    async with bench.started() as (machine, guest):
        await guest.start(ProcessSpec(shell="sleep 0.5; echo done", id="p"))
        await machine.snapshot(into, resume=True)
        assert (await guest.wait("p", timeout_s=60 * PATIENCE)).code == 0
        assert await say(guest, "echo on") == ("on\n", 0)


async def test_a_sealed_machine_gets_an_identity_when_it_is_restored(bench: Bench) -> None:
    into = bench.root / "saved"
    into.mkdir()
    async with bench.started() as (machine, guest):
        assert (await guest.seal()).live == 0
        await guest.close()
        await machine.snapshot(into, resume=False)
    copy = await bench.prepared()
    await copy.restore(into)
    async with bench.guest_of(copy) as guest:
        with pytest.raises(PandastackError):
            await say(guest, "true")
        await identity.confirm(guest, identity.fresh("00000000-0000-4000-8000-000000000001", "mine", {"NAME": "value"}))
        assert await say(guest, "hostname; echo $NAME") == ("mine\nvalue\n", 0)


async def test_who_wants_it_still_for_that_instant_is_asked_once(bench: Bench) -> None:
    into, seen = made_folder(bench.root / "saved"), []

    @asynccontextmanager
    async def still(refuse: bool) -> AsyncIterator[None]:
        seen.append("entered")
        if refuse:
            raise RuntimeFailed("not now")
        yield
        seen.append("left")

    async with bench.started() as (machine, guest):
        with pytest.raises(RuntimeFailed, match="not now"):
            await machine.snapshot(into, resume=True, still=still(refuse=True))
        assert not list(into.iterdir())
        assert not (await guest.health()).frozen, "it runs as if nobody had asked"
        seen.clear()
        await machine.snapshot(into, resume=True, still=still(refuse=False))
        assert seen == ["entered", "left"]
        assert not (await guest.health()).frozen
    copy = await bench.prepared()
    await copy.restore(into)
    async with bench.guest_of(copy) as guest:
        assert not (await guest.health()).frozen


async def test_a_machine_can_be_frozen_by_who_wanted_it_still(bench: Bench) -> None:
    """As one that was paused is, when it has been saved."""
    into = made_folder(bench.root / "saved")

    @asynccontextmanager
    async def still(machine: Machine) -> AsyncIterator[None]:
        yield
        await machine.freeze()

    async with bench.started() as (machine, guest):
        async with asyncio.timeout(30 * PATIENCE):
            await machine.snapshot(into, resume=True, still=still(machine))
        answer = asyncio.create_task(guest.health())
        await asyncio.sleep(0.3)
        assert not answer.done(), "it is frozen again"
        await machine.thaw()
        await answer


@pytest.mark.parametrize("copies", [None, 2, 3], ids=["kept", "for two", "for three"])
async def test_a_frozen_machine_is_saved_on_the_way_and_its_copies_are_others(bench: Bench, copies: int | None) -> None:
    """A live fork: the parent loses nothing, a copy does nothing before it is itself, and nothing asked of the parent."""
    into = bench.root / "saved"
    into.mkdir()
    counting = (
        "i=0; while :; do i=$((i+1)); echo $i >> /root/count; sleep 0.01; done" if bench.real else "sleep 0.6; echo late >> /root/count"
    )
    async with bench.started() as (machine, guest):
        await guest.start(ProcessSpec(shell=counting, id="counting"))
        await guest.start(ProcessSpec(argv=["cat"], stdin=True, id="cat"))
        await asyncio.sleep(0.3)
        sealed = await guest.seal(freeze=True, reason="fork")
        assert sealed.live == 2
        assert sealed.frozen >= 2
        asked = asyncio.create_task(guest.write_file("/root/asked", b"of the parent"))
        assert (await guest.health()).frozen
        await machine.snapshot(into, resume=True, copies=copies)
        assert not asked.done()
        assert await guest.unseal() == sealed.frozen
        assert await asked == 13
        assert await guest.write_stdin("cat", b"parent\n", close=True) == 7
        assert (await guest.wait("cat", timeout_s=60 * PATIENCE)).stdout_bytes == 7
        await asyncio.sleep(0.5)
        lines = (await say(guest, "cat /root/count"))[0].split()
        assert lines == ([str(n) for n in range(1, len(lines) + 1)] if bench.real else ["late"])
    made = [await bench.prepared(), await bench.prepared()]
    for number, copy in enumerate(made):
        await copy.restore(into)
        if number == 1:
            for _ in range(2):
                bench.runtime.forget(into)
        async with bench.guest_of(copy) as guest:
            health = await guest.health()
            assert (health.sealed, health.frozen, health.live) == (True, True, 2)
            waiting = asyncio.create_task(say(guest, "hostname; echo $NAME"))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            await identity.confirm(guest, identity.fresh("00000000-0000-4000-8000-000000000001", f"copy{number}", {"NAME": "value"}))
            assert await waiting == (f"copy{number}\nvalue\n", 0)
            health = await guest.health()
            assert (health.sealed, health.frozen) == (False, False)
            with pytest.raises(FileNotFoundError):
                await guest.stat("/root/asked")
            assert await guest.write_stdin("cat", b"copy\n", close=True) == 5
            assert (await guest.wait("cat", timeout_s=60 * PATIENCE)).stdout_bytes == 5
            await asyncio.sleep(0.7)
            lines = (await say(guest, "cat /root/count"))[0].split()
            assert lines == ([str(n) for n in range(1, len(lines) + 1)] if bench.real else ["late"])


async def test_a_machine_that_waited_frozen_is_as_good_as_a_new_one(bench: Bench) -> None:
    into = bench.root / "saved"
    into.mkdir()
    async with bench.started() as (machine, guest):
        await guest.close()
        await machine.snapshot(into, resume=False)
    copy = await bench.prepared()
    await copy.freeze()
    await copy.thaw()
    await copy.restore(into)
    async with bench.guest_of(copy) as guest:
        await guest.write_file("/root/file", b"content")
        assert await say(guest, "cat /root/file") == ("content", 0)


async def test_a_freeze_holds_and_can_be_taken_back(bench: Bench) -> None:
    slow = 4 if PATIENCE > 1 else 1  # It must still run when it is frozen.
    async with bench.started() as (_, guest):
        await guest.start(ProcessSpec(shell=f"sleep {0.3 * slow}; echo done", timeout_s=2 * slow, id="p"))
        assert (await guest.seal()).frozen == 0
        with pytest.raises(GuestError) as refused:
            await say(guest, "true")
        assert refused.value.guest_code == "sealed"
        assert await guest.unseal() == 0
        sealed = await guest.seal(freeze=True)
        assert sealed == await guest.seal(freeze=True)
        gone = asyncio.create_task(guest.write_file("/root/never", b"x" * (2 << 20)))
        kept = asyncio.create_task(guest.write_file("/root/kept", b"x" * (2 << 20)))
        await asyncio.sleep(2.5 * slow)
        assert not kept.done()
        gone.cancel()
        assert await guest.unseal() == sealed.frozen
        assert await guest.unseal() == 0
        end = await guest.wait("p", timeout_s=30 * PATIENCE)
        assert (end.code, end.reason) == (0, "exited")
        assert await kept == 2 << 20
        with pytest.raises(FileNotFoundError):
            await guest.stat("/root/never")
        for wrong in ({"reason": "A"}, {"hook_timeout_ms": 120_001}):
            with pytest.raises(PandastackError):
                await guest.connection.request("machine.seal", wrong, Sealed, timeout_s=10)
        assert not (await guest.health()).sealed


async def test_hooks_decide_whether_a_machine_is_saved_and_handed_out(bench: Bench) -> None:
    hook, fails = "/etc/pandastack/hooks/", b"#!/bin/sh\nexit 1\n"
    async with bench.started() as (_, guest):
        await guest.start(ProcessSpec(argv=["sleep", "60"], id="p"))
        await guest.write_file(hook + "before-snapshot", fails, mode=0o755)
        with pytest.raises(HookFailed):
            await guest.seal(freeze=True)
        health = await guest.health()
        assert (health.sealed, health.frozen) == (False, False)
        await guest.chmod(hook + "before-snapshot", mode=0o644)
        await guest.write_file(hook + "after-restore", fails, mode=0o755)
        assert (await guest.seal(freeze=True)).frozen == 1
        fresh = identity.fresh("00000000-0000-4000-8000-000000000001", "mine", {})
        with pytest.raises(HookFailed):
            await identity.confirm(guest, fresh)
        health = await guest.health()
        assert (health.sealed, health.frozen) == (True, True)
        assert await guest.unseal() == 1
        await guest.write_file(hook + "after-restore", b"#!/bin/sh\n", mode=0o755)
        await guest.seal(freeze=True)
        await identity.confirm(guest, fresh)
        assert await say(guest, "hostname") == ("mine\n", 0)


async def test_a_saved_state_that_is_none_is_refused(bench: Bench) -> None:
    into = bench.root / "saved"
    into.mkdir()
    machine = await bench.prepared()
    with pytest.raises((RuntimeFailed, OSError)):
        await machine.restore(into)
    for name in ("state", "checkpoint.img", "pages_meta.img", "pages.img"):
        (into / name).write_bytes(b"garbage" * 1000)
    again = await bench.prepared()
    with pytest.raises(RuntimeFailed):
        await again.restore(into)
    if bench.microvms is not None:
        for name in ("machine.json", "mem", "disk"):
            space.clone(bench.microvms.template / name, into / name)
        third = await bench.prepared()
        with pytest.raises(RuntimeFailed) as refused:
            await third.restore(into)
        assert "cannot be restored" in refused.value.message


async def test_a_state_of_another_size_is_refused(bench: Bench) -> None:
    if bench.microvms is None:
        pytest.skip("its states fit machines of any size")
    machine = await bench.prepared(replace(LIMITS, memory_mib=128))
    with pytest.raises(RuntimeFailed) as refused:
        await machine.restore(bench.microvms.template)
    assert "another memory_mib" in refused.value.message


async def test_a_frozen_machine_uses_no_cpu_and_answers_when_thawed(bench: Bench) -> None:
    async with bench.started() as (machine, guest):
        await guest.start(ProcessSpec(shell="while true; do :; done" if bench.real else "sleep 100", id="busy"))
        await asyncio.sleep(0.2)
        await machine.freeze()
        await machine.freeze()
        await asyncio.sleep(0.1)
        before = (await machine.usage()).cpu_s
        with pytest.raises(PandastackError):
            await guest.health(timeout_s=1)
        assert (await machine.usage()).cpu_s - before < 0.02
        await machine.thaw()
        await machine.thaw()
        assert (await guest.health(timeout_s=30 * PATIENCE)).live == 1
        if bench.real:
            await until_used(machine, before + 0.1)


async def until_used(machine: Machine, cpu_s: float) -> None:
    async with asyncio.timeout(30 * PATIENCE):
        used = (await machine.usage()).cpu_s
        while used < cpu_s:
            await asyncio.sleep(0.05)
            used = (await machine.usage()).cpu_s


async def test_usage_is_of_this_machine_and_only_grows(bench: Bench) -> None:
    async with bench.started() as (machine, guest):
        before = await machine.usage()
        assert before.pid > 1
        assert min(before.memory_bytes, before.resident_bytes, before.virtual_bytes, before.threads) > 0
        await say(guest, "echo 1; echo 2; echo 3")
        after = await machine.usage()
        assert after.cpu_s > before.cpu_s
        assert after.uptime_s > before.uptime_s


async def test_memory_share_follows_what_is_used(bench: Bench) -> None:
    async with bench.started() as (machine, guest):
        if bench.runtime.capabilities.own_kernel:
            # Its kernel ends whoever needs too much: using memory brings the machine no nearer to its end.
            await bench.use_memory(machine, guest, 128 << 20)
            assert machine.memory_share() == 0
            return
        before = machine.memory_share()
        assert 0 < before < 0.5
        await bench.use_memory(machine, guest, 128 << 20)
        await until(lambda: machine.memory_share() > before + 0.3)


@pytest.mark.parametrize("reason", ["oom", "exited"])
async def test_the_end_of_a_machine_says_why(bench: Bench, reason: str) -> None:
    if reason == "oom" and bench.runtime.capabilities.own_kernel:
        pytest.skip("such a machine outlives it: see the next test")
    async with bench.started() as (machine, guest):
        ended = asyncio.create_task(machine.ended())
        cancelled = asyncio.create_task(machine.ended())
        await asyncio.sleep(0.05)
        cancelled.cancel()
        assert not ended.done()
        assert not machine.over
        await bench.end_by(machine, guest, reason)
        async with asyncio.timeout(60 * PATIENCE):
            assert await ended == reason
        assert await machine.ended() == reason
        assert machine.over
        async with asyncio.timeout(10 * PATIENCE):
            await guest.ended()


async def test_who_needs_too_much_memory_is_ended_and_a_machine_with_a_kernel_lives(bench: Bench) -> None:
    if not bench.runtime.capabilities.own_kernel:
        pytest.skip("the host ends such a machine: see the test before")
    async with bench.started() as (machine, guest):
        await guest.start(ProcessSpec(argv=["sleep", "300"], id="other"))
        await guest.start(ProcessSpec(argv=["tail", "/dev/zero"], id="hog"))
        end = await guest.wait("hog", timeout_s=120 * PATIENCE)
        assert end.signal == signal.SIGKILL
        assert await say(guest, "echo on") == ("on\n", 0)
        assert [one.running for one in await guest.list_processes() if one.id == "other"] == [True]
        assert not machine.over


async def test_a_stopped_machine_says_so(bench: Bench) -> None:
    async with bench.started() as (machine, guest):
        ended = asyncio.create_task(machine.ended())
        await asyncio.sleep(0.05)
        await machine.stop()
        async with asyncio.timeout(10 * PATIENCE):
            assert await ended == "stopped"
            await guest.ended()
        assert machine.over
        await machine.stop()
        with pytest.raises(RuntimeFailed):
            await machine.connect()


async def test_two_sessions_follow_each_other(bench: Bench) -> None:
    async with bench.started() as (machine, guest):
        await guest.start(ProcessSpec(shell="sleep 100", id="p"))
        stream = await guest.run(ProcessSpec(shell="yes | head -c 3000000"))
        await anext(stream)
        await guest.close()  # In the middle of its output.
        async with bench.guest_of(machine) as again:
            assert "p" in [one.id for one in await again.list_processes() if one.running]
            assert await say(again, "echo hi") == ("hi\n", 0)


@pytest.mark.parametrize("state", ["awake", "frozen", "frozen while it spoke"])
async def test_a_running_machine_is_adopted_after_a_restart(bench: Bench, state: str) -> None:
    async with bench.started() as (machine, guest):
        await guest.start(ProcessSpec(shell="sleep 0.5; echo done; sleep 100", id="p"))
        if state == "frozen while it spoke":
            stream = await guest.run(ProcessSpec(shell="while :; do echo more; sleep 0.001; done", id="speaks"))
            await anext(stream)
            await machine.freeze()
        await guest.close()
        if state == "frozen":
            await machine.freeze()
    forget(bench, machine)
    runtime = reborn(bench)
    await runtime.probe()
    adopted = await runtime.adopt(machine.spec)
    assert adopted is not None
    bench.made.append(adopted)
    if state == "frozen while it spoke":
        await asyncio.sleep(0.3)  # To nobody, for a moment.
    async with bench.guest_of(adopted) as guest:
        async with asyncio.timeout(60 * PATIENCE), await guest.attach("p") as stream:
            assert (await anext(stream)).data == b"done\n"
        assert await say(guest, "echo hi") == ("hi\n", 0)
        await bench.end_by(adopted, guest, "exited") if bench.name == "fake" else os.kill((await adopted.usage()).pid, signal.SIGKILL)
        async with asyncio.timeout(30 * PATIENCE):
            assert await adopted.ended() == "exited"


async def test_a_machine_that_is_gone_is_not_adopted(bench: Bench) -> None:
    async with bench.started() as (machine, guest):
        await bench.end_by(machine, guest, "exited")
        await machine.ended()
        assert await bench.runtime.adopt(machine.spec) is None
    assert await bench.runtime.adopt(await bench.spec()) is None


async def test_a_sweep_removes_all_but_what_is_kept(bench: Bench) -> None:
    kept, other, third = await bench.prepared(), await bench.prepared(), await bench.prepared()
    await kept.start()
    await other.start()
    forget(bench, other)
    forget(bench, third)
    assert await bench.runtime.sweep([kept.spec.id]) == sorted([other.spec.id, third.spec.id])
    async with bench.guest_of(kept) as guest:
        assert await say(guest, "echo hi") == ("hi\n", 0)
    assert await bench.runtime.sweep([kept.spec.id]) == []


async def test_a_sweep_touches_no_other_install(bench: Bench) -> None:
    other: Runtime = FakeRuntime()
    if isinstance(bench.runtime, GvisorRuntime):
        other = GvisorRuntime(
            bench.runtime.runsc, root=bench.root / "other", group=f"{bench.group}-2", guest=bench.guest, keeper=bench.runtime.keeper
        )
    elif bench.microvms is not None:
        other = bench.microvms.runtime(bench.root / "other", f"{bench.group}-2")
    await other.probe()
    async with bench.started() as (_, guest):
        assert await other.sweep([]) == []
        assert await say(guest, "echo hi") == ("hi\n", 0)


async def test_limits_hold(bench: Bench) -> None:
    if not bench.real:
        pytest.skip("the fake has no kernel to hold limits")
    async with bench.started(replace(LIMITS, cpu=0.5)) as (machine, guest):
        before, began = (await machine.usage()).cpu_s, time.monotonic()
        await say(guest, "timeout 2 sh -c 'while :; do :; done'")
        share = ((await machine.usage()).cpu_s - before) / (time.monotonic() - began)
        assert share < 0.8
        _, code = await say(guest, "head -c 600000000 /dev/zero >/root/big")
        assert code != 0, "the disk is larger than its limit"
        assert await say(guest, "rm /root/big; echo on") == ("on\n", 0)


async def test_a_dead_keeper_costs_the_adoption_and_nothing_else(bench: Bench) -> None:
    if bench.keeper is None:
        pytest.skip("its machines need no keeper")
    async with bench.started() as (machine, guest):
        (pid,) = [int(entry.parent.name) for entry in Path("/proc").glob("[0-9]*/cmdline") if _is_keeper(entry, bench.root)]
        os.kill(pid, signal.SIGKILL)
        assert await say(guest, "echo hi") == ("hi\n", 0)
        (await bench.prepared()).spec  # noqa: B018 - a new keeper takes over for what comes
    forget(bench, machine)
    runtime = reborn(bench)
    await runtime.probe()
    assert await runtime.adopt(machine.spec) is None
    assert machine.spec.id in await runtime.sweep([bench.made[-1].spec.id])


def _is_keeper(cmdline: Path, root: Path) -> bool:
    try:
        words = cmdline.read_bytes()
    except OSError:
        return False
    return b"keeper.py" in words and os.fsencode(root) in words
