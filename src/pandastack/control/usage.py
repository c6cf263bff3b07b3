"""What a workspace and its things take of the machine. Nothing here wakes a sandbox or counts as work in it."""

from __future__ import annotations

from pandastack.control.access import Caller
from pandastack.control.hosts import Host, deadline
from pandastack.control.quotas import Quotas
from pandastack.control.sandboxes import Sandboxes
from pandastack.control.settings import ControlSettings
from pandastack.control.store import Store
from pandastack.control.store.snapshots import SnapshotRow
from pandastack.errors import NotFoundError, PandastackError
from pandastack.wire.usage import SandboxUsage, StateUsage, WorkspaceUsage


class Usages:
    """Asked of one host, and of the records."""

    def __init__(self, store: Store, host: Host, sandboxes: Sandboxes, quotas: Quotas, settings: ControlSettings) -> None:
        self._store = store
        self._host = host
        self._sandboxes = sandboxes
        self._quotas = quotas
        self._settings = settings

    async def of_sandbox(self, caller: Caller, sandbox_id: str) -> SandboxUsage:
        """All zeros for one that its host does not have, or not yet. Raises SandboxNotFound."""
        row = await self._sandboxes.get(caller, sandbox_id)
        try:
            async with deadline(self._settings.host_timeout_s):
                found = await self._host.usage(row.id)
        except NotFoundError:
            found = SandboxUsage(id=row.id, status=row.status)
        return found.model_copy(update={"status": row.status})

    async def of_snapshot(self, row: SnapshotRow) -> StateUsage | None:
        """None for one that its host does not have, or not yet, and where the host does not say: the record is told even so."""
        try:
            async with deadline(self._settings.host_timeout_s):
                return await self._host.snapshot_usage(row.id)
        except PandastackError:
            return None

    async def of_workspace(self, caller: Caller) -> WorkspaceUsage:
        sandboxes = await self._store.sandboxes.count(caller.tenant)
        snapshots, snapshot_bytes = await self._store.snapshots.totals(caller.tenant)
        hibernated_bytes = await self._quotas.hibernated_bytes(caller.tenant)
        return WorkspaceUsage(
            sandboxes=self._quotas.of_sandboxes(sandboxes),
            snapshots=self._quotas.of_snapshots(snapshots),
            stored_bytes=self._quotas.of_stored(snapshot_bytes + hibernated_bytes),
            snapshot_bytes=snapshot_bytes,
            hibernated_bytes=hibernated_bytes,
        )
