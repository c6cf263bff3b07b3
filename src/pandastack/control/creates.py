"""How sandboxes come to be, one or several at once: all or none, and at most once per idempotency key.

    key looked up -> plan -> rows `creating` + key (durable) -> the host makes them -> rows `running` + answer
                                                   on failure: host.delete, no row, the key is free

A create is a making of one, a fork of many; `sandboxes` and `forks` say what to make (a `Plan`), this says in which order.
A snapshot (`snapshots`) is under the same rule of keys.
Each step can be repeated, and the rows say how far the work came; so a crash between any two steps is healed by
`reconcile`, which runs the undo. Work that was begun is finished or undone even if its client leaves.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Histogram

from pandastack.control.hosts import Host, deadline
from pandastack.control.quotas import Admit, Quotas
from pandastack.control.settings import ControlSettings
from pandastack.control.store import Store
from pandastack.control.store.creates import CreateRow
from pandastack.control.store.sandboxes import SandboxRow
from pandastack.control.store.snapshots import SnapshotRow
from pandastack.control.work import Crew
from pandastack.errors import CapacityError, Conflict, IdempotencyConflict, PandastackError, RuntimeFailed
from pandastack.wire.host import HostSandbox
from pandastack.wire.ids import SandboxId, SnapshotId, TenantId, new_sandbox_id


@dataclass(frozen=True)
class Created:
    """The answer to a create or fork: the same bytes for every repetition of an idempotency key."""

    status: int
    body: bytes
    replayed: bool = False


@dataclass(frozen=True)
class Plan:
    """What to make: the rows as they begin, the call to the host that makes them all, and how the answer looks.

    The host's answer has one state per row, in any order; `render` gets the rows as they end.
    """

    rows: Sequence[SandboxRow]
    make: Callable[[], Awaitable[Sequence[HostSandbox]]]
    timeout_s: float
    render: Callable[[Sequence[SandboxRow]], bytes]


@dataclass(frozen=True)
class Request:
    """Who asks for what, under which key. `digest` is that of the meaning; `count` the sandboxes it will make."""

    tenant: TenantId
    key: str | None
    digest: bytes
    count: int


Planner = Callable[[Sequence[SandboxId]], Awaitable[Plan]]


class Creates:
    """The makings under way in this process. `outcomes` and `seconds` say where each is counted."""

    def __init__(self, store: Store, host: Host, crew: Crew, quotas: Quotas, settings: ControlSettings) -> None:
        self._store = store
        self._host = host
        self._crew = crew
        self._quotas = quotas
        self._settings = settings
        # Ids that are being made in this process: the sweep leaves them alone.
        self.in_flight: set[SandboxId] = set()
        self._used: collections.Counter[SnapshotId] = collections.Counter()
        self._by_key: dict[tuple[TenantId, str], tuple[bytes, asyncio.Future[Created]]] = {}

    @contextlib.contextmanager
    def using(self, snapshot_id: SnapshotId | None) -> Iterator[None]:
        """A snapshot is being made or read in this process: neither the sweep nor thinning takes it away."""
        if snapshot_id is None:
            yield
            return
        self._used[snapshot_id] += 1
        try:
            yield
        finally:
            self._used[snapshot_id] -= 1
            if not self._used[snapshot_id]:
                del self._used[snapshot_id]

    def is_used(self, snapshot_id: SnapshotId) -> bool:
        return snapshot_id in self._used

    async def once(self, request: Request, plan: Planner, *, outcomes: Counter, seconds: Histogram) -> Created:
        """Make what `plan` says. Raises what the plan, the store and the host raise.

        Repetitions of a running one wait for it and are told the same, also where it fails; a failure frees the key.
        """
        return await self.joined(request, lambda: self._create(request, plan), outcomes=outcomes, seconds=seconds)

    async def joined(
        self, request: Request, work: Callable[[], Coroutine[Any, Any, Created]], *, outcomes: Counter, seconds: Histogram
    ) -> Created:
        """Do `work`, or wait for the repetition of it that is under way in this process."""
        if request.key is None:
            return await self._crew.finish("create", _counted(work(), outcomes, seconds))
        name = (request.tenant, request.key)
        running = self._by_key.get(name)
        if running is None:
            future = self._crew.start("create", _counted(work(), outcomes, seconds))
            self._by_key[name] = (request.digest, future)
            future.add_done_callback(lambda _done: self._by_key.pop(name, None))
            return await asyncio.shield(future)
        if running[0] != request.digest:
            raise _other_body()
        first = await asyncio.shield(running[1])
        return Created(first.status, first.body, replayed=True)

    async def answered(self, request: Request) -> Created | None:
        """What was told for this key before. Raises IdempotencyConflict, and CapacityError while it is made elsewhere."""
        if request.key is None:
            return None
        before = await self._store.creates.find(request.tenant, request.key, newer_than_us=self._expire_us())
        return None if before is None else _replay(before, request.digest)

    async def begin(self, request: Request, rows: Sequence[SandboxRow | SnapshotRow], admit: Admit) -> Created | None:
        """Write rows and key, durable before any side effect. What was told, where another process took the key meanwhile.

        `admit` as in the store.
        """
        begun = await self._store.creates.begin(
            request.tenant, rows, key=request.key, request_hash=request.digest, expire_before_us=self._expire_us(), admit=admit
        )
        if begun:
            return None
        # Taken between our look and our write.
        raced = await self.answered(request)
        if raced is None:
            raise CapacityError("a create with this key has just failed; ask again", retry_after_s=1)
        return raced

    def _expire_us(self) -> int:
        return time.time_ns() // 1000 - self._settings.idempotency_keep_s * 1_000_000

    async def _create(self, request: Request, plan: Planner) -> Created:
        if (before := await self.answered(request)) is not None:
            return before
        if self.in_flight and len(self.in_flight) + request.count > self._settings.creates_in_flight_max:
            raise CapacityError("too many sandboxes are being created at once", retry_after_s=1)
        ids = [new_sandbox_id() for _ in range(request.count)]
        self.in_flight.update(ids)
        try:
            planned = await plan(ids)
            if (raced := await self.begin(request, planned.rows, self._quotas.admit_sandboxes)) is not None:
                return raced
            return await self._make(request.tenant, planned)
        finally:
            self.in_flight.difference_update(ids)

    async def _make(self, tenant: TenantId, plan: Plan) -> Created:
        """The steps with side effects. On any failure nothing is left, or rows stay for `reconcile` to undo."""
        try:
            async with deadline(plan.timeout_s, "the sandbox did not start before the deadline"):
                made = {state.id: state for state in await plan.make()}
            if made.keys() != {row.id for row in plan.rows}:
                raise RuntimeFailed("the host made other sandboxes than it was asked for")
            facts = {row.id: _facts(made[row.id]) for row in plan.rows}
            ends = [SandboxRow(**{**vars(row), **facts[row.id], "status": "running"}) for row in plan.rows]
            answer = plan.render(ends)
            if not await self._store.creates.complete(tenant, facts, response_status=201, response_body=answer):
                raise Conflict("the sandbox was deleted while it was being made")
            return Created(201, answer)
        except BaseException:
            # Cancellation (a shutdown that ran out of patience) lands here too: the undo has its own deadline. If the
            # undo fails, the rows stay as they are and the sweep tries again; the first error is the one to tell.
            with contextlib.suppress(Exception):
                await self._crew.finish("undo create", self._undo([row.id for row in plan.rows]))
            raise

    async def _undo(self, sandbox_ids: Sequence[SandboxId]) -> None:
        """Each of them, also where another one resists."""
        outcomes = await asyncio.gather(*(self.finish_delete(sandbox_id) for sandbox_id in sandbox_ids), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def finish_delete(self, sandbox_id: SandboxId) -> None:
        """The second half of a delete, and the undo of a making; repeating it is harmless. Automatic points end with their sandbox."""
        async with deadline(self._settings.host_timeout_s):
            await self._host.delete(sandbox_id)
        for snapshot_id in await self._store.snapshots.mark_automatic_deleting_of_any_tenant(sandbox_id):
            await self.finish_delete_snapshot(snapshot_id)
        await self._store.sandboxes.remove_of_any_tenant(sandbox_id)

    async def finish_delete_snapshot(self, snapshot_id: SnapshotId) -> None:
        """The same for a snapshot, and the undo of a capture."""
        async with deadline(self._settings.host_timeout_s):
            await self._host.delete_snapshot(snapshot_id)
        await self._store.snapshots.remove_of_any_tenant(snapshot_id)


async def _counted(work: Coroutine[Any, Any, Created], outcomes: Counter, seconds: Histogram) -> Created:
    began = time.monotonic()
    try:
        created = await work
    except PandastackError as error:
        outcomes.labels(error.code).inc()
        raise
    except BaseException:
        outcomes.labels("internal").inc()
        raise
    outcomes.labels("replayed" if created.replayed else "ok").inc()
    if not created.replayed:
        seconds.observe(time.monotonic() - began)
    return created


def digest(meaning: Any) -> bytes:
    """Of the meaning, not of the bytes: the order of keys and a default that is spelled out make no difference."""
    return hashlib.sha256(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode()).digest()


def _replay(row: CreateRow, wanted: bytes) -> Created:
    if row.request_hash != wanted:
        raise _other_body()
    if row.response_status is None or row.response_body is None:
        # In progress, but not in this process: its undo did not come through yet, or another process has it.
        raise CapacityError("a create with this key is still in progress", retry_after_s=1)
    return Created(row.response_status, row.response_body, replayed=True)


def _other_body() -> IdempotencyConflict:
    return IdempotencyConflict("this Idempotency-Key was used with another body", field="Idempotency-Key")


def _facts(made: HostSandbox) -> dict[str, Any]:
    """What a host's answer adds to the record."""
    return {
        "template_actual": made.template_actual,
        "template_note": made.template_note,
        "cpu": made.cpu,
        "memory_mb": made.memory_mb,
        "disk_mb": made.disk_mb,
        "boot_ms": made.boot_ms,
        "boot_mode": made.boot_mode,
        "runtime": made.runtime,
        "isolation": made.isolation,
        "acceleration": made.acceleration,
        "own_kernel": made.own_kernel,
    }
