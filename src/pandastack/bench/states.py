"""What saving and waking cost: `snapshot` and `wake`, for states of several sizes, turn by turn with the bare tool."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from pandastack.bench import bare, bare_states, server
from pandastack.bench.benchmarks import Say
from pandastack.bench.figures import Row, quantity, timing
from pandastack.bench.workloads import Workload, ticking
from pandastack.sdk.sandboxes import Sandbox

MIB = 1 << 20
PROMISED_STATE_MB = 50  # The size that promises are made for.
_NOT_DURABLE = "the bare tool leaves its files in the page cache; ours are on disk, with digests, before the call returns"


def snapshot(template: str, sizes_mb: Sequence[int], samples: int | None, blanks: int, say: Say) -> list[Row]:
    """From the call until the state is durable; how long the sandbox stood still meanwhile; how many bytes it is."""
    rows = []
    with bare.work() as work, server.running(slots=0, blanks=blanks, template=template) as running:
        by_hand = bare.bare(template)
        for size_mb in sizes_mb:
            workload, case = Workload(size_mb), f"{size_mb} MB"
            n = workload.samples(samples)
            say(f"snapshot {case}: filling memory")
            with workload.sandbox(running, template) as sandbox, bare_states.holding(by_hand, work, workload) as held:
                ours, theirs, stored = [], [], 0
                for turn in range(n):
                    say(f"snapshot {case}: {turn + 1} of {n}")
                    took, stored = _snapshot(running, sandbox)
                    ours.append(took)
                    theirs.append(held.checkpoint())
                rows.append(timing("snapshot", f"{case}: durable", "gvisor", ours, theirs, note=_NOT_DURABLE))
                with ticking(sandbox) as ticker:
                    pauses = []
                    for turn in range(n):
                        say(f"snapshot {case}: pause, {turn + 1} of {n}")
                        ticker.longest_s()
                        _snapshot(running, sandbox)
                        pauses.append(ticker.longest_s())
                    rows.append(timing("snapshot", f"{case}: pause", "gvisor", pauses, note=resolution(case, ticker.quiet_s)))
                rows.append(quantity("snapshot", f"{case}: written", "gvisor", 1, stored / MIB, "MiB"))
    return rows


def wake(template: str, sizes_mb: Sequence[int], samples: int | None, blanks: int, say: Say) -> list[Row]:
    """Hibernate, wake and the first command: the sum, and apart."""
    rows = []
    with bare.work() as work, server.running(slots=0, blanks=blanks, template=template) as running:
        by_hand = bare.bare(template)
        for size_mb in sizes_mb:
            workload, case = Workload(size_mb), f"{size_mb} MB"
            n = workload.samples(samples)
            say(f"wake {case}: filling memory")
            with workload.sandbox(running, template) as sandbox, bare_states.holding(by_hand, work, workload) as held:
                turns, theirs = [], []
                for turn in range(n):
                    say(f"wake {case}: {turn + 1} of {n}")
                    turns.append(_hibernate_and_wake(sandbox))
                    theirs.append(held.hibernate_and_wake())
            promise = 1.0 if size_mb == PROMISED_STATE_MB else None
            sums = [down + up + first for down, up, first in turns]
            rows += [
                timing("wake", f"{case}: all", "gvisor", sums, [sum(one) for one in theirs], at_most=promise, note=_NOT_DURABLE),
                timing("wake", f"{case}: hibernate", "gvisor", [down for down, _, _ in turns], [down for down, _ in theirs]),
                timing("wake", f"{case}: wake and exec", "gvisor", [up + first for _, up, first in turns], [up for _, up in theirs]),
                timing("wake", f"{case}: exec of it", "gvisor", [first for _, _, first in turns]),
            ]
    return rows


def resolution(case: str, quiet_s: float) -> str:
    return f"{case}: the pause is seen by ticks of 1 ms; with nothing going on the longest gap between two was {quiet_s * 1000:.1f} ms"


def stored_bytes(running: server.Server, sandbox: Sandbox) -> int:
    """How large a saved state of it is."""
    return _snapshot(running, sandbox)[1]


def _snapshot(running: server.Server, sandbox: Sandbox) -> tuple[float, int]:
    """The seconds it took, and its bytes. It is gone again, and the server has done with it, on return."""
    began = time.perf_counter()
    snapshot_id = sandbox.snapshot()
    took = time.perf_counter() - began
    # The server restores it once by itself; that must not run beside the next measurement.
    kept = running.client.snapshots.wait_verified(snapshot_id)
    running.client.snapshots.delete(snapshot_id)
    return took, kept.size_bytes


def _hibernate_and_wake(sandbox: Sandbox) -> tuple[float, float, float]:
    marks = [time.perf_counter()]
    for step in (sandbox.hibernate, sandbox.wake, lambda: sandbox.exec(["/bin/true"], check=True)):
        step()
        marks.append(time.perf_counter())
    down, up, first = (later - earlier for earlier, later in itertools.pairwise(marks))
    return down, up, first
