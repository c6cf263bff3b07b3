"""A QEMU by hand: its command line, its monitor, its end. Nothing of our driver is in it but what the two command lines must share.

It is what a page about QEMU would tell: sockets and files by name, no user, root or namespaces of its own. Limits are as ours have them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandastack.bench.guest_session import GuestSession
from pandastack.errors import HostUnfit
from pandastack.host.runtimes import cgroups
from pandastack.host.runtimes.base import Limits
from pandastack.host.runtimes.microvms import Size, tsc_khz
from pandastack.host.runtimes.qemu import command

_GROUP = "pandastack-bench"
_TIMEOUT_S = 60.0
_BOOT_TIMEOUT_S = 60.0
_BOOT_ATTEMPTS = 3
_AGAIN_S = 0.0005
_FAST = 1 << 40  # Bytes a second; QEMU's own limit is 128 MiB, for networks.


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What a QEMU by hand is made of. `root` is a raw image, `clone`d for each machine; `folder` is where copies share blocks."""

    binary: Path
    acceleration: command.Acceleration
    vmlinux: Path
    initramfs: Path
    root: Path
    folder: Path
    limits: Limits


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The file that is a guest's memory: with `share` what the guest writes is written there, without it stays the guest's."""

    file: Path
    share: bool


def command_line(kit: Kit, limits: Limits, folder: Path, *, memory: Memory | None, incoming: str | None) -> list[str]:
    """A machine with its sockets and disk in `folder`. It boots, or waits for a state from `incoming`.

    Pure. Devices and their order are the same each time, for states only fit the machine that they were saved from.
    """
    size = Size.of(limits)
    accelerator = "kvm" if kit.acceleration == "kvm" else f"tcg,thread={'single' if size.cpus == 1 else 'multi'}"
    backend = f"memory-backend-ram,id=ram0,size={size.memory_mib}M"
    if memory is not None:
        backend = f"memory-backend-file,id=ram0,size={size.memory_mib}M,mem-path={memory.file},share={'on' if memory.share else 'off'}"
    disk = {"driver": "file", "node-name": "f0", "filename": str(folder / "disk"), "locking": "off", "discard": "unmap"}
    words = [
        str(kit.binary),
        *("-M", "microvm,acpi=on,rtc=on,suppress-vmdesc=on,memory-backend=ram0"),
        *("-accel", accelerator, "-cpu", "host" if kit.acceleration == "kvm" else "max"),
        *("-m", f"{size.memory_mib}M", "-smp", str(size.cpus)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-global", "migration.send-configuration=off"),
        *("-object", backend),
        *("-chardev", f"socket,id=c0,path={folder}/channel,server=on,wait=off"),
        *("-device", "virtio-serial-device", "-device", "virtserialport,chardev=c0,name=pandastack"),
        # Flushes go nowhere, as in ours: a machine does not outlive its host.
        *("-blockdev", json.dumps(disk | {"cache": {"no-flush": True}})),
        *("-blockdev", "driver=raw,node-name=d0,discard=unmap,file=f0"),
        *("-device", "virtio-blk-device,drive=d0"),
        *("-object", "rng-builtin,id=r0", "-device", "virtio-rng-device,rng=r0"),
        *("-qmp", f"unix:{folder}/monitor,server=on,wait=off"),
        *("-serial", "null"),
    ]
    if incoming is not None:
        return [*words, "-incoming", incoming]
    arguments = command.kernel_arguments(kit.acceleration, tsc_khz(), limits.processes)
    return [*words, "-kernel", str(kit.vmlinux), "-initrd", str(kit.initramfs), "-append", arguments]


class Monitor:
    """QMP in a few lines: one command at a time, and the events between."""

    def __init__(self, address: Path, process: subprocess.Popen[bytes]) -> None:
        """Waits until QEMU listens. Raises HostUnfit."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lines = self._socket.makefile("rb")
        self._events: list[dict[str, Any]] = []
        deadline = time.monotonic() + _TIMEOUT_S
        try:
            self._socket.settimeout(_TIMEOUT_S)
            while True:
                try:
                    self._socket.connect(str(address))
                    break
                except OSError as error:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise HostUnfit("the bare QEMU did not start") from error
                    time.sleep(_AGAIN_S)
            self._line()
            self.do("qmp_capabilities")
            self.do("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def do(self, name: str, *, fd: int | None = None, **arguments: Any) -> Any:
        data = json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"
        try:
            if fd is None:
                self._socket.sendall(data)
            else:
                socket.send_fds(self._socket, [data], [fd])
        except OSError as error:
            raise HostUnfit(f"the bare QEMU ended before {name}") from error
        while "return" not in (answer := self._line()):
            if "error" in answer:
                raise HostUnfit(f"the bare QEMU refused {name}", detail=str(answer["error"])[:500])
            self._events.append(answer)
        return answer["return"]

    def migrate(self, name: str, uri: str) -> None:
        """Load or save a state, to the end. Raises HostUnfit where that failed."""
        self._events.clear()  # One that was restored has had the events of that.
        self.do(name, uri=uri)
        while True:
            while self._events:
                event = self._events.pop(0)
                status = event["data"]["status"] if event.get("event") == "MIGRATION" else None
                if status == "completed":
                    return
                if status == "failed":
                    raise HostUnfit("the bare QEMU could not load or save a state")
            self._events.append(self._line())

    def _line(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except OSError as error:
            raise HostUnfit("the bare QEMU does not answer") from error
        if not line:
            raise HostUnfit("the bare QEMU ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Machine:
    """A QEMU that runs or waits. `folder` is its own; gone after `end`."""

    def __init__(self, kit: Kit, limits: Limits, *, disk: Path, memory: Memory | None = None, incoming: str | None = None) -> None:
        """Its disk is a copy of `disk`. All or nothing. Raises HostUnfit."""
        name = "bare-" + secrets.token_hex(4)
        self.folder = kit.folder / name
        self.folder.mkdir()
        with contextlib.ExitStack() as undo:
            undo.callback(remove, self.folder)
            clone(disk, self.folder / "disk")
            os.truncate(self.folder / "disk", max(limits.disk_mib << 20, disk.stat().st_size))
            cgroup = cgroups.MachineCgroup(cgroups.detect(), _GROUP, name)
            undo.callback(cgroup.remove)
            size = Size.of(limits)
            memory_mib = size.memory_mib + command.OVERHEAD_MIB[kit.acceleration]
            cgroup.create(memory_mib=memory_mib, cpu=limits.cpu, tasks=command.TASKS + size.cpus)
            self._process = subprocess.Popen(
                command_line(kit, limits, self.folder, memory=memory, incoming=incoming),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            for file in cgroup.joins():
                file.write_text(str(self._process.pid))
            self.monitor = Monitor(self.folder / "monitor", self._process)
            undo.callback(self.monitor.close)
            self._undo = undo.pop_all()

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    def speak(self) -> GuestSession:
        return GuestSession(self.folder / "channel")

    def load(self, devices: Path) -> None:
        """Bring one that waits, with its memory mapped, to the state of its devices."""
        with devices.open("rb") as file:
            self.monitor.do("getfd", fd=file.fileno(), fdname="state")
            self.monitor.migrate("migrate-incoming", "fd:state")

    def save(self, file: Path) -> None:
        """Stop it, and save memory and devices into one stream, as QEMU's own pages tell it."""
        self.monitor.do("stop")
        self.monitor.do("migrate-set-parameters", **{"max-bandwidth": _FAST})
        self.monitor.migrate("migrate", f"exec:cat >{file}")

    def booted(self) -> bool:
        """Wait for the guest daemon; whether it came."""
        deadline = time.monotonic() + _BOOT_TIMEOUT_S
        while time.monotonic() < deadline:
            if any(one["label"] == "c0" and one["frontend-open"] for one in self.monitor.do("query-chardev")):
                return True
            time.sleep(0.05)
        return False

    def end(self) -> None:
        """Idempotent."""
        self._undo.close()


@contextlib.contextmanager
def running(machine: Machine) -> Iterator[Machine]:
    try:
        yield machine
    finally:
        machine.end()


def booted(kit: Kit, limits: Limits, memory: Memory | None = None) -> Machine:
    """A new machine whose guest daemon is there. A kernel that is emulated on a busy host hangs now and then: it is tried again."""
    for _ in range(_BOOT_ATTEMPTS):
        machine = Machine(kit, limits, disk=kit.root, memory=memory)
        try:
            if machine.booted():
                return machine
        except BaseException:
            machine.end()
            raise
        machine.end()
    raise HostUnfit("the bare machine did not boot")


def clone(source: Path, target: Path) -> None:
    """As one does by hand."""
    done = subprocess.run(["/bin/cp", "--reflink=auto", str(source), str(target)], capture_output=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise HostUnfit("a disk of the bare tool could not be copied", detail=done.stderr.decode("utf-8", "replace")[:500])
    target.chmod(0o600)


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
