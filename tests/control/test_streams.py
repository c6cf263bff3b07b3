"""What only shows over a real socket: pace, bounds, and clients that leave or stall."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pandastack.control.fake_shell import FakeProcess

from .world import World, served, until, world

pytestmark = pytest.mark.anyio
MIB = 1 << 20


@dataclass
class Wire:
    """One connection, spoken to in bytes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    key: str

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        lines = {"host": "x", "authorization": f"Bearer {self.key}", "content-length": str(len(body))} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
        self.writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)

    async def head(self) -> tuple[int, dict[str, str]]:
        raw = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        first, *rest = raw.strip().split("\r\n")
        return int(first.split()[1]), {line.split(":", 1)[0].lower(): line.split(":", 1)[1].strip() for line in rest}

    async def answer(self) -> tuple[int, Any]:
        status, headers = await self.head()
        return status, json.loads(await self.reader.readexactly(int(headers["content-length"])))


@dataclass
class Served:
    w: World
    port: int
    box: str

    @asynccontextmanager
    async def wire(self, key: str | None = None) -> AsyncIterator[Wire]:
        sock = socket.socket()
        # Small buffers in the kernel, or it would hide what the server holds.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=64 << 10)
        try:
            yield Wire(reader, writer, key or self.w.key)
        finally:
            writer.transport.abort()

    def process(self) -> FakeProcess:
        found = next(iter(self.w.host.sandboxes.values())).processes
        return next(iter(found.values()))

    def count(self, name: str) -> float:
        return float(self.w.parts.meters.registry.get_sample_value(name) or 0)


@asynccontextmanager
async def serving(database: Path, **changes: Any) -> AsyncIterator[Served]:
    async with world(database, **changes) as w, served(w.app) as port:
        yield Served(w, port, f"/v1/sandboxes/{await w.sandbox()}")


@pytest.fixture
async def s(database: Path) -> AsyncIterator[Served]:
    async with serving(database) as made:
        yield made


async def settles(look: Any, *, for_s: float = 0.25) -> Any:
    """The value of `look` once it has not changed for a while."""
    async with asyncio.timeout(10):
        value = look()
        while True:
            await asyncio.sleep(for_s)
            if look() == value:
                return value
            value = look()


async def ended(process: FakeProcess) -> FakeProcess:
    async with asyncio.timeout(10):
        await asyncio.wait([process.task])
    return process


async def test_a_client_that_stops_reading_stops_the_command(s: Served) -> None:
    async with s.wire() as wire:
        wire.ask("POST", f"{s.box}/exec/stream", b'{"cmd": "yes | head -c 200000000"}')
        assert (await wire.head())[0] == 200
        produced = await settles(lambda: s.process().view().stdout_bytes)
        assert produced < 8 * MIB
    # It has left: nobody waits any more, and the command goes on to its end.
    process = await ended(s.process())
    assert (process.view().exit_code, process.view().stdout_bytes) == (0, 200_000_000)


async def test_a_client_that_leaves_can_have_its_command_killed(s: Served) -> None:
    async with s.wire() as wire:
        wire.ask("POST", f"{s.box}/exec/stream?on_disconnect=kill", b'{"cmd": "echo hi; sleep 100"}')
        assert (await wire.head())[0] == 200
        await wire.reader.readuntil(b"\n\n")
    assert (await ended(s.process())).view().reason == "killed"


async def test_a_command_whose_client_left_can_be_followed_again(s: Served) -> None:
    async with s.wire() as wire:
        wire.ask("POST", f"{s.box}/exec/stream", b'{"cmd": "echo one; sleep 0.2; echo two"}')
        _, headers = await wire.head()
        await wire.reader.readuntil(b"\n\n")
    async with s.wire() as wire:
        wire.ask("GET", f"{s.box}/processes/{headers['x-process-id']}/stream?stdout_offset=4")
        text = await wire.reader.readuntil(b'"exit_code":0')
        assert b'"chunk":"two\\n","offset":4' in text


async def test_a_stalled_client_is_dropped(database: Path) -> None:
    async with serving(database, stalled_client_s=0.2) as s, s.wire() as wire:
        wire.ask("POST", f"{s.box}/exec/stream", b'{"cmd": "yes | head -c 50000000"}')
        await wire.head()
        assert (await ended(s.process())).view().exit_code == 0
        assert next(iter(s.w.host.sandboxes.values())).requests == 0


@pytest.mark.parametrize("query", ["/fs?path=/dev/zero-1000000000", "/processes/p/output?limit=1048576"])
async def test_a_download_is_read_at_its_readers_pace(s: Served, query: str) -> None:
    await s.w.ours.post(f"{s.box}/processes", json={"cmd": "yes | head -c 3000000", "id": "p"})
    await asyncio.sleep(0.05)
    before = s.count("pandastack_bytes_out_total")
    async with s.wire() as wire:
        wire.ask("GET", s.box + query)
        assert (await wire.head())[0] == 200
        taken = await settles(lambda: s.count("pandastack_bytes_out_total")) - before
        assert taken < 8 * MIB


