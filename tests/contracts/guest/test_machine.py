"""What the host may rely on, asked of the real daemon: identity, sealing, health and resources."""

# `shell=` is a field of ProcessSpec here.
# ruff: noqa: S604

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.host import identity
from pandastack.host.guest import Guest, ProcessSpec

from .daemons import Daemon, become, run, running

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


class TestMachine:
    async def test_identity_and_seal(self, binary: Path, tmp_path: Path) -> None:
        with running(binary, "pid1", tmp_path) as daemon:
            guest = await daemon.open()
            assert guest.connection.greeting.pid == 1
            await guest.seal()
            with pytest.raises(errors.GuestError) as caught:
                await run(guest, argv=["true"])
            assert caught.value.guest_code == "sealed"
            assert (await guest.health()).sealed
            who = {"sandbox_id": "s", "hostname": "box-1", "entropy": os.urandom(64), "token": "secret", "env": {"B": "2"}}
            report = await guest.identity(unix_ns=time.time_ns() - 10**10, machine_id="0" * 31 + "1", **who)  # type: ignore[arg-type]
            failed = sorted(name for name, step in report.steps.items() if not step.ok)
            assert failed == ["clock", "processes"]  # It may not set this machine's clock, says so, and stays closed.
            assert report.steps["processes"].detail == "not continued: clock failed"
            assert 9.9e9 < report.offset_ns < 12e9
            assert (await guest.health()).sealed
            report = await guest.identity(unix_ns=time.time_ns(), machine_id="0" * 31 + "1", **who)  # type: ignore[arg-type]
            assert {name for name, step in report.steps.items() if step.ok} == {*identity.REQUIRED_STEPS, *identity.LATER_STEPS}
            assert (report.steps["hooks"].detail, report.steps["processes"].detail) == ("none", "0 continued")
            out, _, _ = await run(guest, shell="echo $B; hostname; cat /etc/machine-id; grep box-1 /etc/hosts")
            assert out.splitlines()[:3] == [b"2", b"box-1", b"0" * 31 + b"1"]
            assert not (await guest.health()).sealed
            await guest.close()

    async def test_a_rehearsal_leaves_a_sealed_machine_as_it_was(self, binary: Path, tmp_path: Path) -> None:
        with running(binary, "pid1", tmp_path) as daemon:
            guest = await daemon.open()
            with pytest.raises(errors.InvalidRequest, match="sealed"):
                await identity.rehearse(guest)
            await guest.seal()
            for _ in range(2):
                await identity.rehearse(guest)
            health = await guest.health()
            assert (health.sealed, health.live, health.baked) == (True, 0, 0)
            report = await become(guest)
            assert all(step.ok for step in report.steps.values()), report
            out, _, _ = await run(guest, shell="hostname; cat /etc/hostname; grep -c pandastack /etc/hosts; cat /etc/machine-id")
            assert out.split() == [b"box-2", b"box-2", b"1", b"0" * 32]
            assert not any("-version" in entry.argv for entry in await guest.list_processes())
            await guest.seal(freeze=True)
            with pytest.raises(errors.InvalidRequest, match="sealed"):
                await identity.rehearse(guest)
            await guest.close()

    async def test_resources_and_ports(self, plain: Daemon, one: Guest) -> None:
        resources = await one.resources()
        assert resources.memory_total_bytes > resources.memory_available_bytes > 0
        with socket.create_server(("127.0.0.1", 0)) as server:
            ports = {entry.port: entry for entry in await one.ports()}
            assert ports[server.getsockname()[1]].address == "127.0.0.1"
        assert plain.port not in ports

    async def test_idle_time_counts_only_without_processes(self, one: Guest) -> None:
        await run(one, argv=["true"])
        await asyncio.sleep(0.1)
        assert (await one.health()).idle_ms >= 100
        await one.start(ProcessSpec(argv=["sleep", "20"], id="busy"))
        assert (await one.health()).idle_ms == 0
        await one.signal("busy", 9)

    async def test_idle_daemon_burns_nothing(self, plain: Daemon, one: Guest) -> None:
        await run(one, argv=["true"])
        await asyncio.sleep(0.3)  # Until it has forgotten that program.

        def ticks() -> int:
            return sum(int(field) for field in Path(f"/proc/{plain.pid}/stat").read_text().split()[13:15])

        before = ticks()
        await asyncio.sleep(1)
        assert ticks() - before <= 1
        assert plain.rss_mib() < 24
