"""What the drivers of microVMs do alike: one hypervisor's process for each machine, that is made, found again, measured and ended.

A driver's machine is a `HypervisorMachine`, its runtime a `HypervisorRuntime`. What they leave open is what differs: how a guest is
booted, restored and saved, how it stands still, and how its daemon is reached.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes import cgroups, launch, memory, microvms
from pandastack.host.runtimes.base import EndReason, MachineId, MachineSpec, Memory, Usage
from pandastack.host.runtimes.launch import Process
from pandastack.host.runtimes.users import Users
from pandastack.host.runtimes.waiting import to_the_end

_log = logging.getLogger(__name__)


class HypervisorMachine(ABC):
    """See `base.Machine`. Methods with an underscore block, and are run in worker threads."""

    hypervisor: ClassVar[str]
    """What people call it."""
    attempts: ClassVar[int]
    """How often a boot that hangs is tried."""

    def __init__(self, runtime: HypervisorRuntime[Any], spec: MachineSpec, cgroup: cgroups.MachineCgroup) -> None:
        self.spec = spec
        self.size = microvms.Size.of(spec.limits)
        self._runtime = runtime
        self._cgroup = cgroup
        self._process: Process | None = None
        self._running = False
        self._stopped = False
        self._frozen = False
        self._lock = threading.RLock()

    # What differs.

    @abstractmethod
    def prepare(self) -> None:
        """Cgroup and a hypervisor that waits. Blocks."""

    @abstractmethod
    def _boot_anew(self) -> tuple[bool, str]:
        """Whether the guest daemon came, and what the console said. The hypervisor is another one afterwards, and its disk as at first."""

    @abstractmethod
    def _restore(self, snapshot: Path) -> None: ...

    @abstractmethod
    def _record_running(self) -> None:
        """Write down what `find_again` needs."""

    @abstractmethod
    def _take_over(self, process: Process, record: dict[str, Any]) -> None:
        """Have that process, which runs, go on as this machine's. Raises RuntimeFailed, OSError, KeyError or ValueError."""

    @abstractmethod
    def _remove_files(self) -> None:
        """Of a machine that is over."""

    # Coming to be.

    def _check_root(self) -> None:
        if not self.spec.rootfs.is_file():
            raise RuntimeFailed("the machine's root is no image", hint="microVMs boot from raw ext4 images", detail=str(self.spec.rootfs))

    def find_again(self) -> bool:
        """Recognise the process of an earlier life of this daemon: pid, start time and boot must all be the same. Blocks."""
        found = microvms.recorded(self.spec.state, self.hypervisor)
        if found is None:
            return False
        process, record = found
        process.go_on()  # It may have been frozen when the daemon died.
        try:
            self._take_over(process, record)
            self._runtime.users.remember(self.spec.id, Path(f"/proc/{process.pid}").stat().st_uid)
        except (RuntimeFailed, OSError, KeyError, ValueError) as error:
            _log.warning("machine %s cannot be taken over: %s", self.spec.id, error)
            process.close()
            return False
        self._process, self._running = process, True
        return True

    def _start(self) -> None:
        with self._lock:
            for attempt in range(1, self.attempts + 1):
                came, console = self._boot_anew()
                if came:
                    self._running = True
                    self._record_running()
                    return
                said = microvms.telling(console)
                if self.over:  # By its own decision, so it would decide the same again.
                    raise RuntimeFailed("the guest ended while it booted", detail=said)
                _log.warning("machine %s hangs while it boots (attempt %d): %s", self.spec.id, attempt, said)
        raise RuntimeFailed(f"the guest did not boot in {self.attempts} attempts", detail=said)

    def _own_facts(self) -> dict[str, Any]:
        return {"key": self._runtime.key, "cpus": self.size.cpus, "memory_mib": self.size.memory_mib}

    # Its process.

    def _alive(self) -> Process:
        process = self._process
        if process is None or self._stopped or process.over:
            raise RuntimeFailed("the machine is over")
        return process

    def end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.close()
            self._process = None

    def _stop(self) -> None:
        self._stopped = True
        process = self._process
        if process is not None and not process.over:
            process.kill()  # Without the lock: whoever holds it may wait for what this process says.
        with self._lock:
            self._cgroup.remove()
            if self._process is not None:
                self._process.reap()
            self._remove_files()
            microvms.forget_record(self.spec.state)
            self._runtime.users.forget(self.spec.id)

    # The contract.

    async def start(self) -> None:
        await asyncio.to_thread(self._start)

    async def restore(self, snapshot: Path) -> None:
        await to_the_end(self._restore, snapshot)

    async def usage(self) -> Usage:
        return await asyncio.to_thread(lambda: microvms.usage(self._alive(), self._cgroup))

    def memory_share(self) -> float:
        """Nothing: the guest's own kernel ends whoever needs too much in there, and the machine lives on."""
        return 0.0

    async def memory(self) -> Memory:
        return await asyncio.to_thread(memory.of_vmm, self._alive().pid)

    async def ended(self) -> EndReason:
        if self._process is not None:
            await launch.ended(self._process)
        if self._stopped or self._process is None:
            return "stopped"
        await asyncio.to_thread(self._process.reap)
        killed = await asyncio.to_thread(self._cgroup.oom_kills)
        return "oom" if killed else "exited"

    @property
    def over(self) -> bool:
        return self._process is None or self._process.over

    def let_go(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    async def stop(self) -> None:
        await asyncio.to_thread(self._stop)
        self.let_go()


M = TypeVar("M", bound=HypervisorMachine)


class HypervisorRuntime(ABC, Generic[M]):
    """See `base.Runtime`, and for the arguments the docstrings of the drivers."""

    def __init__(self, *, root: Path, group: str, clone: Callable[[Path, Path], None], cache: Path | None, patience: float) -> None:
        self.patience = patience
        self.version = ""
        self.key = ""
        self.root = root
        self.clone = clone
        self.users = Users()
        self._verdicts = microvms.Verdicts(cache or root / "cache")
        self._group = cgroups.Group(group)

    # What differs.

    @abstractmethod
    def _machine(self, spec: MachineSpec) -> M: ...

    @abstractmethod
    def remove_files(self, machine: str) -> None:
        """What is left of a machine below `root`."""

    def _with_files(self) -> set[str]:
        """The machines of which there are files below `root`."""
        return set()

    # The same for all.

    def cgroup(self, machine: str) -> cgroups.MachineCgroup:
        return self._group.of(machine)

    async def prepare(self, spec: MachineSpec) -> M:
        machine = self._machine(spec)
        try:
            await to_the_end(machine.prepare)
        except BaseException:
            await machine.stop()
            raise
        return machine

    def forget(self, copied: Path) -> None:
        """Nothing is in memory, unless the driver says so."""

    async def adopt(self, spec: MachineSpec) -> M | None:
        machine = self._machine(spec)
        alive = await asyncio.to_thread(machine.find_again)
        return machine if alive else None

    async def sweep(self, keep: Collection[MachineId]) -> list[MachineId]:
        return await asyncio.to_thread(self._sweep, frozenset(keep))

    def _sweep(self, keep: frozenset[str]) -> list[MachineId]:
        gone = sorted((self._group.machines() | self._with_files()) - keep)
        for machine in gone:
            self.cgroup(machine).remove()
            self.remove_files(machine)
            self.users.forget(machine)
        return [MachineId(machine) for machine in gone]
