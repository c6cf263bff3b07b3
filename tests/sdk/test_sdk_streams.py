"""Streams that break: no byte lost, none doubled, never a made-up exit code."""

from __future__ import annotations

import base64
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pandastack import errors
from pandastack.sdk import sse
from pandastack.sdk.async_sandboxes import AsyncSandbox
from pandastack.sdk.client import AsyncClient, Client
from pandastack.sdk.sandboxes import Sandbox
from pandastack.sdk.testing import AsyncMemoryTransport, MemoryTransport, Streamed, answer, broken, event
from pandastack.wire.sandboxes import SandboxView

HEAD = {"x-process-id": "p1", "x-request-id": "r1"}
EXIT = event("exit", exit_code=3, signal=None, reason="exited", duration_ms=12)
OUTPUT = "zwölf Boxkämpfer".encode()


def out(data: bytes, offset: int, channel: str = "stdout") -> bytes:
    return event(channel, b64=base64.b64encode(data).decode(), offset=offset)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pandastack.sdk.cursor.random.uniform", lambda low, high: 0.001)


class Server:
    """A process that has written OUTPUT; each connection carries at most `step` bytes of events, then breaks."""

    def __init__(self, step: int, overlap: int = 0) -> None:
        self.step = step
        self.overlap = overlap
        self.asked: list[str] = []

    def __call__(self, request: Any) -> Any:
        self.asked.append(f"{request.method} {request.path}")
        if request.path.endswith("/signal"):
            return answer(status=204)
        begin = 0
        if request.method == "GET":
            begin = int(request.path.split("stdout_offset=")[1].split("&")[0])
        begin = max(0, begin - self.overlap)
        end = min(len(OUTPUT), begin + self.step)
        pieces: list[Any] = [out(OUTPUT[at : at + 1], at) for at in range(begin, end)]
        pieces.append(EXIT if end == len(OUTPUT) else broken())
        return Streamed(pieces, headers=HEAD)


def sandbox(handler: Any) -> tuple[Sandbox, MemoryTransport]:
    transport = MemoryTransport(handler)
    return Sandbox(Client("http://api", "key", transport=transport), SandboxView(id="s1")), transport


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("step", [3, 5, 100])
def test_a_broken_stream_goes_on_where_it_broke(step: int, overlap: int) -> None:
    server = Server(step, overlap)
    stream = sandbox(server)[0].stream("x")
    events = list(stream)
    assert b"".join(item.data for item in events) == OUTPUT
    assert "".join(item.text for item in events) == OUTPUT.decode()
    assert (stream.exit_code, stream.process_id, stream.duration_ms) == (3, "p1", 12)
    assert sum(asked.startswith("POST") for asked in server.asked) == 1


@pytest.mark.anyio
async def test_an_async_stream_goes_on_where_it_broke() -> None:
    client = AsyncClient("http://api", "key", transport=AsyncMemoryTransport(Server(4)))
    stream = AsyncSandbox(client, SandboxView(id="s1")).stream("x")
    assert b"".join([item.data async for item in stream]) == OUTPUT
    assert stream.exit_code == 3


def test_an_end_without_an_exit_event_is_a_break_too() -> None:
    first = Streamed([out(b"ab", 0)], headers=HEAD)
    second = Streamed([out(b"c", 2), EXIT], headers=HEAD)
    answers = iter([first, second])
    assert b"".join(item.data for item in sandbox(lambda request: next(answers))[0].stream("x")) == b"abc"


def test_a_break_before_the_first_output_is_mended_too() -> None:
    answers = iter([Streamed([broken()], headers=HEAD), Streamed([out(b"all", 0), EXIT], headers=HEAD)])
    assert b"".join(item.data for item in sandbox(lambda request: next(answers))[0].stream("x")) == b"all"


def test_a_daemon_that_was_lost_for_a_moment_is_asked_again() -> None:
    lost = event("error", error="the stream to the sandbox ended", code="guest_gone")
    answers = iter([Streamed([out(b"a", 0), lost], headers=HEAD), Streamed([out(b"b", 1), EXIT], headers=HEAD)])
    assert b"".join(item.data for item in sandbox(lambda request: next(answers))[0].stream("x")) == b"ab"


def test_bytes_that_are_gone_are_counted() -> None:
    stream = sandbox(lambda request: Streamed([out(b"ab", 0), out(b"z", 10), EXIT], headers=HEAD))[0].stream("x")
    assert [(item.offset, item.skipped) for item in stream] == [(0, 0), (10, 8)]
    said: list[str] = []
    sandbox(lambda request: Streamed([out(b"ab", 0), out(b"z", 10), EXIT], headers=HEAD))[0].exec_stream("x", said.append)
    assert "".join(said) == "ab\n[... 8 bytes of output are missing here ...]\nz"


