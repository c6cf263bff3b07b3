"""What the host may rely on, asked of the real daemon: sessions, and hosts that die or lie."""

# `shell=` is a field of ProcessSpec here.
# ruff: noqa: S604

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.host.guest import Guest, ProcessSpec
from pandastack.wire import guest as wire

from .daemons import Daemon, run, running

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


class TestSessions:
    async def test_new_session_on_an_old_stream(self, plain: Daemon) -> None:
        """A host died with a frame half sent; the next one pads, and is not glued to it."""
        old = await plain.open()
        started = await old.start(ProcessSpec(argv=["sleep", "30"]))
        old.connection._shut(errors.GuestGone("the host died"))
        half = b"".join(wire.encode(wire.Kind.DATA, 1, bytes(1000), 1))
        for cut in (1, 11, 12, 500):
            plain.socket.sendall(half[:cut])
            again = await plain.open(fresh=False)
            assert [entry.id for entry in await again.list_processes() if entry.running] == [started.id]
            again.connection._shut(errors.GuestGone("the host died"))
        last = await plain.open(fresh=False)
        await last.signal(started.id, 9)
        await last.close()

    async def test_old_output_is_discarded(self, plain: Daemon) -> None:
        old = await plain.open()
        await old.run(ProcessSpec(shell="yes"))
        await asyncio.sleep(0.2)
        old.connection._shut(errors.GuestGone("the host died"))
        again = await plain.open(fresh=False)
        assert (await run(again, argv=["echo", "clean"]))[0] == b"clean\n"
        for entry in await again.list_processes():
            if entry.running:
                await again.signal(entry.id, 9)
        await again.close()

    async def test_daemon_outlives_stdin_and_is_reached_over_tcp(self, plain: Daemon) -> None:
        first = await plain.open()
        started = await first.start(ProcessSpec(argv=["sleep", "30"]))
        await first.close()
        plain.socket.shutdown(socket.SHUT_RDWR)
        second, third = await plain.connect(), await plain.connect()
        assert [entry.id for entry in await second.list_processes()] == [started.id]
        await third.signal(started.id, 9)
        assert (await second.wait(started.id)).signal == 9
        await second.close()
        await third.close()

    async def test_tcp_needs_the_token(self, binary: Path, tmp_path: Path) -> None:
        with running(binary, "pid1", tmp_path) as daemon:
            guest = await daemon.open()
            await guest.identity(
                sandbox_id="s", hostname="box", unix_ns=time.time_ns(), entropy=bytes(64), token="secret", env={}, machine_id=""
            )
            for wrong in (None, "", "secreT"):
                with pytest.raises(errors.GuestProtocolError) as caught:
                    await daemon.connect(wrong)
                assert caught.value.guest_code == "token"
            right = await daemon.connect("secret")
            await right.health()
            await right.close()
            await guest.close()

    async def test_small_calls_pass_bulk(self, one: Guest) -> None:
        stream = await one.run(ProcessSpec(shell="yes"))
        slowest = 0.0
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(stream.wait())
            for _ in range(20):
                begun = time.monotonic()
                await one.health()
                slowest = max(slowest, time.monotonic() - begun)
            await one.signal(stream.id, 9)
        assert reader.result().signal == 9
        assert slowest < 1
