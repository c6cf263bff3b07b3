"""What this project promises of its figures, by runtime: the one table of them, with which rows are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Of = Literal["ratio", "ms", "value"]


@dataclass(frozen=True)
class Promise:
    """`of` says what has the limit: the ratio to the bare tool (both medians), our median in milliseconds, or the row's value."""

    of: Of
    limit: float
    at_least: bool = False

    @property
    def text(self) -> str:
        name = {"ratio": "ratio ", "ms": "ms ", "value": ""}[self.of]
        return f"{name}{'>=' if self.at_least else '<='} {self.limit:g}"

    def held(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit


# Runtime, benchmark, and what of it; of states only where they have the size that promises are made for.
_PROMISES: dict[tuple[str, str, str], Promise] = {
    ("gvisor", "create", "with slots"): Promise("ratio", 0.5),
    ("gvisor", "create", "without slots"): Promise("ratio", 1.0),
    ("gvisor", "exec", "/bin/true"): Promise("ratio", 0.6),
    ("gvisor", "files", "upload"): Promise("ratio", 1 / 0.3),
    ("gvisor", "files", "download"): Promise("ratio", 1 / 0.3),
    ("gvisor", "idle", "memory"): Promise("value", 30),
    ("gvisor", "idle", "CPU"): Promise("value", 0.1),
    ("gvisor", "burst", "rate with slots"): Promise("value", 20, at_least=True),
    ("gvisor", "fork", "one child"): Promise("ratio", 0.9),
    ("gvisor", "fork", "all of 8 by 8 x one by hand"): Promise("ratio", 0.6),
    ("gvisor", "wake", "all"): Promise("ratio", 1.0),
    # By hand a QEMU waits already: like for like are machines that wait as well, blank or with their state.
    ("qemu", "create", "with slots"): Promise("ratio", 1.25),
    ("qemu", "create", "blank machines"): Promise("ratio", 1.25),
    ("qemu", "create", "device state"): Promise("ms", 5),
    ("qemu", "snapshot", "stood still"): Promise("ms", 20),
    ("qemu", "fork", "all of 8 by one"): Promise("value", 3),
}
# The same for every runtime.
_ALWAYS: dict[tuple[str, str], Promise] = {
    ("exec", "errors in parallel"): Promise("value", 0),
    ("burst", "failed"): Promise("value", 0),
    ("files", "server memory growth"): Promise("value", 64),
    ("files", "output lost"): Promise("value", 0),
    ("files", "server memory growth for output"): Promise("value", 32),
}


def promise(runtime: str, benchmark: str, of: str) -> Promise | None:
    """None where nothing was promised."""
    return _PROMISES.get((runtime, benchmark, of)) or _ALWAYS.get((benchmark, of))
