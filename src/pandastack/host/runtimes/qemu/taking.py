"""Takes the memory of a guest: most of it while the guest runs, and what it wrote meanwhile when it stands still.

So the pause does not grow with what a guest has in memory, but with what it writes in the moment in which that is copied. Where
the kernel cannot say what that was, all is copied in the pause.
"""

from __future__ import annotations

from pathlib import Path

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.qemu import capture, dirty
from pandastack.host.runtimes.qemu.capture import Arena, Run

# Less is copied in two milliseconds, which is not worth the faults of a guest whose pages are protected.
_AHEAD_BYTES = 8 << 20
# Room in the arena for what a guest writes until it stands still; more is found then, but slowly.
_SPARE_BYTES = 16 << 20


class Memory:
    """That of one process at one moment: call `ahead`, stop the guest, call `rest`, let it go on, call `write`."""

    def __init__(self, arena: Arena, pid: int, address: int, size_bytes: int) -> None:
        self._arena = arena
        self._place = (pid, address, size_bytes)
        self._tracking: dirty.Tracking | None = None
        self._early: list[Run] = []
        self._late: list[Run] = []
        self._late_at = 0

    @property
    def ahead_bytes(self) -> int:
        return capture.length(self._early)

    @property
    def rest_bytes(self) -> int:
        return capture.length(self._late)

    def ahead(self) -> None:
        """Copy what the guest has written so far, if that is much. It runs meanwhile. Raises RuntimeFailed when it is gone."""
        pid, address, _ = self._place
        own_bytes = capture.length(capture.own_runs(*self._place))
        self._arena.reserve(own_bytes + _SPARE_BYTES)
        if own_bytes < _AHEAD_BYTES or (tracking := dirty.tracking(*self._place)) is None:
            return
        try:
            early = tracking.begin()
            self._late_at = self._arena.copy(pid, address, early)
        except OSError as error:
            raise RuntimeFailed("the memory of the machine cannot be looked at", detail=str(error)) from error
        self._early, self._tracking = early, tracking

    def rest(self) -> None:
        """Copy what is missing of a guest that stands still. Raises RuntimeFailed when it is gone."""
        pid, address, _ = self._place
        try:
            self._late = self._tracking.written() if self._tracking is not None else capture.own_runs(*self._place)
        except OSError as error:
            raise RuntimeFailed("the memory of the machine cannot be looked at", detail=str(error)) from error
        self._arena.copy(pid, address, self._late, at=self._late_at)

    def write(self, target: Path) -> int:
        """Lay it over `target`, as `capture.write` does; returns how many bytes were written."""
        written = capture.write(self._arena, self._early, target)
        return written + capture.write(self._arena, self._late, target, at=self._late_at)

    def inject(self, pid: int, address: int, base_fd: int) -> int:
        """Lay it over the memory of another process, as `capture.inject` does; returns how many bytes were written."""
        written = capture.inject(self._arena, self._early, base_fd, pid, address)
        return written + capture.inject(self._arena, self._late, base_fd, pid, address, at=self._late_at)
