"""What is taken of the machine, and how much there may be: routes, numbers, refusals, and requests that come together."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pandastack.control.fake_states import SAVED_BYTES
from pandastack.errors import GuestTimeout

from .world import World, world

pytestmark = pytest.mark.anyio


async def usage(w: World, sandbox: str) -> dict[str, Any]:
    answer = await w.ours.get(f"/v1/sandboxes/{sandbox}/usage")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def until_failed(w: World, sandbox: str) -> None:
    while (await w.status(sandbox))[0] != "failed":  # noqa: ASYNC110 - the news takes a moment
        await asyncio.sleep(0.01)


async def take(w: World, sandbox: str) -> Any:
    return await w.ours.post(f"/v1/sandboxes/{sandbox}/snapshots")


async def test_a_sandbox_has_memory_while_it_runs_and_a_stored_state_while_it_is_hibernated(w: World) -> None:
    sandbox = await w.sandbox()
    await w.ours.put(f"/v1/sandboxes/{sandbox}/fs", params={"path": "/tmp/f"}, content=b"x" * 1000)
    now = await usage(w, sandbox)
    assert (now["id"], now["status"], now["stored_own_bytes"]) == (sandbox, "running", 0)
    assert now["memory_own_bytes"] > 0
    assert now["disk_own_bytes"] == 1000
    await w.ours.post(f"/v1/sandboxes/{sandbox}/hibernate")
    now = await usage(w, sandbox)
    assert (now["status"], now["memory_own_bytes"], now["disk_own_bytes"], now["stored_own_bytes"]) == ("hibernated", 0, 0, SAVED_BYTES)
    assert w.host.wakes == {}, "looking wakes nothing"
    assert (await w.status(sandbox))[0] == "hibernated"


async def test_a_snapshot_of_a_hibernated_sandbox_shares_its_bytes_until_the_other_is_gone(w: World) -> None:
    sandbox = await w.sandbox()
    await w.ours.post(f"/v1/sandboxes/{sandbox}/hibernate")
    made = (await take(w, sandbox)).json()
    told = (await w.ours.get(f"/v1/snapshots/{made['id']}")).json()
    assert (told["size_bytes"], told["own_bytes"], told["shared_bytes"]) == (SAVED_BYTES, 0, SAVED_BYTES)
    assert (await usage(w, sandbox))["stored_shared_bytes"] == SAVED_BYTES
    listed = (await w.ours.get("/v1/snapshots")).json()["snapshots"][0]
    assert (listed["size_bytes"], listed["own_bytes"], listed["shared_bytes"]) == (SAVED_BYTES, None, None)
    await w.ours.delete(f"/v1/sandboxes/{sandbox}")
    alone = (await w.ours.get(f"/v1/snapshots/{made['id']}")).json()
    assert (alone["own_bytes"], alone["shared_bytes"]) == (SAVED_BYTES, 0)


async def test_a_snapshot_is_told_also_where_its_host_says_nothing(w: World) -> None:
    made = (await take(w, await w.sandbox())).json()
    w.host.fail("snapshot_usage", GuestTimeout("no answer"))
    answer = await w.ours.get(f"/v1/snapshots/{made['id']}")
    assert (answer.status_code, answer.json()["own_bytes"], answer.json()["size_bytes"]) == (200, None, SAVED_BYTES)


async def test_another_tenants_use_is_not_told_and_not_counted(w: World) -> None:
    sandbox = await w.sandbox()
    await w.ours.post(f"/v1/sandboxes/{sandbox}/hibernate")
    assert (await take(w, sandbox)).status_code == 201
    assert (await w.theirs.get(f"/v1/sandboxes/{sandbox}/usage")).status_code == 404
    theirs = (await w.theirs.get("/v1/usage")).json()
    nothing = {"used": 0, "limit": None, "left": None}
    assert theirs == {"sandboxes": nothing, "snapshots": nothing, "stored_bytes": nothing, "snapshot_bytes": 0, "hibernated_bytes": 0}
    ours = (await w.ours.get("/v1/usage")).json()
    assert (ours["sandboxes"]["used"], ours["snapshots"]["used"], ours["stored_bytes"]["used"]) == (1, 1, 2 * SAVED_BYTES)
    assert (ours["snapshot_bytes"], ours["hibernated_bytes"]) == (SAVED_BYTES, SAVED_BYTES)


def refused(answer: Any, quota: str, limit: int, used: int) -> None:
    body = answer.json()
    assert (answer.status_code, body["code"], body["quota"], body["limit"], body["used"]) == (403, "quota_exceeded", quota, limit, used)
    assert "retry-after" not in answer.headers
    assert "PANDASTACK_QUOTA" in body["hint"]


async def test_no_more_sandboxes_than_the_quota_and_a_delete_makes_room(tmp_path: Path) -> None:
    async with world(tmp_path / "control.db", quota_sandboxes=2) as w:
        first, _ = await w.sandbox(), await w.sandbox()
        refused(await w.ours.post("/v1/sandboxes", json={}), "sandboxes", 2, 2)
        refused(await w.ours.post(f"/v1/sandboxes/{first}/fork", json={}), "sandboxes", 2, 2)
        assert (await w.theirs.post("/v1/sandboxes", json={})).status_code == 201, "each workspace has its own"
        assert (await w.ours.get("/v1/usage")).json()["sandboxes"] == {"used": 2, "limit": 2, "left": 0}
        assert w.host.calls.get("fork", 0) == 0
        await w.ours.delete(f"/v1/sandboxes/{first}")
        await w.sandbox()


async def test_a_fork_is_refused_whole_and_a_failed_sandbox_does_not_count(tmp_path: Path) -> None:
    async with world(tmp_path / "control.db", quota_sandboxes=3) as w:
        parent, other = await w.sandbox(), await w.sandbox()
        refused(await w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", json={"count": 2}), "sandboxes", 3, 2)
        w.host.break_sandbox(other, "oom")  # type: ignore[arg-type]
        await until_failed(w, other)
        assert (await w.ours.post(f"/v1/sandboxes/{parent}/fork-tree", json={"count": 2})).status_code == 201


async def test_requests_that_come_together_do_not_slip_past_the_quota(tmp_path: Path) -> None:
    async with world(tmp_path / "control.db", quota_sandboxes=5, quota_snapshots=3) as w:
        w.host.delays_s["create"] = 0.02
        answers = await asyncio.gather(*(w.ours.post("/v1/sandboxes", json={}) for _ in range(20)))
        assert Counter(answer.status_code for answer in answers) == {201: 5, 403: 15}
        w.host.delays_s["snapshot"] = 0.02
        sandbox = next(answer.json()["id"] for answer in answers if answer.status_code == 201)
        taken = await asyncio.gather(*(take(w, sandbox) for _ in range(10)))
        assert Counter(answer.status_code for answer in taken) == {201: 3, 403: 7}
        refused(await take(w, sandbox), "snapshots", 3, 3)


async def test_a_repeated_create_is_answered_also_without_room_for_another(tmp_path: Path) -> None:
    async with world(tmp_path / "control.db", quota_sandboxes=1) as w:
        headers = {"idempotency-key": "k"}
        first, again = [await w.ours.post("/v1/sandboxes", json={}, headers=headers) for _ in range(2)]
        assert (first.status_code, again.status_code, again.json()) == (201, 201, first.json())
        refused(await w.ours.post("/v1/sandboxes", json={}, headers={"idempotency-key": "other"}), "sandboxes", 1, 1)
        # What was refused was never begun, so its key is free.
        await w.ours.delete(f"/v1/sandboxes/{first.json()['id']}")
        assert (await w.ours.post("/v1/sandboxes", json={}, headers={"idempotency-key": "other"})).status_code == 201


async def test_stored_bytes_have_a_quota_and_hibernation_is_counted_but_never_refused(tmp_path: Path) -> None:
    async with world(tmp_path / "control.db", quota_stored_mb=2) as w:
        one, two, three = [await w.sandbox() for _ in range(3)]
        for sandbox in (one, two):
            assert (await w.ours.post(f"/v1/sandboxes/{sandbox}/hibernate")).status_code == 200
        refused(await take(w, three), "stored_bytes", 2 << 20, 2 << 20)
        assert w.host.calls.get("snapshot", 0) == 0
        assert (await w.ours.post(f"/v1/sandboxes/{three}/hibernate")).status_code == 200
        assert (await w.ours.get("/v1/usage")).json()["stored_bytes"] == {"used": 3 << 20, "limit": 2 << 20, "left": 0}
        for sandbox in (two, three):
            await w.ours.delete(f"/v1/sandboxes/{sandbox}")
        assert (await take(w, one)).status_code == 201


async def test_captures_that_come_together_do_not_slip_past_the_quota_of_bytes(tmp_path: Path) -> None:
    async with world(tmp_path / "control.db", quota_stored_mb=2) as w:
        w.host.delays_s["snapshot"] = 0.02
        sandboxes = [await w.sandbox() for _ in range(6)]
        taken = await asyncio.gather(*(take(w, sandbox) for sandbox in sandboxes))
        assert Counter(answer.status_code for answer in taken) == {201: 2, 403: 4}
