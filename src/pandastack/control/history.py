"""The time machine: what points a sandbox has, and how it becomes one of them again.

    restore: undo row `capturing` (durable) -> host.rewind -> undo row `durable` -> sandbox row `running` -> answer

The host saves what the sandbox is at the very instant from which it goes back, so nothing is lost between the two. If this
process dies in between, `reconcile` keeps the undo point wherever the host has it, and believes the host about the sandbox.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import structlog

from pandastack.control.access import Caller
from pandastack.control.checkpoints import Checkpoints
from pandastack.control.creates import Creates
from pandastack.control.hosts import Host
from pandastack.control.meters import Meters
from pandastack.control.quotas import Admit, Quotas
from pandastack.control.sandboxes import Sandboxes, not_usable, view
from pandastack.control.snapshots import Snapshots, facts_of
from pandastack.control.states import States
from pandastack.control.store import Store
from pandastack.control.store.sandboxes import USABLE, SandboxRow
from pandastack.control.store.snapshots import SnapshotRow
from pandastack.control.work import Crew
from pandastack.errors import PandastackError, QuotaExceeded, SandboxNotFound
from pandastack.wire.host import HostRewind, HostSandbox
from pandastack.wire.snapshots import Restored, RestoreRequest

log = structlog.get_logger(__name__)


class History:
    """The histories of all sandboxes of one host."""

    def __init__(
        self,
        store: Store,
        host: Host,
        creates: Creates,
        sandboxes: Sandboxes,
        states: States,
        snapshots: Snapshots,
        checkpoints: Checkpoints,
        crew: Crew,
        quotas: Quotas,
        meters: Meters,
    ) -> None:
        self._store = store
        self._host = host
        self._creates = creates
        self._sandboxes = sandboxes
        self._states = states
        self._snapshots = snapshots
        self._checkpoints = checkpoints
        self._crew = crew
        self._quotas = quotas
        self._meters = meters

    async def points(self, caller: Caller, sandbox_id: str, *, limit: int | None) -> Sequence[SnapshotRow]:
        """Newest first, whoever took them. Wakes nothing."""
        row = await self._sandboxes.get(caller, sandbox_id)
        return await self._snapshots.list(caller, sandbox_id=row.id, automatic=True, limit=limit)

    async def restore(self, caller: Caller, sandbox_id: str, request: RestoreRequest) -> Restored:
        """The sandbox as it was at one of its points, running; a failed one too. When it fails it goes on as it was.

        Raises SandboxNotFound, SandboxNotRunning, SnapshotNotFound, Conflict (the point is another sandbox's), and what
        `Host.rewind` raises.
        """
        row = await self._sandboxes.get(caller, sandbox_id)
        if row.status not in (*USABLE, "failed"):
            raise not_usable(row)
        point = await self._sandboxes.point(caller, row, request.point, field="point")
        return await self._crew.finish("restore", self._counted(row, point, undo=request.undo))

    async def _counted(self, row: SandboxRow, point: SnapshotRow, *, undo: bool) -> Restored:
        outcome = "internal"
        try:
            restored = await self._restore(row, point, undo=undo)
            outcome = "ok"
            log.info("sandbox.restored", sandbox=row.id, point=point.id)
            return restored
        except PandastackError as error:
            outcome = error.code
            raise
        finally:
            self._meters.restores.labels(outcome).inc()

    async def _restore(self, row: SandboxRow, point: SnapshotRow, *, undo: bool) -> Restored:
        await self._checkpoints.turn(row)
        if row.status == "failed":
            # It counts again from now on.
            self._quotas.admit_sandboxes(await self._store.sandboxes.count(row.tenant_id), 1)
        kept = admit = None
        if undo and row.status != "failed":
            size_bytes, admit = await self._quotas.foresee(row)
            kept = self._snapshots.planned(row, cause="restore", size_bytes=size_bytes)
        with contextlib.ExitStack() as used:
            used.enter_context(self._creates.using(point.id))
            if kept is not None and admit is not None:
                used.enter_context(self._creates.using(kept.id))
                await self._insert(kept, admit)
            try:
                saved = await self._rewound(row, point, kept)
            except BaseException:
                if kept is not None:
                    with contextlib.suppress(Exception):
                        await self._crew.finish("settle undo point", self._snapshots.settle(kept))
                raise
        self._checkpoints.changed(row.id)
        now = await self._store.sandboxes.find(row.tenant_id, row.id)
        if now is None:
            raise SandboxNotFound("no such sandbox")
        return Restored(**view(now).model_dump(), undo_point=kept.id if kept is not None and saved else None)

    async def _insert(self, kept: SnapshotRow, admit: Admit) -> None:
        try:
            await self._store.snapshots.insert(kept.tenant_id, kept, admit)
        except QuotaExceeded as error:
            error.hint = f"restore without an undo point (undo: false), or {error.hint}"
            raise

    async def _rewound(self, row: SandboxRow, point: SnapshotRow, kept: SnapshotRow | None) -> bool:
        """Whether what it was is kept."""
        saved = False

        async def ask() -> HostSandbox:
            nonlocal saved
            done = await self._host.rewind(HostRewind(sandbox=row.id, snapshot=point.id, undo=kept.id if kept is not None else None))
            if kept is not None and done.undo is not None and done.undo.id == kept.id:
                await self._snapshots.complete(kept, facts_of(done.undo))
                saved = True
            elif kept is not None:
                await self._creates.finish_delete_snapshot(kept.id)
            return done.sandbox

        await self._states.rewound(row.id, ask)
        return saved
