"""Forks: several running copies of one living sandbox, and what becomes of them.

    fork:     rows `creating` for all children (durable) -> host.fork -> all rows `running` + answer; see `creates`
    promote:  delete the other children of the same fork

With a point given (`at`), the children are what the parent was then, whatever it is by now. A child has its parent's ttl, unless the
metadata of the fork has an `explore_ttl`: existing clients bound their candidates by it. All children of a fork have one `fork_tree_id`
and one `fork_parent_id`, as columns and, for existing clients, in their metadata.
"""

from __future__ import annotations

import asyncio
import builtins
import time
import uuid
from collections.abc import Mapping, Sequence

import structlog

from pandastack.control.access import Caller
from pandastack.control.creates import Created, Creates, Plan, Request, digest
from pandastack.control.hosts import Host
from pandastack.control.meters import Meters
from pandastack.control.sandboxes import Sandboxes, view, when
from pandastack.control.settings import ControlSettings
from pandastack.control.states import States
from pandastack.control.store import Store
from pandastack.control.store.sandboxes import SandboxRow
from pandastack.control.store.snapshots import SnapshotRow
from pandastack.control.work import Crew
from pandastack.errors import Conflict, InvalidRequest, PandastackError, SandboxNotFound
from pandastack.wire.host import HostChild, HostFork, HostSandbox
from pandastack.wire.ids import SandboxId
from pandastack.wire.sandboxes import MAX_METADATA_KEYS
from pandastack.wire.snapshots import Forked, ForkRequest, ForkTreeRequest, Promoted, PromoteRequest

log = structlog.get_logger(__name__)

TREE, PARENT = "fork_tree_id", "fork_parent_id"
EXPLORE_TTL = "explore_ttl"


class Forks:
    """Everything that can be asked about forks, for one host."""

    def __init__(
        self,
        store: Store,
        host: Host,
        creates: Creates,
        sandboxes: Sandboxes,
        states: States,
        crew: Crew,
        settings: ControlSettings,
        meters: Meters,
    ) -> None:
        self._store = store
        self._host = host
        self._creates = creates
        self._sandboxes = sandboxes
        self._states = states
        self._crew = crew
        self._settings = settings
        self._meters = meters

    async def fork(self, caller: Caller, parent_id: str, request: ForkRequest | ForkTreeRequest, key: str | None) -> Created:
        """Running children, all or none, at most once per idempotency key; the parent goes on as it was.

        Raises SandboxNotFound, SandboxNotRunning, InvalidRequest, and what `Host.fork` raises.
        """
        # What was asked, of whom: a key that was used for a create or another parent is used with another body.
        meaning = {"fork": parent_id, "metadata": request.metadata, "count": request.count}
        if request.at is not None:
            meaning["at"] = request.at
        asked = Request(caller.tenant, key, digest(meaning), count=request.count)

        async def plan(ids: Sequence[SandboxId]) -> Plan:
            if request.at is None:
                return self._plan(await self._states.usable(caller, parent_id), request, ids, None)
            # What the parent is by now makes no difference to what it was.
            parent = await self._sandboxes.get(caller, parent_id)
            return self._plan(parent, request, ids, await self._sandboxes.point(caller, parent, request.at, field="at"))

        return await self._creates.once(asked, plan, outcomes=self._meters.forks, seconds=self._meters.fork_s)

    def _plan(
        self, parent: SandboxRow, request: ForkRequest | ForkTreeRequest, ids: Sequence[SandboxId], point: SnapshotRow | None
    ) -> Plan:
        tree_id, now_us = str(uuid.uuid4()), time.time_ns() // 1000
        metadata = {**parent.metadata, **request.metadata} | {TREE: tree_id, PARENT: parent.id}
        if len(metadata) > MAX_METADATA_KEYS + 2:
            raise InvalidRequest(f"metadata: with its parent's, a child would have more than {MAX_METADATA_KEYS} keys", field="metadata")
        rows = [
            SandboxRow(
                id=child_id,
                tenant_id=parent.tenant_id,
                host_id=parent.host_id,
                status="creating",
                template=parent.template,
                template_actual=parent.template_actual,
                template_note=parent.template_note,
                cpu=parent.cpu,
                memory_mb=parent.memory_mb,
                disk_mb=parent.disk_mb,
                persistent=parent.persistent,
                ttl_seconds=_explore_ttl(request.metadata, self._settings) or parent.ttl_seconds,
                created_us=now_us,
                metadata=metadata,
                fork_parent_id=parent.id,
                fork_tree_id=tree_id,
            )
            for child_id in ids
        ]
        children = [HostChild(id=child_id, hostname=f"sandbox-{child_id[:8]}") for child_id in ids]
        wanted = HostFork(parent=parent.id, children=children, snapshot=point.id if point is not None else None)

        async def make() -> builtins.list[HostSandbox]:
            with self._creates.using(wanted.snapshot):
                return await self._host.fork(wanted)

        def render(ends: Sequence[SandboxRow]) -> bytes:
            children = [view(row) for row in ends]
            told = Forked(
                tree_id=tree_id,
                parent_id=parent.id,
                # A capture that is made for the children only is not kept, so there is none to name.
                snapshot_id=point.id if point is not None else "",
                sandbox=children[0],
                children=children,
                at=when(now_us),
            )
            return told.model_dump_json().encode()

        return Plan(rows, make, self._settings.state_timeout_s, render)

    async def promote(self, caller: Caller, sandbox_id: str, request: PromoteRequest) -> Promoted:
        """Let one child of a fork win; with `cleanup_siblings` the others of the same fork are deleted, and nothing else is.

        It can be repeated: siblings that could not be deleted are told, and tried again. Raises Conflict for what is no
        child of a fork, or of another one than `tree_id` names.
        """
        row = await self._states.usable(caller, sandbox_id)
        if row.fork_tree_id is None:
            raise Conflict("this sandbox is not the child of a fork")
        if request.tree_id is not None and request.tree_id != row.fork_tree_id:
            raise Conflict("this sandbox belongs to another fork tree", field="tree_id", tree_id=row.fork_tree_id)
        deleted: list[str] = []
        failures: dict[str, str] = {}
        if request.cleanup_siblings:
            deleted, failures = await self._crew.finish("promote", self._delete_siblings(row))
        return Promoted(winner=row.id, tree_id=row.fork_tree_id, deleted=deleted, failures=failures)

    async def _delete_siblings(self, winner: SandboxRow) -> tuple[list[str], dict[str, str]]:
        siblings = await self._store.sandboxes.siblings(winner.tenant_id, winner)
        ends = (self._sandboxes.delete_of(winner.tenant_id, sibling.id, cause="promote") for sibling in siblings)
        outcomes = await asyncio.gather(*ends, return_exceptions=True)
        deleted: list[str] = []
        failures: dict[str, str] = {}
        for sibling, outcome in zip(siblings, outcomes, strict=True):
            if outcome is None or isinstance(outcome, SandboxNotFound):
                deleted.append(str(sibling.id))
            elif isinstance(outcome, Exception):
                log.warning("promote.sibling_stays", sandbox=sibling.id, error=repr(outcome))
                failures[sibling.id] = outcome.message if isinstance(outcome, PandastackError) else "internal error"
            else:
                raise outcome
        return deleted, failures


def _explore_ttl(metadata: Mapping[str, str], settings: ControlSettings) -> int | None:
    """Seconds, as clients of 0.10 ask for their candidates; they have no other way to say it. None for what is no such number."""
    text = metadata.get(EXPLORE_TTL, "")
    seconds = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    return seconds if 0 < seconds <= settings.max_ttl_seconds else None
