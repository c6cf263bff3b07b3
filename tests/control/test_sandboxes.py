from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pandastack.control.fake_host import FakeHost
from pandastack.errors import CapacityError, DiskFull, HostUnfit, RuntimeFailed

from .world import World, eventually, until, world

pytestmark = pytest.mark.anyio


# Create


async def test_create_answers_a_whole_sandbox(w: World) -> None:
    answer = await w.ours.post("/v1/sandboxes", json={"template": "base", "metadata": {"a": "b"}, "ttl_seconds": 60.0, "memory_mb": 700})
    assert answer.status_code == 201
    body = answer.json()
    assert body["status"] == "running"
    assert body["template"] == "base"
    assert (body["memory_mb"], body["ttl_seconds"], body["metadata"], body["persistent"]) == (700, 60, {"a": "b"}, False)
    assert (await w.ours.get(f"/v1/sandboxes/{body['id']}")).json() == body
    assert (await w.ours.get("/v1/sandboxes")).json() == [body]


@pytest.mark.parametrize("content_type", ["text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "nonsense", None])
async def test_an_empty_body_of_any_type_takes_the_defaults(w: World, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = await w.ours.post("/v1/sandboxes", content=b"", headers=headers)
    assert answer.status_code == 201
    assert answer.json()["template"] == "code-interpreter"
    answer = await w.ours.post("/v1/sandboxes", content=b'{"template":"base"}', headers=headers)
    assert answer.json()["template"] == "base"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"template": "no-such"}, "template"),
        ({"template": "../etc"}, "template"),
        ({"ttl_seconds": -1}, "ttl_seconds"),
        ({"ttl_seconds": 1 << 40}, "ttl_seconds"),
        ({"ttl_seconds": True}, "ttl_seconds"),
        ({"ttl_seconds": "60"}, "ttl_seconds"),
        ({"memory_mb": 1 << 21}, "memory_mb"),
        ({"cpu": 65}, "cpu"),
        ({"disk_mb": (1 << 20) + 1}, "disk_mb"),
        ({"from_snapshot": "x"}, "from_snapshot"),
        ({"volumes": [{"name": "v"}]}, "volumes"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"env": {"1A": "x"}}, "env.1A"),
        ({"env": {"A": "x\x00"}}, "env.A"),
        ({"unknown": 1}, "unknown"),
    ],
)
async def test_a_refused_create_names_the_field_and_leaves_nothing(w: World, body: dict[str, Any], field: str) -> None:
    answer = await w.ours.post("/v1/sandboxes", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["field"] == field
    assert (await w.ours.get("/v1/sandboxes")).json() == []
    assert not w.host.sandboxes


async def test_a_ttl_over_the_maximum_is_told_in_the_words_clients_look_for(w: World) -> None:
    answer = await w.ours.post("/v1/sandboxes", json={"ttl_seconds": 10**9})
    assert "ttl_seconds exceeds tier maximum" in answer.json()["error"]


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (CapacityError("full", retry_after_s=2), 503, "2"),
        (DiskFull("disk full"), 507, None),
        (HostUnfit("no runtime"), 503, None),
        (RuntimeFailed("did not boot"), 500, None),
        (ValueError("secret detail"), 500, None),
    ],
)
async def test_a_failed_create_leaves_nothing(w: World, error: Exception, status: int, retry_after: str | None) -> None:
    w.host.fail("create", error)
    answer = await w.ours.post("/v1/sandboxes", json={})
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry_after
    assert "secret" not in answer.text
    assert (await w.ours.get("/v1/sandboxes")).json() == []
    assert not w.host.sandboxes


async def test_a_full_machine_says_when_to_ask_again(database: Path) -> None:
    host = FakeHost(sandboxes_max=3)
    async with world(database, host) as w:
        answers = await asyncio.gather(*(w.ours.post("/v1/sandboxes", json={}) for _ in range(30)))
        assert sorted({answer.status_code for answer in answers}) == [201, 503]
        assert sum(answer.status_code == 201 for answer in answers) == 3
        assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 503)
        assert len(host.sandboxes) == len((await w.ours.get("/v1/sandboxes")).json()) == 3


