"""What only the driver of gVisor promises."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pandastack.host.keeper import Keeper
from pandastack.host.runtimes.base import MachineId, MachineSpec
from pandastack.host.runtimes.gvisor.driver import GvisorRuntime

from .benches import (
    LIMITS,
    PATIENCE,
    runsc,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300 * PATIENCE)]


class TestGvisorProbe:
    """A runsc that is no good is refused with a reason a person can act on."""

    @pytest.fixture
    def probe(self, short: Path, guest_directory: Path, no_leaks: None) -> Iterator[object]:
        keeper = Keeper(short / "k" / "keeper.sock")

        async def of(text: str | None) -> tuple[bool, str, str]:
            runsc = short / "runsc"
            if text is not None:
                runsc.write_text(text)
                runsc.chmod(runsc.stat().st_mode | stat.S_IXUSR)
            runtime = GvisorRuntime(runsc, root=short / "gv", group=f"pandastack-test-{short.name}", guest=guest_directory, keeper=keeper)
            probe = await runtime.probe()
            return probe.works, probe.reason or "", probe.hint or ""

        yield of
        keeper.close()

    async def test_one_that_is_not_there(self, probe: object) -> None:
        works, reason, hint = await probe(None)  # type: ignore[operator]
        assert not works
        assert "cannot be started" in reason
        assert "PANDASTACK_RUNSC" in hint

    async def test_one_that_is_too_old(self, probe: object) -> None:
        works, reason, hint = await probe("#!/bin/sh\necho runsc version release-20230101.0\n")  # type: ignore[operator]
        assert not works
        assert "too old" in reason
        assert "20240729" in hint

    async def test_one_that_is_no_program(self, probe: object) -> None:
        works, reason, _ = await probe("\x7fELFgarbage")  # type: ignore[operator]
        assert not works
        assert "cannot be started" in reason

    async def test_one_that_fails_at_everything(self, probe: object) -> None:
        if os.geteuid() != 0:
            pytest.skip("cgroups need root")
        works, reason, hint = await probe("#!/bin/sh\necho no luck >&2; exit 1\n")  # type: ignore[operator]
        assert not works
        assert "no control dialect" in reason
        assert "no luck" in hint, "runsc's own last words are in it"


async def test_a_cancelled_prepare_closes_what_it_opened_although_its_error_is_kept(
    short: Path, guest_directory: Path, rootfs: Path, no_leaks: None
) -> None:
    """Whoever keeps the error keeps the frames in it, so nothing may wait there for the collector."""
    putting, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    class SlowKeeper:
        def put(self, name: str, fds: list[int]) -> None:
            loop.call_soon_threadsafe(putting.set)
            assert go_on.wait(20)

        def get(self, name: str) -> list[int]:
            return []

        def drop(self, name: str) -> None:
            pass

    runtime = GvisorRuntime(
        runsc("gvisor"), root=short / "gv", group=f"pandastack-test-{short.name}", guest=guest_directory, keeper=SlowKeeper()
    )
    machine, (disk, state) = MachineId("m" + secrets.token_hex(8)), (short / "disk", short / "state")
    disk.mkdir()
    state.mkdir()
    spec = MachineSpec(id=machine, rootfs=rootfs, guest=guest_directory, disk=disk, state=state, limits=LIMITS)
    go_on.set()
    assert (await runtime.probe()).works
    go_on.clear()
    putting.clear()
    preparing = asyncio.create_task(runtime.prepare(spec))
    async with asyncio.timeout(20):
        await putting.wait()
    before = _sockets()
    preparing.cancel()
    go_on.set()
    (error,) = await asyncio.gather(preparing, return_exceptions=True)
    assert isinstance(error, asyncio.CancelledError)
    assert len(before - _sockets()) == 4, "both ends of stdin and of stdout"
    assert await runtime.sweep([]) == []


def _sockets() -> set[str]:
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(fd.readlink()))
    return {what for what in found if what.startswith("socket:")}
