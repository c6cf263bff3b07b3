"""One sandbox's life as the control plane sees it: the only place that knows the order of steps.

    create:  placement -> template ready -> row `creating` (durable) -> host.create -> row `running` + stored answer
    delete:  row `deleting` (durable) -> host.delete -> no row

Each step can be repeated, and the row says how far the work came; so a crash between any two steps is healed by
`reconcile`, which runs the second half of `delete`. Work that was begun is finished or undone even if its client leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

from pandastack.control import placement
from pandastack.control.access import Caller
from pandastack.control.hosts import Host, deadline
from pandastack.control.meters import Meters
from pandastack.control.settings import ControlSettings
from pandastack.control.store import Store
from pandastack.control.store.creates import CreateRow
from pandastack.control.store.sandboxes import Position, SandboxRow
from pandastack.control.templates import Bakes
from pandastack.control.work import Crew
from pandastack.errors import (
    CapacityError,
    Conflict,
    IdempotencyConflict,
    InvalidRequest,
    NotFoundError,
    PandastackError,
    SandboxNotFound,
    SandboxNotRunning,
)
from pandastack.wire.host import HostCreate, HostSandbox
from pandastack.wire.ids import SandboxId, TenantId, is_uuid, new_sandbox_id
from pandastack.wire.sandboxes import Lifecycle, LifecyclePatch, SandboxCreate, SandboxMetrics, SandboxView

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Created:
    """The answer to a create: the same bytes for every repetition of an idempotency key."""

    status: int
    body: bytes
    replayed: bool = False


def view(row: SandboxRow) -> SandboxView:
    """The public shape of a record."""
    values: dict[str, Any] = {key: value for key, value in vars(row).items() if key not in ("tenant_id", "created_us", "failed_us")}
    values["cpu"] = int(row.cpu) if row.cpu == int(row.cpu) else row.cpu
    values["created_at"] = datetime.fromtimestamp(row.created_us / 1e6, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return SandboxView(**values)


class Sandboxes:
    """Everything that can be asked about a sandbox, for one host."""

    def __init__(self, store: Store, host: Host, bakes: Bakes, crew: Crew, settings: ControlSettings, meters: Meters) -> None:
        self._store = store
        self._host = host
        self._bakes = bakes
        self._crew = crew
        self._settings = settings
        self._meters = meters
        # Ids whose create runs in this process: the sweep leaves them alone.
        self.in_flight: set[SandboxId] = set()
        self._by_key: dict[tuple[TenantId, str], tuple[bytes, asyncio.Future[Created]]] = {}
        # Set when something may have become due earlier than the expiry loop thinks.
        self.expiry_due = asyncio.Event()

    # Create

    async def create(self, caller: Caller, request: SandboxCreate, key: str | None) -> Created:
        """Make a sandbox, at most one per idempotency key. Raises what placement, the store and the host raise.

        Repetitions of a running create wait for it and are told the same, also where it fails; a failure frees the key.
        """
        digest = _digest(request)
        if key is None:
            return await self._crew.finish("create", self._counted(caller, request, None, digest))
        name = (caller.tenant, key)
        running = self._by_key.get(name)
        if running is None:
            future = self._crew.start("create", self._counted(caller, request, key, digest))
            self._by_key[name] = (digest, future)
            future.add_done_callback(lambda _done: self._by_key.pop(name, None))
            return await asyncio.shield(future)
        if running[0] != digest:
            raise _other_body()
        first = await asyncio.shield(running[1])
        return Created(first.status, first.body, replayed=True)

    async def _counted(self, caller: Caller, request: SandboxCreate, key: str | None, digest: bytes) -> Created:
        began = time.monotonic()
        try:
            created = await self._create(caller, request, key, digest)
        except PandastackError as error:
            self._meters.creates.labels(error.code).inc()
            raise
        except BaseException:
            self._meters.creates.labels("internal").inc()
            raise
        self._meters.creates.labels("replayed" if created.replayed else "ok").inc()
        if not created.replayed:
            self._meters.create_s.observe(time.monotonic() - began)
        return created

    async def _create(self, caller: Caller, request: SandboxCreate, key: str | None, digest: bytes) -> Created:
        now_us = time.time_ns() // 1000
        expire_us = now_us - self._settings.idempotency_keep_s * 1_000_000
        if key is not None:
            before = await self._store.creates.find(caller.tenant, key, newer_than_us=expire_us)
            if before is not None:
                return _replay(before, digest)
        if len(self.in_flight) >= self._settings.creates_in_flight_max:
            raise CapacityError("too many sandboxes are being created at once", retry_after_s=1)
        sandbox_id = new_sandbox_id()
        self.in_flight.add(sandbox_id)
        try:
            async with deadline(self._settings.host_timeout_s):
                info = await self._host.describe()
            place = placement.choose(request, [info], self._settings)
            if place.template.state != "ready":
                await self._bakes.ensure(request.template, wait_s=self._settings.template_wait_s)
            row = SandboxRow(
                id=sandbox_id,
                tenant_id=caller.tenant,
                host_id=place.host_id,
                status="creating",
                template=request.template,
                cpu=place.cpu,
                memory_mb=place.memory_mb,
                disk_mb=place.disk_mb,
                persistent=request.persistent,
                ttl_seconds=place.ttl_seconds,
                created_us=now_us,
                metadata=request.metadata,
            )
            begun = await self._store.creates.begin(caller.tenant, row, key=key, request_hash=digest, expire_before_us=expire_us)
            if not begun and key is not None:
                # Another process took the key between our look and our write.
                raced = await self._store.creates.find(caller.tenant, key, newer_than_us=expire_us)
                if raced is None:
                    raise CapacityError("a create with this key has just failed; ask again", retry_after_s=1)
                return _replay(raced, digest)
            return await self._make(row, request)
        finally:
            self.in_flight.discard(sandbox_id)

    async def _make(self, row: SandboxRow, request: SandboxCreate) -> Created:
        """The steps with side effects. On any failure nothing is left, or the row stays for `reconcile` to undo."""
        wanted = HostCreate(
            id=row.id,
            template=row.template,
            hostname=f"sandbox-{row.id[:8]}",
            env=request.env,
            cpu=row.cpu,
            memory_mb=row.memory_mb,
            disk_mb=row.disk_mb,
        )
        try:
            async with deadline(self._settings.create_timeout_s, "the sandbox did not start before the deadline"):
                made = await self._host.create(wanted)
            facts = _facts(made)
            answer = view(SandboxRow(**{**vars(row), **facts, "status": "running"})).model_dump_json().encode()
            if not await self._store.creates.complete(row.tenant_id, row.id, facts, response_status=201, response_body=answer):
                raise Conflict("the sandbox was deleted while it was being made")
            return Created(201, answer)
        except BaseException:
            # Cancellation (a shutdown that ran out of patience) lands here too: the undo has its own deadline. If the
            # undo fails, the row stays as it is and the sweep tries again; the first error is the one to tell.
            with contextlib.suppress(Exception):
                await self._crew.finish("undo create", self.finish_delete(row.id))
            raise

    # Read

    async def get(self, caller: Caller, sandbox_id: str) -> SandboxRow:
        """Raises SandboxNotFound for what is unknown, malformed, or another tenant's, with the same words."""
        row = await self._store.sandboxes.find(caller.tenant, SandboxId(sandbox_id)) if is_uuid(sandbox_id) else None
        if row is None:
            raise SandboxNotFound("no such sandbox")
        return row

    async def running(self, caller: Caller, sandbox_id: str) -> SandboxRow:
        """The same, and raises SandboxNotRunning unless it can be worked in."""
        row = await self.get(caller, sandbox_id)
        if row.status != "running":
            reason = f" ({row.status_reason})" if row.status_reason else ""
            raise SandboxNotRunning(f"the sandbox is {row.status}{reason}", sandbox_status=row.status, status_reason=row.status_reason)
        return row

    async def list(
        self, caller: Caller, *, status: str | None, metadata: Mapping[str, str], limit: int | None, after: Position | None
    ) -> list[SandboxRow]:
        return await self._store.sandboxes.list(caller.tenant, status=status, metadata=metadata, limit=limit, after=after)

    async def lifecycle(self, caller: Caller, sandbox_id: str) -> Lifecycle:
        row = await self.get(caller, sandbox_id)
        idle_s, reason = 0.0, None
        if row.status == "running":
            try:
                async with deadline(self._settings.host_timeout_s):
                    known = await self._host.get(row.id)
                idle_s, reason = (0.0 if known.busy else known.idle_s), known.idle_reason
            except NotFoundError:
                reason = "unknown to its host"
        return Lifecycle(ttl_seconds=row.ttl_seconds, persistent=row.persistent, idle_seconds=int(idle_s), idle_reason=reason)

    async def set_lifecycle(self, caller: Caller, sandbox_id: str, patch: LifecyclePatch) -> Lifecycle:
        """Effective at once, also where it makes the sandbox due now."""
        row = await self.get(caller, sandbox_id)
        if patch.ttl_seconds is None and patch.persistent is None:
            raise InvalidRequest("give ttl_seconds or persistent", field="ttl_seconds")
        if patch.ttl_seconds is not None:
            placement.check_ttl(patch.ttl_seconds, self._settings)
        changed = await self._store.sandboxes.set_lifecycle(
            caller.tenant, row.id, ttl_seconds=patch.ttl_seconds, persistent=patch.persistent
        )
        if not changed:
            raise SandboxNotFound("no such sandbox")
        self.expiry_due.set()
        return await self.lifecycle(caller, sandbox_id)

    async def metrics(self, caller: Caller, sandbox_id: str) -> SandboxMetrics:
        row = await self.running(caller, sandbox_id)
        async with deadline(self._settings.host_timeout_s):
            return await self._host.metrics(row.id)

    # Delete

    async def delete(self, caller: Caller, sandbox_id: str) -> None:
        """Gone when this returns. A second one finds nothing; two at once both succeed."""
        row = await self.get(caller, sandbox_id)
        await self._crew.finish("delete", self._delete(caller.tenant, row.id))

    async def _delete(self, tenant: TenantId, sandbox_id: SandboxId) -> None:
        if not await self._store.sandboxes.mark_deleting(tenant, sandbox_id):
            raise SandboxNotFound("no such sandbox")
        await self.finish_delete(sandbox_id)
        self._meters.deletes.labels("request").inc()

    async def finish_delete(self, sandbox_id: SandboxId) -> None:
        """The second half of a delete, and the undo of a create; repeating it is harmless."""
        async with deadline(self._settings.host_timeout_s):
            await self._host.delete(sandbox_id)
        await self._store.sandboxes.remove_of_any_tenant(sandbox_id)


def _digest(request: SandboxCreate) -> bytes:
    """Of the meaning, not of the bytes: the order of keys and a default that is spelled out make no difference."""
    canonical = json.dumps(request.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).digest()


def _replay(row: CreateRow, digest: bytes) -> Created:
    if row.request_hash != digest:
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
    }
