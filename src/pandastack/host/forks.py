"""Forks: live clones of a sandbox, made of one capture, all or none. The order of steps, and their undo.

    reserved and remembered, xN -> machines prepared, while the parent is captured -> restored xN -> identity xN -> running

Only what fork does that the other verbs do not is here; how a sandbox is brought to stand still is in `states`. The capture is
not a snapshot: it is not made durable, and it is gone when the last child has read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pandastack.host import identity
from pandastack.host.backends import Backend
from pandastack.host.ledger import Entry
from pandastack.host.machines import Machines, Shape
from pandastack.host.runtimes.base import Machine
from pandastack.host.sandbox import Sandbox
from pandastack.host.states import States
from pandastack.wire.host import HostChild, HostCreate, HostFork
from pandastack.wire.ids import SnapshotId

T = TypeVar("T")


class Forks:
    """`root` is where captures lie while children read them: a folder on a disk, or on a tmpfs."""

    def __init__(self, states: States, root: Path) -> None:
        self._states = states
        self._registry = states.registry
        self._root = root

    def open(self) -> None:
        """Remove what a killed daemon left."""
        shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir(mode=0o700, parents=True)

    async def fork(self, request: HostFork) -> list[Sandbox]:
        """See `control.hosts.Host.fork`. Deleting the first child while it is under way undoes all of it."""
        known = [self._registry.find(child.id) for child in request.children]
        if all(known):
            return [sandbox for sandbox in known if sandbox is not None]
        parent = self._registry.get(request.parent)
        return await self._states.once("fork", request.children[0].id, lambda: self._fork(parent, request.children, request.snapshot))

    async def _fork(self, parent: Sandbox, children: Sequence[HostChild], snapshot: SnapshotId | None) -> list[Sandbox]:
        backend = await self._registry.backends.usable(parent.entry.runtime)
        with self._registry.backends.refills.paused():
            return await self._make(parent, backend, children, snapshot)

    async def _make(self, parent: Sandbox, backend: Backend, children: Sequence[HostChild], snapshot: SnapshotId | None) -> list[Sandbox]:
        started = time.monotonic()
        machines = backend.machines
        entries = [_entry(parent, backend, child) for child in children]
        async with contextlib.AsyncExitStack() as undo:
            for entry in entries:
                self._registry.admission.reserve(entry.request.id, parent.limits)
                undo.callback(self._registry.admission.release, entry.request.id)
                self._registry.ledger.write(entry)
                undo.callback(self._registry.ledger.remove, entry.request.id)
            shape = Shape(Path(parent.entry.rootfs), parent.limits, machines.guest.parent / parent.entry.guest)
            # Machines are prepared while the parent is captured; on a machine with two cores neither hurts the other much.
            preparing = [asyncio.create_task(self._prepare(machines, shape), name=f"prepare {entry.request.id}") for entry in entries]
            undo.push_async_callback(self._discard, machines, preparing)
            async with self._captured(parent, backend, len(children)) if snapshot is None else self._kept(parent, snapshot) as folder:
                children_made = [self._child(machines, task, folder, entry, undo) for task, entry in zip(preparing, entries, strict=True)]
                made = await _every(children_made)
            for sandbox in made:
                sandbox.entry.state = "running"
                sandbox.entry.boot_ms = round((time.monotonic() - started) * 1000)
                self._registry.ledger.write(sandbox.entry)
            undo.pop_all()
        for sandbox in made:
            self._registry.enter(sandbox)
        return made

    async def _prepare(self, machines: Machines, shape: Shape) -> Machine:
        async with self._registry.starts:
            return await machines.prepared(shape)

    async def _discard(self, machines: Machines, preparing: Sequence[asyncio.Task[Machine]]) -> None:
        for task in preparing:
            task.cancel()
        for outcome in await asyncio.gather(*preparing, return_exceptions=True):
            if not isinstance(outcome, BaseException):
                await machines.discard(outcome)

    @contextlib.asynccontextmanager
    async def _captured(self, parent: Sandbox, backend: Backend, copies: int) -> AsyncIterator[Path]:
        """A folder with the parent's state, for as long as the block lasts. The parent goes on before the block begins."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(parent.lock)
            if parent.status == "hibernated":
                # Its saved state will do; the lock keeps a wake from giving it back meanwhile.
                saved = await self._states.snapshots.check(parent.entry.snapshot)
                yield self._states.key(saved).snapshot
                return
            folder = self._root / uuid.uuid4().hex
            await asyncio.to_thread(folder.mkdir, 0o700)
            async with contextlib.AsyncExitStack() as left:
                left.callback(self._clear, parent.id, folder)
                left.callback(backend.runtime.forget, folder)
                await self._states.capture(parent, folder, "fork", copies=copies)
                await stack.aclose()
                yield folder

    def _clear(self, name: str, folder: Path) -> None:
        self._states.later(name, asyncio.to_thread(shutil.rmtree, folder, True))

    @contextlib.asynccontextmanager
    async def _kept(self, parent: Sandbox, snapshot: SnapshotId) -> AsyncIterator[Path]:
        """The same of an earlier moment; whatever the parent is by now, it stays that."""
        async with self._states.opened(await self._states.own(parent, snapshot)) as saved:
            yield self._states.key(saved).snapshot

    async def _child(
        self, machines: Machines, preparing: asyncio.Task[Machine], folder: Path, entry: Entry, undo: contextlib.AsyncExitStack
    ) -> Sandbox:
        machine = await preparing
        entry.machine = machine.spec.id
        self._registry.ledger.write(entry)
        fresh = identity.fresh(entry.request.id, entry.request.hostname, entry.env)
        async with self._registry.starts:
            ready = await machines.continued(machine, folder)
            undo.push_async_callback(ready.guest.close)
            await identity.confirm(ready.guest, fresh)
        entry.token, entry.machine_id = fresh.token, fresh.machine_id
        sandbox = Sandbox(entry, machine)
        sandbox.guest = ready.guest
        return sandbox


def _entry(parent: Sandbox, backend: Backend, child: HostChild) -> Entry:
    """What a child has of its parent: everything but its names and secrets."""
    request = HostCreate(**{**parent.entry.request.model_dump(), "id": child.id, "hostname": child.hostname, "snapshot": None})
    own = {"request": request, "state": "creating", "machine": "", "token": "", "machine_id": "", "boot_mode": "fork", "boot_ms": 0}
    return parent.entry.model_copy(update={**own, **backend.facts, "reason": None, "paused": False, "snapshot": ""})


async def _every(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order, or the first error after the others were cancelled and have ended."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