async def test_a_stalled_download_is_dropped(database: Path) -> None:
    async with serving(database, stalled_client_s=0.2) as s, s.wire() as wire:
        wire.ask("GET", f"{s.box}/fs?path=/dev/zero-1000000000")
        await wire.head()
        await until(lambda: not next(iter(s.w.host.sandboxes.values())).requests)


async def test_an_upload_is_taken_at_the_processes_pace(s: Served) -> None:
    await s.w.ours.post(f"{s.box}/processes", json={"cmd": "sleep 100", "stdin": True, "id": "p"})
    async with s.wire() as wire:
        wire.ask("POST", f"{s.box}/processes/p/stdin", content_length=str(1 << 30))
        wire.writer.write(bytes(16 * MIB))
        taken = await settles(lambda: s.count("pandastack_bytes_in_total"))
        assert taken < MIB
    # The writer is stuck in the process's pipe; leaving must free it as well.
    s.process().task.cancel()
    await ended(s.process())


async def test_a_stalled_upload_is_ended(database: Path) -> None:
    async with serving(database, stalled_client_s=0.2) as s, s.wire() as wire:
        wire.ask("PUT", f"{s.box}/fs?path=/tmp/f", content_length="100")
        async with asyncio.timeout(5):
            status, body = await wire.answer()
        assert (status, body["field"]) == (408, "body")


async def test_half_a_gibibyte_each_way_needs_no_memory(s: Served) -> None:
    size = 512 * MIB
    await _transfer(s, 8 * MIB)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    await _transfer(s, size)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 32 << 10


async def _transfer(s: Served, size: int) -> None:
    async with s.wire() as wire:
        wire.ask("GET", f"{s.box}/fs?path=/dev/zero-{size}")
        await wire.head()
        left = size
        while left:
            left -= len(await wire.reader.read(MIB))
        wire.ask("PUT", f"{s.box}/fs?path=/dev/null", content_length=str(size))
        piece = bytes(MIB)
        for _ in range(size // MIB):
            wire.writer.write(piece)
            await wire.writer.drain()
        assert (await wire.answer())[1]["bytes"] == size


async def test_silence_is_filled_with_comments(database: Path) -> None:
    async with serving(database, keepalive_s=0.05) as s, s.wire() as wire:
        wire.ask("POST", f"{s.box}/exec/stream", b'{"cmd": "sleep 0.3; echo x"}')
        await wire.head()
        text = await wire.reader.readuntil(b"event: exit")
        assert b": keep-alive\n\n" in text.split(b"event:")[0]


async def test_revoking_a_key_ends_its_streams(database: Path) -> None:
    async with serving(database, keepalive_s=0.05) as s:
        made = (await s.w.ours.post("/v1/me/tokens", json={})).json()
        async with s.wire(made["token"]) as wire:
            wire.ask("POST", f"{s.box}/exec/stream", b'{"cmd": "echo x; sleep 100"}')
            await wire.head()
            await s.w.ours.delete(f"/v1/me/tokens/{made['prefix']}")
            async with asyncio.timeout(5):
                text = await wire.reader.read()
                while not wire.reader.at_eof():
                    text += await wire.reader.read()
            assert b'"code":"unauthorized"' in text


async def test_an_event_source_may_send_its_key_in_the_address(s: Served) -> None:
    await s.w.ours.post(f"{s.box}/processes", json={"cmd": "echo hi", "id": "p"})
    async with s.wire() as wire:
        wire.ask("GET", f"{s.box}/processes/p/stream?access_token={s.w.key}", authorization="")
        assert (await wire.head())[0] == 200
        assert b'"chunk":"hi\\n"' in await wire.reader.readuntil(b"event: exit")


# Bounds of a request


async def test_a_body_over_the_bound_is_refused_before_it_is_read(s: Served) -> None:
    async with s.wire() as wire:
        wire.ask("POST", f"{s.box}/exec", content_length=str(2 * MIB + 1))
        status, body = await wire.answer()
        assert (status, body["code"]) == (413, "too_large")


async def test_a_body_without_a_length_is_counted(s: Served) -> None:
    async with s.wire() as wire:
        wire.ask("POST", "/v1/sandboxes", content_length="", transfer_encoding="chunked")
        for _ in range(40):
            wire.writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
        status, body = await wire.answer()
        assert (status, body["code"]) == (413, "too_large")


async def test_a_body_at_the_bound_is_read(s: Served) -> None:
    async with s.wire() as wire:
        wire.ask("POST", f"{s.box}/exec", b'{"cmd": "true"}'.ljust(2 * MIB))
        assert (await wire.answer())[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nhost: x\r\na: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"GET /healthz?" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 101 + b"\r\n",
        b"GET /healthz?" + b"a" * 20_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/sandboxes HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
        b"POST /v1/sandboxes HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"GET /healthz HTTP/1.1\r\nhost : x\r\n\r\n",
        b"\x00\xff\r\n\r\n",
    ],
)
async def test_a_head_that_is_too_large_or_ambiguous_is_refused(s: Served, head: bytes) -> None:
    async with s.wire() as wire:
        wire.writer.write(head)
        status, _ = await asyncio.wait_for(wire.head(), 5)
        assert 400 <= status < 500
