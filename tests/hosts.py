"""A whole host of this process, on the fake runtime and plain folders, and how to kill one.

`World` is what outlives a host: its folders and its machines. Disks and the ledger take part in the runtime's failure
injection by name (`disk.create`, `disk.delete`, `ledger.write`, `ledger.remove`), so that every effect of a create has one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from pandastack.control.hosts import closing
from pandastack.errors import DiskFull, TemplateNotFound
from pandastack.host.admission import Admission, Totals
from pandastack.host.app import HostService
from pandastack.host.bakery import Bakery
from pandastack.host.forks import Forks
from pandastack.host.guest import GuestConnection
from pandastack.host.ledger import Entry, Ledger
from pandastack.host.machines import Machines
from pandastack.host.recovery import recover
from pandastack.host.registry import Registry
from pandastack.host.runtimes.base import Probe
from pandastack.host.runtimes.fake import FakeRuntime, Hang
from pandastack.host.sandboxes import Sandboxes
from pandastack.host.states import States
from pandastack.host.storage import space
from pandastack.host.storage.images import Image, Progress
from pandastack.host.storage.recipes import Recipe
from pandastack.host.storage.snapshots import Kind, Origin, Saved, Snapshots
from pandastack.host.storage.space import Space
from pandastack.wire.host import HostCreate, Output, ProcessExit
from pandastack.wire.ids import HostId, SandboxId, SnapshotId, new_process_id, new_sandbox_id
from pandastack.wire.processes import ExecRequest

T = TypeVar("T")
_dead: list[Any] = []
# What a killed process had under way never runs again, not even the `finally` of a collected coroutine.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_dead))


class FolderDisks:
    """As `Disks`, with a folder for each."""

    def __init__(self, root: Path, runtime: FakeRuntime) -> None:
        self._root = root
        self._runtime = runtime
        root.mkdir(parents=True, exist_ok=True)

    def free_mib(self) -> int:
        return 100_000

    def path(self, disk: str) -> Path:
        return self._root / disk

    def space(self, disk: str) -> Space:
        return space.of(*self.path(disk).iterdir()) if self.path(disk).is_dir() else Space()

    async def create(self, disk: str, size_mib: int) -> Path:
        await self._runtime.step("disk.create")
        self.path(disk).mkdir()
        try:
            await self._runtime.step("disk.created")
        except BaseException:
            self.path(disk).rmdir()
            raise
        return self.path(disk)

    async def delete(self, disk: str) -> None:
        await self._runtime.step("disk.delete")
        with contextlib.suppress(FileNotFoundError):
            self.path(disk).rmdir()

    async def sweep(self, keep: Collection[str]) -> list[str]:
        gone = [path.name for path in self._root.iterdir() if path.name not in keep]
        for disk in gone:
            await self.delete(disk)
        return gone


class SteppingLedger(Ledger):
    """The real one; its writes fail by name, as on a full disk."""

    def __init__(self, root: Path, runtime: FakeRuntime) -> None:
        super().__init__(root)
        self._runtime = runtime

    def write(self, entry: Entry, *, durable: bool = False) -> None:
        if error := self._runtime.guest_fault("ledger.write"):
            raise error
        super().write(entry, durable=durable)

    def remove(self, sandbox_id: SandboxId) -> None:
        if error := self._runtime.guest_fault("ledger.remove"):
            raise error
        super().remove(sandbox_id)


class SteppingSnapshots(Snapshots):
    """The real ones; what they do takes part by name: `saved.publish` before, `saved.published` after, `saved.check`, `saved.delete`."""

    def __init__(self, root: Path, runtime: FakeRuntime) -> None:
        super().__init__(root, low_water_mib=0)
        self._runtime = runtime

    async def publish(self, snapshot_id: SnapshotId, kind: Kind, origin: Origin) -> Saved:
        await self._runtime.step("saved.publish")
        saved = await super().publish(snapshot_id, kind, origin)
        await self._runtime.step("saved.published")
        return saved

    async def check(self, snapshot_id: str) -> Saved:
        await self._runtime.step("saved.check")
        return await super().check(snapshot_id)

    async def delete(self, snapshot_id: str) -> None:
        if snapshot_id:
            await self._runtime.step("saved.delete")
        await super().delete(snapshot_id)


class OneImage:
    """As `Images`, with the one template `base`. `building` holds a build up until it is set."""

    def __init__(self, root: Path) -> None:
        self.building = asyncio.Event()
        self.building.set()
        self.error: Exception | None = None
        recipe = Recipe.model_validate(RECIPE)
        self.image = Image(
            name="base",
            requested="base",
            rootfs=root / "rootfs",
            digest="d" * 64,
            size_bytes=1,
            distribution="debian-12",
            note=None,
            recipe=recipe,
            manifest={},
        )

    def names(self) -> list[str]:
        return ["base"]

    def recipe(self, name: str) -> Recipe:
        if name != "base":
            raise TemplateNotFound("no such template", template=name)
        return self.image.recipe

    def cached(self, name: str) -> Image | None:
        self.recipe(name)
        return self.image

    async def ensure(self, name: str, progress: Callable[[Progress], None]) -> Image:
        progress(Progress(step="build", message="building base", done=None, total=None, unit="", elapsed_s=0.0))
        await self.building.wait()
        if self.error is not None:
            raise self.error
        return self.image


RECIPE = {
    "name": "base",
    "label": "Debian 12",
    "description": "A template of the tests.",
    "category": "general",
    "cpu": 1,
    "memory_mb": 256,
    "disk_mb": 256,
    "tools": [],
    "packages": [],
    "distribution": {"name": "debian", "version": "12", "suite": "bookworm"},
    "env": {"FROM_TEMPLATE": "yes"},
}


async def settled(host: HostService) -> None:
    """Wait until what sandboxes have done with is given back."""
    await until(lambda: not host.sandboxes.states._returns)


class World:
    """The folders and machines of one install. `opened` is a host on them; `left` what exists now, by kind."""

    def __init__(self, root: Path, *, slots: int = 0, sandboxes: int = 100) -> None:
        self.root = root
        self.runtime = FakeRuntime()
        self.slots = slots
        self.blanks = 0
        self.totals = Totals(memory_mib=100_000, cpu=64, disk_mib=100_000, sandboxes=sandboxes)
        self.baked = False
        for folder in ("rootfs", "guest"):
            (root / folder).mkdir(exist_ok=True)

    def build(self) -> HostService:
        """The parts of a host, joined; nothing has happened yet."""
        disks: Any = FolderDisks(self.root / "disks", self.runtime)
        images: Any = OneImage(self.root)
        guest = self.root / "guest"
        machines = Machines(self.runtime, disks, state=self.root / "machines", guest=guest, shared=lambda path: path, blanks=self.blanks)
        bakery = Bakery(images, machines, root=self.root / "states", runtime_key="fake", guest_digest="g")
        admission = Admission(self.totals, free_disk_mib=lambda: 100_000, free_memory_mib=lambda: 100_000)
        ledger = SteppingLedger(self.root / "ledger", self.runtime)
        registry = Registry(ledger, machines, admission)
        states = States(registry, SteppingSnapshots(self.root / "snapshots", self.runtime), runtime_key="fake")
        forks = Forks(states, self.root / "captures")
        forks.open()
        sandboxes = Sandboxes(registry, states, bakery, slots=self.slots)
        return HostService(HostId("host"), sandboxes, forks, bakery, Probe(works=True, version="1"))

    async def start(self) -> tuple[HostService, list[asyncio.Task[None]]]:
        """A host as `app.opened` starts it, with its background tasks."""
        host = self.build()
        await recover(host.sandboxes.registry, host.sandboxes.states.snapshots)
        pools = (host.sandboxes.slots, host.sandboxes.registry.machines.blanks)
        own = (host.sandboxes.freeze_idle(), host.sandboxes.watch_memory())
        tasks = [asyncio.create_task(work) for work in (*(pool.run() for pool in pools), *own)]
        if not self.baked:
            async with closing(host.bake("base")) as said:
                async for _ in said:
                    pass
            self.baked = True
            self.runtime.steps.clear()
        return host, tasks

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[HostService]:
        host, tasks = await self.start()
        try:
            yield host
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await host.sandboxes.close()

    def left(self) -> dict[str, list[str]]:
        """What sandboxes hold now; all empty when there are none."""
        folders = {name: self.root / name for name in ("disks", "machines", "ledger", "captures")}
        found = {name: sorted(path.name for path in folder.iterdir()) if folder.exists() else [] for name, folder in folders.items()}
        return {kind: names for kind, names in ({"runtime": sorted(self.runtime.machines)} | found).items() if names}

    def clear(self) -> None:
        for machine in list(self.runtime.machines.values()):
            machine.remove()


class Life:
    """One life of a host, on an event loop of its own that `kill` stops for good: nothing is undone, as after SIGKILL."""

    def __init__(self, world: World) -> None:
        self.loop = asyncio.new_event_loop()
        self.host, self.tasks = self.run(world.start())

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 20) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, timeout_s))

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self.loop.create_task(work)

    def until(self, hang: Hang, timeout_s: float = 20) -> None:
        """Let it run until a step hangs."""
        self.run(reached(hang), timeout_s)

    def kill(self) -> None:
        _dead.append((self, asyncio.all_tasks(self.loop)))
        for one in gc.get_objects():
            if isinstance(one, GuestConnection) and one._loop is self.loop and not one.closed:
                for fd in {one._read_fd, one._write_fd}:
                    os.close(fd)  # The kernel would.
        self.loop.close()

    def close(self) -> None:
        """The orderly end."""
        for task in self.tasks:
            task.cancel()
        self.run(self.host.sandboxes.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


def wanted(**values: Any) -> HostCreate:
    return HostCreate(**{"id": new_sandbox_id(), "template": "base", "hostname": "sandbox"} | values)


async def reached(hang: Hang) -> None:
    await until(hang.reached.is_set)


async def until(true: Callable[[], bool], timeout_s: float = 20) -> None:
    """Wait for a condition that another thread, or a kernel, brings about."""
    ends = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < ends, "it did not come true"
        await asyncio.sleep(0.002)


async def run(host: HostService, sandbox_id: SandboxId, cmd: str, **values: Any) -> tuple[bytes, int]:
    """What a command wrote to stdout, and its exit code."""
    out, code = b"", -1
    async with asyncio.timeout(20), closing(host.run(sandbox_id, ExecRequest(cmd=cmd, **values), new_process_id())) as items:
        async for item in items:
            if isinstance(item, Output) and item.channel == "stdout":
                out += item.data
            elif isinstance(item, ProcessExit):
                code = item.exit_code
    return out, code


def disk_full() -> DiskFull:
    return DiskFull("the host's disk is full")
