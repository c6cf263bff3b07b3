"""Pause, resume, hibernate, wake, the idle timer, and rows that follow what their host does by itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pandastack.control.fake_host import FakeHost
from pandastack.errors import Conflict, DiskFull, GuestError, RuntimeFailed
from pandastack.wire.ids import SandboxId

from .world import World, eventually, until, world

pytestmark = pytest.mark.anyio
QUIET: dict[str, Any] = {"expiry_interval_s": 3600, "sweep_interval_s": 3600}
BODIES: list[dict[str, Any]] = [
    {},
    {"content": b"", "headers": {"content-type": "text/plain;charset=UTF-8"}},
    {"content": b"{}"},
    {"content": b"what", "headers": {"content-type": "text/plain"}},
]


def box(w: World, sandbox: str) -> Any:
    return w.host.sandboxes[SandboxId(sandbox)]


async def to(w: World, sandbox: str, verb: str) -> Any:
    return await w.ours.post(f"/v1/sandboxes/{sandbox}/{verb}")


# Asked for


@pytest.mark.parametrize("how", BODIES)
async def test_each_verb_takes_a_sandbox_where_it_says_and_can_be_repeated(w: World, how: dict[str, Any]) -> None:
    sandbox = await w.sandbox()
    for verb, status, answer in [
        ("pause", ("paused", "request"), None),
        ("resume", ("running", None), None),
        ("hibernate", ("hibernated", "request"), {"status": "hibernated"}),
        ("wake", ("running", None), {"status": "running"}),
        ("stop", ("hibernated", "request"), {"status": "hibernated"}),
        ("start", ("running", None), {"status": "running"}),
    ]:
        for _ in range(2):
            told = await w.ours.post(f"/v1/sandboxes/{sandbox}/{verb}", **how)
            assert told.status_code == (204 if answer is None else 200), told.text
            assert answer is None or told.json() == answer
            assert await w.status(sandbox) == status
            assert box(w, sandbox).state.status == status[0]


async def test_a_hibernated_sandbox_is_not_paused_and_resume_wakes_it(w: World) -> None:
    sandbox = await w.sandbox()
    await to(w, sandbox, "hibernate")
    assert (await to(w, sandbox, "pause")).status_code == 204
    assert await w.status(sandbox) == ("hibernated", "request")
    assert (await to(w, sandbox, "resume")).status_code == 204
    assert await w.status(sandbox) == ("running", None)


async def test_files_are_there_after_hibernation(w: World) -> None:
    sandbox = await w.sandbox()
    await w.ours.put(f"/v1/sandboxes/{sandbox}/fs?path=/tmp/f", content=b"kept")
    await to(w, sandbox, "hibernate")
    assert (await w.ours.get(f"/v1/sandboxes/{sandbox}/fs?path=/tmp/f")).content == b"kept"
    assert await w.status(sandbox) == ("running", None)


async def test_ten_requests_at_once_wake_it_once(w: World) -> None:
    sandbox = await w.sandbox()
    await to(w, sandbox, "hibernate")
    woken = w.host.hold("wake")
    asked = [w.ours.post(f"/v1/sandboxes/{sandbox}/exec", json={"cmd": "echo hi"}) for _ in range(9)]
    answering = asyncio.gather(*asked, w.ours.get(f"/v1/sandboxes/{sandbox}/processes"))
    await asyncio.sleep(0.1)
    woken.set()
    assert {answer.status_code for answer in await answering} == {200}
    # A late one may ask again, and finds it awake.
    assert w.host.wakes == {SandboxId(sandbox): 1}
    assert (await w.ours.get(f"/v1/sandboxes/{sandbox}")).json()["boot_mode"] == "wake"


async def test_two_who_wake_it_at_once_wake_it_once(w: World) -> None:
    sandbox = await w.sandbox()
    await to(w, sandbox, "hibernate")
    answers = await asyncio.gather(*(to(w, sandbox, verb) for verb in ("wake", "start", "wake")))
    assert [answer.json() for answer in answers] == [{"status": "running"}] * 3
    assert w.host.wakes == {SandboxId(sandbox): 1}


async def test_a_request_resumes_a_paused_sandbox(w: World) -> None:
    sandbox = await w.sandbox()
    await to(w, sandbox, "pause")
    assert (await w.ours.post(f"/v1/sandboxes/{sandbox}/exec", json={"cmd": "echo hi"})).json()["stdout"] == "hi\n"
    assert await w.status(sandbox) == ("running", None)


async def test_looking_wakes_nothing(w: World) -> None:
    sandbox = await w.sandbox(metadata={"a": "b"})
    for verb, status in (("pause", "paused"), ("hibernate", "hibernated")):
        await to(w, sandbox, verb)
        assert (await w.ours.get(f"/v1/sandboxes/{sandbox}")).json()["status"] == status
        assert (await w.ours.get("/v1/sandboxes", params={"status": status, "metadata": "a=b"})).json()[0]["id"] == sandbox
        lifecycle = (await w.ours.get(f"/v1/sandboxes/{sandbox}/lifecycle")).json()
        assert lifecycle["status"] == status
        assert status in lifecycle["idle_reason"]
        assert (await w.ours.patch(f"/v1/sandboxes/{sandbox}/lifecycle", json={"ttl_seconds": 600})).status_code == 200
        metrics = await w.ours.get(f"/v1/sandboxes/{sandbox}/metrics")
        assert metrics.status_code == (200 if status == "paused" else 409)
        assert await w.status(sandbox) == (status, "request")
    assert (metrics.json()["code"], metrics.json()["sandbox_status"]) == ("sandbox_not_running", "hibernated")
    assert not w.host.wakes


@pytest.mark.parametrize(
    ("error", "status"), [(DiskFull("full"), 507), (GuestError("the hook refused"), 502), (RuntimeFailed("no"), 500), (ValueError(), 500)]
)
async def test_a_sandbox_that_can_not_be_hibernated_goes_on(w: World, error: Exception, status: int) -> None:
    sandbox = await w.sandbox()
    w.host.fail("hibernate", error)
    assert (await to(w, sandbox, "hibernate")).status_code == status
    assert await w.status(sandbox) == ("running", None)
    assert (await w.ours.post(f"/v1/sandboxes/{sandbox}/exec", json={"cmd": "true"})).status_code == 200


async def test_a_machine_without_room_says_when_to_wake_again_and_keeps_what_was_saved(database: Path) -> None:
    host = FakeHost(sandboxes_max=1)
    async with world(database, host) as w:
        sandbox = await w.sandbox()
        await to(w, sandbox, "hibernate")
        other = await w.sandbox()
        answer = await w.ours.post(f"/v1/sandboxes/{sandbox}/exec", json={"cmd": "true"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert await w.status(sandbox) == ("hibernated", "request")
        await w.ours.delete(f"/v1/sandboxes/{other}")
        assert (await w.ours.post(f"/v1/sandboxes/{sandbox}/exec", json={"cmd": "true"})).status_code == 200


async def test_those_who_wait_for_a_wake_are_told_of_its_failure_together(w: World) -> None:
    sandbox = await w.sandbox()
    await to(w, sandbox, "hibernate")
    tried = w.host.hold("wake")
    w.host.fail("wake", RuntimeFailed("damaged"))
    answering = asyncio.gather(*(w.ours.post(f"/v1/sandboxes/{sandbox}/exec", json={"cmd": "true"}) for _ in range(5)))
    await asyncio.sleep(0.5)
    tried.set()
    assert {answer.status_code for answer in await answering} == {500}
    assert w.host.calls["wake"] == 1
    assert (await to(w, sandbox, "wake")).json() == {"status": "running"}


@pytest.mark.parametrize(("verb", "status"), [("hibernate", "hibernated"), ("pause", "paused")])
async def test_a_change_is_finished_though_its_client_left(w: World, verb: str, status: str) -> None:
    sandbox = await w.sandbox()
    step = f"{verb}.after"
    w.host.delays_s[step] = 0.05
    asking = asyncio.create_task(to(w, sandbox, verb))
    await until(lambda: w.host.calls.get(step))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)

    async def there() -> bool:
        return await w.status(sandbox) == (status, "request")

    await eventually(there)


async def test_a_sandbox_deleted_while_it_is_hibernated_is_gone(w: World) -> None:
    sandbox = await w.sandbox()
    saved = w.host.hold("hibernate")
    asking = asyncio.create_task(to(w, sandbox, "hibernate"))
    await until(lambda: w.host.calls.get("hibernate"))
    assert (await w.ours.delete(f"/v1/sandboxes/{sandbox}")).status_code == 204
    saved.set()
    assert (await asking).status_code == 404
    assert (await w.ours.get(f"/v1/sandboxes/{sandbox}")).status_code == 404
    assert not w.host.sandboxes


async def test_hibernate_and_wake_at_once_end_where_the_host_is(w: World) -> None:
    sandbox = await w.sandbox()
    for _ in range(5):
        await asyncio.gather(*(to(w, sandbox, verb) for verb in ("hibernate", "wake", "pause", "hibernate", "resume")))
        assert (await w.status(sandbox))[0] == box(w, sandbox).state.status


@pytest.mark.parametrize("verb", ["pause", "resume", "hibernate", "wake"])
async def test_a_failed_sandbox_has_no_other_state(w: World, verb: str) -> None:
    sandbox = await w.sandbox()
    w.host.break_sandbox(SandboxId(sandbox), "oom")

    async def failed() -> bool:
        return await w.status(sandbox) == ("failed", "oom")

    await eventually(failed)
    answer = await to(w, sandbox, verb)
    assert (answer.status_code, answer.json()["code"], answer.json()["status_reason"]) == (409, "sandbox_not_running", "oom")


@pytest.mark.parametrize("verb", ["pause", "hibernate"])
async def test_one_that_does_not_run_can_fail_and_be_deleted(w: World, verb: str) -> None:
    one, two = await w.sandbox(), await w.sandbox()
    for sandbox in (one, two):
        await to(w, sandbox, verb)
    assert (await w.ours.delete(f"/v1/sandboxes/{one}")).status_code == 204
    w.host.break_sandbox(SandboxId(two), "error")

    async def failed() -> bool:
        return await w.status(two) == ("failed", "error")

    await eventually(failed)


# The host by itself


async def test_what_a_host_does_by_itself_is_seen(w: World) -> None:
    sandbox = await w.sandbox()
    await w.host.shut_down()

    async def asleep() -> bool:
        return await w.status(sandbox) == ("hibernated", "shutdown")

    await eventually(asleep)
    await w.host.wake(SandboxId(sandbox))

    async def awake() -> bool:
        return await w.status(sandbox) == ("running", None)

    await eventually(awake)


async def test_old_news_do_not_undo_what_is_known_since(w: World) -> None:
    sandbox = await w.sandbox()
    await to(w, sandbox, "hibernate")
    await to(w, sandbox, "wake")
    w.host._tell("hibernated", SandboxId(sandbox), "request")
    seen = w.host.calls["events"]
    await until(lambda: w.host.calls["events"] > seen + 1)
    await asyncio.sleep(0.02)
    assert await w.status(sandbox) == ("running", None)


@pytest.mark.parametrize("status", ["paused", "hibernated"])
async def test_the_sweep_takes_the_state_from_the_host(database: Path, status: Any) -> None:
    host = FakeHost()
    async with world(database, host, **QUIET) as w:
        sandbox = await w.sandbox()
        box(w, sandbox).become(status, "request")  # Without an event: as if it had been lost.
        await w.parts.reconciler.sweep()
        assert await w.status(sandbox) == (status, "request")
        box(w, sandbox).become("running")
    async with world(database, host, **QUIET) as w:
        assert await w.status(sandbox) == ("running", None)


async def test_hibernated_sandboxes_outlive_machine_and_control_plane(database: Path) -> None:
    host = FakeHost()
    async with world(database, host, **QUIET) as w:
        kept, lost = await w.sandbox(), await w.sandbox()
        await to(w, kept, "hibernate")
        await to(w, lost, "pause")
    host.lose_everything()
    async with world(database, host, **QUIET) as w:
        assert await w.status(kept) == ("hibernated", "request")
        assert await w.status(lost) == ("failed", "host_restarted")
        assert (await w.ours.post(f"/v1/sandboxes/{kept}/exec", json={"cmd": "true"})).status_code == 200


async def test_one_that_was_missing_and_is_found_has_the_state_it_has(database: Path) -> None:
    host = FakeHost()
    async with world(database, host, **QUIET) as w:
        sandbox = await w.sandbox()
        await to(w, sandbox, "pause")
        away, host.sandboxes = host.sandboxes, {}
        await w.parts.reconciler.sweep()
        assert await w.status(sandbox) == ("failed", "host_restarted")
        host.sandboxes = away
        await w.parts.reconciler.sweep()
        assert await w.status(sandbox) == ("paused", "request")


@pytest.mark.parametrize("step", ["hibernate.after", "wake.after", "pause.after"])
async def test_a_crash_between_host_and_record_is_healed_by_the_next_start(database: Path, step: str) -> None:
    host = FakeHost()
    verb = step.removesuffix(".after")
    async with world(database, host, **QUIET, event_wait_s=30) as w:
        sandbox = await w.sandbox()
        if verb == "wake":
            await to(w, sandbox, "hibernate")
        host.fail(step, RuntimeError("crash"))
        assert (await to(w, sandbox, verb)).status_code == 500
    async with world(database, host, **QUIET) as w:
        assert (await w.status(sandbox))[0] == {"hibernate": "hibernated", "wake": "running", "pause": "paused"}[verb]


# The idle timer


async def test_an_idle_persistent_sandbox_is_hibernated_and_wakes_when_needed(w: World) -> None:
    kept, endless = await w.sandbox(ttl_seconds=60, persistent=True), await w.sandbox(ttl_seconds=0, persistent=True)
    busy = await w.sandbox(ttl_seconds=60, persistent=True)
    await w.ours.post(f"/v1/sandboxes/{busy}/processes", json={"cmd": "sleep 100"})
    w.host.advance(61)

    async def asleep() -> bool:
        return await w.status(kept) == ("hibernated", "idle")

    await eventually(asleep)
    w.host.advance(10**6)
    await w.parts.reconciler.expire()
    await asyncio.sleep(0.05)
    assert await w.status(kept) == ("hibernated", "idle")
    assert [await w.status(sandbox) for sandbox in (endless, busy)] == [("running", None)] * 2
    assert (await w.ours.post(f"/v1/sandboxes/{kept}/exec", json={"cmd": "true"})).status_code == 200


async def test_neither_deleted_nor_hibernated_while_it_is_kept_awake(w: World) -> None:
    both = [await w.sandbox(ttl_seconds=60, persistent=persistent) for persistent in (False, True)]
    for sandbox in both:
        told = (await w.ours.patch(f"/v1/sandboxes/{sandbox}/lifecycle", json={"keep_awake_seconds": 600})).json()
        assert told["keep_awake_until"].endswith("Z")
        assert "kept awake" in told["idle_reason"]
    w.host.advance(100)
    await w.parts.reconciler.expire()
    await asyncio.sleep(0.05)
    assert [await w.status(sandbox) for sandbox in both] == [("running", None)] * 2
    for sandbox in both:
        told = (await w.ours.patch(f"/v1/sandboxes/{sandbox}/lifecycle", json={"keep_awake_seconds": 0})).json()
        assert told["keep_awake_until"] is None

    async def over() -> bool:
        gone = (await w.ours.get(f"/v1/sandboxes/{both[0]}")).status_code == 404
        return gone and await w.status(both[1]) == ("hibernated", "idle")

    await eventually(over)


async def test_for_a_paused_sandbox_the_clock_stands_still(w: World) -> None:
    sandbox = await w.sandbox(ttl_seconds=60)
    await to(w, sandbox, "pause")
    w.host.advance(1000)
    await w.parts.reconciler.expire()
    await asyncio.sleep(0.05)
    assert await w.status(sandbox) == ("paused", "request")
    await to(w, sandbox, "resume")
    told = (await w.ours.get(f"/v1/sandboxes/{sandbox}/lifecycle")).json()
    assert told["idle_seconds"] < 60
    w.host.advance(61)

    async def gone() -> bool:
        return (await w.ours.get(f"/v1/sandboxes/{sandbox}")).status_code == 404

    await eventually(gone)


async def test_a_hibernated_sandbox_is_never_expired(w: World) -> None:
    sandbox = await w.sandbox(ttl_seconds=60)
    await to(w, sandbox, "hibernate")
    w.host.advance(10**6)
    await w.parts.reconciler.expire()
    await asyncio.sleep(0.05)
    assert await w.status(sandbox) == ("hibernated", "request")


async def test_one_that_became_busy_stays_and_is_asked_again(w: World) -> None:
    sandbox = await w.sandbox(ttl_seconds=60, persistent=True)
    w.host.fail("hibernate", Conflict("the sandbox is not idle"))
    w.host.advance(61)

    async def asleep() -> bool:
        return await w.status(sandbox) == ("hibernated", "idle")

    await eventually(asleep)
    assert w.host.calls["hibernate"] == 2


async def test_after_a_failure_an_idle_sandbox_is_left_alone_for_a_while(w: World) -> None:
    sandbox = await w.sandbox(ttl_seconds=60, persistent=True)
    w.host.fail("hibernate", GuestError("the hook refused"), times=100)
    w.host.advance(61)
    await until(lambda: w.host.calls.get("hibernate"))
    for _ in range(3):
        await w.parts.reconciler.expire()
        await asyncio.sleep(0.01)
    assert w.host.calls["hibernate"] == 1
    assert await w.status(sandbox) == ("running", None)
    text = (await w.anyone.get("/metrics")).text
    assert 'pandastack_hibernations_total{cause="idle",outcome="guest_error"} 1.0' in text


async def test_a_ttl_that_was_raised_meanwhile_is_respected(database: Path) -> None:
    async with world(database, **QUIET) as w:
        sandbox = await w.sandbox(ttl_seconds=60, persistent=True)
        row = await w.parts.store.sandboxes.find_of_any_tenant(SandboxId(sandbox))
        assert row is not None
        w.host.advance(61)
        await w.ours.patch(f"/v1/sandboxes/{sandbox}/lifecycle", json={"ttl_seconds": 3600})
        w.parts.states.doze(row)
        await until(lambda: not w.parts.states._dozing)
        assert await w.status(sandbox) == ("running", None)
        assert "hibernate" not in w.host.calls


@pytest.mark.parametrize("value", [-1, 10**10, True, "60", 1.5])
async def test_a_wrong_keep_awake_names_its_field(w: World, value: Any) -> None:
    sandbox = await w.sandbox()
    answer = await w.ours.patch(f"/v1/sandboxes/{sandbox}/lifecycle", json={"keep_awake_seconds": value})
    assert (answer.status_code, answer.json()["field"]) == (400, "keep_awake_seconds")


# The end of the process


async def test_a_graceful_stop_hibernates_what_is_persistent(database: Path) -> None:
    host = FakeHost()
    async with world(database, host, **QUIET) as w:
        kept = [await w.sandbox(persistent=True) for _ in range(5)]
        other, paused = await w.sandbox(), await w.sandbox(persistent=True)
        await to(w, paused, "pause")
        host.delays_s["hibernate"] = 0.2
    assert [host.sandboxes[SandboxId(one)].state.status for one in kept] == ["hibernated"] * 5
    assert host.sandboxes[SandboxId(other)].state.status == "running"
    async with world(database, host, **QUIET) as w:
        assert [await w.status(one) for one in kept] == [("hibernated", "shutdown")] * 5
        assert await w.status(other) == ("running", None)
        assert await w.status(paused) == ("paused", "request")
        assert (await w.ours.post(f"/v1/sandboxes/{kept[0]}/exec", json={"cmd": "true"})).status_code == 200


async def test_what_cannot_be_saved_in_time_or_at_all_runs_on(database: Path) -> None:
    host = FakeHost()
    async with world(database, host, shutdown_hibernate_s=0.3, shutdown_grace_s=0.1, **QUIET) as w:
        slow = await w.sandbox(persistent=True)
        host.delays_s["hibernate"] = 3600
    assert host.sandboxes[SandboxId(slow)].state.status == "running"
    async with world(database, host, shutdown_hibernate_s=5.0, **QUIET) as w:
        host.delays_s["hibernate"] = 0.0
        host.fail("hibernate", GuestError("its hook refused"))
    async with world(database, host, shutdown_hibernate_s=0, **QUIET) as w:
        assert await w.status(slow) == ("running", None)
    assert host.sandboxes[SandboxId(slow)].state.status == "running"
