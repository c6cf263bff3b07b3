"""Who may do what: a table over every route there is. A route that is not in the table fails the first test."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from pandastack.control.routes import document
from pandastack.wire.ids import ProcessId, new_sandbox_id, new_snapshot_id

from .world import World

pytestmark = pytest.mark.anyio

BOX = "/v1/sandboxes/{sandbox_id}"
PROCESS = BOX + "/processes/{process_id}"
# (method, route) -> (scope, how to ask so that nothing but the right to ask can be missing)
ROUTES: dict[tuple[str, str], tuple[str | None, dict[str, Any]]] = {
    ("POST", "/v1/sandboxes"): ("write", {"json": {}}),
    ("GET", "/v1/sandboxes"): ("read", {}),
    ("GET", BOX): ("read", {}),
    ("DELETE", BOX): ("write", {}),
    ("GET", BOX + "/lifecycle"): ("read", {}),
    ("PATCH", BOX + "/lifecycle"): ("write", {"json": {"ttl_seconds": 600}}),
    ("GET", BOX + "/metrics"): ("read", {}),
    ("GET", BOX + "/usage"): ("read", {}),
    ("GET", "/v1/usage"): ("read", {}),
    ("POST", BOX + "/pause"): ("write", {}),
    ("POST", BOX + "/resume"): ("write", {}),
    ("POST", BOX + "/hibernate"): ("write", {}),
    ("POST", BOX + "/wake"): ("write", {}),
    ("POST", BOX + "/stop"): ("write", {}),
    ("POST", BOX + "/start"): ("write", {}),
    ("POST", BOX + "/snapshots"): ("write", {}),
    ("GET", BOX + "/history"): ("read", {}),
    ("POST", BOX + "/restore"): ("write", {"json": {"point": str(new_snapshot_id())}}),
    ("POST", BOX + "/fork"): ("write", {"json": {}}),
    ("POST", BOX + "/fork-tree"): ("write", {"json": {}}),
    ("POST", BOX + "/promote"): ("write", {"json": {}}),
    ("GET", "/v1/snapshots"): ("read", {}),
    ("GET", "/v1/snapshots/{snapshot_id}"): ("read", {}),
    ("DELETE", "/v1/snapshots/{snapshot_id}"): ("write", {}),
    ("POST", "/v1/snapshots/{snapshot_id}/offload"): ("write", {}),
    ("GET", "/v1/diff"): ("read", {"params": {"a": "none", "b": "none"}}),
    ("POST", BOX + "/exec"): ("write", {"json": {"cmd": "true"}}),
    ("POST", BOX + "/exec/stream"): ("write", {"json": {"cmd": "true"}}),
    ("POST", BOX + "/processes"): ("write", {"json": {"cmd": "true"}}),
    ("GET", BOX + "/processes"): ("read", {}),
    ("GET", PROCESS): ("read", {}),
    ("GET", PROCESS + "/stream"): ("read", {}),
    ("GET", PROCESS + "/output"): ("read", {}),
    ("POST", PROCESS + "/stdin"): ("write", {"content": b"x"}),
    ("POST", PROCESS + "/signal"): ("write", {"json": {"signal": "KILL"}}),
    ("POST", PROCESS + "/resize"): ("write", {"json": {}}),
    ("GET", BOX + "/fs"): ("read", {"params": {"path": "/tmp/f"}}),
    ("HEAD", BOX + "/fs"): ("read", {"params": {"path": "/tmp/f"}}),
    ("PUT", BOX + "/fs"): ("write", {"params": {"path": "/tmp/g"}, "content": b"x"}),
    ("DELETE", BOX + "/fs"): ("write", {"params": {"path": "/tmp/f"}}),
    ("GET", BOX + "/fs/dir"): ("read", {"params": {"path": "/tmp"}}),
    ("GET", BOX + "/fs/stat"): ("read", {"params": {"path": "/tmp"}}),
    ("POST", BOX + "/fs/mkdir"): ("write", {"json": {"path": "/tmp/d"}}),
    ("POST", BOX + "/fs/move"): ("write", {"json": {"source": "/tmp/f", "destination": "/tmp/h"}}),
    ("POST", BOX + "/fs/chmod"): ("write", {"json": {"path": "/tmp/f", "mode": "0600"}}),
    ("GET", BOX + "/fs/watch"): ("read", {"params": {"path": "/tmp"}}),
    ("GET", "/v1/templates"): ("read", {}),
    ("GET", "/v1/templates/{name}"): ("read", {}),
    ("POST", "/v1/templates/{name}/bake"): ("write", {}),
    ("GET", "/v1/me"): ("read", {}),
    ("GET", "/v1/me/tokens"): ("read", {}),
    ("POST", "/v1/me/tokens"): ("write", {"json": {}}),
    ("DELETE", "/v1/me/tokens/{prefix}"): ("write", {}),
    ("GET", "/v1/host"): ("admin", {}),
    ("GET", "/healthz"): (None, {}),
    ("GET", "/version"): (None, {}),
    ("GET", "/metrics"): (None, {}),
}
# In an order in which one sandbox serves them all.
ROUTES = dict(sorted(ROUTES.items(), key=lambda item: item[0] == ("DELETE", BOX)))
RANK = {None: 0, "read": 1, "write": 2, "admin": 3}
OPEN = {key for key, (scope, _) in ROUTES.items() if scope is None}


async def ask(client: Any, method: str, path: str, how: dict[str, Any], **names: str) -> Any:
    known = {
        "sandbox_id": str(new_sandbox_id()),
        "snapshot_id": str(new_snapshot_id()),
        "process_id": "p1",
        "name": "base",
        "prefix": "pds_00000000",
    } | names
    return await client.request(method, path.format(**known), **how)


async def furnished(w: World) -> str:
    """A sandbox with a file and a process that ends at once when asked to."""
    sandbox = await w.sandbox()
    await w.ours.put(f"/v1/sandboxes/{sandbox}/fs?path=/tmp/f", content=b"x")
    await w.ours.post(f"/v1/sandboxes/{sandbox}/processes", json={"cmd": "echo hi; exit 3", "id": "p1"})
    return sandbox


def same(one: Any, other: Any) -> bool:
    def plain(answer: Any) -> Any:
        body = answer.json() if answer.content else {}
        body.pop("request_id", None)
        return answer.status_code, body

    return bool(plain(one) == plain(other))


async def test_the_table_holds_every_route_and_its_scope(w: World) -> None:
    found = {(method, route.path): document.scope_of(route) for route in document.routes(w.app) for method in route.methods}
    assert found == {key: scope for key, (scope, _) in ROUTES.items()}


@pytest.mark.parametrize("scope", ["none", "bad", "read", "write", "admin"])
async def test_each_route_asks_for_its_scope(w: World, scope: str) -> None:
    keys = {"none": None, "bad": "pds_" + "0" * 56}
    client = w.client(keys[scope] if scope in keys else await w.key_with(scope))
    box = await furnished(w)
    for (method, path), (needed, how) in ROUTES.items():
        if path.endswith("/watch") and RANK.get(scope, 0):
            continue  # It never ends; `test_files` follows it over a socket.
        answer = await ask(client, method, path, how, sandbox_id=box)
        if needed is None or RANK.get(scope, 0) >= RANK[needed]:
            assert answer.status_code not in (401, 403, 500), (method, path, answer.text)
        else:
            assert answer.status_code == (403 if scope in RANK else 401), (method, path)
            if method != "HEAD":
                assert isinstance(answer.json()["error"], str)


async def test_without_a_key_nothing_is_told_about_the_request(w: World) -> None:
    for (method, path), (needed, _) in ROUTES.items():
        if needed is not None:
            answer = await ask(w.anyone, method, path, {"content": b"{not json"} if method not in ("GET", "HEAD") else {})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (method, path)


@pytest.mark.parametrize(("method", "path"), [key for key in ROUTES if "{sandbox_id}" in key[1]])
async def test_another_tenants_sandbox_looks_like_an_unknown_one(w: World, method: str, path: str) -> None:
    how = ROUTES[(method, path)][1]
    sandbox = await furnished(w)
    before = w.host.calls.copy()
    foreign = await ask(w.theirs, method, path, how, sandbox_id=sandbox)
    unknown = await ask(w.theirs, method, path, how)
    assert foreign.status_code == 404
    assert same(foreign, unknown)
    changed = {name for name in w.host.calls if w.host.calls[name] != before.get(name)}
    assert changed <= {"events", "list", "get", "list_snapshots"}, "the host was asked about it"
    assert sandbox in w.host.sandboxes


@pytest.mark.parametrize(
    "spelling",
    [str.upper, lambda s: "{" + s + "}", lambda s: s.replace("-", ""), lambda s: s + "%00", lambda s: " " + s, lambda s: s + "%0A"],
)
async def test_an_id_has_one_spelling(w: World, spelling: Any) -> None:
    sandbox = await w.sandbox()
    answer = await w.ours.get(f"/v1/sandboxes/{spelling(sandbox)}")
    assert answer.status_code == 404


async def test_another_tenants_token_and_lists_are_unseen(w: World) -> None:
    await w.sandbox()
    key = (await w.ours.post("/v1/me/tokens", json={"label": "mine"})).json()
    assert (await w.theirs.get("/v1/sandboxes")).json() == []
    assert key["prefix"] not in (await w.theirs.get("/v1/me/tokens")).text
    foreign = await w.theirs.delete(f"/v1/me/tokens/{key['prefix']}")
    unknown = await w.theirs.delete("/v1/me/tokens/pds_00000000")
    assert foreign.status_code == 404
    assert same(foreign, unknown)
    assert (await w.client(key["token"]).get("/v1/me")).status_code == 200


# Keys


async def test_a_key_is_shown_once_and_stored_as_a_hash(w: World) -> None:
    made = (await w.ours.post("/v1/me/tokens", json={"label": "ci", "expires_in_days": 3, "scopes": ["read"]})).json()
    assert made["token"].startswith(made["prefix"])
    assert len(made["prefix"]) == 12
    assert len(bytes.fromhex(made["token"][12:])) * 8 >= 160
    listed = (await w.ours.get("/v1/me/tokens")).json()["items"]
    assert [made["prefix"], "ci", ["read"]] in [[row["prefix"], row["label"], row["scopes"]] for row in listed]
    assert made["token"] not in str(listed)
    raw = await asyncio.to_thread(w.parts.settings.database_path.read_bytes)
    assert made["token"].encode() not in raw


async def test_revoking_is_effective_at_once_also_for_a_cached_key(w: World) -> None:
    made = (await w.ours.post("/v1/me/tokens", json={})).json()
    client = w.client(made["token"])
    assert (await client.get("/v1/me")).status_code == 200
    assert (await w.ours.delete(f"/v1/me/tokens/{made['prefix']}")).status_code == 204
    assert (await client.get("/v1/me")).status_code == 401
    assert (await w.ours.delete(f"/v1/me/tokens/{made['prefix']}")).status_code == 404


async def test_an_expired_key_is_refused(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = (await w.ours.post("/v1/me/tokens", json={"expires_in_days": 1})).json()
    client = w.client(made["token"])
    assert (await client.get("/v1/me")).status_code == 200
    later = time.time_ns() + 86_401 * 10**9
    monkeypatch.setattr("pandastack.control.access._now_us", lambda: later // 1000)
    assert (await client.get("/v1/me")).status_code == 401


async def test_a_key_cannot_make_or_revoke_a_stronger_one(w: World) -> None:
    writer = w.client(await w.key_with("write"))
    refused = await writer.post("/v1/me/tokens", json={"scopes": ["admin"]})
    assert (refused.status_code, refused.json()["field"]) == (403, "scopes")
    assert (await writer.post("/v1/me/tokens", json={})).json()["scopes"] == ["write"]
    assert (await writer.delete(f"/v1/me/tokens/{w.key[:12]}")).status_code == 403
    assert (await w.ours.get("/v1/me")).json()["role"] == "admin"


async def test_a_key_made_by_an_expiring_one_does_not_outlive_it(w: World) -> None:
    parent = (await w.ours.post("/v1/me/tokens", json={"expires_in_days": 1})).json()
    child = (await w.client(parent["token"]).post("/v1/me/tokens", json={"expires_in_days": 30})).json()
    assert child["expires_at"] == parent["expires_at"]


async def test_last_use_is_written_lazily(w: World) -> None:
    async def used() -> Any:
        items = (await w.ours.get("/v1/me/tokens")).json()["items"]
        return next(row["last_used_at"] for row in items if row["prefix"] == w.key[:12])

    assert await used() is None
    await w.parts.keys.flush()
    assert await used() is not None


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_key_in_the_address_is_for_reading_only(w: World, method: str) -> None:
    answer = await w.anyone.request(method, f"/v1/sandboxes?access_token={w.key}", content=b"" if method == "POST" else None)
    assert answer.status_code == (200 if method == "GET" else 401)


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic x", "Bearer pds_x", "Bearer pds_" + "g" * 56, "Bearer " + "x" * 5000])
async def test_a_header_that_is_no_key_is_refused_flatly(w: World, header: str) -> None:
    answer = await w.anyone.get("/v1/me", headers={"authorization": header})
    assert answer.status_code == 401
    assert (answer.json()["error"], type(answer.json()["detail"])) == ("unauthorized", str)


async def test_nested_ids_are_looked_up_in_their_own_sandbox(w: World) -> None:
    one, two = await furnished(w), await w.sandbox()
    assert (await w.ours.get(f"/v1/sandboxes/{one}/processes/p1")).status_code == 200
    foreign = await w.ours.get(f"/v1/sandboxes/{two}/processes/p1")
    assert (foreign.status_code, foreign.json()["code"]) == (404, "process_not_found")
    assert ProcessId("p1") in w.host.sandboxes[next(iter(w.host.sandboxes))].processes
