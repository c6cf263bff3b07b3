"""One microVM: its Firecracker, the jail with its disk and sockets, and the link to its daemon. Made and found again by `driver`.

A prepared machine is a jailed Firecracker that waits for calls. `restore` has it load a saved state; `start` puts one in its place
that finds a kernel in its jail. Before the first instruction of a guest runs, the jail is locked: its Firecracker can make no file
there any more, but in a small file system in memory that ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes import cgroups, microvms
from pandastack.host.runtimes.base import Channel, MachineSpec, MemorySource
from pandastack.host.runtimes.firecracker import client, command, jail, vsock
from pandastack.host.runtimes.firecracker.memory import SavedMemory
from pandastack.host.runtimes.firecracker.session import Session
from pandastack.host.runtimes.hypervisors import HypervisorMachine
from pandastack.host.runtimes.launch import Process
from pandastack.host.runtimes.microvms import DEVICES, DISK, FACTS, MEMORY, Laps
from pandastack.host.runtimes.waiting import finished

if TYPE_CHECKING:
    from pandastack.host.runtimes.firecracker.driver import FirecrackerRuntime

_log = logging.getLogger(__name__)

BOOT_ATTEMPTS = 2
BOOT_TIMEOUT_S = 15.0
_READY_TIMEOUT_S = 20.0
_LOAD_TIMEOUT_S = 60.0
_SAVE_TIMEOUT_S = 120.0
_SAVING_CPUS = 2.0
_LOOK_S = 0.002
_WATCH_S = 0.02


class FirecrackerMachine(HypervisorMachine):
    """See `base.Machine`."""

    hypervisor = "Firecracker"
    attempts = BOOT_ATTEMPTS
    _runtime: FirecrackerRuntime

    def __init__(self, runtime: FirecrackerRuntime, spec: MachineSpec, cgroup: cgroups.MachineCgroup) -> None:
        super().__init__(runtime, spec, cgroup)
        self._jail = command.Jail.of(spec.disk / "jail", spec.id, runtime.binaries)
        self._session = Session(spec.id, self._root / command.VSOCK, patience=runtime.patience, alive=self._alive)
        self._memory = SavedMemory(spec.disk, self.size.memory_bytes, runtime.clone)
        self._paused = False  # Its guest is, by Firecracker; `_frozen` is its process.

    @property
    def _root(self) -> Path:
        return self._jail.root

    # Blocking parts, run in worker threads. Coming to be.

    def prepare(self) -> None:
        self._check_root()
        self.limit()
        self._spawn()

    def limit(self) -> None:
        """Make its cgroup."""
        self._cgroup.create(memory_mib=self._memory_mib, cpu=self.spec.limits.cpu, tasks=command.TASKS + self.size.cpus)

    @property
    def _memory_mib(self) -> int:
        return self.size.memory_mib + command.OVERHEAD_MIB

    def _spawn(self, *, kernel: command.Kernel | None = None) -> None:
        with self._lock:
            if self._stopped:
                raise RuntimeFailed("the machine was stopped")
            self.end_process()
            shutil.rmtree(self._jail.base, ignore_errors=True)
            (self._root / command.SCRATCH).mkdir(parents=True, mode=0o755)
            argv = self._runtime.jailed(self._jail, self._cgroup, self.size.memory_mib, kernel)
            fds = [kernel.vmlinux_fd, kernel.initramfs_fd] if kernel else []
            self._process = Process.spawn(self.hypervisor, argv, fds)
        self._wait_for_calls(self._process)
        self._record(self._process)

    def _wait_for_calls(self, process: Process) -> None:
        ends = time.monotonic() + _READY_TIMEOUT_S * self._runtime.patience
        while True:
            over = process.over
            try:
                with client.opened(self._root / command.API) as api:
                    api.state()
                return
            except client.Gone as error:
                if over or time.monotonic() > ends:
                    raise RuntimeFailed("Firecracker did not start", detail=process.last_words() or error.fields.get("detail")) from error
            time.sleep(_LOOK_S)

    def _record(self, process: Process, *, whole: bool | None = None, restore: Laps | None = None) -> None:
        """What `find_again` needs; and of a restore what it took, for whoever measures it."""
        took = {} if restore is None else {"restore_parts_ms": restore.ms}
        whole = self._memory.whole if whole is None else whole
        source = None if self._memory.source is None else str(self._memory.source)
        microvms.record(self.spec.state, process, running=self._running, whole=whole, source=source, **took)

    def _record_running(self) -> None:
        self._record(self._alive())

    def _take_over(self, process: Process, record: dict[str, Any]) -> None:
        with self._api() as api:
            if api.state() == "Paused":
                api.resume()  # It was being saved.
        self._memory.whole = bool(record["whole"])
        self._memory.source = None if record["source"] is None else Path(record["source"])
        jail.clear_saved(process.pid)

    def _boot_anew(self) -> tuple[bool, str]:
        return self.boot()

    def boot(self, ready: Callable[[str], bool] | None = None) -> tuple[bool, str]:
        """Whether the guest daemon listens, or `ready` says so, and what the console said. Another Firecracker is there afterwards."""
        with self._runtime.kernel() as kernel:
            self._spawn(kernel=kernel)
        process = self._alive()
        os.close(self._disk_from(self.spec.rootfs))
        config, source, drive, device = command.machine(self.size, self.spec.limits.processes)
        with self._api() as api:
            api.configure(config)
            api.boot_source(source)
            api.drive(drive)
            api.entropy()
            api.vsock(device)
        jail.lock(self._root)
        # A connection of its own: making a machine may end Firecracker, and that shall be told from silence.
        try:
            with self._api() as api:
                api.start()
        except RuntimeFailed as error:
            detail = error.fields.get("detail") or process.last_words()
            raise RuntimeFailed("Firecracker cannot start a machine", detail=detail) from error
        jail.tidy(self._root)
        ends = time.monotonic() + BOOT_TIMEOUT_S * self._runtime.patience
        # Its console is what it writes. Of that the beginning is kept, and nobody needs to read it: what a guest writes later is lost.
        with contextlib.closing(vsock.Listens(self._root / command.VSOCK)) as listens:
            while True:
                over, console = process.over, process.said()
                if ready(console) if ready is not None else listens.now():
                    return True, console
                if over or time.monotonic() > ends:
                    return False, console
                if self._stopped:
                    raise RuntimeFailed("the machine was stopped")
                time.sleep(_WATCH_S)

    def _disk_from(self, source: Path) -> int:
        """A copy of an image as this machine's disk, as large as its limit. Root's, in a folder that is root's: see `jail.open_disk`."""
        fd = microvms.disk_from(source, self._root / DISK, self.spec.limits.disk_mib, self._runtime.clone)
        os.fchmod(fd, 0o666)  # Nobody else comes by: the folders above are root's.
        return fd

    def _restore(self, snapshot: Path) -> None:
        with self._lock:
            process = self._alive()
            process.go_on()
            laps = Laps()
            facts = microvms.facts(snapshot, self._own_facts(), self.size.memory_bytes)
            with microvms.held(self._disk_from(snapshot / DISK)) as disk_fd, microvms.filled():
                disk_bytes = os.fstat(disk_fd).st_size
                laps.end("disk")
                self._runtime.clone(snapshot / DEVICES, self._root / DEVICES)
                (self._root / DEVICES).chmod(0o444)
                user, pager = self._runtime.users.of(self.spec.id), self._runtime.pager
                memory = self._memory.put(snapshot / MEMORY, self._root, pid=process.pid, user=user, pager=pager)
                laps.end("memory")
            load = client.SnapshotLoad(snapshot_path=DEVICES, mem_backend=memory, track_dirty_pages=True)
            try:
                with self._api() as api:
                    api.load(load, timeout_s=_LOAD_TIMEOUT_S)
                    laps.end("devices")
                    jail.lock(self._root)
                    if disk_bytes != facts["disk_bytes"]:
                        api.look_at_drive(command.DRIVE, DISK)
                    api.resume()
            except (RuntimeFailed, OSError) as error:
                detail = error.fields.get("detail") or error.message if isinstance(error, RuntimeFailed) else str(error)
                raise RuntimeFailed("the saved state cannot be restored", detail=detail) from error
            self._memory.loaded(self._root)
            jail.tidy(self._root)
            self._running = True
            self._record(process, restore=laps)

    # Being saved.

    def _ahead(self) -> None:
        with self._lock:
            process = self._alive()
            # Firecracker forgets what was written when it has saved it. If this does not come to its end, nobody knows any more.
            self._record(process, whole=True)
            # What it writes is charged to it, and the memory of its guest must not be taken for that. Nor shall one with a small
            # part of a CPU stand still for long, because it has to save itself with that.
            self._cgroup.set_memory(self._memory_mib + 2 * self.size.memory_mib)
            self._cgroup.set_cpu(max(_SAVING_CPUS, self.spec.limits.cpu))
            with microvms.held(jail.open_disk(self._root)) as disk_fd:
                os.fdatasync(disk_fd)  # Written back now, so that little is left for when the guest stands still.

    def _afterwards(self, into: Path, laps: Laps, disk_bytes: int, whole: bool) -> None:
        with self._lock, microvms.filled():
            process = self._alive()
            rest_bytes, written = self._memory.write(process.pid, into / MEMORY, whole=whole)
            self._keep_devices(process, into / DEVICES)
            self._memory.share_as_base(into / MEMORY)
            facts = self._own_facts() | {
                "firecracker": self._runtime.version,
                "disk_bytes": disk_bytes,
                "pause_ms": laps.sum_ms,
                "pause_parts_ms": laps.ms,
                "whole": whole,
                "ahead_bytes": 0,
                "rest_bytes": rest_bytes,
                "written_bytes": written,
            }
            (into / FACTS).write_text(json.dumps(facts))
            self._record(process)
            _log.debug("machine %s stood still for %.1f ms: %s", self.spec.id, laps.sum_ms, laps.ms)

    def _saved(self) -> None:
        """Whether it was or not: what only that needed is given back."""
        with self._lock:
            if self._process is None or self._process.over:
                return
            jail.clear_saved(self._process.pid)
            with contextlib.suppress(OSError):
                self._cgroup.set_memory(self._memory_mib)
                self._cgroup.set_cpu(self.spec.limits.cpu)
            if self._frozen:
                self._process.halt()

    def _take(self, into: Path, resume: bool, laps: Laps) -> tuple[int, bool]:
        """All that has to be of one instant. The guest stands still meanwhile. Returns the size of its disk, and whether all was saved."""
        with self._lock, microvms.held(jail.open_disk(self._root)) as disk_fd:
            self._alive().go_on()
            whole, self._memory.whole = self._memory.whole, True
            save = client.SnapshotCreate(
                snapshot_type="Full" if whole else "Diff",
                snapshot_path=f"{command.SCRATCH}/{DEVICES}",
                mem_file_path=f"{command.SCRATCH}/{MEMORY}",
            )
            with self._api() as api:
                try:
                    api.pause()
                    laps.end("stop")
                    api.save(save, timeout_s=_SAVE_TIMEOUT_S)
                    laps.end("memory")
                    with microvms.filled():
                        self._runtime.clone(Path(f"/proc/self/fd/{disk_fd}"), into / DISK)
                    laps.end("disk")
                except BaseException:
                    if not self._paused:
                        with contextlib.suppress(RuntimeFailed):
                            api.resume()
                    raise
                if resume and not self._paused:
                    api.resume()
                elif not resume:
                    self._paused = self._frozen = True
                laps.end("go on")
            return os.fstat(disk_fd).st_size, whole

    def _keep_devices(self, process: Process, target: Path) -> None:
        with microvms.held(jail.saved_file(process.pid, DEVICES)) as source_fd:
            self._runtime.clone(Path(f"/proc/self/fd/{source_fd}"), target)

    # Standing still without being saved.

    def _freeze(self) -> None:
        with self._lock:
            self._alive().halt()
            self._frozen = True

    def _thaw(self) -> None:
        with self._lock:
            self._alive().go_on()
            if self._paused:
                with self._api() as api:
                    api.resume()
            self._frozen = self._paused = False

    def _api(self) -> contextlib.AbstractContextManager[client.Api]:
        return client.opened(self._root / command.API)

    async def _save(self, into: Path, resume: bool, still: AbstractAsyncContextManager[Any]) -> None:
        await asyncio.to_thread(self._ahead)
        try:
            laps = Laps()
            async with still:
                laps.end("hold")
                link = await self._session.hold(frozen=self._frozen)
                laps.end("link")
                try:
                    disk_bytes, whole = await asyncio.to_thread(self._take, into, resume, laps)
                finally:
                    if link is not None and not self._frozen:
                        await self._session.go_on(link)
                        laps.end("link again")
            laps.end("let go")
            await asyncio.to_thread(self._afterwards, into, laps, disk_bytes, whole)
        finally:
            await asyncio.to_thread(self._saved)

    def _remove_files(self) -> None:
        shutil.rmtree(self._jail.base, ignore_errors=True)
        self._memory.forget()

    # The contract.

    async def connect(self) -> Channel:
        return await self._session.connect()

    async def snapshot(
        self, into: Path, *, resume: bool, still: AbstractAsyncContextManager[Any] | None = None, copies: int | None = None
    ) -> None:
        # To its end, also when this is cancelled: whoever cleans up must not meet a machine that is still being read.
        await finished(self._save(into, resume, still or contextlib.nullcontext()))

    async def freeze(self) -> None:
        await asyncio.to_thread(self._freeze)

    async def thaw(self) -> None:
        if not self._frozen:
            return
        await asyncio.to_thread(self._thaw)
        if (link := self._session.held) is not None:
            await self._session.go_on(link)

    @property
    def memory_source(self) -> MemorySource | None:
        file = self._memory.source
        return None if file is None else MemorySource(file=file, user=self._runtime.users.of(self.spec.id))

    def let_go(self) -> None:
        self._session.close()
        super().let_go()
