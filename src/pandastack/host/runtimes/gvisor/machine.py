"""One gVisor sandbox: its processes, its stdio and its control. Made and found again by `driver`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import select
import signal
import socket
import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes import cgroups, memory
from pandastack.host.runtimes.base import Channel, EndReason, MachineSpec, Memory, MemorySource, Usage
from pandastack.host.runtimes.waiting import to_the_end

if TYPE_CHECKING:
    from pandastack.host.runtimes.gvisor.driver import GvisorRuntime

# What runsc itself needs beside the guest's memory: sentry and gofer heaps and the tasks that carry guest threads.
OVERHEAD_MIB = 96


class GvisorMachine:
    """See `base.Machine`."""

    def __init__(self, runtime: GvisorRuntime, spec: MachineSpec, cgroup: cgroups.MachineCgroup) -> None:
        self.spec = spec
        self.stdio: tuple[socket.socket, socket.socket] | None = None
        self._connected = False
        self._runtime = runtime
        self._cgroup = cgroup
        self._pid = 0
        self._pidfds: list[int] = []  # The sandbox first, then its gofer.
        self._running = False
        self._stopped = False
        self._frozen = False
        self._control = runtime.control(spec)
        self._born = time.monotonic()

    @property
    def _limit_mib(self) -> int:
        return self.spec.limits.memory_mib + OVERHEAD_MIB

    # Blocking parts, run in worker threads.

    def created(self) -> None:
        """Take over a sandbox that `runsc create` just made: learn its pids, correct its limit."""
        states = list(self._runtime.root.glob(f"{self.spec.id}_sandbox:*.state"))
        if not states:
            raise RuntimeFailed("runsc create left no state")
        state: dict[str, Any] = json.loads(states[0].read_text())
        self._pid, gofer = int(state["sandbox"]["pid"]), int(state["goferPid"])
        self._pidfds = [os.pidfd_open(self._pid), os.pidfd_open(gofer)]
        record = {
            "pid": self._pid,
            "gofer_pid": gofer,
            "started": _start_ticks(self._pid),
            "gofer_started": _start_ticks(gofer),
            "boot_id": _boot_id(),
        }
        (self.spec.state / "machine.json").write_text(json.dumps(record))
        self._cgroup.set_memory(self._limit_mib)

    def find_again(self) -> bool:
        """Recognise the processes of an earlier life of this daemon: pid, start time and boot must all be the same."""
        with contextlib.ExitStack() as undo:
            try:
                record = json.loads((self.spec.state / "machine.json").read_text())
                pidfds = []
                for pid in (int(record["pid"]), int(record["gofer_pid"])):
                    pidfds.append(os.pidfd_open(pid))
                    undo.callback(os.close, pidfds[-1])
            except (OSError, ValueError, KeyError):
                return False
            known = (record["boot_id"], record["started"], record["gofer_started"])
            if known != (_boot_id(), _start_ticks(int(record["pid"])), _start_ticks(int(record["gofer_pid"]))):
                return False
            if any(_has_ended(pidfd) for pidfd in pidfds):
                return False
            kept = self._runtime.keeper.get(self.spec.id)
            if len(kept) != 2:
                for fd in kept:
                    os.close(fd)
                return False
            undo.pop_all()
        self._pid, self._pidfds, self._running = int(record["pid"]), pidfds, True
        self.stdio = (socket.socket(fileno=kept[0]), socket.socket(fileno=kept[1]))
        self._connected = True  # By an earlier life; what it was saying may still be under way.
        if _is_stopped(self._pid):
            # It was frozen when the daemon died. Only then: a sentry that is told to resume without a pause panics.
            self._signal(signal.SIGCONT)
            with contextlib.suppress(RuntimeFailed):
                self._control.resume()
        return True

    def _signal(self, number: signal.Signals) -> None:
        for pidfd in self._pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)

    def _freeze(self, frozen: bool) -> None:
        """Stop the sentry and the gofer, and only those: a release of 2026 gives up when its stub processes are stopped
        from outside, so the guest's threads are parked by `Pause` before.
        """
        if self._frozen == frozen:
            return
        if frozen:
            if self._running:
                self._control.pause()
            self._signal(signal.SIGSTOP)
        else:
            self._signal(signal.SIGCONT)
            if self._running:
                self._control.resume()
        self._frozen = frozen

    def _start(self) -> None:
        self._control.start()
        self._running = True

    def _restore(self, snapshot: Path) -> None:
        self._control.restore(snapshot)
        self._running = True

    def _stop(self) -> None:
        self._stopped = True
        self._cgroup.remove()
        with contextlib.suppress(OSError):
            self._runtime.keeper.drop(self.spec.id)
        self._runtime.remove_files(self.spec.id)
        (self.spec.state / "machine.json").unlink(missing_ok=True)

    # The contract.

    async def start(self) -> None:
        await asyncio.to_thread(self._start)

    async def restore(self, snapshot: Path) -> None:
        await asyncio.to_thread(self._restore, snapshot)

    async def connect(self) -> Channel:
        if self.stdio is None:
            raise RuntimeFailed("the machine has no channel any more")
        stdin, stdout = self.stdio
        fresh, self._connected = not self._connected, True
        return Channel(read_fd=os.dup(stdout.fileno()), write_fd=os.dup(stdin.fileno()), fresh=fresh)

    async def snapshot(
        self, into: Path, *, resume: bool, still: AbstractAsyncContextManager[Any] | None = None, copies: int | None = None
    ) -> None:
        # To its end, also when this is cancelled: whoever cleans up must not meet a sandbox that is still being read.
        async with still or contextlib.nullcontext():
            await to_the_end(functools.partial(self._control.checkpoint, resume=resume), into)

    async def freeze(self) -> None:
        await asyncio.to_thread(self._freeze, True)

    async def thaw(self) -> None:
        if self._frozen:
            await asyncio.to_thread(self._freeze, False)

    async def usage(self) -> Usage:
        return await asyncio.to_thread(self._usage)

    def _usage(self) -> Usage:
        resident = virtual = threads = 0
        page = os.sysconf("SC_PAGE_SIZE")
        for pid in self._cgroup.pids():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                threads += int(fields[17])
                virtual += int(fields[20])
                resident += int(fields[21]) * page
        return Usage(
            pid=self._pid,
            cpu_s=self._cgroup.cpu_seconds(),
            memory_bytes=self._cgroup.memory_bytes(),
            resident_bytes=resident,
            virtual_bytes=virtual,
            threads=threads,
            uptime_s=time.monotonic() - self._born,
        )

    def memory_share(self) -> float:
        return self._cgroup.needed_bytes() / (self._limit_mib << 20)

    async def memory(self) -> Memory:
        # The guest's memory is a file in memory, whose pages are often mapped by no process: only the cgroup knows them all.
        return await asyncio.to_thread(
            lambda: Memory(own_bytes=self._cgroup.own_bytes(), shared_bytes=memory.files_of(self._cgroup.pids()))
        )

    async def ended(self) -> EndReason:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        # A duplicate, so that `stop` may close the original while somebody waits here.
        pidfd = os.dup(self._pidfds[0])
        loop.add_reader(pidfd, over.set)
        try:
            await over.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        if self._stopped:
            return "stopped"
        killed = await asyncio.to_thread(self._cgroup.oom_kills)
        return "oom" if killed else "exited"

    @property
    def over(self) -> bool:
        return not self._pidfds or any(_has_ended(pidfd) for pidfd in self._pidfds)

    @property
    def memory_source(self) -> MemorySource | None:
        return None

    def let_go(self) -> None:
        if self.stdio is not None:
            for end in self.stdio:
                end.close()
            self.stdio = None
        for pidfd in self._pidfds:
            os.close(pidfd)
        self._pidfds = []

    async def stop(self) -> None:
        await asyncio.to_thread(self._stop)
        self.let_go()


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _start_ticks(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return -1


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    except (OSError, IndexError):
        return False


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
