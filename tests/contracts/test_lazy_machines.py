"""MicroVMs whose memory is in an object store when they begin: it comes when it is touched, or they end with a reason."""

# ruff: noqa: ASYNC240 - what is read is short, and in /proc or a folder of the test
from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import tempfile
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pandastack.errors import PandastackError
from pandastack.host.guest import Guest, ProcessSpec
from pandastack.host.runtimes.base import Machine
from pandastack.host.runtimes.firecracker import driver
from pandastack.host.runtimes.firecracker.driver import FirecrackerRuntime
from pandastack.host.runtimes.firecracker.machine import FirecrackerMachine
from pandastack.host.runtimes.qemu.machine import QemuMachine
from pandastack.host.storage import lazy
from pandastack.host.storage.depot import Depot
from pandastack.host.storage.lazy import LazyMemory
from pandastack.host.storage.objects import Objects

from .benches import (
    ACCELERATORS,
    PATIENCE,
    Bench,
    check_jail,
    forget,
    made_folder,
    reborn,
    say,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300 * PATIENCE)]


@dataclass(kw_only=True)
class Away:
    """A saved state of which the memory is in an object store: what reads it, and what a program in it had kept in memory."""

    bench: Bench
    lazy: LazyMemory
    store: Path
    chunks: Path
    state: Path
    file: Path
    digest: str
    paged: bool

    SUM = "sha256sum </dev/shm/kept"

    async def restored(self) -> Machine:
        machine = await self.bench.prepared()
        await machine.restore(self.state)
        source = machine.memory_source
        assert source is not None
        assert (source.file, source.user) == (self.file, Path(f"/proc/{(await machine.usage()).pid}").stat().st_uid)
        return machine

    def lose(self) -> int:
        """The chunks of nothing but the random file, which nobody touches who does not read it. How many those were."""
        lost = 0
        for chunk in [*self.store.glob("chunks/*/*"), *self.chunks.glob("*/*")]:
            data = chunk.read_bytes()
            if len(zlib.compress(data, 1)) >= len(data):
                chunk.unlink()
                lost += chunk.is_relative_to(self.store)
        return lost

    async def why(self, machine: Machine) -> str:
        """Why a part of its memory did not come. It may be told so by then, or it waits for that part."""
        source = machine.memory_source
        assert source is not None
        ends = time.monotonic() + 60 * PATIENCE
        while (why := await self.lazy.why(source.file, source.user)) is None:
            assert time.monotonic() < ends, "nobody says so"
            await asyncio.sleep(0.1)
        return why


@pytest.fixture
async def away(bench: Bench, paged: bool, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Away]:
    """Memory is mapped as a file, or `paged`: each page that is touched comes from the pager."""
    if not Path("/dev/fuse").exists():
        pytest.skip("this machine has no FUSE")
    for name in ("START_TIMEOUT_S", "ANSWER_TIMEOUT_S"):
        monkeypatch.setattr(lazy, name, getattr(lazy, name) * PATIENCE)
    state, chunks = bench.root / "saved", bench.root / "chunks"
    # On another file system than the cache: of a store that is near nothing is kept.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as store:
        memory = LazyMemory(bench.root / "lazy", bench.root / "indexes", objects=store, cache=chunks, cache_mb=1024)
        if paged:
            assert isinstance(bench.runtime, FirecrackerRuntime)
            assert driver.has_userfaultfd()
            bench.runtime.pager = memory
        async with bench.started() as (machine, guest):
            digest, _ = await say(guest, f"head -c 48M /dev/urandom >/dev/shm/kept; {Away.SUM}")
            await machine.snapshot(made_folder(state), resume=False)
        depot = Depot(Objects(store), "here")
        with depot.putting("one"):
            kept = depot.put("one", {"mem": state / "mem"})
        (state / "mem").unlink()
        try:
            file = await memory.file(kept.files["mem"])
            (state / "mem").symlink_to(file)
            yield Away(bench=bench, lazy=memory, store=Path(store), chunks=chunks, state=state, file=file, digest=digest, paged=paged)
        finally:
            for made in bench.made:
                await made.stop()
            memory.close(needed=False)
        assert not (bench.root / "lazy").exists()


