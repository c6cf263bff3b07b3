"""Templates, health, version, metrics, the log, and the loops' owner."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from pandastack.control import logs
from pandastack.control.fake_host import FakeHost
from pandastack.control.meters import Meters
from pandastack.control.work import Crew
from pandastack.errors import TemplateBuildError

from .world import World, events, until, world

pytestmark = pytest.mark.anyio


async def test_templates_are_a_bare_list(w: World) -> None:
    listed = (await w.ours.get("/v1/templates")).json()
    assert [template["name"] for template in listed] == ["base", "code-interpreter", "ubuntu-24.04"]
    assert (await w.ours.get("/v1/templates/base")).json() == listed[0]
    missing = await w.ours.get("/v1/templates/none")
    assert (missing.status_code, missing.json()["code"]) == (404, "template_not_found")


async def test_a_bake_tells_its_progress_and_ends(w: World) -> None:
    w.host.templates["base"] = "missing"
    w.host.delays_s["bake.step"] = 0.01
    found = events((await w.ours.post("/v1/templates/base/bake")).text)
    assert {name for name, _ in found[:-1]} == {"progress"}
    assert found[0][1]["step"] == "copy"
    assert found[-1] == ("done", {"state": "ready"})
    assert events((await w.ours.post("/v1/templates/base/bake")).text) == [("done", {"state": "ready"})]


async def test_two_who_bake_follow_one_bake(w: World) -> None:
    w.host.templates["base"] = "missing"
    w.host.delays_s["bake.step"] = 0.02
    both = await asyncio.gather(*(w.ours.post("/v1/templates/base/bake") for _ in range(2)))
    assert [events(answer.text)[-1][0] for answer in both] == ["done", "done"]
    assert w.host.calls["bake"] == 1


async def test_a_bake_that_fails_says_why_and_can_be_tried_again(w: World) -> None:
    w.host.templates["base"] = "missing"
    w.host.fail("bake.step", TemplateBuildError("no space left", hint="free some"), times=2)
    found = events((await w.ours.post("/v1/templates/base/bake")).text)
    assert (found[-1][0], found[-1][1]["code"], found[-1][1]["hint"]) == ("error", "template_build_failed", "free some")
    assert (await w.ours.post("/v1/sandboxes", json={"template": "base"})).status_code == 500
    assert (await w.ours.post("/v1/sandboxes", json={"template": "base"})).status_code == 201


async def test_what_needs_no_key(w: World) -> None:
    assert (await w.anyone.get("/healthz")).json() == {"status": "ok"}
    assert set((await w.anyone.get("/version")).json()) == {"version"}
    assert (await w.anyone.get("/openapi.json")).json()["openapi"].startswith("3.1")
    assert (await w.anyone.get("/docs")).status_code == 200
    await w.sandbox()
    text = (await w.anyone.get("/metrics")).text
    assert 'pandastack_creates_total{outcome="ok"} 1.0' in text
    assert 'pandastack_requests_total{method="POST",route="/v1/sandboxes",status="201"} 1.0' in text


async def test_the_host_is_shown_to_its_admin(w: World) -> None:
    body = (await w.ours.get("/v1/host")).json()
    assert (body["id"], body["capacity"]["sandboxes"]) == ("fake", 0)


def test_the_log_holds_no_key() -> None:
    key = "pds_" + "0" * 56
    said = logs._without_keys(None, "info", {"event": f"GET /x?access_token={key}", "n": 1})
    assert said == {"event": "GET /x?access_token=pds_00000000...", "n": 1}
    json.dumps(said)


async def test_a_stop_lets_a_running_create_finish(database: Path) -> None:
    host = FakeHost(create_s=0.1)
    async with world(database, host) as w:
        asking = asyncio.create_task(w.ours.post("/v1/sandboxes", json={}))
        await until(lambda: host.calls.get("create"))
    assert (await asking).status_code == 201
    assert len(host.sandboxes) == 1


async def test_a_stop_that_ran_out_of_patience_undoes_a_running_create(database: Path) -> None:
    host = FakeHost(create_s=60)
    async with world(database, host, shutdown_grace_s=0.05) as w:
        asking = asyncio.create_task(w.ours.post("/v1/sandboxes", json={}))
        await until(lambda: host.calls.get("create"))
    await asyncio.gather(asking, return_exceptions=True)
    assert not host.sandboxes
    host.delays_s.clear()
    async with world(database, host) as w:
        assert (await w.ours.get("/v1/sandboxes")).json() == []


async def test_a_job_outlives_the_one_who_waits_and_a_loop_outlives_its_errors() -> None:
    meters, turns, done = Meters(), 0, asyncio.Event()

    async def turn() -> None:
        nonlocal turns
        turns += 1
        if turns < 3:
            raise OSError("again")

    async def job() -> None:
        await asyncio.sleep(0.05)
        done.set()

    async with Crew(meters, grace_s=1) as crew:
        crew.loop("turns", turn, pause_s=0.001)
        waiting = asyncio.create_task(crew.finish("job", job()))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await until(lambda: turns > 3 and done.is_set())
    assert meters.registry.get_sample_value("pandastack_background_failures_total", {"task": "turns"}) == 2
