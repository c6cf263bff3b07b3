"""Whether one more sandbox fits. By what was promised, not by what is used now: use comes later, when it is too late.

Memory and disk may be promised more than once (`*_overcommit`), because sandboxes rarely use all of theirs; a floor of
really free memory and disk holds all the same. Pure arithmetic over values read from the kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pandastack.errors import CapacityError, DiskFull, InvalidRequest
from pandastack.host.runtimes.base import Limits
from pandastack.wire.host import HostCapacity
from pandastack.wire.ids import SandboxId

RETRY_AFTER_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What the machine has, after overcommit. MiB and cores."""

    memory_mib: int
    cpu: float
    disk_mib: int
    sandboxes: int


class Admission:
    """`free_disk_mib` and `free_memory_mib` read what is really free now."""

    def __init__(
        self,
        totals: Totals,
        *,
        free_disk_mib: Callable[[], int],
        free_memory_mib: Callable[[], int] | None = None,
        memory_floor_mib: int = 512,
    ) -> None:
        self._totals = totals
        self._free_disk_mib = free_disk_mib
        self._free_memory_mib = free_memory_mib or available_memory_mib
        self._memory_floor_mib = memory_floor_mib
        self._reserved: dict[SandboxId, Limits] = {}

    def reserve(self, sandbox_id: SandboxId, limits: Limits, *, known: bool = False) -> None:
        """Promise `limits` to a sandbox, or raise CapacityError, or DiskFull at the floor. `known` sandboxes already run and always fit.

        Raises InvalidRequest for what this machine could never hold.
        """
        if not known:
            self.require_possible(limits)
            self._require_room(limits)
        self._reserved[sandbox_id] = limits

    def release(self, sandbox_id: SandboxId) -> None:
        self._reserved.pop(sandbox_id, None)

    def require_possible(self, limits: Limits) -> None:
        """Raises InvalidRequest for what this machine could not hold if it were empty."""
        for field, wanted, total in (
            ("memory_mb", limits.memory_mib, self._totals.memory_mib),
            ("disk_mb", limits.disk_mib, self._totals.disk_mib),
        ):
            if wanted > total:
                raise InvalidRequest(f"{field} is {wanted}, but this machine has {total} in all", field=field, maximum=total)
        if limits.cpu > (os.cpu_count() or 1):
            raise InvalidRequest(f"cpu is {limits.cpu:g}, but this machine has {os.cpu_count()}", field="cpu", maximum=os.cpu_count())

    def _require_room(self, limits: Limits) -> None:
        memory, disk = self._sum_memory(), self._sum_disk()
        full = (
            f"{len(self._reserved)} sandboxes run, the most allowed"
            if len(self._reserved) >= self._totals.sandboxes
            else f"memory: {self._totals.memory_mib - memory} of {self._totals.memory_mib} MiB are unpromised"
            if memory + limits.memory_mib > self._totals.memory_mib
            else f"disk: {self._totals.disk_mib - disk} of {self._totals.disk_mib} MiB are unpromised"
            if disk + limits.disk_mib > self._totals.disk_mib
            else "hardly any memory is free"
            if self._free_memory_mib() < self._memory_floor_mib
            else None
        )
        if full:
            raise CapacityError(
                f"this machine is full ({full})",
                hint="delete sandboxes, ask for less, or try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        if self._free_disk_mib() <= 0:
            raise DiskFull(
                "hardly any disk is free on this machine",
                hint="delete snapshots or sandboxes, or give the data directory more space",
            )

    def _sum_memory(self) -> int:
        return sum(limits.memory_mib for limits in self._reserved.values())

    def _sum_disk(self) -> int:
        return sum(limits.disk_mib for limits in self._reserved.values())

    def capacity(self) -> HostCapacity:
        return HostCapacity(
            memory_mb=self._totals.memory_mib,
            memory_reserved_mb=self._sum_memory(),
            cpu=self._totals.cpu,
            cpu_reserved=sum(limits.cpu for limits in self._reserved.values()),
            disk_mb=self._totals.disk_mib,
            disk_reserved_mb=self._sum_disk(),
            sandboxes=len(self._reserved),
            sandboxes_max=self._totals.sandboxes,
        )


def memory_mib(field: str) -> int:
    """A line of /proc/meminfo in MiB, such as "MemTotal"."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) >> 10
    return 0


def available_memory_mib() -> int:
    return memory_mib("MemAvailable")
