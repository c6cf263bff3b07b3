"""A whole host of this process, on the fake runtime and plain folders, and how to kill one.

`World` is what outlives a host: its folders and its machines. Disks and the ledger take part in the runtime's failure
injection by name (`disk.create`, `disk.delete`, `ledger.write`, `ledger.remove`), so that every effect of a create has one.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import secrets
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pandastack.control.hosts import closing
from pandastack.errors import DiskFull, TemplateNotFound
from pandastack.host import identity
from pandastack.host.admission import Admission, Totals
from pandastack.host.app import HostService
from pandastack.host.backends import Backend, Backends, Offer
from pandastack.host.bakery import Bakery
from pandastack.host.forks import Forks
from pandastack.host.guest import GuestConnection
from pandastack.host.ledger import Entry, Ledger
from pandastack.host.machines import Machines, Ready, SlotKey
from pandastack.host.recovery import recover
from pandastack.host.registry import Registry
from pandastack.host.runtimes.base import Capabilities, Probe, Runtime
from pandastack.host.runtimes.fake import FakeRuntime, Hang
from pandastack.host.sandboxes import Sandboxes
from pandastack.host.slots import Refills, Slots
from pandastack.host.states import States
from pandastack.host.storage.chunk_cache import ChunkCache
from pandastack.host.storage.chunks import Chunks
from pandastack.host.storage.depot import Depot
from pandastack.host.storage.folders import Folders
from pandastack.host.storage.images import Image, Progress
from pandastack.host.storage.lazy import LazyMemory
from pandastack.host.storage.objects import Objects
from pandastack.host.storage.offloads import Offloads
from pandastack.host.storage.recipes import Recipe
from pandastack.host.storage.snapshots import Kind, Origin, Saved, Snapshots
from pandastack.wire.host import HostCreate, Output, ProcessExit
from pandastack.wire.ids import HostId, SandboxId, SnapshotId, new_process_id, new_sandbox_id
from pandastack.wire.isolation import Minimum
from pandastack.wire.processes import ExecRequest

T = TypeVar("T")
IMAGE_MIB = 8  # Of the disk image of `base`.
_dead: list[Any] = []
# What a killed process had under way never runs again, not even the `finally` of a collected coroutine.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_dead))


class SteppingFolders(Folders):
    """The real ones; what they do takes part by name."""

    def __init__(self, root: Path, runtime: FakeRuntime) -> None:
        super().__init__(root, low_water_mib=0)
        self._runtime = runtime
        root.mkdir(parents=True, exist_ok=True)

    async def create(self, disk: str, size_mib: int) -> Path:
        await self._runtime.step("disk.create")
        path = await super().create(disk, size_mib)
        try:
            await self._runtime.step("disk.created")
        except BaseException:
            path.rmdir()
            raise
        return path

    async def delete(self, disk: str) -> None:
        await self._runtime.step("disk.delete")
        await super().delete(disk)


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


def fake_vm(name: str = "fakevm", acceleration: str = "tcg") -> FakeRuntime:
    """A fake that has to be handled like QEMU: a disk image as its root, states of one size only."""
    capabilities = Capabilities(snapshot=True, fork_memory=True, own_kernel=True, fixed_size=True, image=True)
    return FakeRuntime(name, isolation="microvm", acceleration=acceleration, capabilities=capabilities)


class World:
    """The folders and machines of one install. `opened` is a host on them; `left` what exists now, by kind.

    `runtimes` are those that the next host tries, the first of them before it is ready. The faults of disks, ledger and saved
    states are those of the first.
    """

    def __init__(self, root: Path, *, slots: int = 0, sandboxes: int = 100, runtimes: Sequence[FakeRuntime] = ()) -> None:
        self.root = root
        self.runtimes = list(runtimes) or [FakeRuntime()]
        self.runtime = self.runtimes[0]
        self.minimum: Minimum = "none"
        self.roots: list[str] = []  # The images of which a disk image was made.
        self.slots = slots
        self.blanks = 0
        self.totals = Totals(memory_mib=100_000, cpu=64, disk_mib=100_000, sandboxes=sandboxes)
        self.baked = False
        for folder in ("rootfs", "guest"):
            (root / folder).mkdir(exist_ok=True)

    def build(self) -> HostService:
        """The parts of a host, joined; nothing has happened yet."""
        self.images: Any = OneImage(self.root)
        self.admission = Admission(self.totals, free_disk_mib=lambda: 100_000, free_memory_mib=lambda: 100_000)
        self._refills = Refills()
        backends = Backends([self._offer(runtime) for runtime in self.runtimes], self._backend, self._refills, minimum=self.minimum)
        self.objects = Objects(str(self.root / "objects"))
        reader = Chunks(self.objects, ChunkCache(self.root / "chunks", 1 << 30))
        lazy = LazyMemory(self.root / "lazy", self.root / "indexes", objects="", cache=self.root / "chunks", cache_mb=1024)
        registry = Registry(SteppingLedger(self.root / "ledger", self.runtime), backends, self.admission, lazy)
        snapshots = SteppingSnapshots(self.root / "snapshots", self.runtime)
        states = States(registry, snapshots, Offloads(snapshots, Depot(self.objects, "here"), reader, lazy, least_bytes=1))
        forks = Forks(states, self.root / "captures")
        forks.open()
        return HostService(HostId("host"), Sandboxes(registry, states), forks)

    def _offer(self, runtime: FakeRuntime) -> Offer:
        async def find() -> tuple[FakeRuntime, Probe]:
            return runtime, await runtime.probe()

        return Offer(
            name=runtime.name,
            isolation=runtime.isolation,
            acceleration=runtime.acceleration,
            own_kernel=runtime.capabilities.own_kernel,
            at_once=runtime is self.runtimes[0],
            find=find,
            rootfs=self._root_image if runtime.capabilities.image else None,
        )

    async def _root_image(self, image: Image) -> Path:
        """As `Roots.ensure`: made once."""
        made = self.root / f"{image.name}.ext4"
        if not made.exists():
            self.roots.append(image.name)
            made.write_bytes(bytes(IMAGE_MIB << 20))
        return made

    def joined(self, host: HostService) -> Backend:
        """The first runtime, as if it had been tried, of a host that was only built."""
        return self._backend(host.backends._offers[self.runtime.name], self.runtime, self.runtime.outcome)

    def folder(self, kind: str, runtime: FakeRuntime) -> Path:
        """As in a real host: the first came when there were no others."""
        return self.root / (kind if runtime is self.runtime else f"{kind}-{runtime.name}")

    def _backend(self, offer: Offer, made: Runtime, probe: Probe) -> Backend:
        runtime: Any = made
        machines = Machines(
            runtime,
            SteppingFolders(self.folder("disks", runtime), runtime),
            state=self.folder("machines", runtime),
            guest=self.root / "guest",
            shared=lambda path: path,
            refills=self._refills,
            rehearse=identity.rehearse if runtime.capabilities.own_kernel else None,
            slots=self.slots,
            blanks=self.blanks,
        )
        return Backend(probe, machines, self.bakery(machines, offer.rootfs, probe.bakes))

    def bakery(
        self, machines: Machines, rootfs: Callable[[Image], Awaitable[Path]] | None, runtime_key: str, guest_digest: str = "g"
    ) -> Bakery:
        runtime: Any = machines.runtime
        return Bakery(
            self.images,
            machines,
            root=self.folder("states", runtime),
            runtime_key=runtime_key,
            guest_digest=guest_digest,
            admission=self.admission,
            rootfs=rootfs,
        )

    async def start(self) -> tuple[HostService, list[asyncio.Task[None]]]:
        """A host as `app.opened` starts it, with its background tasks."""
        host = self.build()
        await recover(host.sandboxes.registry, host.sandboxes.states.snapshots)
        own = (host.backends.run(), host.sandboxes.freeze_idle(), host.sandboxes.watch_memory())
        tasks = [asyncio.create_task(work) for work in own]
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
            await host.backends.close()
            await host.sandboxes.close()

    def left(self) -> dict[str, list[str]]:
        """What sandboxes hold now; all empty when there are none."""
        own = {self.folder(kind, runtime) for kind in ("disks", "machines") for runtime in self.runtimes}
        folders = {path.name: path for path in (*own, self.root / "ledger", self.root / "captures")}
        found = {name: sorted(path.name for path in folder.iterdir()) if folder.exists() else [] for name, folder in folders.items()}
        machines = {"runtime": sorted(name for runtime in self.runtimes for name in runtime.machines)}
        copied = {"copied": sorted(folder.name for runtime in self.runtimes for folder in runtime.copied)}
        return {kind: names for kind, names in (machines | copied | found).items() if names}

    def clear(self) -> None:
        for runtime in self.runtimes:
            for machine in list(runtime.machines.values()):
                machine.remove()


class Life:
    """One life of a host, on an event loop of its own that `kill` stops for good: nothing is undone, as after SIGKILL."""

    def __init__(self, world: World) -> None:
        self._world = world
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
        for runtime in self._world.runtimes:
            runtime.copied.clear()  # It was this process's memory.
        self.loop.close()

    def close(self) -> None:
        """The orderly end."""
        for task in self.tasks:
            task.cancel()
        self.run(asyncio.wait(self.tasks))
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


def slots(host: HostService) -> Slots[SlotKey, Ready]:
    """Those of the first runtime."""
    return host.backends.list()[0].machines.slots


def disk_full() -> DiskFull:
    return DiskFull("the host's disk is full")


@contextmanager
def sharing_blocks(file: Path) -> Iterator[Path]:
    """A file system on which copies share blocks, in `file`. It is mounted at a path that is short enough for sockets."""
    folder = Path("/tmp") / f"px-{secrets.token_hex(3)}"
    with file.open("wb") as empty:
        empty.truncate(64 << 30)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(file)], check=True)
    folder.mkdir()
    subprocess.run(["mount", "-o", "loop", str(file), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()
        file.unlink()
