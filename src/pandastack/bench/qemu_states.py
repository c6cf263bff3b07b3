"""Saving, waking and copying with the bare QEMU: `stop`, `migrate exec:cat`, and a QEMU with `-incoming exec:cat` for each copy.

That is QEMU's documented way, and what somebody without this project would do: all memory in use goes through a stream into a file,
is read again by each child, and no page of it is shared. The file is in the page cache then; nobody syncs it. The disk is copied
with shared blocks while the guest stands still.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pandastack.bench import qemu_machines
from pandastack.bench.qemu_machines import Kit, Machine
from pandastack.bench.workloads import HOLDER, READY, READY_TIMEOUT_S, Workload
from pandastack.errors import HostUnfit
from pandastack.host.runtimes.base import Limits


class QemuState:
    """See `tool.BareState`."""

    def __init__(self, kit: Kit, limits: Limits, machine: Machine) -> None:
        self._kit, self._limits, self._machine = kit, limits, machine

    def checkpoint(self) -> float:
        with self._files() as folder:
            return self._save(folder, go_on=True)

    def fork(self, children: int, *, at_once: bool = False) -> list[float]:
        with self._files() as folder, contextlib.ExitStack() as undo:
            saved, began = self._save(folder, go_on=True), time.perf_counter()

            def answered(_: int) -> float:
                child, _took = self._restored(folder)
                undo.callback(child.end)
                return saved + time.perf_counter() - began

            with ThreadPoolExecutor(children if at_once else 1) as threads:
                return list(threads.map(answered, range(children)))

    def hibernate_and_wake(self) -> tuple[float, float]:
        with self._files() as folder:
            down = self._save(folder, go_on=False)
            began = time.perf_counter()
            self._machine.end()
            down += time.perf_counter() - began
            self._machine, up = self._restored(folder)
            return down, up

    def end(self) -> None:
        self._machine.end()

    @contextlib.contextmanager
    def _files(self) -> Iterator[Path]:
        folder = self._kit.folder / "saved"
        folder.mkdir()
        try:
            yield folder
        finally:
            qemu_machines.remove(folder)

    def _save(self, folder: Path, *, go_on: bool) -> float:
        began = time.perf_counter()
        self._machine.save(folder / "state")
        qemu_machines.clone(self._machine.disk, folder / "disk")
        if go_on:
            self._machine.monitor.do("cont")
        return time.perf_counter() - began

    def _restored(self, folder: Path) -> tuple[Machine, float]:
        """A copy of it, and how long that took up to the end of `/bin/true`."""
        began = time.perf_counter()
        machine = Machine(self._kit, self._limits, disk=folder / "disk", incoming=f"exec:cat {folder / 'state'}")
        try:
            # A short state may have come before anybody listened for its event.
            while (status := machine.monitor.do("query-status")["status"]) == "inmigrate":
                time.sleep(0.001)
            if status != "running":
                machine.monitor.do("cont")
            with machine.speak() as guest:
                if guest.run("/bin/true") != 0:
                    raise HostUnfit("/bin/true failed in a bare machine")
        except BaseException:
            machine.end()
            raise
        return machine, time.perf_counter() - began


@contextlib.contextmanager
def holding(kit: Kit, workload: Workload) -> Iterator[QemuState]:
    """A bare machine in which a program holds the state."""
    limits = workload.limits(kit.limits)
    machine = qemu_machines.booted(kit, limits)
    state = QemuState(kit, limits, machine)
    try:
        with machine.speak() as guest:
            guest.start("/usr/bin/python3", "-c", HOLDER, str(workload.state_mb))
            deadline = time.monotonic() + READY_TIMEOUT_S
            while guest.run("/usr/bin/test", "-e", READY) != 0:
                if time.monotonic() > deadline:
                    raise HostUnfit("the bare machine did not fill its memory in time")
                time.sleep(0.2)
        yield state
    finally:
        state.end()
