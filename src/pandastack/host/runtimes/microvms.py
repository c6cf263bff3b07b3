"""What the drivers of microVMs share: the size that a saved state fits, disks, and what a console and a processor tell."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandastack.errors import DiskFull, HostUnfit, RuntimeFailed
from pandastack.host.runtimes.base import Limits, Usage
from pandastack.host.runtimes.cgroups import MachineCgroup
from pandastack.host.runtimes.launch import Process

KVM = Path("/dev/kvm")
# The files of a saved state.
MEMORY, DEVICES, DISK, FACTS = "mem", "state", "disk", "machine.json"
RECORD = "machine.json"
# What the guest daemon says where a machine has no root file system. Then kernel, modules, disk and user space work.
ARRIVED = "this machine cannot start: root file system"
_VERDICTS_KEPT = 16
_KHZ_TOLERANCE = 0.0005  # So exact is what Linux measures when it boots (arch/x86/kernel/tsc.c).


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a saved state fits: whole CPUs and MiB of memory."""

    cpus: int
    memory_mib: int

    @classmethod
    def of(cls, limits: Limits) -> Size:
        """A part of a CPU is a whole one for the guest; its cgroup holds the limit."""
        return cls(cpus=max(1, math.ceil(limits.cpu)), memory_mib=limits.memory_mib)

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib << 20


class Laps:
    """What the parts of something took, in milliseconds."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._last = time.monotonic()

    @property
    def sum_ms(self) -> float:
        return round(sum(self.ms.values()), 2)

    def end(self, name: str) -> None:
        """Of the part that went from the last end to now."""
        now = time.monotonic()
        self.ms[name], self._last = round((now - self._last) * 1000, 2), now


def facts(snapshot: Path, wanted: Mapping[str, Any], memory_bytes: int | None) -> dict[str, Any]:
    """What a saved state says of itself, if it is of a machine with these facts, and has a memory of that size, or None of its own.

    Raises RuntimeFailed.
    """
    try:
        found: dict[str, Any] = json.loads((snapshot / FACTS).read_text())
        differs = [name for name in wanted if found[name] != wanted[name]]
        int(found["disk_bytes"])
        size = None if memory_bytes is None else (snapshot / MEMORY).stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeFailed("there is no saved state of a microVM", detail=str(error)) from error
    if differs:
        name = differs[0]
        raise RuntimeFailed(
            f"the saved state is of a machine with another {name}", detail=f"{name}: {found[name]} there, {wanted[name]} here"
        )
    if size != memory_bytes:
        raise RuntimeFailed("the saved memory is not as large as its machine's")
    return found


def record(folder: Path, process: Process, **more: Any) -> None:
    """Write down, in the folder of a machine, what an adoption needs."""
    kept = {"pid": process.pid, "started": process.started, "boot_id": boot_id(), **more}
    written = folder / f"{RECORD}.new"
    written.write_text(json.dumps(kept))
    written.replace(folder / RECORD)


def recorded(folder: Path, name: str) -> tuple[Process, dict[str, Any]] | None:
    """The process of an earlier life of this daemon, if it is still the same: pid, start time and boot must all be."""
    try:
        kept = json.loads((folder / RECORD).read_text())
        if kept["boot_id"] != boot_id() or not kept["running"]:
            return None
        process = Process.found(name, int(kept["pid"]), int(kept["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (process, kept) if process is not None else None


def forget_record(folder: Path) -> None:
    for name in (RECORD, f"{RECORD}.new"):
        (folder / name).unlink(missing_ok=True)


def usage(process: Process, cgroup: MachineCgroup) -> Usage:
    """Raises RuntimeFailed when it is over."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError as error:
        raise RuntimeFailed("the machine is over") from error
    return Usage(
        pid=process.pid,
        cpu_s=cgroup.cpu_seconds(),
        memory_bytes=cgroup.memory_bytes(),
        resident_bytes=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        virtual_bytes=int(fields[20]),
        threads=int(fields[17]),
        uptime_s=max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - process.started / os.sysconf("SC_CLK_TCK")),
    )


def disk_from(source: Path, disk: Path, disk_mib: int, clone: Callable[[Path, Path], None]) -> int:
    """A copy of an image as a machine's disk, as large as its limit; open for reading and writing.

    Raises RuntimeFailed where the image is larger: the file system in it fills it.
    """
    disk.unlink(missing_ok=True)
    with filled():
        clone(source, disk)
    fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size > disk_mib << 20:
            raise RuntimeFailed("the saved disk is larger than the machine's may be")
        os.truncate(fd, disk_mib << 20)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def held(fd: int) -> Iterator[int]:
    """A descriptor that is closed at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def filled() -> Iterator[None]:
    """A full disk is said as such."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("the host's disk is full", hint="free space on the file system of the data directory, or move it") from error
        raise RuntimeFailed("a file of the machine cannot be copied", detail=str(error)) from error


def telling(console: str) -> str:
    """The line of a console that says why a machine went off; what the kernel says after it is the same each time."""
    lines = [line.strip()[:300] for line in console.splitlines() if line.strip()]
    whys = [line for line in lines if "pandastack-guest:" in line or "Kernel panic" in line]
    return next(iter([*whys[:1], *lines[-1:]]), "its console said nothing")


def cpu() -> str:
    """Model and features, which a state saved with KVM relies on, and the series of the kernel that gives them, such as 6.1.

    What KVM saves stays the same within one, so a host that was mended and started again restores what it saved before.
    """
    wanted = ("vendor_id", "cpu family", "model\t", "stepping", "flags")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    series = ".".join(platform.release().split(".")[:2])
    return "\n".join([line for line in lines if line.startswith(wanted)] + [series])


def tsc_khz(cpuinfo: Path = Path("/proc/cpuinfo")) -> int:
    """How fast this host's time stamp counter runs: Linux takes its BogoMIPS from it, two of them for each MHz. Raises HostUnfit."""
    text = cpuinfo.read_text()
    for pattern, factor in ((r"^bogomips\s*:\s*([\d.]+)", 500.0), (r"^cpu MHz\s*:\s*([\d.]+)", 1000.0)):
        found = re.search(pattern, text, re.MULTILINE)
        if found:
            return round(float(found[1]) * factor)
    raise HostUnfit("this host does not say how fast its clock runs", hint="use gVisor")


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Verdicts:
    """What probing found out, kept in a folder that hosts of one machine share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def steady_khz(self, measured: int) -> int:
        """How fast the clock runs, as it was measured first: each boot measures a little differently, and states are tied to it."""
        kept = self._folder / "tsc_khz"
        with contextlib.suppress(OSError, ValueError):
            first = int(kept.read_text())
            if abs(measured - first) <= first * _KHZ_TOLERANCE:
                return first
        _replace(kept, str(measured))
        return measured

    def get(self, identity: Sequence[str]) -> dict[str, Any] | None:
        """What was found for that identity: everything that a verdict depends on."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._file(identity).read_text())
            return found if isinstance(found, dict) else None
        return None

    def put(self, identity: Sequence[str], verdict: Mapping[str, Any]) -> None:
        for old in sorted(self._folder.glob("*.json"), key=_changed)[:-_VERDICTS_KEPT]:
            old.unlink(missing_ok=True)
        _replace(self._file(identity), json.dumps(verdict))

    def _file(self, identity: Sequence[str]) -> Path:
        return self._folder / f"{hashlib.sha256(chr(10).join(identity).encode()).hexdigest()[:32]}.json"


def _replace(file: Path, content: str) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = file.with_suffix(f".{os.getpid()}")
    new.write_text(content)
    new.replace(file)


def _changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # Another host of this machine removed it.
        return 0.0
