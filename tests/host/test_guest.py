"""The client against guests that lie, flood, stop half way, or say nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from pandastack import errors
from pandastack.host.guest import Guest, ProcessSpec
from pandastack.wire import guest as wire
from pandastack.wire.guest import Kind

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]
STARTED = {"id": "p", "pid": 5, "started_unix_ns": 1, "pty": False, "stdout": {"first": 0, "next": 0}, "stderr": {"first": 0, "next": 0}}
EXIT = {"id": "p", "exit_code": 0, "signal": None, "reason": "exited", "stdout_bytes": 0, "stderr_bytes": 0, "duration_ms": 1}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Descriptors:
    read_fd: int
    write_fd: int
    fresh: bool = True


class FakeGuest:
    """The guest's end of a socket: it shakes hands properly, and then sends what the test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.tag = reader, writer, 0

    async def greet(self, **changes: object) -> None:
        await self.reader.readuntil(wire.MAGIC)
        hello = json.loads((await self.frame())[3])
        self.tag = hello["tag"]
        body = {"version": 1, "nonce": hello["nonce"], "build": "fake", "pid": 1, "sealed": False, "live": 0} | changes
        self.writer.write(wire.MAGIC)
        self.send(Kind.HELLO_OK, 0, body)

    async def frame(self) -> tuple[int, int, int, bytes]:
        head = await self.reader.readexactly(12)
        payload = await self.reader.readexactly(int.from_bytes(head[8:], "big") + 4)
        return head[0], head[1], int.from_bytes(head[4:8], "big"), payload[:-4]

    async def expect(self, kind: Kind) -> tuple[int, bytes]:
        while True:
            got, _, stream, payload = await self.frame()
            if got == kind:
                return stream, payload

    def send(self, kind: int, stream: int, body: Any = b"", *, flags: int = 0) -> None:
        payload = body if isinstance(body, bytes) else wire.encode_json(body)
        for buffer in wire.encode(kind, stream, payload, self.tag, flags=flags):  # type: ignore[arg-type]
            self.writer.write(bytes(buffer))

    def output(self, stream: int, offset: int, data: bytes, channel: int = 1) -> None:
        self.send(Kind.DATA, stream, offset.to_bytes(8, "big") + data, flags=channel)


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[FakeGuest, Descriptors]]:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    descriptor = ours.detach()
    try:
        yield FakeGuest(reader, writer), Descriptors(descriptor, descriptor)
    finally:
        writer.close()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[FakeGuest, Guest]]:
    async with pair() as (fake, descriptors), asyncio.timeout(20):
        opening = asyncio.ensure_future(Guest.open(descriptors, timeout_s=5))
        await fake.greet()
        guest = await opening
        try:
            yield fake, guest
        finally:
            await guest.close()


async def test_a_silent_guest_times_out() -> None:
    async with pair() as (_, descriptors):
        with pytest.raises(errors.GuestTimeout):
            await Guest.open(descriptors, timeout_s=0.05)


async def test_a_guest_that_hangs_up_is_gone() -> None:
    async with pair() as (fake, descriptors):
        fake.writer.close()
        with pytest.raises(errors.GuestGone):
            await Guest.open(descriptors, timeout_s=5)
    async with connected() as (fake, guest):
        call = asyncio.ensure_future(guest.health())
        await fake.expect(Kind.CALL)
        fake.writer.close()
        with pytest.raises(errors.GuestGone):
            await call
        with pytest.raises(errors.GuestGone):
            await guest.health()


async def test_an_endless_babbler_is_refused() -> None:
    async with pair() as (fake, descriptors):
        opening = asyncio.ensure_future(Guest.open(descriptors, timeout_s=20))

        async def babble() -> None:
            while not opening.done():
                fake.writer.write(bytes(1 << 20))
                await fake.writer.drain()

        babbler = asyncio.ensure_future(babble())
        with pytest.raises(errors.GuestProtocolError):
            await opening
        babbler.cancel()


async def test_an_answer_of_another_shape_is_a_violation_of_the_call() -> None:
    async with connected() as (fake, guest):
        call = asyncio.ensure_future(guest.seal())
        stream, _ = await fake.expect(Kind.CALL)
        fake.send(Kind.REPLY, stream, {"live": 1, "frozen": 0, "extra": 2}, flags=1)
        with pytest.raises(errors.GuestProtocolError):
            await call


