"""What a sandbox or a saved state takes of this host now. Looks from outside: wakes nothing, and is no activity."""

from __future__ import annotations

import asyncio
import contextlib

from pandastack.errors import RuntimeFailed, SnapshotNotFound
from pandastack.host.registry import Registry
from pandastack.host.runtimes.base import Memory
from pandastack.host.sandbox import Sandbox
from pandastack.host.storage.snapshots import Snapshots
from pandastack.host.storage.space import Space
from pandastack.wire.usage import Location, SandboxUsage, StateUsage


async def of_sandbox(registry: Registry, snapshots: Snapshots, sandbox: Sandbox) -> SandboxUsage:
    """One that changes its state meanwhile is told as it was at some instant of it."""
    machine, status, saved = sandbox.machine, sandbox.status, sandbox.entry.snapshot
    memory, disk, stored = Memory(), Space(), Space()
    if machine is not None:
        with contextlib.suppress(RuntimeFailed):  # It has just ended.
            memory = await machine.memory()
        disk = await asyncio.to_thread(registry.machines(sandbox).disk_space, machine)
    if status == "hibernated":
        with contextlib.suppress(SnapshotNotFound):
            stored = await asyncio.to_thread(snapshots.space, saved)
    return SandboxUsage(
        id=sandbox.id,
        status=status,
        memory_own_bytes=memory.own_bytes,
        memory_shared_bytes=memory.shared_bytes,
        disk_own_bytes=disk.own_bytes,
        disk_shared_bytes=disk.shared_bytes,
        stored_own_bytes=stored.own_bytes,
        stored_shared_bytes=stored.shared_bytes,
    )


async def of_snapshot(snapshots: Snapshots, snapshot_id: str) -> StateUsage:
    """Raises SnapshotNotFound."""
    found = await asyncio.to_thread(snapshots.space, snapshot_id)
    location: Location = "local" if snapshots.get(snapshot_id).away is None else "store"
    return StateUsage(own_bytes=found.own_bytes, shared_bytes=found.shared_bytes, location=location)
