"""One microVM: its Firecracker, the jail with its disk and sockets, and the link to its daemon. Made and found again by `driver`.

A prepared machine is a jailed Firecracker that waits for calls. `restore` has it load a saved state; `start` puts one in its place
that finds a kernel in its jail. Before the first instruction of a guest runs, the jail is locked: its Firecracker can make no file
there any more, but in a small file system in memory that ends with it.

What is saved of a running machine is what it wrote since it was last saved (or restored, or booted), laid over the memory
that was saved then. That one is kept under a second name of the file, `base`, beside the jail. Where it is not known for sure
that both fit, the next state is saved whole, which takes longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes import cgroups, launch, memory, microvms, pages
from pandastack.host.runtimes.base import Channel, EndReason, MachineSpec, Memory, MemorySource, Usage
from pandastack.host.runtimes.firecracker import client, command, jail, vsock
from pandastack.host.runtimes.firecracker.link import ACCEPTED, Link, preamble
from pandastack.host.runtimes.launch import Process
from pandastack.host.runtimes.microvms import DEVICES, DISK, FACTS, MEMORY, Laps
from pandastack.host.runtimes.waiting import finished, to_the_end

if TYPE_CHECKING:
    from pandastack.host.runtimes.firecracker.driver import FirecrackerRuntime

_log = logging.getLogger(__name__)

NAME = "Firecracker"
BASE = "base"
BOOT_ATTEMPTS = 2
BOOT_TIMEOUT_S = 15.0
_READY_TIMEOUT_S = 20.0
_LOAD_TIMEOUT_S = 60.0
_SAVE_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 5.0
# A daemon that has not answered by then has lost what was under way; the machine is saved all the same.
_HOLD_TIMEOUT_S = 2.0
_SAVING_CPUS = 2.0
_AGAIN_S = 0.01
_LOOK_S = 0.002
_WATCH_S = 0.02


class FirecrackerMachine:
    """See `base.Machine`."""

    def __init__(self, runtime: FirecrackerRuntime, spec: MachineSpec, cgroup: cgroups.MachineCgroup) -> None:
        self.spec = spec
        self.size = microvms.Size.of(spec.limits)
        self._runtime = runtime
        self._cgroup = cgroup
        self._process: Process | None = None
        self._jail = command.Jail.of(spec.disk / "jail", spec.id, runtime.binaries)
        self._link: Link | None = None
        self._running = False
        self._stopped = False
        self._frozen = False  # Its process is halted.
        self._paused = False  # Its guest is, by Firecracker.
        self._whole = False  # The next state must be saved whole.
        self._lock = threading.RLock()

    @property
    def _root(self) -> Path:
        return self._jail.root

    # Blocking parts, run in worker threads. Coming to be.

    def prepare(self) -> None:
        if not self.spec.rootfs.is_file():
            raise RuntimeFailed("the machine's root is no image", hint="microVMs boot from raw ext4 images", detail=str(self.spec.rootfs))
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
            self._process = Process.spawn(NAME, argv, fds)
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
        microvms.record(self.spec.state, process, running=self._running, whole=self._whole if whole is None else whole, **took)

    def find_again(self) -> bool:
        """Recognise the process of an earlier life of this daemon."""
        found = microvms.recorded(self.spec.state, NAME)
        if found is None:
            return False
        process, record = found
        process.go_on()  # It may have been frozen when the daemon died.
        try:
            with self._api() as api:
                if api.state() == "Paused":
                    api.resume()  # It was being saved.
            self._whole = bool(record["whole"])
            self._runtime.users.remember(self.spec.id, Path(f"/proc/{process.pid}").stat().st_uid)
            jail.clear_saved(process.pid)
        except (RuntimeFailed, OSError, KeyError) as error:
            _log.warning("machine %s cannot be taken over: %s", self.spec.id, error)
            process.close()
            return False
        self._process, self._running = process, True
        return True

    def _start(self) -> None:
        with self._lock:
            for attempt in range(1, BOOT_ATTEMPTS + 1):
                came, console = self.boot()
                if came:
                    self._running = True
                    self._record(self._alive())
                    return
                said = microvms.telling(console)
                if self.over:  # By its own decision, so it would decide the same again.
                    raise RuntimeFailed("the guest ended while it booted", detail=said)
                _log.warning("machine %s hangs while it boots (attempt %d): %s", self.spec.id, attempt, said)
        raise RuntimeFailed(f"the guest did not boot in {BOOT_ATTEMPTS} attempts", detail=said)

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

    def end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.close()
            self._process = None

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
            facts = microvms.facts(snapshot, self._own_facts())
            if (snapshot / MEMORY).stat().st_size != self.size.memory_bytes:
                raise RuntimeFailed("the saved memory is not as large as its machine's")
            with contextlib.closing(_Descriptor(self._disk_from(snapshot / DISK))) as disk, microvms.filled():
                disk_bytes = os.fstat(disk.fd).st_size
                laps.end("disk")
                self._runtime.clone(snapshot / DEVICES, self._root / DEVICES)
                (self._root / DEVICES).chmod(0o444)
                jail.share(snapshot / MEMORY, self._root / MEMORY, self._runtime.clone)
                laps.end("memory")
            load = client.SnapshotLoad(snapshot_path=DEVICES, mem_backend=client.MemoryBackend(backend_path=MEMORY), track_dirty_pages=True)
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
            # The same file that is mapped now; its next state is written over a copy of it.
            (self._root / MEMORY).replace(self.spec.disk / BASE)
            jail.tidy(self._root)
            self._running = True
            self._record(process, restore=laps)

    def _own_facts(self) -> dict[str, Any]:
        return {"key": self._runtime.key, "cpus": self.size.cpus, "memory_mib": self.size.memory_mib}

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
            with contextlib.closing(_Descriptor(jail.open_disk(self._root))) as disk:
                os.fdatasync(disk.fd)  # Written back now, so that little is left for when the guest stands still.

    def _afterwards(self, into: Path, laps: Laps, disk_bytes: int, whole: bool) -> None:
        with self._lock, microvms.filled():
            process = self._alive()
            rest_bytes, written = self._keep_memory(process, into / MEMORY, whole=whole)
            self._keep_devices(process, into / DEVICES)
            self._share_as_base(into / MEMORY)
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
        with self._lock, contextlib.closing(_Descriptor(jail.open_disk(self._root))) as disk:
            self._alive().go_on()
            whole, self._whole = self._whole, True
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
                        self._runtime.clone(Path(f"/proc/self/fd/{disk.fd}"), into / DISK)
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
            return os.fstat(disk.fd).st_size, whole

    def _keep_memory(self, process: Process, target: Path, *, whole: bool) -> tuple[int, int]:
        base = self.spec.disk / BASE
        if base.exists() and not whole:
            self._runtime.clone(base, target)
        else:
            target.touch(mode=0o600, exist_ok=False)
            os.truncate(target, self.size.memory_bytes)
        with (
            contextlib.closing(_Descriptor(jail.saved_file(process.pid, MEMORY))) as source,
            contextlib.closing(_Descriptor(os.open(target, os.O_RDWR | os.O_CLOEXEC))) as written,
        ):
            if os.fstat(source.fd).st_size != self.size.memory_bytes:
                raise RuntimeFailed("the memory that was saved is not as large as the machine's")
            return pages.lay_over(source.fd, written.fd)

    def _share_as_base(self, saved: Path) -> None:
        """What is saved next is written over this. From here on it must not change, and machines map it."""
        new = self.spec.disk / f"{BASE}.new"
        new.unlink(missing_ok=True)
        saved.chmod(0o444)
        try:
            new.hardlink_to(saved)
        except OSError:
            # On another file system, or too often. To copy it now would cost as much as the next state does if it is whole.
            return
        new.replace(self.spec.disk / BASE)
        self._whole = False

    def _keep_devices(self, process: Process, target: Path) -> None:
        with contextlib.closing(_Descriptor(jail.saved_file(process.pid, DEVICES))) as source:
            self._runtime.clone(Path(f"/proc/self/fd/{source.fd}"), target)

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

    # The way to the guest.

    def _api(self) -> contextlib.AbstractContextManager[client.Api]:
        return client.opened(self._root / command.API)

    def _dial(self, opening: bytes, timeout_s: float, answer_bytes: int = 0) -> tuple[socket.socket, bytes]:
        """A connection to the daemon, with what it is for said, and the daemon's answer to that. Tries until the time is over."""
        ends = time.monotonic() + timeout_s * self._runtime.patience
        while True:
            self._alive()
            try:
                return vsock.dialed(self._root / command.VSOCK, opening, answer_bytes, ends)
            except (OSError, TimeoutError, RuntimeFailed) as error:
                if time.monotonic() > ends:
                    raise RuntimeFailed("the machine's daemon cannot be reached", detail=str(error)) from error
            time.sleep(_AGAIN_S)

    async def _hold(self) -> Link | None:
        """Let nothing be under way; None where there is no link, or where it could not be held and is over."""
        link = self._link
        if link is None or link.gone():
            return None
        try:
            if self._frozen:
                raise RuntimeFailed("the machine is frozen")
            async with asyncio.timeout(_HOLD_TIMEOUT_S * self._runtime.patience):
                await link.quiet()
                opening = preamble("hold", link.id, link.sent)
                connection, answer = await asyncio.to_thread(self._dial, opening, _HOLD_TIMEOUT_S, 8)
                connection.close()
                await link.drained(struct.unpack(">Q", answer)[0])
        except (RuntimeFailed, OSError, TimeoutError) as error:
            _log.warning("machine %s is saved without the session with its daemon: %s", self.spec.id, error)
            link.close()
            return None
        return link

    async def _go_on(self, link: Link) -> None:
        try:
            connection, answer = await asyncio.to_thread(self._dial, preamble("resume", link.id), _CONNECT_TIMEOUT_S, len(ACCEPTED))
        except (RuntimeFailed, OSError) as error:
            _log.warning("machine %s goes on without the session with its daemon: %s", self.spec.id, error)
            link.close()
            return
        if link.closed or answer != ACCEPTED:
            connection.close()
            link.close()
        else:
            link.resume(connection)

    async def _save(self, into: Path, resume: bool, still: AbstractAsyncContextManager[Any]) -> None:
        await asyncio.to_thread(self._ahead)
        try:
            laps = Laps()
            async with still:
                laps.end("hold")
                link = await self._hold()
                laps.end("link")
                try:
                    disk_bytes, whole = await asyncio.to_thread(self._take, into, resume, laps)
                finally:
                    if link is not None and not self._frozen:
                        await self._go_on(link)
                        laps.end("link again")
            laps.end("let go")
            await asyncio.to_thread(self._afterwards, into, laps, disk_bytes, whole)
        finally:
            await asyncio.to_thread(self._saved)

    def _alive(self) -> Process:
        process = self._process
        if process is None or self._stopped or process.over:
            raise RuntimeFailed("the machine is over")
        return process

    def _stop(self) -> None:
        self._stopped = True
        process = self._process
        if process is not None and not process.over:
            process.kill()  # Without the lock: whoever holds it may wait for what this process says.
        with self._lock:
            self._cgroup.remove()
            if self._process is not None:
                self._process.reap()
            shutil.rmtree(self._jail.base, ignore_errors=True)
            for name in (BASE, f"{BASE}.new"):
                (self.spec.disk / name).unlink(missing_ok=True)
            microvms.forget_record(self.spec.state)
            self._runtime.users.forget(self.spec.id)

    # The contract.

    async def start(self) -> None:
        await asyncio.to_thread(self._start)

    async def restore(self, snapshot: Path) -> None:
        await to_the_end(self._restore, snapshot)

    async def connect(self) -> Channel:
        identity = Link.identity()
        connection, _ = await asyncio.to_thread(self._dial, preamble("open", identity), _CONNECT_TIMEOUT_S)
        if self._link is not None:
            self._link.close()
        self._link = Link(connection, identity)
        fd = self._link.take()
        return Channel(read_fd=fd, write_fd=fd)

    async def snapshot(self, into: Path, *, resume: bool, still: AbstractAsyncContextManager[Any] | None = None) -> None:
        # To its end, also when this is cancelled: whoever cleans up must not meet a machine that is still being read.
        await finished(self._save(into, resume, still or contextlib.nullcontext()))

    async def freeze(self) -> None:
        await asyncio.to_thread(self._freeze)

    async def thaw(self) -> None:
        if not self._frozen:
            return
        await asyncio.to_thread(self._thaw)
        if self._link is not None and self._link.held:
            await self._go_on(self._link)

    async def usage(self) -> Usage:
        return await asyncio.to_thread(lambda: microvms.usage(self._alive(), self._cgroup))

    def memory_share(self) -> float:
        """Nothing: the guest's own kernel ends whoever needs too much in there, and the machine lives on."""
        return 0.0

    async def memory(self) -> Memory:
        return await asyncio.to_thread(lambda: memory.of([self._alive().pid], files_are_shared=True))

    async def ended(self) -> EndReason:
        if self._process is not None:
            await launch.ended(self._process)
        if self._stopped or self._process is None:
            return "stopped"
        await asyncio.to_thread(self._process.reap)
        killed = await asyncio.to_thread(self._cgroup.oom_kills)
        return "oom" if killed else "exited"

    @property
    def over(self) -> bool:
        return self._process is None or self._process.over

    @property
    def memory_source(self) -> MemorySource | None:
        """None: what it has mapped is a name in its jail for a file that is all here."""
        return None

    def let_go(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._process is not None:
            self._process.close()
            self._process = None

    async def stop(self) -> None:
        await asyncio.to_thread(self._stop)
        self.let_go()


class _Descriptor:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)
