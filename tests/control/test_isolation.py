"""Which runtime a sandbox gets: what may be asked for, what is answered, and what stays so for its whole life."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pandastack.control.fake_host import FakeHost

from .world import World, events, world

pytestmark = pytest.mark.anyio
GVISOR = {"runtime": "gvisor", "isolation": "gvisor", "acceleration": None, "own_kernel": False}
QEMU = {"runtime": "qemu", "isolation": "microvm", "acceleration": "tcg", "own_kernel": True}


def both() -> FakeHost:
    """gVisor, and a QEMU that emulates."""
    host = FakeHost()
    host.runtimes.offer("gvisor", "gvisor")
    host.runtimes.offer("qemu", "microvm", acceleration="tcg")
    host.runtimes.offer("firecracker", "microvm", acceleration="kvm", works=False, reason="there is no /dev/kvm")
    return host


@pytest.fixture
async def two(database: Path) -> AsyncIterator[World]:
    host = both()
    async with world(database, host) as made:
        yield made
    await host.aclose()


async def got(w: World, sandbox: str) -> dict[str, Any]:
    body = (await w.ours.get(f"/v1/sandboxes/{sandbox}")).json()
    return {name: body[name] for name in GVISOR}


@pytest.mark.parametrize(
    ("wanted", "facts"),
    [
        ({}, GVISOR),
        ({"isolation": "auto"}, GVISOR),
        ({"isolation": "gvisor"}, GVISOR),
        ({"isolation": "microvm"}, QEMU),
        ({"isolation": "qemu"}, QEMU),
    ],
)
async def test_a_sandbox_gets_what_it_asks_for_and_tells_what_it_got(two: World, wanted: dict[str, str], facts: dict[str, Any]) -> None:
    body = (await two.ours.post("/v1/sandboxes", json=wanted)).json()
    assert {name: body[name] for name in facts} == facts
    assert await got(two, body["id"]) == facts
    assert {name: (await two.ours.get("/v1/sandboxes")).json()[0][name] for name in facts} == facts


async def test_auto_prefers_qemu_with_kvm(two: World) -> None:
    two.host.runtimes.offer("qemu", "microvm", acceleration="kvm")
    assert await got(two, await two.sandbox()) == QEMU | {"acceleration": "kvm"}


@pytest.mark.parametrize("word", ["docker", "QEMU", "kvm", "", "x" * 65])
async def test_an_unknown_word_is_refused_with_those_that_are_known(two: World, word: str) -> None:
    answer = await two.ours.post("/v1/sandboxes", json={"isolation": word})
    body = answer.json()
    assert (answer.status_code, body["code"], body["field"]) == (400, "invalid_request", "isolation")
    if 0 < len(word) <= 64:
        assert {"auto", "microvm", "gvisor", "qemu"} <= set(body["choices"])
    assert (await two.ours.get("/v1/sandboxes")).json() == []


async def test_a_runtime_that_does_not_work_says_why(two: World) -> None:
    answer = await two.ours.post("/v1/sandboxes", json={"isolation": "firecracker"})
    body = answer.json()
    assert (answer.status_code, body["code"], body["runtime"]) == (503, "runtime_unavailable", "firecracker")
    assert "there is no /dev/kvm" in body["error"]
    assert "pandastack doctor" in body["hint"]
    assert "retry-after" not in answer.headers
    assert ((await two.ours.get("/v1/sandboxes")).json(), two.host.sandboxes) == ([], {})


async def test_too_weak_for_the_server_is_refused(two: World) -> None:
    two.host.runtimes.min_isolation = "gvisor"
    answer = await two.ours.post("/v1/sandboxes", json={"isolation": "qemu"})
    body = answer.json()
    assert (answer.status_code, body["code"], body["minimum"], body["runtime"]) == (403, "isolation_too_weak", "gvisor", "qemu")
    assert (await two.ours.get("/v1/sandboxes")).json() == []
    assert await got(two, await two.sandbox()) == GVISOR


async def test_a_key_with_another_isolation_is_used_with_another_body(two: World) -> None:
    key = {"idempotency-key": "k"}
    first = await two.ours.post("/v1/sandboxes", json={"template": "base"}, headers=key)
    # What is left out, and its default spelled out, are the same.
    same = await two.ours.post("/v1/sandboxes", json={"template": "base", "isolation": "auto"}, headers=key)
    assert (same.status_code, same.content) == (201, first.content)
    other = await two.ours.post("/v1/sandboxes", json={"template": "base", "isolation": "qemu"}, headers=key)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")


async def test_what_it_got_stays_through_states_forks_and_restarts(database: Path) -> None:
    host = both()
    async with world(database, host) as w:
        parent = await w.sandbox(isolation="qemu")
        child = (await w.ours.post(f"/v1/sandboxes/{parent}/fork")).json()["sandbox"]
        assert {name: child[name] for name in QEMU} == QEMU
        await w.ours.post(f"/v1/sandboxes/{parent}/hibernate")
        assert await got(w, parent) == QEMU
        await w.ours.post(f"/v1/sandboxes/{child['id']}/pause")
    async with world(database, host) as w:
        assert await got(w, parent) == QEMU
        await w.ours.post(f"/v1/sandboxes/{parent}/wake")
        for sandbox in (parent, child["id"]):
            assert await got(w, sandbox) == QEMU
    await host.aclose()


async def test_a_snapshot_goes_on_where_it_was_made(two: World) -> None:
    parent = await two.sandbox(isolation="qemu")
    snapshot = (await two.ours.post(f"/v1/sandboxes/{parent}/snapshots")).json()["id"]
    for wanted in ({}, {"isolation": "microvm"}, {"isolation": "qemu"}):
        assert await got(two, await two.sandbox(from_snapshot=snapshot, **wanted)) == QEMU
    refused = await two.ours.post("/v1/sandboxes", json={"from_snapshot": snapshot, "isolation": "gvisor"})
    body = refused.json()
    assert (refused.status_code, body["code"], body["field"], body["reason"]) == (409, "snapshot_unusable", "isolation", "runtime")


async def test_a_snapshot_whose_runtime_is_gone_is_kept(two: World) -> None:
    parent = await two.sandbox(isolation="qemu")
    snapshot = (await two.ours.post(f"/v1/sandboxes/{parent}/snapshots")).json()["id"]
    two.host.runtimes.offer("qemu", "microvm", acceleration="tcg", works=False, reason="QEMU is not installed")
    refused = await two.ours.post("/v1/sandboxes", json={"from_snapshot": snapshot})
    assert (refused.status_code, refused.json()["code"]) == (503, "runtime_unavailable")
    two.host.runtimes.offer("qemu", "microvm", acceleration="tcg")
    assert await got(two, await two.sandbox(from_snapshot=snapshot)) == QEMU


# Templates


async def test_a_template_says_how_far_each_runtime_is(two: World) -> None:
    two.host.runtimes.templates_on["base", "qemu"] = "built"
    found = (await two.ours.get("/v1/templates/base")).json()
    assert (found["state"], found["runtimes"]) == ("ready", {"gvisor": "ready", "qemu": "built", "fake": "ready"})


async def test_a_create_bakes_for_the_runtime_that_it_gets_only(two: World) -> None:
    two.host.runtimes.templates_on["base", "qemu"] = "built"
    await two.sandbox(template="base")
    assert "bake" not in two.host.calls
    await two.sandbox(template="base", isolation="microvm")
    assert two.host.calls["bake"] == 1
    assert (await two.ours.get("/v1/templates/base")).json()["runtimes"]["qemu"] == "ready"
    await two.sandbox(template="base", isolation="qemu")
    assert two.host.calls["bake"] == 1


async def test_a_refused_isolation_bakes_nothing(two: World) -> None:
    two.host.templates["base"] = "missing"
    for word, status in (("docker", 400), ("firecracker", 503)):
        answer = await two.ours.post("/v1/sandboxes", json={"template": "base", "isolation": word})
        assert answer.status_code == status
    assert "bake" not in two.host.calls


async def test_a_bake_is_for_one_runtime(two: World) -> None:
    two.host.runtimes.templates_on["base", "qemu"] = "built"
    assert events((await two.ours.post("/v1/templates/base/bake")).text) == [("done", {"state": "ready"})]
    assert (await two.ours.get("/v1/templates/base")).json()["runtimes"]["qemu"] == "built"
    found = events((await two.ours.post("/v1/templates/base/bake?isolation=qemu")).text)
    assert (found[0][0], found[-1]) == ("progress", ("done", {"state": "ready"}))
    assert (await two.ours.get("/v1/templates/base")).json()["runtimes"]["qemu"] == "ready"
    refused = events((await two.ours.post("/v1/templates/base/bake?isolation=docker")).text)
    assert (refused[-1][0], refused[-1][1]["code"], refused[-1][1]["field"]) == ("error", "invalid_request", "isolation")
