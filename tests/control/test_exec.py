"""Commands: the wire behaviour that existing clients need, and the bounds. What needs a socket is in test_streams."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from pandastack.errors import GuestGone
from pandastack.wire.host import Output, ProcessExit
from pandastack.wire.processes import ProcessView

from .world import World, events

pytestmark = pytest.mark.anyio


@pytest.fixture
async def box(w: World) -> str:
    return await w.sandbox()


async def run(w: World, box: str, **body: Any) -> Any:
    return await w.ours.post(f"/v1/sandboxes/{box}/exec", json=body)


async def stream(w: World, box: str, query: str = "", **body: Any) -> Any:
    return await w.ours.post(f"/v1/sandboxes/{box}/exec/stream{query}", json=body)


async def test_a_command_answers_its_output_and_code(w: World, box: str) -> None:
    answer = await run(w, box, cmd="echo out; echo err >&2; exit 3")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["stdout"], body["stderr"], body["exit_code"], body["truncated"]) == ("out\n", "err\n", 3, False)
    assert isinstance(body["duration_ms"], int)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"cmd": ""},
        {"cmd": "  "},
        {"cmd": "true", "argv": ["true"]},
        {"cmd": "a\x00b"},
        {"cmd": 1},
        {"cmd": "true", "timeout_seconds": 0},
    ],
)
async def test_a_command_that_is_none_is_refused(w: World, box: str, body: dict[str, Any]) -> None:
    answer = await run(w, box, **body)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


async def test_a_command_over_its_time_is_a_5xx_that_says_timeout(w: World, box: str) -> None:
    answer = await run(w, box, cmd="echo before; sleep 60", timeout_seconds=0.05)
    body = answer.json()
    assert (answer.status_code, body["code"], body["stdout"]) == (504, "exec_timeout", "before\n")
    assert body["error"] == "command timeout: exceeded 0.05 s and was ended with its whole process tree"
    assert "i/o timeout" not in body["error"]
    assert body["process_id"]


async def test_other_failures_do_not_look_like_a_timeout(w: World, box: str) -> None:
    w.host.fail("run", GuestGone("the stream to the sandbox ended"))
    answer = await run(w, box, cmd="true")
    assert answer.status_code == 502
    for words in ("timeout", "deadline exceeded", "connection refused", "no route to host"):
        assert words not in answer.json()["error"].lower()


async def test_long_output_is_cut_with_a_marker_and_the_rest_can_be_read(w: World, box: str) -> None:
    body = (await run(w, box, cmd="yes | head -c 300000", max_output_bytes=1024)).json()
    assert (body["truncated"], body["stdout_bytes"], body["exit_code"]) == (True, 300000, 0)
    assert body["stdout"].startswith("y\n" * 512)
    assert "[... output cut here: 1024 of 300000 bytes shown; read the rest with GET .../processes/" in body["stdout"]
    rest = await w.ours.get(f"/v1/sandboxes/{box}/processes/{body['process_id']}/output", params={"offset": 1024, "limit": 1 << 20})
    assert len(rest.content) == 300000 - 1024
    assert (rest.headers["x-output-offset"], rest.headers["x-output-end"], rest.headers["x-output-running"]) == ("1024", "300000", "false")


async def test_a_cut_does_not_split_a_character(w: World, box: str) -> None:
    body = (await run(w, box, cmd="printf '" + "x" * 1023 + "é'", max_output_bytes=1024)).json()
    assert body["stdout"].startswith("x" * 1023 + "\n[... output cut")
    assert "\ufffd" not in body["stdout"]


async def test_bytes_that_are_no_text_are_replaced_and_given_exactly(w: World, box: str) -> None:
    body = (await run(w, box, cmd="printf 'a\\377b'")).json()
    assert body["stdout"] == "a\ufffdb"
    assert base64.b64decode(body["stdout_b64"]) == b"a\xffb"
    assert (await run(w, box, cmd="echo fine")).json()["stdout_b64"] is None


async def test_stdin_is_text_or_bytes(w: World, box: str) -> None:
    assert (await run(w, box, cmd="cat", stdin="héllo")).json()["stdout"] == "héllo"
    assert (await run(w, box, cmd="cat", stdin_b64="aGk=")).json()["stdout"] == "hi"
    assert (await run(w, box, cmd="cat")).json()["stdout"] == ""
    assert (await run(w, box, cmd="cat", stdin="a", stdin_b64="aGk=")).status_code == 400


# Streams


async def test_a_stream_has_no_data_before_data_and_ends_with_its_exit(w: World, box: str) -> None:
    answer = await stream(w, box, cmd="echo out; echo err >&2; exit 3")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "\r" not in answer.text
    found = events(answer.text)
    assert found[:2] == [("stdout", {"chunk": "out\n"}), ("stderr", {"chunk": "err\n"})]
    name, facts = found[-1]
    assert (name, facts["exit_code"], facts["reason"], facts["stdout_bytes"]) == ("exit", 3, "exited", 4)
    assert facts["process_id"] == answer.headers["x-process-id"]
    assert answer.text.endswith("\n\n")


async def test_characters_are_never_split(w: World, box: str) -> None:
    answer = await stream(w, box, cmd="printf '\\342'; printf '\\202'; printf '\\254x'; printf '\\377'; printf '\\303' >&2; printf '\\303'")
    found = events(answer.text)
    assert "".join(data["chunk"] for name, data in found if name == "stdout") == "€x\ufffd\ufffd"
    assert [data["chunk"] for name, data in found if name == "stderr"] == ["\ufffd"]
    assert "\ufffd" not in found[0][1]["chunk"]


async def test_base64_holds_nothing_back(w: World, box: str) -> None:
    answer = await stream(w, box, "?encoding=base64", cmd="printf '\\342'; printf '\\202\\254'")
    found = [data for name, data in events(answer.text) if name == "stdout"]
    assert [(base64.b64decode(data["b64"]), data["offset"]) for data in found] == [(b"\xe2", 0), (b"\x82\xac", 1)]


async def test_a_streamed_timeout_is_an_error_event(w: World, box: str) -> None:
    answer = await stream(w, box, cmd="echo before; sleep 60", timeout_seconds=0.05)
    found = events(answer.text)
    assert answer.status_code == 200
    assert found[0] == ("stdout", {"chunk": "before\n"})
    assert (found[-1][0], found[-1][1]["code"]) == ("error", "exec_timeout")
    assert "timeout" in found[-1][1]["error"]


async def test_a_stream_that_never_began_is_an_ordinary_error(w: World, box: str) -> None:
    w.host.fail("run", GuestGone("gone"))
    assert (await stream(w, box, cmd="true")).status_code == 502
    assert (await stream(w, box, cmd="")).status_code == 400


async def test_a_stream_without_an_end_is_an_error_and_never_a_zero(w: World, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cut(*_: Any) -> Any:
        yield ProcessView(id="p", pid=1, command="x", running=True, started_at="")
        yield Output("stdout", 0, b"half")

    monkeypatch.setattr(w.host, "run", cut)
    found = events((await stream(w, box, cmd="x")).text)
    assert [name for name, _ in found] == ["stdout", "error"]
    assert found[-1][1]["code"] == "guest_gone"
    assert (await run(w, box, cmd="x")).status_code == 502


async def test_a_jump_in_the_output_does_not_glue_characters(w: World, box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def jump(*_: Any, **__: Any) -> Any:
        yield ProcessView(id="p", pid=1, command="x", running=True, started_at="")
        yield Output("stdout", 0, b"a\xe2")
        yield Output("stdout", 100, b"\x82\xacb")
        yield ProcessExit(exit_code=0, reason="exited", stdout_bytes=104, stderr_bytes=0, duration_ms=1)

    monkeypatch.setattr(w.host, "attach", jump)
    answer = await w.ours.get(f"/v1/sandboxes/{box}/processes/p/stream")
    found = [(data["chunk"], data["offset"]) for name, data in events(answer.text) if name == "stdout"]
    assert found == [("a", 0), ("\ufffd", 1), ("\ufffd\ufffdb", 100)]


# Processes


async def test_a_process_outlives_its_request(w: World, box: str) -> None:
    made = await w.ours.post(f"/v1/sandboxes/{box}/processes", json={"cmd": "cat", "stdin": True})
    assert (made.status_code, made.json()["running"]) == (201, True)
    at = f"/v1/sandboxes/{box}/processes/{made.json()['id']}"
    assert [row["id"] for row in (await w.ours.get(f"/v1/sandboxes/{box}/processes")).json()] == [made.json()["id"]]
    assert (await w.ours.post(f"{at}/stdin", content=b"one ")).json() == {"bytes": 4}
    assert (await w.ours.post(f"{at}/stdin?close=1", content=b"two")).json() == {"bytes": 3}
    found = events((await w.ours.get(f"{at}/stream?stdout_offset=2")).text)
    assert "".join(data["chunk"] for name, data in found if name == "stdout") == "e two"
    assert found[0][1]["offset"] == 2
    assert found[-1][1]["exit_code"] == 0
    assert (await w.ours.get(at)).json()["exit_code"] == 0
    assert (await w.ours.get(f"{at}/output", params={"offset": 4, "limit": 2})).content == b"tw"


async def test_a_process_is_ended_by_a_signal(w: World, box: str) -> None:
    made = (await w.ours.post(f"/v1/sandboxes/{box}/processes", json={"cmd": "sleep 100", "id": "s"})).json()
    at = f"/v1/sandboxes/{box}/processes/{made['id']}"
    assert (await w.ours.post(f"{at}/signal", content=b"")).status_code == 204
    end = events((await w.ours.get(f"{at}/stream")).text)[-1]
    assert (end[1]["exit_code"], end[1]["signal"], end[1]["reason"]) == (143, "TERM", "signaled")
    assert (await w.ours.post(f"{at}/signal", json={"signal": "BUS"})).status_code == 400
    assert (await w.ours.post(f"{at}/stdin", content=b"x")).status_code == 409
    assert (await w.ours.post(f"/v1/sandboxes/{box}/processes", json={"cmd": "true", "id": "s"})).status_code == 409


async def test_a_terminal_can_be_resized(w: World, box: str) -> None:
    await w.ours.post(f"/v1/sandboxes/{box}/processes", json={"cmd": "sleep 100", "id": "t", "pty": {"rows": 10, "cols": 20}})
    assert (await w.ours.post(f"/v1/sandboxes/{box}/processes/t/resize", json={"rows": 30, "cols": 90})).status_code == 204
    assert (await w.ours.post(f"/v1/sandboxes/{box}/processes/t/resize", json={"rows": 0, "cols": 90})).status_code == 400


@pytest.mark.parametrize("process_id", ["none", "A", "%00", "a" * 65, "p%0A"])
async def test_an_unknown_process_is_a_404(w: World, box: str, process_id: str) -> None:
    answer = await w.ours.get(f"/v1/sandboxes/{box}/processes/{process_id}")
    assert answer.status_code == 404
