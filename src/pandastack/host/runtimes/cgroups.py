"""Limits from outside the sandbox: one cgroup per machine, on cgroup v2 or v1, whichever this host has.

The driver makes the cgroup before the first process of a machine exists, the runtime joins it, and `remove` takes it
away again. Paths are `<mount>/<group>/<machine id>`; `group` carries the install id, so that two installs on one
machine never touch each other's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pandastack.errors import HostUnfit, RuntimeFailed

CPU_PERIOD_US = 100_000
_NEEDED = ("memory", "cpu", "pids")
_REMOVE_DEADLINE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Hierarchy:
    """Where the controllers are mounted. For v2 every name maps to the same directory."""

    version: Literal[1, 2]
    mounts: dict[str, Path]


def detect(mountinfo: Path = Path("/proc/self/mountinfo")) -> Hierarchy:
    """Find the hierarchy that has the memory, cpu and pids controllers; v2 is preferred where it has them.

    Raises HostUnfit naming what is missing.
    """
    v1: dict[str, Path] = {}
    v2: Path | None = None
    for line in mountinfo.read_text().splitlines():
        left, _, right = line.partition(" - ")
        mount_point = Path(left.split()[4])
        kind, _source, options = right.split(" ", 2)
        if kind == "cgroup2":
            v2 = v2 or mount_point
        elif kind == "cgroup":
            for option in options.split(","):
                v1.setdefault(option, mount_point)
    if v2 is not None:
        controllers = _read(v2 / "cgroup.controllers").split()
        if all(name in controllers for name in _NEEDED):
            return Hierarchy(version=2, mounts=dict.fromkeys((*_NEEDED, "cpuacct"), v2))
    missing = [name for name in (*_NEEDED, "cpuacct") if name not in v1]
    if not missing:
        # All of them, not only the needed: runsc joins a cgroup of the same name in every one, and `remove` must find it.
        return Hierarchy(version=1, mounts={name: path for name, path in v1.items() if (path / "cgroup.procs").exists()})
    raise HostUnfit(
        f"this machine has no cgroup controller {', '.join(missing)}, so limits cannot be enforced",
        hint="mount cgroup v2 with the memory, cpu and pids controllers (the default of systemd), or all of v1",
    )


class Group:
    """The parent of the cgroups of one runtime's machines. Where they are is looked up when it is first needed; see `detect`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._hierarchy: Hierarchy | None = None

    @property
    def hierarchy(self) -> Hierarchy:
        if self._hierarchy is None:
            self._hierarchy = detect()
        return self._hierarchy

    def of(self, machine: str) -> MachineCgroup:
        return MachineCgroup(self.hierarchy, self.name, machine)

    def machines(self) -> set[str]:
        """Those that have a cgroup, also of an earlier life of this daemon."""
        found: set[str] = set()
        for mount in self.hierarchy.mounts.values():
            with contextlib.suppress(OSError):
                found.update(entry.name for entry in (mount / self.name).iterdir() if entry.is_dir())
        return found


