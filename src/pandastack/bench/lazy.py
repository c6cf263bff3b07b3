"""What a microVM from an offloaded snapshot waits for: with a store that answers each chunk at once, or late."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pandastack.bench.far import Far, serving
from pandastack.bench.figures import Row, quantity, timing
from pandastack.bench.server import Server
from pandastack.bench.setting import Setting

DELAYS_MS = (0, 5, 20)
_NOTE = (
    "from the call to the result of the first command; its disk and what it touches of its memory come from the store, 4 MiB at a time. "
    "`first`: nobody knows what it will touch; `known`: on a host with nothing but the order of the first; `again`: the same once more"
)
_ORDER_TIMEOUT_S = 60.0


@dataclass
class _Case:
    took_s: list[float] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)


def lazy(setting: Setting, state_mb: int, n: int) -> list[Row]:
    """Local, then for each delay `first`, `known` and `again`, and how many chunks the store was asked for."""
    work = setting.place.folder / "far"
    objects = {"PANDASTACK_OBJECT_STORE": str(work / "objects"), "PANDASTACK_CHUNK_CACHE_DIR": str(work / "chunks")}
    runtime, workload, local = setting.runtime, setting.workload(state_mb), _Case()
    with setting.running(environ=objects) as running:
        setting.say("lazy: a snapshot, and what it takes when it is here")
        with workload.sandbox(running, setting.template) as sandbox:
            snapshot = sandbox.snapshot()
        running.client.snapshots.wait_verified(snapshot)
        for _ in range(n):
            local.took_s.append(_create(running, snapshot))
        running.client.snapshots.offload(snapshot)
        root = running.root
    rows = [timing("lazy", f"{state_mb} MB: local", runtime, local.took_s, note=_NOTE)]
    try:
        with serving(work / "objects") as far:
            for delay_ms in DELAYS_MS:
                far.delay_s = delay_ms / 1000
                cases = {name: _Case() for name in ("first", "known", "again")}
                for turn in range(n):
                    setting.say(f"lazy: {delay_ms} ms a chunk, {turn + 1} of {n}")
                    _turn(setting, far, work, root, snapshot, cases)
                for name, case in cases.items():
                    what = f"{state_mb} MB, {delay_ms} ms a chunk: {name}"
                    rows.append(timing("lazy", what, runtime, case.took_s, local.took_s, note=_NOTE))
                    rows.append(quantity("lazy", f"{what}, chunks", runtime, n, max(case.asked), "requests"))
    finally:
        with setting.running(environ=objects) as running:
            running.client.snapshots.delete(snapshot)
    return rows


def _turn(setting: Setting, far: Far, work: Path, root: Path, snapshot: str, cases: dict[str, _Case]) -> None:
    environ = {"PANDASTACK_OBJECT_STORE": far.url, "PANDASTACK_CHUNK_CACHE_DIR": str(work / "chunks")}

    def measure(running: Server, name: str) -> None:
        far.asked()
        cases[name].took_s.append(_create(running, snapshot))
        cases[name].asked.append(far.asked())

    for order in (root / "indexes").glob("*.order"):
        order.unlink()
    shutil.rmtree(work / "chunks", ignore_errors=True)
    with setting.running(environ=environ) as running:
        measure(running, "first")
        _until(lambda: any((root / "indexes").glob("*.order")))
    shutil.rmtree(work / "chunks", ignore_errors=True)
    with setting.running(environ=environ) as running:
        measure(running, "known")
        measure(running, "again")


def _create(running: Server, snapshot: str) -> float:
    began = time.perf_counter()
    sandbox = running.client.sandboxes.create(from_snapshot=snapshot)
    sandbox.exec(["/bin/true"], check=True)
    took = time.perf_counter() - began
    sandbox.kill()
    return took


def _until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _ORDER_TIMEOUT_S
    while not check() and time.monotonic() < deadline:
        time.sleep(0.1)
