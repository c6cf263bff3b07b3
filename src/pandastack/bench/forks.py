"""What a fork costs: time to the first command in every child, pause of the parent, bytes, and memory of each child."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pandastack.bench import memory, server
from pandastack.bench.figures import Row, percentile, quantity, timing
from pandastack.bench.setting import Setting
from pandastack.bench.states import MIB, PROMISED_STATE_MB, resolution, stored_bytes
from pandastack.bench.tool import BareState
from pandastack.bench.workloads import ticking
from pandastack.errors import PandastackError
from pandastack.host.admission import memory_mib
from pandastack.sdk.sandboxes import Sandbox

_PAUSES = 3  # Samples of the pause for each number of children, at most.
_EXEC_TIMEOUT_S = 120.0
_BESIDES_MB = {"gvisor": 64, "qemu": 256}  # What a sandbox takes beside its state; the bare one's memory is all its own.
_ONE_BY_ONE = "the bare tool saves once and then restores the children one after the other; first: its first child, all: its last"
_TIMES_EIGHT = "against 8 times what the bare tool takes for one child"


def fork(setting: Setting, sizes_mb: Sequence[int], counts: Sequence[int], samples: int | None, blanks: int) -> list[Row]:
    """Sizes and numbers of children that need more memory than is free are left out."""
    rows = []
    with setting.running(blanks=blanks) as running:
        for size_mb in sizes_mb:
            workload, fitting = setting.workload(size_mb), [count for count in counts if fits(setting.runtime, size_mb, count)]
            if not fitting:
                continue
            setting.say(f"fork {size_mb} MB: filling memory")
            with workload.sandbox(running, setting.template) as parent, setting.bare.holding(workload) as held:
                rows += _Fork(setting, running, parent, held, size_mb, fitting).rows(workload.samples(samples))
    return rows


def fits(runtime: str, state_mb: int, children: int) -> bool:
    """Whether memory holds the parents (ours and the bare one), the children, and the files of the captures."""
    return (children + 2) * (state_mb + _BESIDES_MB[runtime]) + 2 * state_mb < 0.9 * memory_mib("MemAvailable")


class _Fork:
    def __init__(
        self, setting: Setting, running: server.Server, parent: Sandbox, held: BareState, size_mb: int, counts: Sequence[int]
    ) -> None:
        self._setting = setting
        self._running = running
        self._parent = parent
        self._held = held
        self._size_mb = size_mb
        self._counts = counts
        self._many = 8 if 8 in counts else max(counts)  # What is promised is of eight.

    def rows(self, n: int) -> list[Row]:
        say, runtime = self._setting.say, self._setting.runtime
        firsts: dict[int, list[float]] = {count: [] for count in self._counts}
        lasts: dict[int, list[float]] = {count: [] for count in self._counts}
        costs: dict[int, memory.Cost] = {}
        theirs, at_once = [], []
        for turn in range(n):
            for count in self._counts:
                say(f"fork {self._size_mb} MB: {count} children, {turn + 1} of {n}")
                with self._children(count) as (children, answered):
                    firsts[count].append(min(answered))
                    lasts[count].append(max(answered))
                    if turn == n - 1:
                        costs[count] = memory.cost(children)
            say(f"fork {self._size_mb} MB: the bare tool, {turn + 1} of {n}")
            theirs.append(self._held.fork(max(self._counts)))
            at_once.append(max(self._held.fork(self._many, at_once=True)))
        rows = [row for count in self._counts for row in self._timings(count, firsts[count], lasts[count], theirs)]
        for count, cost in costs.items():
            rows += memory.rows("fork", f"{self._case(count)}: memory of each", runtime, count, cost)
        rows += self._by_one(lasts, [answered[0] for answered in theirs], at_once)
        rows += self._pauses(min(n, _PAUSES))
        written = stored_bytes(self._running, self._parent) / MIB
        rows.append(
            quantity("fork", f"{self._size_mb} MB: written", runtime, 1, written, "MiB", note="written: of a snapshot of the same state")
        )
        return rows

    def _timings(self, count: int, firsts: Sequence[float], lasts: Sequence[float], theirs: Sequence[Sequence[float]]) -> list[Row]:
        case, runtime, promised = self._case(count), self._setting.runtime, self._size_mb == PROMISED_STATE_MB
        one = [answered[0] for answered in theirs]
        if count == 1:
            promise = self._setting.promise("fork", "one child", if_=promised)
            return [timing("fork", f"{case}: answers", runtime, firsts, one, promise=promise)]
        rows = [
            timing("fork", f"{case}: first answers", runtime, firsts, one, note=_ONE_BY_ONE),
            timing("fork", f"{case}: all answer", runtime, lasts, [answered[count - 1] for answered in theirs], note=_ONE_BY_ONE),
        ]
        if count == 8:
            eight = [8 * took for took in one]
            promise = self._setting.promise("fork", "all of 8 by 8 x one by hand", if_=promised)
            note = f"by 8 x one: {_TIMES_EIGHT}"
            rows.append(timing("fork", f"{case}: all, by 8 x one", runtime, lasts, eight, promise=promise, note=note))
        return rows

    def _by_one(self, lasts: dict[int, list[float]], one_by_hand: Sequence[float], at_once: Sequence[float]) -> list[Row]:
        """How much longer than one child many of them take, ours and by hand at once."""
        case, runtime, n = f"{self._case(self._many)}: all answer", self._setting.runtime, len(at_once)
        if self._many == 1:
            return []
        rows = [timing("fork", f"{case}, at once by hand too", runtime, lasts[self._many], at_once)]
        if 1 in lasts:
            promise = self._setting.promise("fork", "all of 8 by one", if_=self._size_mb == PROMISED_STATE_MB and self._many == 8)
            each = f"{self._setting.cpu:g}" if self._setting.cpu else "those of the template"
            note = f"by one child: how many times as long as one; {os.cpu_count()} cores do the work of all guests, CPUs of each: {each}"
            ours = percentile(lasts[self._many], 0.5) / percentile(lasts[1], 0.5)
            theirs = percentile(at_once, 0.5) / percentile(one_by_hand, 0.5)
            rows += [
                quantity("fork", f"{case}, by one child", runtime, n, ours, "x", promise=promise, note=note),
                quantity("fork", f"{case} at once by hand, by one child by hand", runtime, n, theirs, "x", note=note),
            ]
        return rows

    def _pauses(self, n: int) -> list[Row]:
        """Apart from the times: a process that ticks runs on in every child, and takes CPU from it."""
        rows = []
        with ticking(self._parent) as ticker:
            for count in self._counts:
                pauses = []
                for turn in range(n):
                    self._setting.say(f"fork {self._size_mb} MB: pause with {count} children, {turn + 1} of {n}")
                    ticker.longest_s()
                    with self._children(count):
                        pauses.append(ticker.longest_s())
                note = resolution(f"{self._size_mb} MB", ticker.quiet_s)
                rows.append(timing("fork", f"{self._case(count)}: pause of the parent", self._setting.runtime, pauses, note=note))
        return rows

    @contextlib.contextmanager
    def _children(self, count: int) -> Iterator[tuple[list[Sandbox], list[float]]]:
        """Live children, and how long after the call each of them had run its first command."""
        children: list[Sandbox] = []
        with ThreadPoolExecutor(count) as threads:
            try:
                began = time.perf_counter()
                children = self._parent.fork_tree(count)

                def answered(child: Sandbox) -> float:
                    child.exec(["/bin/true"], timeout_seconds=_EXEC_TIMEOUT_S, check=True)
                    return time.perf_counter() - began

                yield children, list(threads.map(answered, children))
            finally:
                list(threads.map(_kill, children))

    def _case(self, count: int) -> str:
        return f"{self._size_mb} MB, {count} {'child' if count == 1 else 'children'}"


def _kill(child: Sandbox) -> None:
    # At the latest the end of the server takes it.
    with contextlib.suppress(PandastackError):
        child.kill()
