"""What sandboxes really cost in memory: the proportional share of all their processes, each shared page counted once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pandastack.bench.figures import Row, quantity
from pandastack.bench.promises import Promise
from pandastack.sdk.sandboxes import Sandbox

_MIB = 1 << 20
_PARTS = "own: what no other sandbox can share; shared: pages of files that are mapped, such as programs and saved memory"


@dataclass(frozen=True)
class Cost:
    """MiB of one sandbox, the mean of several: its proportional share of all, what is its own, and what others may have mapped too."""

    share: float
    own: float
    shared: float


def cost(sandboxes: Sequence[Sandbox]) -> Cost:
    share = proportional_bytes([sandbox.metrics().pid for sandbox in sandboxes])
    usages = [sandbox.usage() for sandbox in sandboxes]
    own, shared = sum(usage.memory_own_bytes for usage in usages), sum(usage.memory_shared_bytes for usage in usages)
    return Cost(*(total / len(sandboxes) / _MIB for total in (share, own, shared)))


def rows(benchmark: str, case: str, runtime: str, n: int, found: Cost, *, promise: Promise | None = None) -> list[Row]:
    return [
        quantity(benchmark, case, runtime, n, found.share, "MiB PSS", promise=promise),
        quantity(benchmark, f"{case}: own", runtime, n, found.own, "MiB", note=_PARTS),
        quantity(benchmark, f"{case}: shared", runtime, n, found.shared, "MiB", note=_PARTS),
    ]


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
