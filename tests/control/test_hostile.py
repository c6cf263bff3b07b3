"""What nobody should send, to every route: the answer is a flat 4xx, never a 5xx, and it repeats nothing."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic_core import to_json

from pandastack.control.fake_host import FakeHost
from pandastack.control.gateway import Head, _Channel
from pandastack.control.routes.requests import parse
from pandastack.errors import InvalidRequest
from pandastack.wire.host import Output
from pandastack.wire.sandboxes import SandboxCreate

from .test_access import ROUTES, ask, furnished
from .world import World, events, world

pytestmark = pytest.mark.anyio

BODIES: dict[str, bytes] = {
    "no json": b"{",
    "bad utf-8": b'{"cmd": "\xff"}',
    "utf-16": '{"cmd": "x"}'.encode("utf-16"),
    "lone surrogate": b'{"cmd": "\\ud800", "path": "/\\ud800", "label": "\\ud800"}',
    "not an object": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "nan": b'{"cmd": "x", "timeout_seconds": NaN, "ttl_seconds": NaN, "cpu": NaN}',
    "infinity": b'{"cmd": "x", "timeout_seconds": Infinity, "ttl_seconds": -Infinity}',
    "huge number": b'{"cmd": "x", "timeout_seconds": 1e308, "ttl_seconds": 1e308, "rows": 1e308, "expires_in_days": 1e308}',
    "huge integer": b'{"ttl_seconds": ' + b"9" * 5000 + b', "cmd": "x", "timeout_seconds": ' + b"9" * 5000 + b"}",
    "true for a number": b'{"ttl_seconds": true, "timeout_seconds": true, "rows": true, "expires_in_days": true}',
    "deep": b'{"metadata":' * 33 + b"1" + b"}" * 33,
    "very deep": b"[" * 200_000,
    "wrong types": b'{"cmd": [], "argv": "x", "path": {}, "metadata": [], "label": 1, "signal": 9, "template": null}',
    "nul": b'{"cmd": "a\\u0000b", "path": "/a\\u0000b", "label": "\\u0000", "template": "\\u0000"}',
    "unknown field": b'{"__class__": {}, "constructor": 1}',
    "same key twice": b'{"cmd": "", "cmd": ""}',
    "newline at the end of a name": b'{"template": "base\\n", "id": "p\\n", "signal": "TERM\\n", "mode": "0644\\n"}',
}


def check(answer: Any, *, flat: bool = True) -> None:
    assert answer.status_code < 500, answer.text
    assert answer.headers["x-request-id"]
    if answer.status_code >= 400 and flat:
        body = answer.json()
        assert isinstance(body["error"], str)
        assert isinstance(body["code"], str)
        assert body["request_id"] == answer.headers["x-request-id"]
        assert "Traceback" not in answer.text


@pytest.mark.parametrize("name", BODIES)
async def test_hostile_bodies(w: World, name: str) -> None:
    box = await furnished(w)
    for (method, path), (_, how) in ROUTES.items():
        if method not in ("POST", "PATCH") or path.endswith(("/stdin", "/bake")):
            continue
        answer = await ask(w.ours, method, path, {"content": BODIES[name]}, sandbox_id=box)
        check(answer)
        if "json" in how:
            assert answer.status_code in (400, 409), (path, answer.text)


PATHS = [
    "..",
    "%2e%2e",
    "%2e%2e%2f%2e%2e",
    "%00",
    "a%00b",
    "%ff",
    "%0d%0aX: y",
    "x" * 8000,
    "{sandbox_id}",
    "💥",
    "-1",
    "null",
    "a%2fb",
    ";",
    "?",
    "*",
]


@pytest.mark.parametrize("value", PATHS)
async def test_hostile_ids(w: World, value: str) -> None:
    for (method, path), (_, how) in ROUTES.items():
        if "{" not in path:
            continue
        names = dict.fromkeys(("sandbox_id", "snapshot_id", "process_id", "name", "prefix"), value)
        answer = await ask(w.ours, method, path, how, **names)
        check(answer, flat=method != "HEAD")
        if value not in ("..", "?"):
            assert answer.status_code in (404, 405), (method, path, answer.text)


QUERIES = [
    *("path=%00", "path=/&path=/", "path", "path=%", "limit=1e9", "limit=-1", "limit=NaN", "limit=" + "9" * 400),
    *("offset=-1", "offset=99999999999999999999", "stdout_offset=x", "encoding=utf-16", "stream=both", "after=%00"),
    *("recursive=maybe", "close=2", "mode=9999", "mode=0644%0a", "owner=a:b:c", "cursor=%ff", "metadata==", "&&&=&=="),
]


@pytest.mark.parametrize("query", QUERIES)
async def test_hostile_queries(w: World, query: str) -> None:
    box = await furnished(w)
    for (method, path), (_, how) in ROUTES.items():
        if path.endswith("/watch"):
            continue
        plain = {key: value for key, value in how.items() if key != "params"}
        check(await ask(w.ours, method, f"{path}?{query}", plain, sandbox_id=box), flat=method != "HEAD")


HEADERS = [
    {"content-type": "application/json; " + "a=b;" * 3000},
    {"content-type": "multipart/form-data; boundary=" + "x" * 2000},
    {"content-type": "\xff"},
    {"content-encoding": "gzip"},
    {"range": "bytes=" + ",".join(f"{n}-{n}" for n in range(2000))},
    {"range": "bytes=--1"},
    {"host": "evil.example/../../v1/host?x="},
    {"host": ""},
    {"x-forwarded-host": "evil", "x-forwarded-for": "127.0.0.1", "x-original-url": "/v1/host"},
    {"accept": "text/html," * 500},
    {"x-request-id": "a\tb"},
    {"x-request-id": "é"},
    {"x-request-id": "x" * 65},
    {"idempotency-key": "\xff"},
    {"expect": "nonsense"},
    {"upgrade": "websocket", "connection": "upgrade"},
    {"accept-encoding": "gzip, br, zstd"},
]


@pytest.mark.parametrize("headers", HEADERS, ids=lambda headers: next(iter(headers)) + ":" + ascii(next(iter(headers.values()))[:12]))
async def test_hostile_headers(w: World, headers: dict[str, str]) -> None:
    box = await furnished(w)
    for (method, path), (_, how) in ROUTES.items():
        if path.endswith("/watch"):
            continue
        raw = {key: value.encode("latin-1") for key, value in headers.items()}
        answer = await ask(w.ours, method, path, {**how, "headers": raw}, sandbox_id=box)
        check(answer, flat=method != "HEAD")
        assert answer.headers["x-request-id"] != headers.get("x-request-id")


async def test_a_host_header_changes_no_right(w: World) -> None:
    reader = w.client(await w.key_with("read"))
    for host in ("x/v1/me?", "x#", "[::1", "a@b", "metrics"):
        assert (await reader.get("/v1/host", headers={"host": host})).status_code == 403


async def test_a_sane_request_id_is_echoed_and_others_are_minted(w: World) -> None:
    assert (await w.anyone.get("/version", headers={"x-request-id": "abc-1.2_3"})).headers["x-request-id"] == "abc-1.2_3"
    minted = {(await w.anyone.get("/version")).headers["x-request-id"] for _ in range(3)}
    assert len(minted) == 3


async def test_the_frameworks_own_errors_have_our_shape(w: World) -> None:
    missing = await w.ours.get("/v1/nothing")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    wrong = await w.ours.put("/v1/me")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")
    assert isinstance(wrong.json()["error"], str)
    for path in ("/v1/sandboxes/", "//v1/sandboxes", "/v1//sandboxes", "/V1/sandboxes", "/v1/sandboxes/../me"):
        assert (await w.ours.get(path)).status_code in (200, 404)


async def test_an_unexpected_error_tells_nothing_but_its_request_id(w: World) -> None:
    box = await w.sandbox()
    w.host.fail("run", ValueError("password=hunter2"))
    answer = await w.ours.post(f"/v1/sandboxes/{box}/exec", json={"cmd": "true"})
    assert answer.status_code == 500
    assert answer.json() == {"error": "internal error", "code": "internal", "request_id": answer.headers["x-request-id"]}


async def test_metrics_hold_no_name_of_a_client(w: World) -> None:
    box = await w.sandbox(metadata={"customer": "acme"})
    await w.ours.get(f"/v1/sandboxes/{box}")
    await w.ours.get("/some/secret/path")
    text = (await w.anyone.get("/metrics")).text
    assert 'route="/v1/sandboxes/{sandbox_id}"' in text
    assert 'pandastack_sandboxes{status="running"} 1.0' in text
    for word in (box, "acme", "secret", "default", w.key[:12]):
        assert word not in text


# Properties


@given(st.lists(st.binary(min_size=1, max_size=6), max_size=12))
def test_text_events_lose_nothing_however_the_bytes_are_cut(pieces: list[bytes]) -> None:
    channel = _Channel("stdout", as_bytes=False, offsets=True)
    raw, offset = b"", 0
    for piece in pieces:
        raw += channel.frames(Output("stdout", offset, piece))
        offset += len(piece)
    raw += channel.rest()
    assert "".join(data["chunk"] for _, data in events(raw.decode())) == b"".join(pieces).decode("utf-8", "replace")


@given(st.binary(max_size=64), st.integers(1, 64))
def test_a_bounded_head_keeps_its_bound(data: bytes, limit: int) -> None:
    head = Head(limit)
    for at in range(0, len(data), 7):
        head.add(data[at : at + 7])
    text, _, cut = head.render(len(data), process_id="p", channel="stdout")
    assert cut == (len(data) > limit)
    if not cut:
        assert text == data.decode("utf-8", "replace")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*SandboxCreate.model_fields, "x"]), JSON, max_size=5))
def test_any_json_is_a_shape_or_an_invalid_request(value: dict[str, Any]) -> None:
    try:
        parsed = parse(SandboxCreate, json.dumps(value).encode())
    except InvalidRequest as error:
        assert error.field  # noqa: PT017 - either outcome is right
    else:
        to_json(parsed)


# The contract itself

EXAMPLES = int(os.environ.get("PANDASTACK_CONTRACT_EXAMPLES", "6"))


def test_requests_made_from_the_contract_are_answered_as_it_says(database: Any) -> None:
    """schemathesis over every operation, with requests that keep the contract and requests that break it."""

    async def start() -> tuple[Any, ...]:
        manager = world(database, FakeHost(sandboxes_max=5))
        return manager, await manager.__aenter__()

    with asyncio.Runner() as runner:
        manager, w = runner.run(start())
        box = runner.run(furnished(w))
        schema = schemathesis.openapi.from_dict(w.app.openapi())
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) == len(ROUTES)
        for operation in operations:
            if operation.path.endswith(("/watch", "/bake")):
                continue

            @given(case=operation.as_strategy())
            @settings(
                max_examples=EXAMPLES,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
                derandomize=True,
            )
            def conforms(case: Any) -> None:
                if "sandbox_id" in (case.path_parameters or {}):
                    case.path_parameters["sandbox_id"] = box
                if "timeout_seconds" in (case.body if isinstance(case.body, dict) else {}):
                    case.body["timeout_seconds"] = 0.1
                kwargs = case.as_transport_kwargs(base_url="http://api.test")
                request = {
                    name: kwargs.get(name)
                    for name in ("method", "url", "params", "json", "data", "headers")
                    if kwargs.get(name) is not None
                }
                request["headers"] = dict(request["headers"])
                if "data" in request:
                    request["content"] = request.pop("data")
                try:
                    answer = runner.run(w.ours.request(**request))
                except (ValueError, TypeError, UnicodeError):
                    return  # The client itself can not send this.
                assert answer.status_code < 500 or answer.status_code in (503, 504), answer.text
                if answer.status_code >= 400 and case.method != "HEAD":
                    assert isinstance(answer.json()["error"], str)

            conforms()
        runner.run(manager.__aexit__(None, None, None))
