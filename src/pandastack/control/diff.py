"""Comparing the files of two points: which snapshots and sandboxes two ids name, and what their host says of them."""

from __future__ import annotations

import collections
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, contextmanager

from pandastack.control.access import Caller
from pandastack.control.creates import Creates
from pandastack.control.hosts import Host, closing, deadline
from pandastack.control.sandboxes import WHICH_SNAPSHOTS
from pandastack.control.settings import ControlSettings
from pandastack.control.snapshots import Snapshots
from pandastack.control.states import States
from pandastack.control.store.snapshots import RESTORABLE
from pandastack.errors import CapacityError, Conflict, NotFoundError, SandboxNotFound, SnapshotNotFound, SnapshotUnusable
from pandastack.wire.diff import HostChange, HostPoint
from pandastack.wire.ids import HostId, SnapshotId, TenantId

_SLOW = "the comparison was not finished in time"


class Diffs:
    """Everything that can be asked about differences, for one host."""

    def __init__(self, host: Host, creates: Creates, states: States, snapshots: Snapshots, settings: ControlSettings) -> None:
        self._host = host
        self._creates = creates
        self._under_way: Counter[TenantId] = collections.Counter()
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
        with ExitStack() as held:
            held.enter_context(self._turn(caller.tenant))
            for point in (one, two):
                held.enter_context(self._creates.using(SnapshotId(point.id)))
            ends = time.monotonic() + self._settings.diff_timeout_s
            async with closing(self._host.diff(one, two, path, patch=patch)) as found:
                while True:
                    async with deadline(min(self._settings.state_timeout_s, ends - time.monotonic()), _SLOW):
                        change = await anext(found, None)
                    if change is None:
                        return
                    yield change

    @contextmanager
    def _turn(self, tenant: TenantId) -> Iterator[None]:
        """Each comparison may hold two hidden machines: a workspace has only a few of them at a time."""
        if self._under_way[tenant] >= self._settings.diffs_at_once:
            raise CapacityError("too many comparisons are under way in this workspace", retry_after_s=5)
        self._under_way[tenant] += 1
        try:
            yield
        finally:
            self._under_way[tenant] -= 1
            if not self._under_way[tenant]:
                del self._under_way[tenant]

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
            raise NotFoundError("no such snapshot or sandbox", hint=WHICH_SNAPSHOTS) from None
        return row.host_id, HostPoint(kind="sandbox", id=row.id)