BREACHES: dict[str, Callable[[FakeGuest, int], None]] = {
    "a call that is not open": lambda fake, n: fake.send(Kind.REPLY, n + 1, {}),
    "an answer twice": lambda fake, n: [fake.send(Kind.REPLY, n, STARTED) for _ in range(2)] and None,
    "data before the answer": lambda fake, n: fake.output(n, 0, b"x"),
    "an unknown kind": lambda fake, n: fake.send(99, n),
    "a call": lambda fake, n: fake.send(Kind.CALL, n),
    "a bad event": lambda fake, n: fake.send(Kind.EVENT, 0, {"type": "activity", "live": -1}),
    "data on stream 0": lambda fake, n: fake.send(Kind.DATA, 0, b"x"),
    "a fault that is none": lambda fake, n: fake.send(Kind.ERROR, n, {"code": "../../etc", "message": ""}),
    "a short credit": lambda fake, n: fake.send(Kind.CREDIT, n, b"x"),
    "endless credit": lambda fake, n: fake.send(Kind.CREDIT, n, b"\xff\xff\xff\xff"),
    "garbage": lambda fake, n: fake.writer.write(b"\xff" * 100),
}


@pytest.mark.parametrize("name", BREACHES)
async def test_a_breach_ends_the_session_and_every_call_in_it(name: str) -> None:
    async with connected() as (fake, guest):
        calls = [asyncio.ensure_future(guest.wait("p")), asyncio.ensure_future(guest.wait("q"))]
        await fake.expect(Kind.CALL)
        last, _ = await fake.expect(Kind.CALL)
        BREACHES[name](fake, last)
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, errors.GuestProtocolError), result
        assert isinstance(await guest.ended(), errors.GuestProtocolError)


OUTPUT_BREACHES: dict[str, Callable[[FakeGuest, int], None]] = {
    "backwards": lambda fake, n: [fake.output(n, at, b"xx") for at in (5, 6)] and None,
    "no offset": lambda fake, n: fake.send(Kind.DATA, n, b"12345678", flags=1),
    "nothing": lambda fake, n: fake.send(Kind.DATA, n, b"", flags=0),
    "unknown channel": lambda fake, n: fake.output(n, 0, b"x", channel=3),
    "beyond all offsets": lambda fake, n: fake.output(n, 2**64 - 1, b"x"),
    "over credit": lambda fake, n: [fake.output(n, at, bytes(65_536)) for at in range(0, 1 << 20, 65_536)] and None,
}


@pytest.mark.parametrize("name", OUTPUT_BREACHES)
async def test_a_breach_within_output_ends_the_session(name: str) -> None:
    async with connected() as (fake, guest):
        starting = asyncio.ensure_future(guest.run(ProcessSpec(argv=["x"])))
        number, _ = await fake.expect(Kind.CALL)
        fake.send(Kind.REPLY, number, STARTED)
        stream = await starting
        OUTPUT_BREACHES[name](fake, number)
        await fake.writer.drain()
        assert isinstance(await guest.ended(), errors.GuestProtocolError)
        with pytest.raises(errors.GuestProtocolError):
            await stream.wait()


async def test_an_end_without_result_is_no_exit() -> None:
    async with connected() as (fake, guest):
        starting = asyncio.ensure_future(guest.run(ProcessSpec(argv=["x"])))
        number, _ = await fake.expect(Kind.CALL)
        fake.send(Kind.REPLY, number, STARTED)
        stream = await starting
        fake.send(Kind.END, number, b"")
        with pytest.raises(errors.GuestProtocolError):
            await stream.wait()


async def test_tiny_frames_cost_no_more_memory_than_the_window() -> None:
    async with connected() as (fake, guest):
        starting = asyncio.ensure_future(guest.run(ProcessSpec(argv=["x"])))
        number, _ = await fake.expect(Kind.CALL)
        fake.send(Kind.REPLY, number, STARTED)
        stream = await starting
        count = 50_000
        tracemalloc.start()
        for at in range(count):
            fake.output(number, at, b"x")
            if at % 1000 == 0:
                await fake.writer.drain()
        fake.send(Kind.END, number, EXIT)
        await fake.writer.drain()
        await asyncio.sleep(0.2)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 8 << 20
        assert sum([len(piece.data) async for piece in stream]) == count


async def test_cancelling_resets_and_late_frames_are_dropped() -> None:
    async with connected() as (fake, guest):
        call = asyncio.ensure_future(guest.wait("p"))
        number, _ = await fake.expect(Kind.CALL)
        call.cancel()
        assert (await fake.expect(Kind.RESET))[0] == number
        fake.send(Kind.REPLY, number, EXIT, flags=1)
        again = asyncio.ensure_future(guest.seal())
        number, _ = await fake.expect(Kind.CALL)
        fake.send(Kind.REPLY, number, {"live": 0, "frozen": 0}, flags=1)
        assert (await again).live == 0


async def test_deadline_of_a_call_leaves_the_session_open() -> None:
    async with connected() as (_, guest):
        with pytest.raises(errors.GuestTimeout):
            await guest.health(timeout_s=0.05)
        assert not guest.closed


