"""How much a workspace may have: sandboxes, snapshots, and bytes of saved states. Set by the operator; no limit unless set.

Asked inside the transaction that writes the intent, with what the workspace has at that instant, so that of two requests for the
last place one is refused. What is refused was never begun. Hibernation is counted and never refused: it saves work that would be lost.
"""

from __future__ import annotations

from collections.abc import Callable

from pandastack.control.hosts import Host, deadline
from pandastack.control.settings import ControlSettings
from pandastack.control.store import Store
from pandastack.control.store.sandboxes import SandboxRow
from pandastack.errors import QuotaExceeded
from pandastack.wire.ids import TenantId
from pandastack.wire.usage import Quota

Admit = Callable[[int, int], None]
"""Called with what there is: how many of the thing, and their bytes. Raises QuotaExceeded."""


class Quotas:
    """The limits of every workspace; they are the same for all."""

    def __init__(self, store: Store, host: Host, settings: ControlSettings) -> None:
        self._store = store
        self._host = host
        self._settings = settings
        self._most_sandboxes = settings.quota_sandboxes
        self._most_snapshots = settings.quota_snapshots
        self._most_bytes = None if settings.quota_stored_mb is None else settings.quota_stored_mb << 20

    def admit_sandboxes(self, used: int, more: int) -> None:
        """Whether `more` sandboxes may be made. Raises QuotaExceeded."""
        if self._most_sandboxes is not None and used + more > self._most_sandboxes:
            raise QuotaExceeded(
                f"this workspace may have {self._most_sandboxes} sandboxes, has {used}, and asked for {more} more",
                hint="delete sandboxes, or have the operator raise PANDASTACK_QUOTA_SANDBOXES",
                quota="sandboxes",
                limit=self._most_sandboxes,
                used=used,
            )

    async def foresee(self, sandbox: SandboxRow) -> tuple[int, Admit]:
        """How many bytes a snapshot of that sandbox will take, about (0 where nobody counts), and what says whether it may."""
        more = hibernated = 0
        if self._most_bytes is not None:
            async with deadline(self._settings.host_timeout_s):
                now = await self._host.usage(sandbox.id)
            more = now.memory_own_bytes + now.disk_own_bytes + now.disk_shared_bytes + now.stored_own_bytes + now.stored_shared_bytes
            hibernated = await self.hibernated_bytes(sandbox.tenant_id)
        return more, lambda used, used_bytes: self._admit_snapshot(used, used_bytes + hibernated, more)

    def _admit_snapshot(self, used: int, used_bytes: int, more_bytes: int) -> None:
        if self._most_snapshots is not None and used >= self._most_snapshots:
            raise QuotaExceeded(
                f"this workspace may have {self._most_snapshots} snapshots and has {used}",
                hint="delete snapshots, or have the operator raise PANDASTACK_QUOTA_SNAPSHOTS",
                quota="snapshots",
                limit=self._most_snapshots,
                used=used,
            )
        if self._most_bytes is not None and used_bytes + more_bytes > self._most_bytes:
            raise QuotaExceeded(
                f"this workspace may store {self._most_bytes >> 20} MiB of snapshots and hibernated sandboxes and has {used_bytes >> 20}; "
                f"this one may take {more_bytes >> 20}",
                hint="delete snapshots or hibernated sandboxes, or have the operator raise PANDASTACK_QUOTA_STORED_MB",
                quota="stored_bytes",
                limit=self._most_bytes,
                used=used_bytes,
            )

    async def hibernated_bytes(self, tenant: TenantId) -> int:
        """What the hibernated sandboxes of a workspace take on disk; those of a host that is away count nothing."""
        ours = {row.id for row in await self._store.sandboxes.list(tenant, status="hibernated")}
        if not ours:
            return 0
        async with deadline(self._settings.host_timeout_s):
            return sum(found.stored_bytes for found in await self._host.list() if found.id in ours)

    def of_sandboxes(self, used: int) -> Quota:
        return _quota(used, self._most_sandboxes)

    def of_snapshots(self, used: int) -> Quota:
        return _quota(used, self._most_snapshots)

    def of_stored(self, used_bytes: int) -> Quota:
        return _quota(used_bytes, self._most_bytes)


def _quota(used: int, limit: int | None) -> Quota:
    return Quota(used=used, limit=limit, left=None if limit is None else max(0, limit - used))