class MachineCgroup:
    """The cgroup of one machine. All calls are short file operations; `remove` may wait for processes to be gone."""

    def __init__(self, hierarchy: Hierarchy, group: str, machine: str) -> None:
        self._hierarchy = hierarchy
        self.path = f"/{group}/{machine}"

    def _dir(self, controller: str) -> Path:
        return self._hierarchy.mounts[controller] / self.path.lstrip("/")

    def _dirs(self) -> list[Path]:
        return list(dict.fromkeys(mount / self.path.lstrip("/") for mount in self._hierarchy.mounts.values()))

    def create(self, *, memory_mib: int, cpu: float, tasks: int) -> None:
        """Make the cgroup with its limits. Raises HostUnfit where this process may not."""
        try:
            if self._hierarchy.version == 2:
                self._enable_v2()
            for name in _NEEDED + (("cpuacct",) if self._hierarchy.version == 1 else ()):
                self._dir(name).mkdir(parents=True, exist_ok=True)
            self.set_memory(memory_mib)
            self.set_cpu(cpu)
            _write(self._dir("pids") / "pids.max", str(tasks))
        except OSError as error:
            self.remove()
            raise HostUnfit(
                "this process may not make cgroups, so limits cannot be enforced",
                hint="run as root on the host, or give the container a writable cgroup mount (docker run --privileged --cgroupns=host)",
                detail=str(error),
            ) from error

    def _enable_v2(self) -> None:
        mount = self._hierarchy.mounts["memory"]
        parent = self._dir("memory").parent
        parent.mkdir(parents=True, exist_ok=True)
        for directory in (mount, parent):
            present = _read(directory / "cgroup.subtree_control").split()
            wanted = [f"+{name}" for name in _NEEDED if name not in present]
            if wanted:
                _write(directory / "cgroup.subtree_control", " ".join(wanted))

    def set_memory(self, memory_mib: int) -> None:
        """The hard limit, swap included; for a larger one v1 wants the swap limit raised first."""
        limit = memory_mib << 20
        if self._hierarchy.version == 2:
            _write(self._dir("memory") / "memory.max", str(limit))
            _write_if_there(self._dir("memory") / "memory.swap.max", "0")
            _write_if_there(self._dir("memory") / "memory.oom.group", "1")
            return
        files = [self._dir("memory") / "memory.limit_in_bytes", self._dir("memory") / "memory.memsw.limit_in_bytes"]
        with contextlib.suppress(OSError):
            _write(files[1], str(limit))
        _write(files[0], str(limit))
        _write_if_there(files[1], str(limit))

    def set_cpu(self, cpu: float) -> None:
        quota = max(1000, round(cpu * CPU_PERIOD_US))
        # What an idle sandbox did not use may be used in a burst: a short command on several cores would otherwise
        # spend its quota in half a period and then wait for the next one. The share over time stays the same.
        if self._hierarchy.version == 2:
            _write(self._dir("cpu") / "cpu.max", f"{quota} {CPU_PERIOD_US}")
            _write_if_there(self._dir("cpu") / "cpu.max.burst", str(quota))
        else:
            _write_if_there(self._dir("cpu") / "cpu.cfs_burst_us", "0")
            _write(self._dir("cpu") / "cpu.cfs_period_us", str(CPU_PERIOD_US))
            _write(self._dir("cpu") / "cpu.cfs_quota_us", str(quota))
            _write_if_there(self._dir("cpu") / "cpu.cfs_burst_us", str(quota))

    def oom_kills(self) -> int:
        """How many processes the kernel killed here for memory; 0 when the cgroup is gone."""
        name = "memory.events" if self._hierarchy.version == 2 else "memory.oom_control"
        return _keyed(self._dir("memory") / name).get("oom_kill", 0)

    def cpu_seconds(self) -> float:
        if self._hierarchy.version == 2:
            return _keyed(self._dir("cpu") / "cpu.stat").get("usage_usec", 0) / 1e6
        return int(_read(self._dir("cpuacct") / "cpuacct.usage") or 0) / 1e9

    def memory_bytes(self) -> int:
        name = "memory.current" if self._hierarchy.version == 2 else "memory.usage_in_bytes"
        return int(_read(self._dir("memory") / name) or 0)

    def needed_bytes(self) -> int:
        """The memory that the kernel cannot take back: all but the cache of files."""
        stat = _keyed(self._dir("memory") / "memory.stat")
        prefix = "" if self._hierarchy.version == 2 else "total_"
        return max(0, self.memory_bytes() - stat.get(f"{prefix}inactive_file", 0) - stat.get(f"{prefix}active_file", 0))

    def own_bytes(self) -> int:
        """Anonymous memory, and files that are nowhere but in memory; also what no process has mapped at the moment."""
        stat = _keyed(self._dir("memory") / "memory.stat")
        names = ("anon", "shmem") if self._hierarchy.version == 2 else ("total_rss", "total_shmem")
        return sum(stat.get(name, 0) for name in names)

    def pids(self) -> list[int]:
        found = {int(pid) for pid in _read(self._dir("memory") / "cgroup.procs").split()}
        if self._hierarchy.version == 1:
            found |= {int(pid) for pid in _read(self._dir("pids") / "cgroup.procs").split()}
        return sorted(found)

    def joins(self) -> list[Path]:
        """The files through which a process becomes a member, by writing 0 into each."""
        return list(dict.fromkeys(self._dir(name) / "cgroup.procs" for name in (*_NEEDED, "cpuacct")))

    def remove(self) -> None:
        """Kill whatever is still inside and remove the cgroup. Idempotent. Raises RuntimeFailed when the kernel keeps it."""
        deadline = time.monotonic() + _REMOVE_DEADLINE_S
        while any(directory.exists() for directory in self._dirs()):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for directory in self._dirs():
                with contextlib.suppress(OSError):
                    directory.rmdir()
            if any(directory.exists() for directory in self._dirs()):
                _pause_until(deadline, "processes of the sandbox do not die")
        for mount in self._hierarchy.mounts.values():
            with contextlib.suppress(OSError):  # Still used by other machines, or never made.
                (mount / self.path.lstrip("/")).parent.rmdir()


def _pause_until(deadline: float, message: str) -> None:
    if time.monotonic() > deadline:
        raise RuntimeFailed(message)
    time.sleep(0.002)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _keyed(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _write(path: Path, text: str) -> None:
    # Opened without O_CREAT: a control file that is missing must be an error, not a new file.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _write_if_there(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        _write(path, text)
