"""Builds every part of a host and joins them. Read this first.

`opened` is the life of the daemon: choose a runtime by trying it, find the sandboxes of an earlier life, run the loops, and
at the end let go of what runs without stopping it. `service` is what control sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import structlog

import pandastack
from pandastack.errors import HostUnfit
from pandastack.host import fetch_runsc
from pandastack.host.admission import Admission, Totals, memory_mib
from pandastack.host.bakery import Bakery
from pandastack.host.forks import Forks
from pandastack.host.keeper import Keeper
from pandastack.host.ledger import Ledger
from pandastack.host.machines import Machines
from pandastack.host.recovery import recover
from pandastack.host.registry import Registry
from pandastack.host.runtimes.base import Probe, Runtime
from pandastack.host.runtimes.gvisor.driver import GvisorRuntime
from pandastack.host.sandboxes import Sandboxes
from pandastack.host.service import HostService as HostService
from pandastack.host.settings import HostSettings
from pandastack.host.states import States
from pandastack.host.storage import space
from pandastack.host.storage.disks import Disks
from pandastack.host.storage.images import Images
from pandastack.host.storage.pool import Pool
from pandastack.host.storage.readonly import ReadOnly
from pandastack.host.storage.snapshots import Snapshots
from pandastack.wire.ids import HostId

log = structlog.get_logger(__name__)


@contextlib.asynccontextmanager
async def opened(settings: HostSettings, *, say: Callable[[str], None]) -> AsyncIterator[HostService]:
    """A host that is ready for requests. `say` gets a line for each long step before that.

    Raises HostUnfit with a remedy when this machine cannot run sandboxes; nothing is left then.
    """
    install = _install_id(settings.data_dir)
    keeper = Keeper(settings.run_dir / install / "keeper.sock")
    guest, guest_digest = await asyncio.to_thread(guest_directory, settings.cache_dir / "guest")
    run_dir = settings.run_dir / install
    views = ReadOnly(run_dir / "shared")
    pool = Pool(settings.data_dir)
    await asyncio.to_thread(pool.open)
    try:
        runtime, probe = await choose_runtime(settings, install, views.view(guest), keeper, say)
    except BaseException:
        _leave(run_dir, views, keeper, pool)
        raise
    root, below = pool.root, pool.below
    if space.shares_blocks(root) is False:
        log.warning("files are copied in full: this file system cannot share blocks; see `pandastack storage init`", path=str(root))
    disks = Disks(root / "disks", low_water_mib=settings.disk_low_water_mb, below=below)
    images = Images(
        settings.cache_dir / "images",
        [shipped_templates(), *([settings.templates_dir] if settings.templates_dir else [])],
        ubuntu_mirror=settings.ubuntu_mirror,
        debian_mirror=settings.debian_mirror,
    )
    for name, error in images.broken().items():
        log.error("template is broken and left out", template=name, error=error.message)
    machines = Machines(runtime, disks, state=settings.data_dir / "machines", guest=guest, shared=views.view, blanks=settings.blanks)
    bakery = Bakery(images, machines, root=settings.cache_dir / "states", runtime_key=probe.key, guest_digest=guest_digest)
    admission = Admission(_totals(settings, disks), free_disk_mib=disks.free_mib)
    snapshots = Snapshots(root / "snapshots", low_water_mib=settings.disk_low_water_mb, below=below)
    registry = Registry(Ledger(settings.data_dir / "ledger"), machines, admission)
    states = States(registry, snapshots, runtime_key=probe.key)
    forks = Forks(states, settings.captures_dir or root / "captures")
    await asyncio.to_thread(forks.open)
    sandboxes = Sandboxes(registry, states, bakery, slots=settings.slots)
    await recover(registry, snapshots)
    await asyncio.to_thread(keeper.retain, sandboxes.machine_ids())
    service = HostService(HostId(f"{socket.gethostname()}-{install}"), sandboxes, forks, bakery, probe)
    tasks = [
        asyncio.create_task(sandboxes.slots.run(), name="refill slots"),
        asyncio.create_task(machines.blanks.run(), name="refill blank machines"),
        asyncio.create_task(sandboxes.freeze_idle(), name="freeze idle sandboxes"),
        asyncio.create_task(sandboxes.watch_memory(), name="watch memory of sandboxes"),
    ]
    try:
        yield service
    finally:
        await bakery.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await sandboxes.close()
        if sandboxes.machine_ids():
            keeper.close()
        else:
            _leave(run_dir, views, keeper, pool)


def _leave(run_dir: Path, views: ReadOnly, keeper: Keeper, pool: Pool) -> None:
    """Remove what a host without sandboxes needs no more. The keeper ends by itself, and removes its socket."""
    views.withdraw()
    keeper.close()
    pool.close()
    for directory in (run_dir / "gv", run_dir):
        with contextlib.suppress(OSError):
            directory.rmdir()


async def choose_runtime(
    settings: HostSettings, install: str, guest: Path, keeper: Keeper, say: Callable[[str], None]
) -> tuple[Runtime, Probe]:
    """The first runtime that really works here. Raises HostUnfit saying why none does."""
    prefix = settings.cache_dir / "runsc"
    if not fetch_runsc.candidates(settings.runsc, prefix):
        await fetch_runsc.fetch(prefix, debian_mirror=settings.debian_mirror, say=say)
    reasons = []
    for runsc in fetch_runsc.candidates(settings.runsc, prefix):
        runtime = GvisorRuntime(runsc, root=settings.run_dir / install / "gv", group=f"pandastack-{install}", guest=guest, keeper=keeper)
        probe = await runtime.probe()
        if probe.works:
            return runtime, probe
        reasons.append(f"{runsc}: {probe.reason}" + (f" ({probe.hint})" if probe.hint else ""))
    raise HostUnfit(f"no runtime works on this machine: {'; '.join(reasons)}", hint="run `pandastack doctor`")


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