def test_a_process_that_is_gone_makes_the_outcome_unknown() -> None:
    gone = answer({"error": "no such process", "code": "process_not_found"}, 404)
    answers = iter([Streamed([out(b"half", 0), broken()], headers=HEAD), gone])
    with pytest.raises(errors.ExecInterrupted) as caught:
        list(sandbox(lambda request: next(answers))[0].stream("x"))
    assert caught.value.stdout == caught.value.partial_stdout == "half"
    assert caught.value.process_id == "p1"
    assert isinstance(caught.value.__cause__, errors.ProcessNotFound)


def test_a_server_without_offsets_cannot_be_resumed() -> None:
    answers = iter([Streamed([event("stdout", chunk="half")])])
    with pytest.raises(errors.ExecInterrupted) as caught:
        sandbox(lambda request: next(answers))[0].exec_stream("x")
    assert caught.value.stdout == "half"


def test_frames_of_older_servers_are_understood() -> None:
    pieces = [event("stdout", chunk="a"), b": keep-alive\n\n", event("stderr", chunk="b"), event("exit", exit_code=0)]
    said: list[str] = []
    code = sandbox(lambda request: Streamed(pieces))[0].exec_stream("x", said.append, lambda text: said.append(f"!{text}"))
    assert (code, said) == (0, ["a", "!b"])


def test_a_command_that_may_have_started_is_not_started_again() -> None:
    made, transport = sandbox(lambda request: (_ for _ in ()).throw(broken()))
    with pytest.raises(errors.APIConnectionError):
        list(made.stream("x"))
    assert len(transport.requests) == 1


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ({"error": "command timeout: exceeded 1 s", "code": "exec_timeout"}, errors.SandboxTimeout),
        ({"error": "context deadline exceeded"}, errors.SandboxTimeout),
        ({"error": "it broke"}, errors.ServerError),
    ],
)
def test_error_events_are_typed(data: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        list(sandbox(lambda request: Streamed([out(b"so far", 0), event("error", **data)], headers=HEAD))[0].stream("x"))
    assert caught.value.request_id == "r1"
    assert caught.value.stdout == "so far"


def test_leaving_with_kills_and_iterating_alone_does_not() -> None:
    server = Server(100)
    made, transport = sandbox(server)
    with made.stream("x") as stream:
        next(stream)
    assert transport.requests[-1].path == "/sandboxes/s1/processes/p1/signal"
    assert b'"KILL"' in transport.bodies[-1]
    count = len(transport.requests)
    stream = made.stream("x")
    next(stream)
    stream.close()
    with made.stream("x") as whole:
        list(whole)
    assert [request.path for request in transport.requests[count:]] == ["/sandboxes/s1/exec/stream?encoding=base64"] * 2


def test_half_a_character_waits_for_its_other_half_and_shows_at_the_end() -> None:
    pieces = [out(b"\xc3", 0), out(b"\xa9\xff", 1), out(b"\xe2\x82", 3), EXIT]
    events = list(sandbox(lambda request: Streamed(pieces, headers=HEAD))[0].stream("x"))
    assert "".join(item.text for item in events) == "\xe9\ufffd\ufffd"
    assert b"".join(item.data for item in events) == b"\xc3\xa9\xff\xe2\x82"


def test_wait_has_a_deadline_even_when_output_never_stops() -> None:
    view = {"id": "p1", "pid": 1, "command": "yes", "running": True, "started_at": ""}

    def endless() -> Any:
        for at in range(100_000):
            time.sleep(0.005)
            yield out(b"y", at)

    made, _ = sandbox(lambda request: Streamed(endless(), headers=HEAD) if "/stream" in request.path else answer(view))
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="timeout"):
        made.processes.get("p1").wait(0.2)
    assert time.monotonic() - begun < 2


def test_a_lost_answer_to_start_is_looked_for_by_its_id() -> None:
    def handle(request: Any) -> Any:
        if request.method == "POST":
            raise broken()
        return answer({"id": request.path.rpartition("/")[2], "pid": 7, "command": "x", "running": True, "started_at": ""})

    made, transport = sandbox(handle)
    process = made.processes.start("x")
    assert process.pid == 7
    assert [request.method for request in transport.requests] == ["POST", "GET"]


@given(st.lists(st.tuples(st.sampled_from(["stdout", "exit", "x"]), st.text(max_size=20)), max_size=6), st.integers(1, 7))
def test_events_are_the_same_however_the_bytes_were_cut(wanted: list[tuple[str, str]], size: int) -> None:
    data = b"".join(event(name, text=text) + b": comment\n\n" for name, text in wanted)
    parser = sse.Parser()
    found = [item for at in range(0, len(data), size) for item in parser.feed(data[at : at + size])]
    assert [(item.name, item.json()["text"]) for item in found] == wanted


def test_output_is_parsed_in_linear_time() -> None:
    frame = out(bytes(32 * 1024), 0)
    parser = sse.Parser()
    begun = time.monotonic()
    count = sum(len(parser.feed(frame)) for _ in range(500))
    assert count == 500
    assert time.monotonic() - begun < 2
