"""The fake driver: keeps the contract of `base` with machines that are objects of this process.

One thread serves all guests, as if they were processes of their own: they go on when the event loop of the host that made
them is gone, and the same FakeRuntime handed to a new host lets it adopt them. It can stand for a runtime with a kernel of
its own: then a root is a file, of which each machine has a copy of the size of its disk. A saved state is refused on another
runtime, and with a fixed size by a machine of another size. Steps can be made to fail or to hang by
name: `prepare`, `prepared`, `start`, `restore`, `restored`, `connect`, `snapshot`, `freeze`, `thaw`, `usage`, `memory`, `stop`, `adopt`,
`sweep`, `probe`; in the guest `hello`, each method of the protocol, and `identity` for `machine.identity`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import select
import shutil
import socket
import threading
import time
from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from pandastack.errors import GuestError, GuestGone, PandastackError, RuntimeFailed
from pandastack.host.runtimes.base import Capabilities, Channel, EndReason, MachineId, MachineSpec, Memory, MemorySource, Probe, Usage
from pandastack.host.runtimes.fake.guest import FakeGuest

_SAVED, _MARK, _MADE_ON = "state", "fake-machine", "made-on"
ROOT = "root.img"
_GUEST_STEPS = ("hello", "process.", "file.", "machine.")
_pids = itertools.count(100_001)


class Hang:
    """A step that was told to hang: `reached` is set when it does, and `release` lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._released = threading.Event()

    def release(self) -> None:
        self._released.set()

    async def wait(self) -> None:
        self.reached.set()
        while not self._released.is_set():  # noqa: ASYNC110 - it may be released from another loop or thread
            await asyncio.sleep(0.002)


