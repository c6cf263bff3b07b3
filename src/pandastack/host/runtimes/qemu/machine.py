"""One microVM: its QEMU process, its two sockets, its disk and its memory. Made and found again by `driver`.

A prepared machine is a QEMU that waits for a saved state, of any template with its size. `restore` gives it disk, memory and
device state. `start` is for what was never saved: it puts a QEMU that boots a kernel in the place of the one that waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes import cgroups, launch, microvms
from pandastack.host.runtimes.base import Channel, MachineSpec, MemorySource
from pandastack.host.runtimes.hypervisors import HypervisorMachine
from pandastack.host.runtimes.launch import Process
from pandastack.host.runtimes.microvms import DEVICES, DISK, FACTS, MEMORY, Laps
from pandastack.host.runtimes.qemu import client, command, dirty, mapping, taking
from pandastack.host.runtimes.waiting import InThread, to_the_end

if TYPE_CHECKING:
    from pandastack.host.runtimes.qemu.driver import QemuRuntime

_log = logging.getLogger(__name__)

BOOT_ATTEMPTS = 3
BOOT_TIMEOUT_S = {"kvm": 15.0, "tcg": 60.0}
_LOAD_TIMEOUT_S = 30.0
# What is put into the memory of a copy is copied for each of them and shared by none, but it is in no file.
INJECTED_COPIES = 2
INJECTED_BYTES = 512 << 20
_SAVE_TIMEOUT_S = 60.0
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The memory of a state that is to be copied, where it is in no file: what was taken, and the file below it.

    `leave` gives both back.
    """

    base_fd: int
    taken: taking.Memory
    leave: contextlib.ExitStack


