"""Sandboxes with a state: how large it is, the programs inside, and what they tell."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pandastack.bench.server import Server
from pandastack.errors import HostUnfit
from pandastack.host.runtimes.base import Limits
from pandastack.sdk.processes import Process
from pandastack.sdk.sandboxes import Sandbox

READY = "/tmp/state-is-there"  # noqa: S108 - a path inside the sandbox
READY_TIMEOUT_S = 120.0
LARGE_STATE_MB = 1000
_ANSWER_TIMEOUT_S = 60.0
_QUIET_S = 1.0

# Random bytes: nothing on the way can make them smaller, and no page of them is zero.
HOLDER = f"""
import os, sys, time
state = os.urandom(int(sys.argv[1]) << 20)
open({READY!r}, "w").close()
while True:
    time.sleep(3600)
"""

# Ticks every millisecond. For each byte on its standard input it prints the longest time between two ticks since the last answer.
_TICKER = """
import select, sys, time
longest, last = 0, time.monotonic_ns()
while True:
    asked = select.select([0], [], [], 0.001)[0]
    now = time.monotonic_ns()
    longest, last = max(longest, now - last), now
    if asked:
        if not sys.stdin.buffer.raw.read(1):
            break
        print(longest, flush=True)
        longest = 0
"""


@dataclass(frozen=True)
class Workload:
    """A Python process that holds `state_mb` of random bytes, and beside it nothing; `free_mb` of memory stay free.

    `cpu` is that of its sandbox; None is the template's.
    """

    state_mb: int
    free_mb: int = 512
    cpu: float | None = None

    @property
    def memory_mb(self) -> int:
        # A sandbox is charged for the files that it is saved into until they are on disk, so there is room for a part of them.
        return self.free_mb + self.state_mb + self.state_mb // 4

    def samples(self, wanted: int | None) -> int:
        """How many to take of each case, where nobody said it: few of what takes long."""
        return wanted or (5 if self.state_mb < LARGE_STATE_MB else 2)

    def limits(self, usual: Limits) -> Limits:
        return replace(usual, memory_mib=self.memory_mb, cpu=self.cpu or usual.cpu)

    @contextlib.contextmanager
    def sandbox(self, running: Server, template: str) -> Iterator[Sandbox]:
        """A sandbox in which the state is there."""
        with running.client.sandboxes.create(template, memory_mb=self.memory_mb, cpu=self.cpu, ttl_seconds=3600) as sandbox:
            sandbox.processes.start(["/usr/bin/python3", "-c", HOLDER, str(self.state_mb)])
            sandbox.exec(f"until test -e {READY}; do sleep 0.05; done", timeout_seconds=READY_TIMEOUT_S, check=True)
            yield sandbox


class Ticker:
    """A process in a sandbox that ticks, and so sees how long it was stopped. It costs CPU: not to be run beside other measurements."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._read = 0
        self.longest_s()
        time.sleep(_QUIET_S)
        self.quiet_s = self.longest_s()

    def longest_s(self) -> float:
        """The longest time between two ticks since the last call. `quiet_s` is that of a second in which nothing was done."""
        self._process.write_stdin(b"?")
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while time.monotonic() < deadline:
            seen = self._process.read_output("stdout", offset=self._read)
            if seen.data.endswith(b"\n"):
                self._read = seen.offset + len(seen.data)
                return int(seen.data) / 1e9
            time.sleep(0.005)
        raise HostUnfit("the process that measures pauses does not answer")


@contextlib.contextmanager
def ticking(sandbox: Sandbox) -> Iterator[Ticker]:
    process = sandbox.processes.start(["/usr/bin/python3", "-c", _TICKER], stdin=True)
    try:
        yield Ticker(process)
    finally:
        process.kill()