class FakeMachine:
    """See `base.Machine`."""

    def __init__(self, runtime: FakeRuntime, spec: MachineSpec) -> None:
        self.spec = spec
        self.frozen = False
        self.share = 0.01
        self.guest: FakeGuest | None = None
        self._runtime = runtime
        self._pid = next(_pids)
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._connected = False
        self._over: EndReason | None = None
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._born = time.monotonic()
        (spec.state / _MARK).write_text(spec.id)

    def _made_on(self) -> str:
        """What a machine must be to go on from a state of this one."""
        limits, fixed = self.spec.limits, self._runtime.capabilities.fixed_size
        return f"{self._runtime.name} {math.ceil(limits.cpu)} {limits.memory_mib}" if fixed else self._runtime.name

    async def _step(self, name: str) -> None:
        await self._runtime.step(name)
        if self._over is not None:
            raise RuntimeFailed("the machine is over")

    def _boot(self, saved: str | None) -> None:
        with self._runtime.lock:
            self.guest = FakeGuest(self.spec.limits, self._runtime.guest_fault, saved)
        self._runtime.nudge()

    async def start(self) -> None:
        await self._step("start")
        self._boot(None)

    async def restore(self, snapshot: Path) -> None:
        await self._step("restore")
        try:
            made_on, disk_mib = (snapshot / _MADE_ON).read_text().splitlines()
            if made_on != self._made_on():
                raise ValueError(f"it is of another machine than {self._made_on()}")
            if self._runtime.capabilities.image and int(disk_mib) > self.spec.limits.disk_mib:
                raise ValueError("its disk is larger")
            self._boot(self._runtime.copied.get(snapshot) or (snapshot / _SAVED).read_text())
        except (OSError, ValueError, SyntaxError) as error:
            raise RuntimeFailed("there is no such saved state", detail=str(error)) from error
        await self._step("restored")

    async def connect(self) -> Channel:
        await self._step("connect")
        fresh, self._connected = not self._connected, True
        fd = os.dup(self._ours.fileno())
        return Channel(read_fd=fd, write_fd=fd, fresh=fresh)

    async def snapshot(
        self, into: Path, *, resume: bool, still: AbstractAsyncContextManager[Any] | None = None, copies: int | None = None
    ) -> None:
        async with still or contextlib.nullcontext():
            await self._step("snapshot")
            with self._runtime.lock:
                if self.guest is None:
                    raise RuntimeFailed("the machine does not run")
                saved = self.guest.save()
                if copies is None:
                    (into / _SAVED).write_text(saved)
                else:
                    self._runtime.copied[into] = saved
                (into / _MADE_ON).write_text(f"{self._made_on()}\n{self.spec.limits.disk_mib}\n")
        if not resume:
            self.end("exited")

    async def freeze(self) -> None:
        await self._step("freeze")
        with self._runtime.lock:
            self.frozen = True

    async def thaw(self) -> None:
        await self._step("thaw")
        self.frozen = False
        self._runtime.nudge()

    async def usage(self) -> Usage:
        await self._step("usage")
        cpu_s = self.guest.cpu_s if self.guest else 0.0
        sizes = {"memory_bytes": 1 << 20, "resident_bytes": 1 << 20, "virtual_bytes": 2 << 20}
        return Usage(pid=self._pid, cpu_s=cpu_s, threads=1, uptime_s=time.monotonic() - self._born, **sizes)

    def memory_share(self) -> float:
        return self.share

    async def memory(self) -> Memory:
        await self._step("memory")
        return Memory(own_bytes=1 << 20)

    async def ended(self) -> EndReason:
        loop = asyncio.get_running_loop()
        waiter = (loop, loop.create_future())
        with self._runtime.lock:
            if self._over is None:
                self._waiters.append(waiter)
            else:
                waiter[1].set_result(None)
        try:
            await waiter[1]
        finally:
            with self._runtime.lock, contextlib.suppress(ValueError):
                self._waiters.remove(waiter)
        assert self._over is not None  # noqa: S101
        return self._over

    @property
    def over(self) -> bool:
        return self._over is not None

    @property
    def memory_source(self) -> MemorySource | None:
        return None

    def let_go(self) -> None:
        """Nothing: both ends live in this process."""

    async def stop(self) -> None:
        await self._runtime.step("stop")
        self.remove()

    def end(self, reason: EndReason) -> None:
        """The machine is over: its guest is gone, and everybody who waits learns why. For tests, too."""
        with self._runtime.lock:
            if self._over is not None:
                return
            self._over = reason
            self.guest = None
            self._theirs.shutdown(socket.SHUT_RDWR)  # The serving thread may hold it open a moment longer.
            self._theirs.close()
            for loop, waiter in self._waiters:
                with contextlib.suppress(RuntimeError):  # That host's loop is gone.
                    loop.call_soon_threadsafe(_finish, waiter)

    def remove(self) -> None:
        self.end("stopped")
        self._ours.close()
        (self.spec.state / _MARK).unlink(missing_ok=True)
        self._runtime.machines.pop(self.spec.id, None)
        self._runtime.nudge()

    # In the serving thread, under the lock.

    def events(self) -> int:
        """What the thread waits for on this machine's socket; 0 while it does not run."""
        if self.guest is None or self.frozen:
            return 0
        return select.POLLIN | (select.POLLOUT if self.guest.out else 0)

    def fileno(self) -> int:
        return self._theirs.fileno()

    def turn(self) -> float | None:
        if self.guest is None or self.frozen:
            return None
        try:
            with contextlib.suppress(BlockingIOError):
                self.guest.receive(self._theirs.recv(1 << 20))
            wake = self.guest.turn(time.monotonic())
            with contextlib.suppress(BlockingIOError):
                while self.guest.out:
                    del self.guest.out[: self._theirs.send(self.guest.out)]
                    self.guest.turn(time.monotonic())
            return wake
        except (GuestGone, OSError):
            self.end("exited")
            return None


def _clone_root(spec: MachineSpec) -> None:
    size_bytes = spec.limits.disk_mib << 20
    if spec.rootfs.stat().st_size > size_bytes:
        raise RuntimeFailed("the image does not fit on the disk")
    shutil.copyfile(spec.rootfs, spec.disk / ROOT)
    os.truncate(spec.disk / ROOT, size_bytes)


