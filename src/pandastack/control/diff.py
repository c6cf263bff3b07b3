"""Comparing the files of two points: which snapshots and sandboxes two ids name, and what their host says of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from pandastack.control.access import Caller
from pandastack.control.hosts import Host, closing, deadline
from pandastack.control.settings import ControlSettings
from pandastack.control.snapshots import Snapshots
from pandastack.control.states import States
from pandastack.control.store.snapshots import RESTORABLE
from pandastack.errors import Conflict, NotFoundError, SandboxNotFound, SnapshotNotFound, SnapshotUnusable
from pandastack.wire.diff import HostChange, HostPoint
from pandastack.wire.ids import HostId

_SLOW = "the comparison was not finished in time"


class Diffs:
    """Everything that can be asked about differences, for one host."""

    def __init__(self, host: Host, states: States, snapshots: Snapshots, settings: ControlSettings) -> None:
        self._host = host
        self._states = states
        self._snapshots = snapshots
        self._settings = settings

    async def changes(self, caller: Caller, a: str, b: str, path: bytes, *, patch: bool) -> AsyncGenerator[HostChange, None]:
        """What became of the files below `path` from `a` to `b`. Nothing that is hibernated is woken for it.

        Raises NotFoundError for an id that names neither a snapshot nor a sandbox of this caller.
        """
        (host, one), (other, two) = await self._point(caller, a), await self._point(caller, b)
        if host != other:
            raise Conflict("the two are on different machines", hint="compare points of one machine")
        async with closing(self._host.diff(one, two, path, patch=patch)) as found:
            while True:
                async with deadline(self._settings.state_timeout_s, _SLOW):
                    change = await anext(found, None)
                if change is None:
                    return
                yield change

    async def _point(self, caller: Caller, name: str) -> tuple[HostId, HostPoint]:
        try:
            saved = await self._snapshots.get(caller, name)
        except SnapshotNotFound:
            pass
        else:
            if saved.status == "capturing":
                raise Conflict("the snapshot is still being captured")
            if saved.status not in RESTORABLE:
                raise SnapshotUnusable("the snapshot cannot be restored", reason=saved.status_reason or "failed")
            return saved.host_id, HostPoint(kind="snapshot", id=saved.id)
        try:
            row = await self._states.usable(caller, name)
        except SandboxNotFound:
            raise NotFoundError("no such snapshot or sandbox") from None
        return row.host_id, HostPoint(kind="sandbox", id=row.id)
