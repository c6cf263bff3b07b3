"""What saving and waking cost: `snapshot` and `wake`, for states of several sizes, turn by turn with the bare tool."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from pandastack.bench import facts, server
from pandastack.bench.figures import Row, quantity, timing
from pandastack.bench.setting import Setting
from pandastack.bench.workloads import ticking
from pandastack.sdk.sandboxes import Sandbox

MIB = 1 << 20
PROMISED_STATE_MB = 50  # The size that promises are made for.
LARGER_FREE_MB = 2048
_NOT_DURABLE = "the bare tool leaves its files in the page cache; ours are on disk, with digests, before the call returns"


def snapshot(setting: Setting, sizes_mb: Sequence[int], samples: int | None, blanks: int) -> list[Row]:
    """From the call until the state is durable; how long the sandbox stood still meanwhile; how many bytes it is."""
    rows: list[Row] = []
    with setting.running(blanks=blanks) as running:
        for size_mb in sizes_mb:
            rows += _snapshot_rows(setting, running, size_mb, samples)
        if PROMISED_STATE_MB in sizes_mb:
            rows += _in_larger_memory(setting, running, samples)
    return rows


def _snapshot_rows(setting: Setting, running: server.Server, size_mb: int, samples: int | None) -> list[Row]:
    runtime, workload, case = setting.runtime, setting.workload(size_mb), f"{size_mb} MB"
    n = workload.samples(samples)
    setting.say(f"snapshot {case}: filling memory")
    with workload.sandbox(running, setting.template) as sandbox, setting.bare.holding(workload) as held:
        ours, theirs, stored, paused = [], [], 0, []
        for turn in range(n):
            setting.say(f"snapshot {case}: {turn + 1} of {n}")
            took, stored, pause = _snapshot(running, sandbox)
            ours.append(took)
            theirs.append(held.checkpoint())
            paused += [pause] if pause is not None else []
        rows = [timing("snapshot", f"{case}: durable", runtime, ours, theirs, note=_NOT_DURABLE)]
        if paused:
            rows += _stood_still(setting, case, paused, promised=size_mb == PROMISED_STATE_MB)
        with ticking(sandbox) as ticker:
            pauses = []
            for turn in range(n):
                setting.say(f"snapshot {case}: pause, {turn + 1} of {n}")
                ticker.longest_s()
                _snapshot(running, sandbox)
                pauses.append(ticker.longest_s())
            rows.append(timing("snapshot", f"{case}: pause", runtime, pauses, note=resolution(case, ticker.quiet_s)))
        rows.append(quantity("snapshot", f"{case}: written", runtime, 1, stored / MIB, "MiB"))
    return rows


def _in_larger_memory(setting: Setting, running: server.Server, samples: int | None) -> list[Row]:
    """The same state in a sandbox with more memory, where the runtime says how long it stood still."""
    workload = setting.workload(PROMISED_STATE_MB, free_mb=LARGER_FREE_MB)
    n = workload.samples(samples)
    case = f"{PROMISED_STATE_MB} MB in {workload.memory_mb} MiB"
    paused = []
    setting.say(f"snapshot {case}: filling memory")
    with workload.sandbox(running, setting.template) as sandbox:
        for turn in range(n):
            setting.say(f"snapshot {case}: {turn + 1} of {n}")
            pause = _snapshot(running, sandbox)[2]
            if pause is None:
                return []
            paused.append(pause)
    return _stood_still(setting, case, paused, promised=True)


def _stood_still(setting: Setting, case: str, paused: Sequence[facts.Pause], *, promised: bool) -> list[Row]:
    """What the runtime itself says: of the machine, and with stopping and continuing the guest's processes, which is the guest's work."""
    median = sorted(paused, key=lambda pause: pause.machine_ms)[(len(paused) - 1) // 2]
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in median.parts_ms.items())
    note = f"{case}: stood still: {parts} ms; {median.rest_bytes / MIB:.1f} MiB were copied in it, {median.ahead_bytes / MIB:.0f} before"
    promise, runtime = setting.promise("snapshot", "stood still", if_=promised), setting.runtime
    machine, whole = [pause.machine_ms / 1000 for pause in paused], [pause.total_ms / 1000 for pause in paused]
    return [
        timing("snapshot", f"{case}: machine stood still", runtime, machine, promise=promise, note=note),
        timing("snapshot", f"{case}: with hold and let go", runtime, whole),
    ]


def wake(setting: Setting, sizes_mb: Sequence[int], samples: int | None, blanks: int) -> list[Row]:
    """Hibernate, wake and the first command: the sum, and apart."""
    rows, runtime = [], setting.runtime
    with setting.running(blanks=blanks) as running:
        for size_mb in sizes_mb:
            workload, case = setting.workload(size_mb), f"{size_mb} MB"
            n = workload.samples(samples)
            setting.say(f"wake {case}: filling memory")
            with workload.sandbox(running, setting.template) as sandbox, setting.bare.holding(workload) as held:
                turns, theirs = [], []
                for turn in range(n):
                    setting.say(f"wake {case}: {turn + 1} of {n}")
                    turns.append(_hibernate_and_wake(sandbox))
                    theirs.append(held.hibernate_and_wake())
            promise = setting.promise("wake", "all", if_=size_mb == PROMISED_STATE_MB)
            sums = [down + up + first for down, up, first in turns]
            rows += [
                timing("wake", f"{case}: all", runtime, sums, [sum(one) for one in theirs], promise=promise, note=_NOT_DURABLE),
                timing("wake", f"{case}: hibernate", runtime, [down for down, _, _ in turns], [down for down, _ in theirs]),
                timing("wake", f"{case}: wake and exec", runtime, [up + first for _, up, first in turns], [up for _, up in theirs]),
                timing("wake", f"{case}: exec of it", runtime, [first for _, _, first in turns]),
            ]
    return rows


def resolution(case: str, quiet_s: float) -> str:
    return f"{case}: the pause is seen by ticks of 1 ms; with nothing going on the longest gap between two was {quiet_s * 1000:.1f} ms"


def stored_bytes(running: server.Server, sandbox: Sandbox) -> int:
    """How large a saved state of it is."""
    return _snapshot(running, sandbox)[1]


def _snapshot(running: server.Server, sandbox: Sandbox) -> tuple[float, int, facts.Pause | None]:
    """The seconds it took, the bytes it takes, and what its runtime says. It is gone again, and the server has done with it, on return."""
    began = time.perf_counter()
    snapshot_id = sandbox.snapshot()
    took = time.perf_counter() - began
    # The server restores it once by itself; that must not run beside the next measurement.
    kept = running.client.snapshots.wait_verified(snapshot_id)
    pause = facts.pause(running, snapshot_id)
    running.client.snapshots.delete(snapshot_id)
    # Without what it shares with the state that its sandbox was made from, if that is known.
    return took, kept.size_bytes if kept.own_bytes is None else kept.own_bytes, pause


def _hibernate_and_wake(sandbox: Sandbox) -> tuple[float, float, float]:
    marks = [time.perf_counter()]
    for step in (sandbox.hibernate, sandbox.wake, lambda: sandbox.exec(["/bin/true"], check=True)):
        step()
        marks.append(time.perf_counter())
    down, up, first = (later - earlier for earlier, later in itertools.pairwise(marks))
    return down, up, first
