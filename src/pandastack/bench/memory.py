"""What sandboxes really cost in memory: the proportional share of all their processes, each shared page counted once."""

from __future__ import annotations

import contextlib
from pathlib import Path


def proportional_bytes(pids: list[int]) -> int:
    """The PSS of the sandboxes that the given processes belong to, found by their cgroup."""
    total = 0
    for pid in _members({_cgroup(pid) for pid in pids}):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total


def _cgroup(pid: int) -> str:
    """The memory cgroup (v1) or the cgroup (v2) of a process, as a path below its mount."""
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    v1 = next((path for _, names, path in lines if "memory" in names.split(",")), None)
    return v1 if v1 is not None else next(path for number, _, path in lines if number == "0")


def _members(cgroups: set[str]) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, StopIteration):
                if _cgroup(int(entry.name)) in cgroups:
                    found.append(int(entry.name))
    return found