async def test_more_creates_at_once_than_allowed_are_refused_at_once(database: Path) -> None:
    async with world(database, FakeHost(create_s=0.1), creates_in_flight_max=2) as w:
        answers = await asyncio.gather(*(w.ours.post("/v1/sandboxes", json={}) for _ in range(6)))
        assert sorted(answer.status_code for answer in answers) == [201, 201, 503, 503, 503, 503]


async def test_a_client_that_leaves_gets_a_whole_sandbox_all_the_same(w: World) -> None:
    w.host.delays_s["create"] = 0.05
    asking = asyncio.create_task(w.ours.post("/v1/sandboxes", json={}))
    await until(lambda: w.host.calls.get("create"))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)

    async def running() -> bool:
        return [row["status"] for row in (await w.ours.get("/v1/sandboxes")).json()] == ["running"]

    await eventually(running)
    assert len(w.host.sandboxes) == 1


async def test_a_sandbox_deleted_while_it_is_made_is_undone(w: World) -> None:
    w.host.delays_s["create"] = 0.1
    asking = asyncio.create_task(w.ours.post("/v1/sandboxes", json={}))

    async def creating() -> Any:
        return (await w.ours.get("/v1/sandboxes?status=creating")).json()

    found = await eventually(creating)
    assert (await w.ours.delete(f"/v1/sandboxes/{found[0]['id']}")).status_code == 204
    assert (await asking).status_code == 409
    assert not w.host.sandboxes
    assert (await w.ours.get("/v1/sandboxes")).json() == []


# Templates that are not ready


async def test_a_template_that_bakes_fast_enough_is_waited_for(w: World) -> None:
    w.host.templates["base"] = "missing"
    assert (await w.ours.post("/v1/sandboxes", json={"template": "base"})).status_code == 201


