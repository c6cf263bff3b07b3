"""Builds every part of a host and joins them. Read this first.

`opened` is the life of the daemon: try the runtimes, find the sandboxes of an earlier life, run the loops, and
at the end let go of what runs without stopping it. `service` is what control sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import structlog

import pandastack
from pandastack.errors import HostUnfit
from pandastack.host import identity
from pandastack.host.admission import Admission, Totals, memory_mib
from pandastack.host.backends import Backend, Backends, Offer
from pandastack.host.bakery import Bakery
from pandastack.host.forks import Forks
from pandastack.host.keeper import Keeper
from pandastack.host.ledger import Ledger
from pandastack.host.machines import Machines, Storage
from pandastack.host.recovery import recover
from pandastack.host.registry import Registry
from pandastack.host.runtimes.base import Probe, Runtime
from pandastack.host.runtimes_here import Surroundings, offers
from pandastack.host.sandboxes import Sandboxes
from pandastack.host.service import HostService as HostService
from pandastack.host.settings import HostSettings
from pandastack.host.slots import Refills
from pandastack.host.states import States
from pandastack.host.storage import objects, space
from pandastack.host.storage.chunk_cache import ChunkCache
from pandastack.host.storage.chunks import Chunks
from pandastack.host.storage.depot import Depot
from pandastack.host.storage.disks import Disks
from pandastack.host.storage.folders import Folders
from pandastack.host.storage.images import Images
from pandastack.host.storage.lazy import LazyMemory
from pandastack.host.storage.objects import Objects
from pandastack.host.storage.offloads import Offloads
from pandastack.host.storage.pool import Pool
from pandastack.host.storage.readonly import ReadOnly
from pandastack.host.storage.snapshots import Snapshots
from pandastack.wire.ids import HostId

log = structlog.get_logger(__name__)

_LEAVES_WITHIN_S = 1.0


@contextlib.asynccontextmanager
async def opened(settings: HostSettings, *, say: Callable[[str], None]) -> AsyncIterator[HostService]:
    """A host that is ready for requests. `say` gets a line for each long step before that.

    Raises HostUnfit with a remedy when this machine cannot run sandboxes; nothing is left then.
    """
    install = _install_id(settings.data_dir)
    run_dir = settings.run_dir / install
    keeper = Keeper(run_dir / "keeper.sock")
    guest, guest_digest = await asyncio.to_thread(guest_directory, settings.cache_dir / "guest")
    views = ReadOnly(run_dir / "shared")
    pool = Pool(settings.data_dir)
    await asyncio.to_thread(pool.open)
    parts: _Parts | None = None
    try:
        shown = views.view(guest)
        parts = _Parts(settings, pool, views, guest, guest_digest, install=install, run_dir=run_dir)
        here = Surroundings(
            settings=settings,
            run_dir=run_dir,
            group=f"pandastack-{install}",
            guest=shown,
            roots=pool.root / "roots",
            keeper=keeper,
            pager=parts.lazy,
            say=say,
        )
        backends = Backends(await offers(here), parts.backend, parts.refills, minimum=settings.min_isolation)
        registry = Registry(Ledger(settings.data_dir / "ledger"), backends, parts.admission, parts.lazy)
        states = States(registry, parts.snapshots, parts.offloads)
        forks = Forks(states, settings.captures_dir or pool.root / "captures")
        await asyncio.to_thread(forks.open)
        sandboxes = Sandboxes(registry, states)
        await asyncio.to_thread(parts.lazy.recover)
        await recover(registry, parts.snapshots)
        if await asyncio.to_thread(space.shares_blocks, pool.root) is False:
            log.warning(
                "files are copied in full: this file system cannot share blocks; see `pandastack storage init`", path=str(pool.root)
            )
    except BaseException:
        if parts is not None:
            parts.close(needed=True)  # By machines of an earlier life, which a later start may find.
        _leave(run_dir, views, keeper, pool)
        raise
    await asyncio.to_thread(keeper.retain, sandboxes.machine_ids())
    service = HostService(HostId(f"{socket.gethostname()}-{install}"), sandboxes, forks)
    tasks = [
        asyncio.create_task(backends.run(), name="runtimes and their pools"),
        asyncio.create_task(sandboxes.freeze_idle(), name="freeze idle sandboxes"),
        asyncio.create_task(sandboxes.watch_memory(), name="watch memory of sandboxes"),
        asyncio.create_task(parts.lazy.run(registry.fail_those_that_lost_memory), name="watch lazy memory"),
        asyncio.create_task(parts.offloads.run(registry.memory_files), name="sweep the object store"),
    ]
    try:
        yield service
    finally:
        await backends.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await sandboxes.close()
        parts.close(needed=bool(registry.memory_files()))
        if sandboxes.machine_ids():
            keeper.close()
        else:
            _leave(run_dir, views, keeper, pool)


class _Parts:
    """What all runtimes of a host share, and how a runtime that works gets what is its own."""

    def __init__(
        self, settings: HostSettings, pool: Pool, views: ReadOnly, guest: Path, guest_digest: str, *, install: str, run_dir: Path
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._views = views
        self._guest, self._guest_digest = guest, guest_digest
        root, below = pool.root, pool.below
        self._disks = Disks(root / "disks", low_water_mib=settings.disk_low_water_mb, below=below)
        self._images = Images(
            settings.cache_dir / "images",
            [shipped_templates(), *([settings.templates_dir] if settings.templates_dir else [])],
            ubuntu_mirror=settings.ubuntu_mirror,
            debian_mirror=settings.debian_mirror,
        )
        for name, error in self._images.broken().items():
            log.error("template is broken and left out", template=name, error=error.message)
        self.refills = Refills()
        self.admission = Admission(_totals(settings, self._disks), free_disk_mib=self._disks.free_mib)
        self.snapshots = Snapshots(root / "snapshots", low_water_mib=settings.disk_low_water_mb, below=below)
        store = objects.absolute(settings.object_store or str(settings.data_dir / "objects"))
        cache = (settings.chunk_cache_dir or settings.cache_dir / "chunks").absolute()
        self._objects = Objects(store)
        self._chunks = Chunks(self._objects, ChunkCache(cache, settings.chunk_cache_mb << 20))
        self.lazy = LazyMemory(run_dir / "lazy", root.absolute() / "indexes", objects=store, cache=cache, cache_mb=settings.chunk_cache_mb)
        self.offloads = Offloads(self.snapshots, Depot(self._objects, install), self._chunks, self.lazy)

    def close(self, *, needed: bool) -> None:
        """`needed`: machines that go on without this process read their memory from the store."""
        self.lazy.close(needed=needed)
        self._chunks.close()
        self._objects.close()

    def backend(self, offer: Offer, runtime: Runtime, probe: Probe) -> Backend:
        """Folders are its own by its name; gVisor's have none, from the time when it was alone."""
        settings, suffix = self._settings, "" if offer.name == "gvisor" else f"-{offer.name}"
        low_water_mib, below = settings.disk_low_water_mb, self._pool.below
        storage: Storage = self._disks
        if runtime.capabilities.image:
            storage = Folders(self._pool.root / f"disks{suffix}", low_water_mib=low_water_mib, below=below)
        elif suffix:
            storage = Disks(self._pool.root / f"disks{suffix}", low_water_mib=low_water_mib, below=below)
        machines = Machines(
            runtime,
            storage,
            state=settings.data_dir / f"machines{suffix}",
            guest=self._guest,
            # A view of a folder; an image is opened by its driver only, which does not write to it.
            shared=(lambda path: path) if runtime.capabilities.image else self._views.view,
            refills=self.refills,
            # A kernel that is shared has run all of it before.
            rehearse=identity.rehearse if runtime.capabilities.own_kernel else None,
            slots=settings.slots,
            blanks=settings.blanks,
        )
        bakery = Bakery(
            self._images,
            machines,
            # Disks of machines are cloned from that of the state, which shares blocks only on one file system.
            root=(self._pool.root if runtime.capabilities.image else settings.cache_dir) / f"states{suffix}",
            runtime_key=probe.bakes,
            guest_digest=self._guest_digest,
            admission=self.admission,
            rootfs=offer.rootfs,
        )
        return Backend(probe, machines, bakery)