def _finish(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class FakeRuntime:
    """See `base.Runtime`. `steps` is every step so far, in order; `machines` are those that were not stopped, `copied` what was
    saved to be copied, by its folder.
    """

    def __init__(
        self,
        name: str = "fake",
        *,
        isolation: str = "none",
        acceleration: str | None = None,
        capabilities: Capabilities | None = None,
    ) -> None:
        self.name = name
        self.isolation = isolation
        self.acceleration = acceleration
        self.capabilities = capabilities or Capabilities(snapshot=True, fork_memory=True, own_kernel=False)
        self.outcome = Probe(works=True, version="1", key=f"{name}-1")  # Of the probe.
        self.lock = threading.RLock()
        self.machines: dict[MachineId, FakeMachine] = {}
        self.copied: dict[Path, str] = {}
        self.steps: list[str] = []
        self._faults: dict[str, list[PandastackError]] = {}
        self._hangs: dict[str, Hang] = {}
        self._thread: threading.Thread | None = None
        self._wake: socket.socket | None = None

    # For tests.

    def fail(self, step: str, error: PandastackError | None = None, times: int = 1) -> None:
        """Make the next `times` of a step fail.

        Of a guest's step the error chooses the way: GuestGone ends the machine, GuestProtocolError sends garbage, GuestTimeout
        never answers, any other refuses (the identity by a report that it was not done).
        """
        step = "machine.identity" if step == "identity" else step
        default = GuestError if step.startswith(_GUEST_STEPS) else RuntimeFailed
        self._faults[step] = [error or default(f"{step} was made to fail")] * times

    def hang(self, step: str) -> Hang:
        """Make the next of a step (none of the guest's) hang until it is released or cancelled."""
        hang = self._hangs[step] = Hang()
        return hang

    # For machines.

    async def step(self, name: str) -> None:
        self.steps.append(name)
        await asyncio.sleep(0)
        if hang := self._hangs.pop(name, None):
            await hang.wait()
        if planned := self._faults.get(name):
            raise planned.pop()

    def guest_fault(self, name: str) -> PandastackError | None:
        self.steps.append(name)
        planned = self._faults.get(name)
        return planned.pop() if planned else None

    def nudge(self) -> None:
        """Have the serving thread look again; it lives as long as there are machines."""
        with self.lock:
            if self._thread is None and self.machines:
                self._wake, theirs = socket.socketpair()
                self._wake.setblocking(False)
                self._thread = threading.Thread(target=self._serve, args=(theirs,), name="fake guests", daemon=True)
                self._thread.start()
            if self._wake is not None:
                with contextlib.suppress(BlockingIOError):
                    self._wake.send(b"!")

    def _serve(self, wake: socket.socket) -> None:
        while True:
            poll = select.poll()
            poll.register(wake, select.POLLIN)
            with self.lock:
                if not self.machines:
                    assert self._wake is not None  # noqa: S101
                    self._wake.close()
                    wake.close()
                    self._wake = self._thread = None
                    return
                machines = list(self.machines.values())
                wakes = [wake_at for one in machines if (wake_at := one.turn()) is not None]
                for one in machines:
                    if events := one.events():
                        poll.register(one.fileno(), events)
            timeout_s = min(60.0, max(0.0, min(wakes, default=math.inf) - time.monotonic()))
            if any(fd == wake.fileno() for fd, _ in poll.poll(timeout_s * 1000 + 0.5)):
                wake.recv(4096)

    # The contract.

    async def probe(self) -> Probe:
        await self.step("probe")
        return self.outcome

    async def prepare(self, spec: MachineSpec) -> FakeMachine:
        await self.step("prepare")
        if self.capabilities.image:
            _clone_root(spec)
        machine = FakeMachine(self, spec)
        self.machines[spec.id] = machine
        try:
            await self.step("prepared")
        except BaseException:
            machine.remove()
            raise
        return machine

    def forget(self, copied: Path) -> None:
        self.copied.pop(copied, None)

    async def adopt(self, spec: MachineSpec) -> FakeMachine | None:
        await self.step("adopt")
        machine = self.machines.get(spec.id)
        if machine is None or machine.guest is None:
            return None
        machine.frozen = False
        self.nudge()
        return machine

    async def sweep(self, keep: Collection[MachineId]) -> list[MachineId]:
        await self.step("sweep")
        gone = sorted(set(self.machines) - set(keep))
        for machine in gone:
            self.machines[machine].remove()
        return gone