async def test_a_slow_template_is_answered_with_its_progress_and_goes_on(w: World) -> None:
    w.host.templates["base"] = "missing"
    w.host.delays_s["bake.step"] = 0.15
    answer = await w.ours.post("/v1/sandboxes", json={"template": "base"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["code"] == "template_not_ready"
    assert "copying files" in answer.json()["error"]
    assert (await w.ours.get("/v1/sandboxes")).json() == []

    async def ready() -> bool:
        return w.host.templates["base"] == "ready"

    await eventually(ready)
    assert w.host.calls["bake"] == 1


# Idempotency

KEY = {"idempotency-key": "k-1"}


async def test_fifty_creates_with_one_key_make_one_sandbox(w: World) -> None:
    w.host.delays_s["create"] = 0.02
    answers = await asyncio.gather(*(w.ours.post("/v1/sandboxes", json={"metadata": {"n": "1"}}, headers=KEY) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replay" not in answer.headers for answer in answers) == 1
    assert len(w.host.sandboxes) == w.host.calls["create"] == 1


async def test_a_key_is_replayed_also_after_the_sandbox_is_gone_and_after_a_restart(database: Path) -> None:
    host = FakeHost()
    async with world(database, host) as w:
        first = await w.ours.post("/v1/sandboxes", json={"template": "base"}, headers=KEY)
        await w.ours.delete(f"/v1/sandboxes/{first.json()['id']}")
    async with world(database, host) as w:
        again = await w.ours.post("/v1/sandboxes", content=b'{"template":"base","persistent":false}', headers=KEY)
        assert (again.status_code, again.content, again.headers["idempotent-replay"]) == (201, first.content, "true")
        assert not host.sandboxes


async def test_a_key_with_another_body_is_a_conflict_also_while_the_first_runs(w: World) -> None:
    go_on = w.host.hold("create")
    first = asyncio.create_task(w.ours.post("/v1/sandboxes", json={}, headers=KEY))
    await until(lambda: w.host.calls.get("create") == 1)
    for _ in range(2):
        other = await w.ours.post("/v1/sandboxes", json={"template": "base"}, headers=KEY)
        assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
        go_on.set()
        await asyncio.wait([first])
    assert (await first).status_code == 201


async def test_keys_of_two_tenants_do_not_meet(w: World) -> None:
    one, two = await asyncio.gather(*(client.post("/v1/sandboxes", json={}, headers=KEY) for client in (w.ours, w.theirs)))
    assert one.json()["id"] != two.json()["id"]


async def test_a_failed_create_frees_its_key(w: World) -> None:
    w.host.fail("create", CapacityError("full", retry_after_s=1))
    assert (await w.ours.post("/v1/sandboxes", json={}, headers=KEY)).status_code == 503
    assert (await w.ours.post("/v1/sandboxes", json={"template": "base"}, headers=KEY)).status_code == 201


@pytest.mark.parametrize("key", ["", "a" * 256, "a b", "a\tb"])
async def test_a_key_that_is_no_key_is_refused(w: World, key: str) -> None:
    answer = await w.ours.post("/v1/sandboxes", json={}, headers={"idempotency-key": key})
    assert (answer.status_code, answer.json()["field"]) == (400, "Idempotency-Key")


# List


async def test_a_filtered_list_is_paged_and_stable_under_deletes(w: World) -> None:
    ids = [await w.sandbox(metadata={"n": str(n % 2), 'odd "key"': "é"}) for n in range(7)]
    ids.reverse()
    one = (await w.ours.get("/v1/sandboxes", params={"limit": 3})).json()
    assert [row["id"] for row in one["items"]] == ids[:3]
    await w.ours.delete(f"/v1/sandboxes/{ids[2]}")
    two = (await w.ours.get("/v1/sandboxes", params={"limit": 3, "cursor": one["next_cursor"]})).json()
    assert [row["id"] for row in two["items"]] == ids[3:6]
    three = (await w.ours.get("/v1/sandboxes", params={"cursor": two["next_cursor"]})).json()
    assert ([row["id"] for row in three["items"]], three["next_cursor"]) == (ids[6:], None)
    found = (await w.ours.get("/v1/sandboxes", params={"metadata": ["n=1", 'odd "key"=é'], "status": "running"})).json()
    assert [row["id"] for row in found] == [ids[1], ids[3], ids[5]]
    assert (await w.ours.get("/v1/sandboxes", params={"metadata": "n=7"})).json() == []


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "cursor=!!", "cursor=MS5h", "status=gone", "metadata=x", "limit=%00"]
)
async def test_a_wrong_list_query_names_its_field(w: World, query: str) -> None:
    answer = await w.ours.get(f"/v1/sandboxes?{query}")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
    assert answer.json()["field"].split(".")[0] == query.split("=")[0]


# Lifecycle and expiry


async def test_an_idle_sandbox_is_deleted_and_others_are_not(w: World) -> None:
    idle, busy, kept, endless = [
        await w.sandbox(**body)
        for body in ({"ttl_seconds": 60}, {"ttl_seconds": 60}, {"ttl_seconds": 60, "persistent": True}, {"ttl_seconds": 0})
    ]
    started = await w.ours.post(f"/v1/sandboxes/{busy}/processes", json={"cmd": "sleep 100"})
    assert started.status_code == 201
    w.host.advance(61)
    await eventually(lambda: _gone(w, idle))
    left = {row["id"] for row in (await w.ours.get("/v1/sandboxes")).json()}
    assert left == {busy, kept, endless}


async def test_looking_is_not_activity_and_working_is(w: World) -> None:
    idle = await w.sandbox(ttl_seconds=600)
    w.host.advance(300)
    for path in ("", "/lifecycle"):
        await w.ours.get(f"/v1/sandboxes/{idle}{path}")
    assert (await w.ours.get(f"/v1/sandboxes/{idle}/lifecycle")).json()["idle_seconds"] >= 300
    await w.ours.post(f"/v1/sandboxes/{idle}/exec", json={"cmd": "true"})
    assert (await w.ours.get(f"/v1/sandboxes/{idle}/lifecycle")).json()["idle_seconds"] == 0


async def test_a_new_ttl_is_effective_at_once(database: Path) -> None:
    async with world(database, expiry_interval_s=3600) as w:
        sandbox = await w.sandbox(ttl_seconds=600)
        w.host.advance(100)
        answer = await w.ours.patch(f"/v1/sandboxes/{sandbox}/lifecycle", json={"ttl_seconds": 50})
        assert (answer.status_code, answer.json()["ttl_seconds"]) == (200, 50)
        await eventually(lambda: _gone(w, sandbox))


async def test_making_a_sandbox_persistent_saves_it(w: World) -> None:
    sandbox = await w.sandbox(ttl_seconds=60)
    await w.ours.patch(f"/v1/sandboxes/{sandbox}/lifecycle", json={"persistent": True})
    w.host.advance(1000)
    await w.parts.reconciler.expire()
    await asyncio.sleep(0.05)
    assert (await w.ours.get(f"/v1/sandboxes/{sandbox}")).status_code == 200
    refused = await w.ours.patch(f"/v1/sandboxes/{sandbox}/lifecycle", content=b"")
    assert refused.status_code == 400


async def _gone(w: World, sandbox: str) -> bool:
    return (await w.ours.get(f"/v1/sandboxes/{sandbox}")).status_code == 404


# Delete


async def test_delete_is_final_and_can_be_repeated(w: World) -> None:
    sandbox = await w.sandbox()
    both = await asyncio.gather(*(w.ours.delete(f"/v1/sandboxes/{sandbox}") for _ in range(2)))
    assert {answer.status_code for answer in both} <= {204, 404}
    assert 204 in {answer.status_code for answer in both}
    assert (await w.ours.delete(f"/v1/sandboxes/{sandbox}")).status_code == 404
    assert not w.host.sandboxes


async def test_a_delete_that_fails_half_way_is_finished_by_the_sweep(w: World) -> None:
    sandbox = await w.sandbox()
    w.host.fail("delete", RuntimeFailed("busy"))
    assert (await w.ours.delete(f"/v1/sandboxes/{sandbox}")).status_code == 500
    assert (await w.ours.get(f"/v1/sandboxes/{sandbox}")).json()["status"] == "deleting"
    assert (await w.ours.post(f"/v1/sandboxes/{sandbox}/exec", json={"cmd": "true"})).status_code == 409
    await w.parts.reconciler.sweep()
    assert await _gone(w, sandbox)
    assert not w.host.sandboxes


# Failure


async def test_a_sandbox_that_fails_says_why(w: World) -> None:
    sandbox = await w.sandbox()
    w.host.break_sandbox(next(iter(w.host.sandboxes)), "oom")

    async def failed() -> bool:
        body = (await w.ours.get(f"/v1/sandboxes/{sandbox}")).json()
        return (body["status"], body["status_reason"]) == ("failed", "oom")

    await eventually(failed)
    answer = await w.ours.post(f"/v1/sandboxes/{sandbox}/exec", json={"cmd": "true"})
    assert (answer.status_code, answer.json()["code"], answer.json()["status_reason"]) == (409, "sandbox_not_running", "oom")
    assert (await w.ours.delete(f"/v1/sandboxes/{sandbox}")).status_code == 204


async def test_metrics_are_those_of_the_host(w: World) -> None:
    sandbox = await w.sandbox()
    assert (await w.ours.get(f"/v1/sandboxes/{sandbox}/metrics")).json()["memory_limit_bytes"] == 512 << 20
