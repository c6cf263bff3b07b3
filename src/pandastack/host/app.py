"""Builds every part of a host and joins them. Read this first.

`opened` is the life of the daemon: choose a runtime by trying it, find the sandboxes of an earlier life, run the loops, and
at the end let go of what runs without stopping it. `HostService` is what control sees (`control.hosts.Host`).
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import structlog

import pandastack
from pandastack.errors import HostUnfit, PandastackError
from pandastack.host import fetch_runsc, files, processes
from pandastack.host.admission import Admission, Totals, memory_mib
from pandastack.host.bakery import Bakery
from pandastack.host.keeper import Keeper
from pandastack.host.ledger import Ledger
from pandastack.host.machines import Machines
from pandastack.host.runtimes.base import Probe, Runtime
from pandastack.host.runtimes.gvisor.driver import GvisorRuntime
from pandastack.host.sandboxes import Sandboxes
from pandastack.host.settings import HostSettings
from pandastack.host.storage.disks import Disks
from pandastack.host.storage.images import Images
from pandastack.host.storage.readonly import ReadOnly
from pandastack.wire.files import ChangeMode, FileEntry, FileEvent
from pandastack.wire.host import (
    HostCreate,
    HostEvent,
    HostInfo,
    HostSandbox,
    Output,
    OutputSlice,
    ProcessExit,
    RuntimeInfo,
)
from pandastack.wire.ids import HostId, ProcessId, SandboxId
from pandastack.wire.processes import ExecRequest, ProcessStart, ProcessView, PtySize, SignalRequest
from pandastack.wire.sandboxes import SandboxMetrics
from pandastack.wire.templates import BakeProgress

log = structlog.get_logger(__name__)

Items = AsyncGenerator[ProcessView | Output | ProcessExit, None]
_CPU_SAMPLE_S = 0.1


class HostService:
    """See `control.hosts.Host`, where each method is described."""

    def __init__(
        self, host_id: HostId, sandboxes: Sandboxes, bakery: Bakery, admission: Admission, runtime: Runtime, probe: Probe, slots: int
    ) -> None:
        self.id = host_id
        self.sandboxes = sandboxes
        self._bakery = bakery
        self._admission = admission
        self._runtime = runtime
        self._probe = probe
        self._slots = slots

    @property
    def runtime_name(self) -> str:
        return self._runtime.name

    async def describe(self) -> HostInfo:
        capabilities = self._runtime.capabilities
        runtime = RuntimeInfo(
            name=self._runtime.name,
            works=True,
            version=self._probe.version,
            isolation=self._runtime.isolation,
            capabilities={
                "snapshot": capabilities.snapshot,
                "fork_memory": capabilities.fork_memory,
                "own_kernel": capabilities.own_kernel,
            },
        )
        views = []
        for name in self._bakery.names():
            with contextlib.suppress(PandastackError):  # A broken recipe is in the log; the others are still there.
                views.append(self._bakery.view(name))
        return HostInfo(
            id=self.id,
            version=_version(),
            runtime=self._runtime.name,
            runtimes=[runtime],
            capacity=self._admission.capacity(),
            templates=views,
            slots_ready=self.sandboxes.slots.ready,
            slots_wanted=self.sandboxes.slots.wanted,
        )

    async def events(self, after: int, *, timeout_s: float) -> builtins.list[HostEvent]:
        return await self.sandboxes.events(after, timeout_s)

    async def create(self, request: HostCreate) -> HostSandbox:
        return await self.sandboxes.create(request)

    async def get(self, sandbox_id: SandboxId) -> HostSandbox:
        return self.sandboxes.view(self.sandboxes.get(sandbox_id))

    async def list(self) -> builtins.list[HostSandbox]:
        return [self.sandboxes.view(sandbox) for sandbox in self.sandboxes.list()]

    async def delete(self, sandbox_id: SandboxId) -> None:
        await self.sandboxes.delete(sandbox_id)

    async def metrics(self, sandbox_id: SandboxId) -> SandboxMetrics:
        """Two readings a moment apart give the CPU share; looking does not count as activity and thaws nothing."""
        sandbox = self.sandboxes.get(sandbox_id)
        machine = self.sandboxes.machine(sandbox)
        before, began = await machine.usage(), time.monotonic()
        await asyncio.sleep(_CPU_SAMPLE_S)
        usage = await machine.usage()
        share = (usage.cpu_s - before.cpu_s) / max(time.monotonic() - began, 1e-6)
        return SandboxMetrics(
            pid=usage.pid,
            uptime_seconds=round(usage.uptime_s, 3),
            host_cpu_seconds=round(usage.cpu_s, 3),
            host_cpu_percent=round(100 * share, 1),
            host_rss_bytes=usage.resident_bytes,
            host_vsz_bytes=usage.virtual_bytes,
            threads=usage.threads,
            memory_limit_bytes=sandbox.entry.memory_mb << 20,
        )

    # Processes

    async def run(self, sandbox_id: SandboxId, request: ExecRequest, process_id: ProcessId) -> Items:
        async with self.sandboxes.use(sandbox_id) as guest, contextlib.aclosing(processes.run(guest, request, process_id)) as items:
            async for item in items:
                yield item

    async def attach(self, sandbox_id: SandboxId, process_id: ProcessId, *, stdout_offset: int = 0, stderr_offset: int = 0) -> Items:
        async with (
            self.sandboxes.use(sandbox_id) as guest,
            contextlib.aclosing(processes.attach(guest, process_id, stdout_offset=stdout_offset, stderr_offset=stderr_offset)) as items,
        ):
            async for item in items:
                yield item

    async def start_process(self, sandbox_id: SandboxId, request: ProcessStart) -> ProcessView:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await processes.start(guest, request)

    async def list_processes(self, sandbox_id: SandboxId) -> builtins.list[ProcessView]:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await processes.every(guest)

    async def get_process(self, sandbox_id: SandboxId, process_id: ProcessId) -> ProcessView:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await processes.get(guest, process_id)

    async def read_output(
        self, sandbox_id: SandboxId, process_id: ProcessId, channel: Literal["stdout", "stderr"], *, offset: int, limit: int
    ) -> OutputSlice:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await processes.read_output(guest, process_id, channel, offset=offset, limit=limit)

    async def write_stdin(self, sandbox_id: SandboxId, process_id: ProcessId, data: AsyncIterator[bytes], *, close: bool) -> int:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await processes.write_stdin(guest, process_id, data, close=close)

    async def signal_process(self, sandbox_id: SandboxId, process_id: ProcessId, request: SignalRequest) -> None:
        async with self.sandboxes.use(sandbox_id) as guest:
            await processes.send_signal(guest, process_id, request)

    async def resize_process(self, sandbox_id: SandboxId, process_id: ProcessId, size: PtySize) -> None:
        async with self.sandboxes.use(sandbox_id) as guest:
            await guest.resize(process_id, size.rows, size.cols)

    # Files

    async def read_file(
        self, sandbox_id: SandboxId, path: bytes, *, offset: int = 0, length: int | None = None
    ) -> tuple[FileEntry, AsyncIterator[bytes]]:
        stack = contextlib.AsyncExitStack()
        try:
            guest = await stack.enter_async_context(self.sandboxes.use(sandbox_id))
            entry, body = await files.read(guest, path, offset=offset, length=length)
        except BaseException as error:
            await stack.__aexit__(type(error), error, error.__traceback__)
            raise
        return entry, _until_closed(body, stack)

    async def write_file(
        self, sandbox_id: SandboxId, path: bytes, data: AsyncIterator[bytes], *, mode: int | None = None, owner: str | None = None
    ) -> int:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await guest.write_file(path, data, mode=mode, owner=owner)

    async def stat_file(self, sandbox_id: SandboxId, path: bytes) -> FileEntry:
        async with self.sandboxes.use(sandbox_id) as guest:
            return await files.stat(guest, path)

    async def list_dir(self, sandbox_id: SandboxId, path: bytes) -> AsyncGenerator[builtins.list[FileEntry], None]:
        async with self.sandboxes.use(sandbox_id) as guest, contextlib.aclosing(files.listing(guest, path)) as batches:
            async for batch in batches:
                yield batch

    async def make_dir(self, sandbox_id: SandboxId, path: bytes, *, parents: bool, mode: int) -> None:
        async with self.sandboxes.use(sandbox_id) as guest:
            await guest.mkdir(path, parents=parents, mode=mode)

    async def move_file(self, sandbox_id: SandboxId, source: bytes, destination: bytes, *, overwrite: bool) -> None:
        async with self.sandboxes.use(sandbox_id) as guest:
            await guest.move(source, destination, overwrite=overwrite)

    async def remove_file(self, sandbox_id: SandboxId, path: bytes, *, recursive: bool) -> None:
        async with self.sandboxes.use(sandbox_id) as guest:
            await guest.remove(path, recursive=recursive)

    async def change_mode(self, sandbox_id: SandboxId, path: bytes, request: ChangeMode) -> None:
        async with self.sandboxes.use(sandbox_id) as guest:
            await files.change_mode(guest, path, request)

    async def watch_files(self, sandbox_id: SandboxId, path: bytes, *, recursive: bool) -> AsyncGenerator[builtins.list[FileEvent], None]:
        async with self.sandboxes.use(sandbox_id) as guest, contextlib.aclosing(files.watch(guest, path, recursive=recursive)) as batches:
            async for batch in batches:
                yield batch

    # Templates

    async def bake(self, template: str) -> AsyncGenerator[BakeProgress, None]:
        async with contextlib.aclosing(self._bakery.follow(template)) as said:
            async for progress in said:
                yield progress


async def _until_closed(body: AsyncIterator[bytes], stack: contextlib.AsyncExitStack) -> AsyncIterator[bytes]:
    """The bytes of a file; the request counts as under way until the reader is done or closes this."""
    async with stack:
        close: Any = body
        try:
            async for piece in body:
                yield piece
        finally:
            await close.aclose()


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
    try:
        runtime, probe = await choose_runtime(settings, install, views.view(guest), keeper, say)
    except BaseException:
        _leave(run_dir, views, keeper)
        raise
    disks = Disks(settings.data_dir / "disks", low_water_mib=settings.disk_low_water_mb)
    images = Images(
        settings.cache_dir / "images",
        [shipped_templates(), *([settings.templates_dir] if settings.templates_dir else [])],
        ubuntu_mirror=settings.ubuntu_mirror,
        debian_mirror=settings.debian_mirror,
    )
    for name, error in images.broken().items():
        log.error("template is broken and left out", template=name, error=error.message)
    machines = Machines(runtime, disks, state=settings.data_dir / "machines", guest=guest, shared=views.view)
    bakery = Bakery(images, machines, root=settings.cache_dir / "states", runtime_key=probe.key, guest_digest=guest_digest)
    admission = Admission(_totals(settings, disks), free_disk_mib=disks.free_mib)
    sandboxes = Sandboxes(Ledger(settings.data_dir / "ledger"), bakery, machines, admission, slots=settings.slots)
    await sandboxes.recover()
    await asyncio.to_thread(keeper.retain, sandboxes.machine_ids())
    service = HostService(HostId(f"{socket.gethostname()}-{install}"), sandboxes, bakery, admission, runtime, probe, settings.slots)
    tasks = [
        asyncio.create_task(sandboxes.slots.run(), name="refill slots"),
        asyncio.create_task(sandboxes.freeze_idle(), name="freeze idle sandboxes"),
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
            _leave(run_dir, views, keeper)


def _leave(run_dir: Path, views: ReadOnly, keeper: Keeper) -> None:
    """Remove what a host without sandboxes needs no more. The keeper ends by itself, and removes its socket."""
    views.withdraw()
    keeper.close()
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


def _version() -> str:
    try:
        return metadata.version("pandastack")
    except metadata.PackageNotFoundError:
        return "dev"


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