@pytest.mark.parametrize(
    ("bench", "paged"),
    [(name, False) for name in ACCELERATORS] + [("firecracker-kvm", True)],
    indirect=["bench"],
    ids=[*(f"{name}-mapped" for name in ACCELERATORS), "firecracker-kvm-paged"],
)
class TestMemoryThatIsNotHere:
    """A machine runs before its memory is here, and one that cannot get it is known, and ended."""

    async def test_it_comes_when_it_is_touched_and_is_saved_with_the_rest(self, away: Away) -> None:
        bench = away.bench
        machine = await away.restored()
        async with bench.guest_of(machine) as guest:
            assert await say(guest, "echo hi") == ("hi\n", 0)
            first = (await away.lazy.status()).fetched
            assert await say(guest, Away.SUM) == (away.digest, 0)
            assert (await away.lazy.status()).fetched > first + 6, "most of twelve chunks of the file"
            own, _ = await say(guest, "head -c 4M /dev/urandom >/dev/shm/own; sha256sum </dev/shm/own")
        forget(bench, machine)
        bench.runtime = reborn(bench)
        await bench.runtime.probe()
        adopted = await bench.runtime.adopt(machine.spec)
        assert adopted is not None
        bench.made.append(adopted)
        assert adopted.memory_source == machine.memory_source
        first_state, second_state = made_folder(bench.root / "first"), made_folder(bench.root / "second")
        await adopted.snapshot(first_state, resume=True)
        async with bench.guest_of(adopted) as guest:
            assert await say(guest, f"rm /dev/shm/own; {Away.SUM}") == (away.digest, 0)
        await adopted.snapshot(second_state, resume=True)
        facts = json.loads((second_state / "machine.json").read_text())
        assert not facts.get("whole"), "it is laid over the first one"
        await adopted.stop()
        # From here on nothing is there that could be fetched.
        await away.lazy._lose(away.lazy._server)  # type: ignore[arg-type]
        for state, kept in ((first_state, f"{away.digest}{own}"), (second_state, away.digest)):
            child = await bench.prepared()
            await child.restore(state)
            async with bench.guest_of(child) as guest:
                assert (await say(guest, "cat /dev/shm/kept | sha256sum; [ ! -e /dev/shm/own ] || sha256sum </dev/shm/own"))[0] == kept

    async def test_what_one_has_fetched_the_next_one_has(self, away: Away) -> None:
        one, other = await away.restored(), await away.restored()
        async with away.bench.guest_of(one) as guest:
            assert await say(guest, Away.SUM) == (away.digest, 0)
            fetched = (await away.lazy.status()).fetched
        async with away.bench.guest_of(other) as guest:
            assert await say(guest, Away.SUM) == (away.digest, 0)
            memory = await other.memory()
            assert (await away.lazy.status()).fetched == fetched, "the second time all of it is here"
        # Pages of a file are the same ones for all who map it; those that a pager brings are each machine's own.
        own = memory.own_bytes > 48 << 20
        assert own is away.paged, memory
        assert (memory.shared_bytes > 48 << 20) is not away.paged, memory

    async def test_a_missing_part_is_known_and_fails_nobody_else(self, away: Away) -> None:
        needs, other = await away.restored(), await away.restored()
        async with away.bench.guest_of(other) as guest:
            assert await say(guest, "echo hi") == ("hi\n", 0)
        lost = away.lose()
        assert lost > 6, "most of twelve chunks hold nothing but the file"
        guest = await Guest.open(await needs.connect(), timeout_s=30 * PATIENCE)
        with contextlib.suppress(PandastackError):
            await guest.start(ProcessSpec(shell=Away.SUM))
        assert await away.why(needs) == "missing"
        async with asyncio.timeout(30 * PATIENCE):
            await guest.close()
            await needs.stop()  # Also where it still waits.
        source = other.memory_source
        assert source is not None
        assert await away.lazy.why(source.file, source.user) is None
        async with away.bench.guest_of(other) as guest:
            assert await say(guest, "echo hi") == ("hi\n", 0)

    async def test_the_death_of_who_serves_it_is_known(self, away: Away) -> None:
        machine = await away.restored()
        guest = await Guest.open(await machine.connect(), timeout_s=30 * PATIENCE)
        os.kill((await away.lazy.status()).pid, signal.SIGKILL)
        with contextlib.suppress(PandastackError):
            await guest.start(ProcessSpec(shell=Away.SUM))
        assert await away.why(machine) == "server"
        async with asyncio.timeout(30 * PATIENCE):
            await guest.close()
            await machine.stop()
            assert await machine.ended() == "stopped"
        with pytest.raises(PandastackError):
            await (await away.bench.prepared()).restore(away.state)

    async def test_nothing_of_it_is_left_in_the_jail(self, away: Away) -> None:
        machine = await away.restored()
        if away.bench.name == "firecracker-kvm":
            await check_jail(machine)
        assert isinstance(machine, QemuMachine | FirecrackerMachine)
        process = machine._process
        assert process is not None

        def opened() -> set[str]:
            found = set()
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found.add(str(link.readlink()))
            return found

        # QEMU closes what it was given when it sees that nobody speaks with it any more.
        for _ in range(200):
            if str(away.file) not in opened():
                break
            await asyncio.sleep(0.05 * PATIENCE)
        assert str(away.file) not in opened()