class QemuMachine(HypervisorMachine):
    """See `base.Machine`."""

    hypervisor = "QEMU"
    attempts = BOOT_ATTEMPTS
    _runtime: QemuRuntime

    def __init__(self, runtime: QemuRuntime, spec: MachineSpec, cgroup: cgroups.MachineCgroup) -> None:
        super().__init__(runtime, spec, cgroup)
        self._address = 0  # of the guest's memory in QEMU's
        self._base_fd: int | None = None  # The file that its memory was restored from.
        self._base_name: Path | None = None
        self._connected = False
        self._control = runtime.root / f"{spec.id}.q"
        self._channel = runtime.root / f"{spec.id}.c"

    # Blocking parts, run in worker threads.

    def prepare(self) -> None:
        self._check_root()
        self._cgroup.create(
            memory_mib=self.size.memory_mib + command.OVERHEAD_MIB[self._runtime.accelerated],
            cpu=self.spec.limits.cpu,
            tasks=command.TASKS + self.size.cpus,
        )
        self._spawn()

    def _spawn(self, *, disk_fd: int | None = None, boot: command.Boot | None = None) -> None:
        with self._lock, contextlib.ExitStack() as ours:
            if self._stopped:
                raise RuntimeFailed("the machine was stopped")
            channel = ours.enter_context(launch.listening(self._channel))
            control = ours.enter_context(launch.listening(self._control))
            argv = self._runtime.argv(self.size, channel.fileno(), control.fileno(), disk_fd=disk_fd, boot=boot)
            fds = [channel.fileno(), control.fileno(), disk_fd]
            fds += [boot.vmlinux_fd, boot.initramfs_fd, boot.serial_fd] if boot else []
            confined = self._runtime.confined(argv, self.spec.id, self._cgroup, boot)
            self._process = Process.spawn(self.hypervisor, confined, [fd for fd in fds if fd is not None])
        try:
            # Only QEMU has the sockets now, so its end is noticed.
            with client.opened(self._control) as qmp:
                if boot is None:
                    events = [{"capability": "events", "state": True}]
                    qmp.call("migrate-set-capabilities", {"capabilities": events})
                self._address = _address(qmp)
        except RuntimeFailed as error:
            raise RuntimeFailed("QEMU did not start", detail=self._process.last_words() or error.fields.get("detail")) from error
        self._record(self._process)

    def _record(self, process: Process, restore: Laps | None = None) -> None:
        """What `find_again` needs; and of a restore what it took, for whoever measures it."""
        took = {} if restore is None else {"restore_parts_ms": restore.ms}
        restored = self._base_fd is not None
        microvms.record(self.spec.state, process, address=self._address, running=self._running, restored=restored, **took)

    def _record_running(self) -> None:
        self._record(self._alive())

    def _take_over(self, process: Process, record: dict[str, Any]) -> None:
        with client.opened(self._control, timeout_s=_CONNECT_TIMEOUT_S) as qmp:
            if qmp.call("query-status").get("status") == "paused":
                # That, or it was being saved.
                qmp.call("cont")
                self._knock()
        self._address = int(record["address"])
        if record["restored"]:
            self._rest_on(_mapped(process.pid, self._address, self.size.memory_bytes))
        self._connected = True  # By an earlier life; what it was saying may still be under way.

    def _boot_anew(self) -> tuple[bool, str]:
        self.end_process()
        # Anew each time: a kernel that hung may have written to it.
        with microvms.held(self._disk_from(self.spec.rootfs)) as disk_fd:
            return self._boot(disk_fd)

    def _boot(self, disk_fd: int) -> tuple[bool, str]:
        """Whether the guest daemon came, and what the console said."""
        ours, theirs = socket.socketpair()
        with ours, contextlib.ExitStack() as undo:
            with theirs, self._runtime.booting(theirs.fileno(), self.spec.limits.processes) as boot:
                self._spawn(disk_fd=disk_fd, boot=boot)
            process = self._alive()
            qmp = undo.enter_context(client.opened(self._control))

            def ready(_console: str) -> bool:
                if self._stopped:
                    raise RuntimeFailed("the machine was stopped")
                with contextlib.suppress(client.Gone):
                    return any(one["label"] == command.CHANNEL and one["frontend-open"] for one in qmp.call("query-chardev"))
                return False

            timeout_s = BOOT_TIMEOUT_S[self._runtime.accelerated] * self._runtime.patience
            return launch.watch(process, ours, ready, timeout_s=timeout_s)

    def _disk_from(self, source: Path) -> int:
        """A copy of an image as this machine's disk, as large as its limit, open for QEMU."""
        return microvms.disk_from(source, self.spec.disk / DISK, self.spec.limits.disk_mib, self._runtime.clone)

    def _restore(self, snapshot: Path) -> None:
        with self._lock, contextlib.ExitStack() as ours:
            process, qmp = ours.enter_context(self._speaking())
            laps = Laps()
            kept = self._runtime.kept.get(snapshot)
            facts = microvms.facts(snapshot, self._own_facts(), self.size.memory_bytes if kept is None else None)
            devices_fd = ours.enter_context(microvms.held(os.open(snapshot / DEVICES, os.O_RDONLY | os.O_CLOEXEC)))
            base_fd = os.open(snapshot / MEMORY, os.O_RDONLY | os.O_CLOEXEC) if kept is None else os.dup(kept.base_fd)
            memory_fd = ours.enter_context(microvms.held(base_fd))
            disk_fd = self._disk_from(snapshot / DISK)
            ours.callback(os.close, disk_fd)
            try:
                qmp.call("add-fd", {"fdset-id": 1}, fd=disk_fd)
                qmp.call("blockdev-add", command.file_node("f1", 1))
                node = {"driver": "raw", "node-name": command.DISK, "file": "f1", "discard": "unmap"}
                qmp.call("blockdev-reopen", {"options": [node]})
                laps.end("disk")
                number = int(qmp.call("add-fd", {"fdset-id": 2}, fd=memory_fd)["fd"])
                with mapping.in_its_name(process.pid) as call:
                    mapping.map_file(call, number, self._address, self.size.memory_bytes)
                    dirty.allow(call, process.pidfd, self._address, self.size.memory_bytes)
                qmp.call("remove-fd", {"fdset-id": 2})
                if kept is not None:
                    kept.taken.inject(process.pid, self._address, memory_fd)
                laps.end("memory")
                qmp.call("getfd", {"fdname": "state"}, fd=devices_fd)
                qmp.call("migrate-incoming", {"uri": "fd:state"})
                ends = time.monotonic() + _LOAD_TIMEOUT_S
                while (status := qmp.event("MIGRATION", until=ends)["data"]["status"]) != "completed":
                    if status == "failed":
                        raise RuntimeFailed("QEMU could not load the saved state")
                laps.end("devices")
                size = os.fstat(disk_fd).st_size
                if size != facts["disk_bytes"]:
                    qmp.call("block_resize", {"node-name": command.DISK, "size": size})
            except (RuntimeFailed, KeyError, TypeError) as error:
                detail = process.last_words() or (error.fields.get("detail") or error.message if isinstance(error, RuntimeFailed) else "")
                raise RuntimeFailed("the saved state cannot be restored", detail=detail) from error
            self._rest_on(os.dup(memory_fd))
            self._running = True
            # What it had said to the host of its parent may still be under way.
            self._connected = True
            self._record(process, laps)

    def _rest_on(self, fd: int) -> None:
        self._base_fd = fd
        self._base_name = Path(f"/proc/self/fd/{fd}").readlink()

    def _snapshot(self, into: Path, resume: bool, still: InThread, copies: int | None) -> None:
        with contextlib.ExitStack() as held, contextlib.ExitStack() as leaving:
            arena = held.enter_context(self._runtime.arenas.one())
            with self._lock, self._speaking() as (process, qmp):
                base_fd = None if self._base_fd is None else held.enter_context(microvms.held(os.dup(self._base_fd)))
                # Written back now, so that little is left for when the guest stands still.
                with microvms.held(os.open(self.spec.disk / DISK, os.O_RDWR | os.O_CLOEXEC)) as disk_fd:
                    os.fdatasync(disk_fd)
                    disk_bytes = os.fstat(disk_fd).st_size
                taken = taking.Memory(arena, process.pid, self._address, self.size.memory_bytes)
                taken.ahead()
                laps = Laps()
                leaving.enter_context(still)
                laps.end("hold")
                self._take(qmp, taken, into, resume, laps)
            # Without the lock: who leaves it may freeze the machine again.
            leaving.close()
            laps.end("let go")
            if base_fd is not None and copies is not None and _injected(copies, taken):
                written = 0
                self._runtime.kept[into] = Kept(base_fd=base_fd, taken=taken, leave=held.pop_all())
            else:
                with microvms.filled():
                    written = self._write_memory(taken, base_fd, into / MEMORY)
        facts = self._own_facts() | {
            "qemu": self._runtime.version,
            "disk_bytes": disk_bytes,
            "pause_ms": laps.sum_ms,
            "pause_parts_ms": laps.ms,
            "ahead_bytes": taken.ahead_bytes,
            "rest_bytes": taken.rest_bytes,
            "written_bytes": written,
        }
        (into / FACTS).write_text(json.dumps(facts))
        _log.debug("machine %s stood still for %.1f ms: %s", self.spec.id, laps.sum_ms, laps.ms)

    def _take(self, qmp: client.Connection, taken: taking.Memory, into: Path, resume: bool, laps: Laps) -> None:
        """All that has to be of one instant. The guest stands still meanwhile."""
        try:
            qmp.call("stop")
            laps.end("stop")
            self._save_devices(qmp, into / DEVICES)
            laps.end("devices")
            taken.rest()
            laps.end("memory")
            with microvms.filled():
                self._runtime.clone(self.spec.disk / DISK, into / DISK)
            laps.end("disk")
        except BaseException:
            if not self._frozen:
                with contextlib.suppress(RuntimeFailed):
                    qmp.call("cont")
            raise
        if resume and not self._frozen:
            qmp.call("cont")
        self._frozen = self._frozen or not resume
        laps.end("go on")

    def _save_devices(self, qmp: client.Connection, target: Path) -> None:
        with microvms.held(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)) as devices_fd:
            qmp.call("add-fd", {"fdset-id": 9}, fd=devices_fd)
        try:
            arguments = {"filename": "/dev/fdset/9", "live": False}
            qmp.call("xen-save-devices-state", arguments, timeout_s=_SAVE_TIMEOUT_S)
        finally:
            qmp.call("remove-fd", {"fdset-id": 9})

    def _write_memory(self, taken: taking.Memory, base_fd: int | None, target: Path) -> int:
        if base_fd is not None:
            self._runtime.clone(Path(f"/proc/self/fd/{base_fd}"), target)
        else:
            target.touch(mode=0o600, exist_ok=False)
            os.truncate(target, self.size.memory_bytes)
        written = taken.write(target)
        target.chmod(0o400)  # From here on machines map it, and rely on it.
        return written

    def _freeze(self, frozen: bool) -> None:
        with self._lock:
            if self._frozen == frozen:
                return
            with self._speaking() as (_, qmp):
                # One that waits for a state does nothing. A `cont` would open its disks for writing before they are its own.
                if self._running:
                    qmp.call("stop" if frozen else "cont")
                self._frozen = frozen

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[tuple[Process, client.Connection]]:
        """The process and its control channel. One that is frozen runs meanwhile; its guest does not."""
        process = self._alive()
        process.go_on()
        try:
            with client.opened(self._control) as qmp:
                yield process, qmp
        finally:
            if self._frozen:
                process.halt()

    def _knock(self) -> None:
        """Come to the guest's port and go again.

        While a guest stands still QEMU does not tell its port that the host went away. What the guest says before the next one
        comes then stops the port, until somebody leaves it again.
        """
        self._dial().close()

    def _dial(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(_CONNECT_TIMEOUT_S)
            connection.connect(str(self._channel))
            connection.settimeout(None)
        except OSError as error:
            connection.close()
            raise RuntimeFailed("the machine has no channel any more", detail=str(error)) from error
        return connection

    def _connect(self) -> Channel:
        self._alive()
        connection = self._dial()
        fresh, self._connected = not self._connected, True
        fd = connection.detach()
        return Channel(read_fd=fd, write_fd=fd, fresh=fresh)

    def _remove_files(self) -> None:
        self._runtime.remove_files(self.spec.id)

    # The contract.

    async def connect(self) -> Channel:
        return await asyncio.to_thread(self._connect)

    async def snapshot(
        self, into: Path, *, resume: bool, still: AbstractAsyncContextManager[Any] | None = None, copies: int | None = None
    ) -> None:
        # To its end, also when this is cancelled: whoever cleans up must not meet a machine that is still being read.
        await to_the_end(self._snapshot, into, resume, InThread(still or contextlib.nullcontext()), copies)

    async def freeze(self) -> None:
        await asyncio.to_thread(self._freeze, True)

    async def thaw(self) -> None:
        if self._frozen:
            await asyncio.to_thread(self._freeze, False)

    @property
    def memory_source(self) -> MemorySource | None:
        return None if self._base_name is None else MemorySource(file=self._base_name, user=self._runtime.users.of(self.spec.id))

    def let_go(self) -> None:
        super().let_go()
        if self._base_fd is not None:
            os.close(self._base_fd)
            self._base_fd = None


def _injected(copies: int, taken: taking.Memory) -> bool:
    """Whether so many copies get what was taken from here, and not from a file of their own."""
    return copies <= INJECTED_COPIES and copies * (taken.ahead_bytes + taken.rest_bytes) <= INJECTED_BYTES


def _address(qmp: client.Connection) -> int:
    """Where QEMU has the guest's memory."""
    answer = str(qmp.call("human-monitor-command", {"command-line": "gpa2hva 0x0"}))
    found = re.search(rf"\({command.MEMORY}\) is (0x[0-9a-f]+)", answer)
    if found is None:
        raise RuntimeFailed("QEMU does not say where the guest's memory is", detail=answer[:200])
    return int(found[1], 16)


def _mapped(pid: int, address: int, size_bytes: int) -> int:
    """The file that a process has mapped there, open for reading."""
    fd = os.open(f"/proc/{pid}/map_files/{address:x}-{address + size_bytes:x}", os.O_RDONLY | os.O_CLOEXEC)
    if os.fstat(fd).st_size != size_bytes:
        os.close(fd)
        raise RuntimeFailed("the machine's memory is not mapped as it was")
    return fd
