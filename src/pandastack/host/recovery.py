"""Starting again: what of an earlier life of this daemon still runs, what is saved, and what was only half made.

Part of the conductor; called once, before any request is served. Truth is the kernel and the ledger: a machine is taken over
when its process is the one that was remembered and its guest answers; everything that nobody remembers is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import structlog

from pandastack.errors import GuestError, PandastackError, RuntimeFailed, SnapshotNotFound
from pandastack.host.ledger import Entry
from pandastack.host.registry import Registry
from pandastack.host.runtimes.base import Machine, MachineId
from pandastack.host.sandbox import Sandbox
from pandastack.host.storage.snapshots import Snapshots

log = structlog.get_logger(__name__)

_ONCE_THE_ONLY_ONE = "gvisor"  # What entries that name no runtime were on.


async def recover(registry: Registry, snapshots: Snapshots) -> None:
    """Find the sandboxes of an earlier life; clear what was half made. Raises HostUnfit, before anything is changed.

    One whose runtime does not work any more is failed if it ran; a hibernated one stays what it is, for the day on which it does.
    """
    await asyncio.to_thread(snapshots.open)
    entries = registry.ledger.open()
    for entry in entries:
        entry.runtime = entry.runtime or _ONCE_THE_ONLY_ONE
    running = {entry.runtime for entry in entries if entry.state == "running"}
    await registry.backends.open(running)
    for entry in entries:
        if not entry.isolation and (backend := registry.backends.find(entry.runtime)) is not None:
            entry.isolation, entry.own_kernel = backend.facts["isolation"], backend.facts["own_kernel"]
    keep: dict[str, set[MachineId]] = {}
    for entry in entries:
        if entry.state == "creating":
            registry.ledger.remove(entry.request.id)
            registry.tell("gone", entry.request.id, "half created")
        elif entry.state == "failed":
            registry.keep(Sandbox(entry, None))
        elif entry.state == "hibernated":
            _remember(registry, snapshots, entry)
        elif registry.backends.find(entry.runtime) is None:
            _lose(registry, Sandbox(entry, None), "runtime_missing")
        elif await _adopt(registry, entry):
            keep.setdefault(entry.runtime, set()).add(MachineId(entry.machine))
        else:
            _lose(registry, Sandbox(entry, None), "host_restarted")
    for name in running:
        await registry.backends.give_up(name)
    swept = await registry.backends.sweep(keep)
    cleared = await snapshots.sweep({sandbox.entry.snapshot for sandbox in registry.list()})
    if entries or swept or cleared:
        log.info("recovered", adopted=sum(map(len, keep.values())), known=len(entries), cleared=swept + cleared)


def _remember(registry: Registry, snapshots: Snapshots, entry: Entry) -> None:
    sandbox = Sandbox(entry, None)
    try:
        sandbox.stored_bytes = snapshots.get(entry.snapshot).size_bytes
    except SnapshotNotFound:
        _lose(registry, sandbox, "state_lost")
    else:
        registry.keep(sandbox)


def _lose(registry: Registry, sandbox: Sandbox, reason: str) -> None:
    sandbox.status = sandbox.entry.state = "failed"
    sandbox.entry.reason = reason
    registry.ledger.write(sandbox.entry)
    registry.keep(sandbox)
    registry.tell("failed", sandbox.id, reason)


async def _adopt(registry: Registry, entry: Entry) -> bool:
    sandbox = Sandbox(entry, None)
    try:
        machine = await registry.machines(sandbox).adopt(MachineId(entry.machine), Path(entry.rootfs), sandbox.limits)
    except (PandastackError, OSError) as error:
        # One that resists must not keep this host, and all the others with it, from starting.
        log.error("sandbox could not be looked for", sandbox_id=sandbox.id, error=str(error))
        return False
    if machine is None:
        return False
    try:
        await _take_over(registry, sandbox, machine)
    except (GuestError, RuntimeFailed, OSError) as error:
        log.warning("sandbox was found but does not answer", sandbox_id=sandbox.id, error=str(error))
        with contextlib.suppress(PandastackError):  # What is left then is swept.
            await registry.machines(sandbox).discard(machine)
        return False
    return True


async def _take_over(registry: Registry, sandbox: Sandbox, machine: Machine) -> None:
    guest = await registry.connect(sandbox, machine)
    health = await guest.health()
    if health.sealed:
        # The daemon died while it was saving this one.
        await guest.unseal()
    sandbox.machine, sandbox.guest = machine, guest
    registry.admission.reserve(sandbox.id, sandbox.limits, known=True)
    registry.enter(sandbox)
    sandbox.activity(health.live)
    registry.tell("adopted", sandbox.id)
    if sandbox.entry.paused:
        sandbox.status, sandbox.frozen = "paused", True
        await machine.freeze()
        registry.tell("paused", sandbox.id, sandbox.entry.reason)