async def test_uploads_wait_for_credit() -> None:
    async with connected() as (fake, guest):
        writing = asyncio.ensure_future(guest.write_file("/x", bytes(3 << 20)))
        number, _ = await fake.expect(Kind.CALL)
        got = 0
        while got < 1 << 20:
            got += len((await fake.expect(Kind.DATA))[1])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await fake.frame()
        fake.send(Kind.CREDIT, number, wire.encode_credit(2 << 20))
        while got < 3 << 20:
            got += len((await fake.expect(Kind.DATA))[1])
        await fake.expect(Kind.END)
        fake.send(Kind.REPLY, number, {"bytes": got}, flags=1)
        assert await writing == 3 << 20


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("not_found", errors.FileNotFound),
        ("no_space", errors.DiskFull),
        ("no_process", errors.ProcessNotFound),
        ("new_code", errors.GuestError),
    ],
)
async def test_faults_become_typed_errors(code: str, kind: type[errors.PandastackError]) -> None:
    async with connected() as (fake, guest):
        call = asyncio.ensure_future(guest.stat("/x"))
        number, _ = await fake.expect(Kind.CALL)
        fake.send(Kind.ERROR, number, {"code": code, "message": "m" * 2000, "errno": 2})
        with pytest.raises(kind) as caught:
            await call
        assert (caught.value.guest_code, caught.value.guest_errno, len(caught.value.message)) == (code, 2, 500)


async def test_bulk_is_fast_enough() -> None:
    """Half a gigabyte a second on an idle machine; the bound here only catches a codec gone quadratic."""
    async with connected() as (fake, guest):
        starting = asyncio.ensure_future(guest.run(ProcessSpec(argv=["x"])))
        number, _ = await fake.expect(Kind.CALL)
        fake.send(Kind.REPLY, number, STARTED)
        stream = await starting
        total, block = 64 << 20, bytes(65_536)

        async def produce() -> None:
            credit, at = 1 << 20, 0
            while at < total:
                while credit < len(block) + 8:
                    credit += int.from_bytes((await fake.expect(Kind.CREDIT))[1], "big")
                fake.output(number, at, block)
                at += len(block)
                credit -= len(block) + 8
                await fake.writer.drain()
            fake.send(Kind.END, number, EXIT)

        begun = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(produce())
            received = sum([len(piece.data) async for piece in stream])
        assert received == total
        assert time.monotonic() - begun < 10


def _entry(path: str, **more: object) -> dict[str, object]:
    numbers = {"size": 0, "mode": 0o644, "uid": 0, "gid": 0, "mtime_ns": 0, "ctime_ns": 0}
    return {"path": path, "type": "file", "pristine": False, **numbers, **more}


TREES: dict[str, tuple[list[dict[str, object]], int]] = {
    "no root": ([_entry("a")], 1),
    "backwards": ([_entry(""), _entry("b"), _entry("a")], 3),
    "a name twice": ([_entry(""), _entry("a"), _entry("a")], 3),
    "out of the tree": ([_entry(""), _entry("../etc")], 2),
    "an absolute path": ([_entry(""), _entry("/etc")], 2),
    "a NUL": ([_entry(""), _entry("a\0b")], 2),
    "more than asked for": ([_entry(""), *(_entry(f"{number}") for number in range(9))], 10),
    "less than was counted": ([_entry("")], 2),
    "another shape": ([_entry("", extra=1)], 1),
}


@pytest.mark.parametrize("name", TREES)
async def test_a_tree_that_is_none_is_refused(name: str) -> None:
    entries, count = TREES[name]
    async with connected() as (fake, guest):

        async def walk() -> None:
            async for _ in guest.scan("/", 9):
                pass

        walking = asyncio.ensure_future(walk())
        number, _ = await fake.expect(Kind.CALL)
        fake.send(Kind.REPLY, number, {})
        fake.send(Kind.DATA, number, json.dumps({"entries": entries}).encode() + b"\n")
        fake.send(Kind.END, number, {"count": count})
        with pytest.raises(errors.GuestProtocolError):
            await walking


@pytest.mark.parametrize("digests", [[], ["a" * 64] * 2, ["A" * 64], ["short"]])
async def test_digests_that_are_none_are_refused(digests: list[str]) -> None:
    async with connected() as (fake, guest):
        asking = asyncio.ensure_future(guest.digests([b"/a"]))
        number, _ = await fake.expect(Kind.CALL)
        fake.send(Kind.REPLY, number, {})
        fake.send(Kind.DATA, number, json.dumps({"digests": digests}).encode() + b"\n")
        fake.send(Kind.END, number, {"count": 1})
        with pytest.raises(errors.GuestProtocolError):
            await asking
