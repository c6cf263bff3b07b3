"""`GET /v1/diff`: a listing or a patch of what differs between two points of the caller's workspace."""

from __future__ import annotations

import asyncio

import pytest

from hosts import until
from pandastack.control.routes import diff as routes
from pandastack.wire.ids import SnapshotId, new_snapshot_id

from .test_snapshots import take
from .world import World

pytestmark = pytest.mark.anyio


async def points(w: World) -> tuple[str, str]:
    sandbox = await w.sandbox()
    await w.ours.put(f"/v1/sandboxes/{sandbox}/fs", params={"path": "/w/text"}, content=b"one\n")
    name = await take(w, sandbox)
    await w.ours.put(f"/v1/sandboxes/{sandbox}/fs", params={"path": "/w/text"}, content=b"two\n")
    await w.ours.put(f"/v1/sandboxes/{sandbox}/fs", params={"path": "/w/new"}, content=b"new\n")
    return name, sandbox


async def test_a_listing_and_a_patch(w: World) -> None:
    name, sandbox = await points(w)
    body = (await w.ours.get("/v1/diff", params={"a": name, "b": sandbox})).json()
    assert (body["a"], body["b"], body["path"], body["truncated"]) == (name, sandbox, "/", False)
    assert [(change["path"], change["kind"]) for change in body["changes"]] == [("/w/new", "added"), ("/w/text", "modified")]
    assert body["changes"][1]["before"]["size"] == 4
    short = (await w.ours.get("/v1/diff", params={"a": name, "b": sandbox, "path": "/w", "limit": 1})).json()
    assert ([change["path"] for change in short["changes"]], short["truncated"]) == (["/w/new"], True)
    answer = await w.ours.get("/v1/diff", params={"a": name, "b": sandbox, "path": "/w", "format": "patch"})
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "text/x-diff")
    assert answer.text.splitlines()[-4:] == ["+++ b/text", "@@ -1,1 +1,1 @@", "-one", "+two"]
    empty = await w.ours.get("/v1/diff", params={"a": name, "b": name, "format": "patch"})
    assert (empty.status_code, empty.content) == (200, b"")


async def test_a_hibernated_sandbox_is_not_woken(w: World) -> None:
    name, sandbox = await points(w)
    await w.ours.post(f"/v1/sandboxes/{sandbox}/hibernate")
    assert (await w.ours.get("/v1/diff", params={"a": name, "b": sandbox})).status_code == 200
    assert (await w.status(sandbox))[0] == "hibernated"


async def test_others_points_look_like_unknown_ones(w: World) -> None:
    name, sandbox = await points(w)
    for a, b in ((name, new_snapshot_id()), (new_snapshot_id(), sandbox), (name, "no-id")):
        answer = await w.ours.get("/v1/diff", params={"a": a, "b": b})
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    answer = await w.theirs.get("/v1/diff", params={"a": name, "b": sandbox})
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_what_is_wrong_is_said_by_status(w: World) -> None:
    name, sandbox = await points(w)
    for more, status in (({"path": "w"}, 400), ({"format": "html"}, 400), ({"limit": 0}, 400), ({"path": "/nowhere"}, 404)):
        for form in ({}, {"format": "patch"}):
            answer = await w.ours.get("/v1/diff", params={"a": name, "b": sandbox, **form, **more})
            assert answer.status_code == status, answer.text


async def test_a_listing_ends_where_its_names_are_too_much(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_TEXT", 10)
    name, sandbox = await points(w)
    body = (await w.ours.get("/v1/diff", params={"a": name, "b": sandbox})).json()
    assert ([change["path"] for change in body["changes"]], body["truncated"]) == (["/w/new"], True)


async def test_a_workspace_compares_only_so_much_at_a_time(w: World) -> None:
    name, sandbox = await points(w)
    going_on = w.host.hold("diff")
    first = [asyncio.create_task(w.ours.get("/v1/diff", params={"a": name, "b": sandbox})) for _ in range(2)]
    await until(lambda: w.host.calls.get("diff", 0) == 2)
    refused = await w.ours.get("/v1/diff", params={"a": name, "b": sandbox})
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
    assert w.parts.reconciler._creates.is_used(SnapshotId(name))
    going_on.set()
    assert [answer.status_code for answer in await asyncio.gather(*first)] == [200, 200]
    assert not w.parts.reconciler._creates.is_used(SnapshotId(name))
    assert (await w.ours.get("/v1/diff", params={"a": name, "b": sandbox})).status_code == 200