def _leave(run_dir: Path, views: ReadOnly, keeper: Keeper, pool: Pool) -> None:
    """Remove what a host without sandboxes needs no more. The keeper ends by itself, and removes its socket."""
    views.withdraw()
    keeper.close()
    pool.close()
    ends = time.monotonic() + _LEAVES_WITHIN_S
    for directory in (run_dir / "gv", run_dir / "q"):
        # A tool that a killed host had started may be on its way out.
        while not _removed(directory) and time.monotonic() < ends:
            time.sleep(0.02)
    _removed(run_dir)


def _removed(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def shipped_templates() -> Path:
    """The templates that came with this package, or those of the checkout it is installed from."""
    package = Path(pandastack.__file__).parent
    shipped = package / "_templates"
    return shipped if shipped.is_dir() else package.parents[1] / "templates"


def _install_id(data_dir: Path) -> str:
    """Eight hex digits that mark every kernel object of this install, so that no other install ever touches them."""
    file = data_dir / "install-id"
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not file.exists():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(uuid.uuid4().hex[:8])
        temporary.replace(file)
    return file.read_text().strip()


def guest_directory(root: Path) -> tuple[Path, str]:
    """A directory with nothing but the guest binary, under a name that changes with its content."""
    try:
        import pandastack_guest
    except ImportError as error:
        raise HostUnfit("the package pandastack-guest is missing", hint="pip install 'pandastack[server]'") from error
    source = pandastack_guest.path()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    directory = root / digest[:12]
    binary = directory / "pandastack-guest"
    # Looked at each time: this is the one file of ours that runs in every sandbox.
    if not binary.exists() or hashlib.sha256(binary.read_bytes()).hexdigest() != digest:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        temporary = directory / f".{os.getpid()}.tmp"
        shutil.copyfile(source, temporary)
        temporary.chmod(0o555)
        temporary.replace(binary)
    return directory, digest


def _totals(settings: HostSettings, disks: Disks) -> Totals:
    cores = float(os.cpu_count() or 1)
    return Totals(
        memory_mib=int(memory_mib("MemTotal") * settings.memory_overcommit),
        cpu=cores,
        disk_mib=int(disks.free_mib() * settings.disk_overcommit),
        sandboxes=settings.max_sandboxes,
    )
