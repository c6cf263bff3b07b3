"""Makes machines and takes them apart again: disk, private directory and runtime, in that order and back.

A `Ready` machine is one step from being a sandbox: its template's state is restored and its guest answers, but the guest is
sealed, so it does nothing before it gets an identity. That is what the slots keep, frozen, and what a create without
a slot makes on the spot. A *blank* machine is prepared and no more: whatever is to be restored, a fork or a hibernated sandbox,
goes into it. A few are kept for the shapes that were wanted last.
Part of the conductor: with `sandboxes` and `bakery` the only ones that know storage, runtime and guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import secrets
import shutil
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from pandastack.errors import DiskFull, PandastackError, RuntimeFailed
from pandastack.host.guest import Guest
from pandastack.host.runtimes.base import Limits, Machine, MachineId, MachineSpec, Runtime
from pandastack.host.slots import Refills, Slots
from pandastack.host.storage.space import Space

RESTORE_TIMEOUT_S = 300.0  # A large state on a slow disk takes minutes.
CONNECT_TIMEOUT_S = 30.0  # An emulated guest on a busy machine has taken more than ten.


@contextlib.contextmanager
def _typed(message: str) -> Iterator[None]:
    """What the kernel refuses becomes an error that callers know."""
    try:
        yield
    except (PandastackError, TimeoutError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("the host's disk is full", hint="free space on the file system of the data directory") from error
        raise RuntimeFailed(message, detail=str(error)) from error


class Storage(Protocol):
    """What gives each machine its `MachineSpec.disk`: see `storage.disks` and `storage.folders`."""

    def path(self, disk: str) -> Path: ...

    async def create(self, disk: str, size_mib: int) -> Path: ...

    async def delete(self, disk: str) -> None: ...

    async def sweep(self, keep: Collection[str]) -> list[str]: ...

    def space(self, disk: str) -> Space: ...


@dataclass(frozen=True)
class Size:
    """The class of sizes for which one saved state will do, on a runtime with `Capabilities.fixed_size`: whole CPUs, and MiB.

    Its file system fills a disk of that size, and can grow after a restore, but never shrink.
    """

    cpus: int
    memory_mib: int
    disk_mib: int

    @classmethod
    def of(cls, limits: Limits) -> Size:
        return cls(math.ceil(limits.cpu), limits.memory_mib, limits.disk_mib)

    def within(self, limits: Limits) -> Limits:
        """Those of a machine that is saved for this size."""
        return replace(limits, cpu=float(self.cpus), memory_mib=self.memory_mib, disk_mib=self.disk_mib)

    @property
    def words(self) -> str:
        return f"{self.cpus} CPUs, {self.memory_mib} MiB of memory and a disk of {self.disk_mib} MiB or more"

    def __str__(self) -> str:
        return f"{self.cpus}x{self.memory_mib}x{self.disk_mib}"


@dataclass(frozen=True)
class Shape:
    """What must be equal for two blank machines to be interchangeable. `guest` as in `SlotKey`."""

    rootfs: Path
    limits: Limits
    guest: Path | None = None


@dataclass(frozen=True)
class SlotKey:
    """What must be equal for two ready machines to be interchangeable. `guest` is the folder of the daemon in the snapshot,
    where that is not the current one.
    """

    rootfs: Path
    limits: Limits
    snapshot: Path
    guest: Path | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.rootfs, self.limits, self.guest)


@dataclass(frozen=True)
class Ready:
    """A restored machine and the session with its sealed guest."""

    machine: Machine
    guest: Guest


class Machines:
    """All of one runtime. `state` holds one private directory per machine; `guest` is the one that sandboxes see as `/.pandastack`.

    `shared` turns a directory that many sandboxes use into the read-only view that a runtime is given. `slots` ready machines are
    kept for each key, whose guests did `rehearse`, and `blanks` blank ones for each shape. The owner runs `run`.
    """

    def __init__(
        self,
        runtime: Runtime,
        disks: Storage,
        *,
        state: Path,
        guest: Path,
        shared: Callable[[Path], Path],
        refills: Refills,
        rehearse: Callable[[Guest], Awaitable[None]] | None = None,
        slots: int = 0,
        blanks: int = 0,
    ) -> None:
        self.runtime = runtime
        self._disks = disks
        self._state = state
        self.guest = guest
        self._shared = shared
        self._rehearse = rehearse
        self.slots: Slots[SlotKey, Ready] = Slots(self.slot, self.discard_ready, refills, size=slots)
        self.blanks: Slots[Shape, Machine] = Slots(self._blank, self.discard, refills, size=blanks)

    async def run(self) -> None:
        """Keep both pools filled until cancelled; then they are given back."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.slots.run(), name=f"refill slots of {self.runtime.name}")
            tasks.create_task(self.blanks.run(), name=f"refill blank machines of {self.runtime.name}")

    def _spec(self, machine: MachineId, rootfs: Path, limits: Limits, disk: Path, guest: Path | None = None) -> MachineSpec:
        # The runtime makes mount points that an image lacks, but not in a read-only view; this one no distribution has.
        with contextlib.suppress(OSError):
            (rootfs / ".pandastack").mkdir(mode=0o755, exist_ok=True)
        return MachineSpec(
            id=machine,
            rootfs=self._shared(rootfs),
            guest=self._shared(guest or self.guest),
            disk=disk,
            state=self._state / machine,
            limits=limits,
        )

    async def adopt(self, machine: MachineId, rootfs: Path, limits: Limits) -> Machine | None:
        """The machine of an earlier life of this daemon, if it still runs."""
        return await self.runtime.adopt(self._spec(machine, rootfs, limits, self._disks.path(machine)))

    async def prepare(self, rootfs: Path, limits: Limits, guest: Path | None = None) -> Machine:
        """A machine that can be started or restored. All or nothing. Raises DiskFull, HostUnfit, RuntimeFailed."""
        machine_id = MachineId("m" + secrets.token_hex(8))
        state = self._state / machine_id
        async with contextlib.AsyncExitStack() as undo:
            with _typed("a sandbox could not be prepared"):
                # Not in a thread: one that a cancelled create left behind would make it after the undo.
                state.mkdir(0o700, parents=True)
            undo.push_async_callback(asyncio.to_thread, shutil.rmtree, state, True)
            undo.push_async_callback(self._disks.delete, machine_id)
            with _typed("a sandbox could not be prepared"):
                disk = await self._disks.create(machine_id, limits.disk_mib)
                machine = await self.runtime.prepare(self._spec(machine_id, rootfs, limits, disk, guest))
            undo.pop_all()
            return machine

    async def _new(self, shape: Shape) -> Machine:
        return await self.prepare(shape.rootfs, shape.limits, shape.guest)

    async def _blank(self, shape: Shape) -> Machine:
        """One that waits; frozen, because even a machine that does nothing yet takes a few per cent of a core."""
        machine = await self._new(shape)
        try:
            await machine.freeze()
        except BaseException:
            await self.discard(machine)
            raise
        return machine

    async def prepared(self, shape: Shape) -> Machine:
        """As `prepare`, at once where a blank machine waits."""
        if shape.guest == self.guest:
            shape = replace(shape, guest=None)
        while (machine := self.blanks.take(shape)) is not None:
            try:
                await machine.thaw()
                if not machine.over:
                    return machine
            except BaseException as error:
                await self.discard(machine)
                if not isinstance(error, RuntimeFailed):
                    raise
            else:
                await self.discard(machine)  # It died while it waited.
        return await self._new(shape)

    async def restored(self, key: SlotKey, *, quiet: bool = True, blank: bool = False) -> Ready:
        """A ready machine. All or nothing. Raises also GuestError where the guest does not answer. `quiet` as in `continued`.

        `blank`: somebody waits for it, so take a machine that was prepared ahead of time.
        """
        machine = await (self.prepared if blank else self._new)(key.shape)
        return await self.continued(machine, key.snapshot, quiet=quiet)

    async def continued(self, machine: Machine, snapshot: Path, *, quiet: bool = False) -> Ready:
        """A prepared machine brought to a saved state; when that fails the machine is gone.

        `quiet`: nobody was speaking with the guest when it was saved, so that the session need not look for its beginning.
        """
        try:
            async with asyncio.timeout(RESTORE_TIMEOUT_S):
                with _typed("a sandbox could not be restored"):
                    await machine.restore(snapshot)
                channel = await machine.connect()
                guest = await Guest.open(channel if quiet else replace(channel, fresh=False), timeout_s=CONNECT_TIMEOUT_S)
                return Ready(machine, guest)
        except BaseException as error:
            await self.discard(machine)
            if isinstance(error, TimeoutError):
                raise RuntimeFailed("the sandbox did not start in time") from error
            raise

    async def slot(self, key: SlotKey) -> Ready:
        """A ready machine that uses no CPU until it is taken."""
        ready = await self.restored(key)
        try:
            if self._rehearse is not None:
                await self._rehearse(ready.guest)
            await ready.machine.freeze()
        except BaseException:
            await self.discard_ready(ready)
            raise
        return ready

    async def discard_ready(self, ready: Ready) -> None:
        """Like `discard`, with the session."""
        await ready.guest.close()
        await self.discard(ready.machine)

    async def discard(self, machine: Machine) -> None:
        """Stop a machine and remove all of it. Idempotent; finishes even if its caller is cancelled."""
        await asyncio.shield(asyncio.ensure_future(self._discard(machine)))

    async def _discard(self, machine: Machine) -> None:
        try:
            await machine.stop()
        finally:
            await self._disks.delete(machine.spec.id)
            await asyncio.to_thread(shutil.rmtree, machine.spec.state, True)

    def disk_space(self, machine: Machine) -> Space:
        """What its disk takes of the host. Blocks briefly."""
        return self._disks.space(machine.spec.id)

    async def sweep(self, keep: Collection[MachineId]) -> int:
        """Remove what machines other than `keep` left behind in this install; returns how many."""
        gone: set[str] = set(await self.runtime.sweep(keep))
        gone.update(await self._disks.sweep(keep))
        gone.update(await asyncio.to_thread(self._sweep_state, frozenset(keep)))
        return len(gone)

    def _sweep_state(self, keep: frozenset[str]) -> list[str]:
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        gone = [path for path in self._state.iterdir() if path.name not in keep]
        for path in gone:
            shutil.rmtree(path, ignore_errors=True)
        return [path.name for path in gone]
