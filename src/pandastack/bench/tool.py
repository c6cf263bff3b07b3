"""The bare tool of a runtime: what somebody without this project would run by hand, on the same image with the same limits.

`bare_runsc` and `bare_qemu` are the two. Each makes ready what is not to be measured before its clock runs. Durations are seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from pandastack.bench.workloads import Workload


class BareState(Protocol):
    """A bare sandbox that holds a state, and how to save, wake and copy it."""

    def checkpoint(self) -> float:
        """Save it; it runs on."""
        ...

    def fork(self, children: int, *, at_once: bool = False) -> list[float]:
        """Save once, then restore one child after the other, or all `at_once`, and run `/bin/true` in each: when they had answered."""
        ...

    def hibernate_and_wake(self) -> tuple[float, float]:
        """Save it and end it; then restore it and run `/bin/true`."""
        ...


class BareTool(Protocol):
    def find(self, acceleration: str | None) -> None:
        """Called when a server has made the template ready, with how its runtime runs code. Raises HostUnfit where something is missing."""
        ...

    def create_and_exec(self) -> float:
        """A new sandbox, until `/bin/true` has run in it."""
        ...

    def session(self) -> AbstractContextManager[Callable[[], float]]:
        """A sandbox; each call runs `/bin/true` in it."""
        ...

    def holding(self, workload: Workload) -> AbstractContextManager[BareState]:
        """A sandbox in which the state is there."""
        ...
