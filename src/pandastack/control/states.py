"""What a living sandbox can be: running, paused (in memory, without CPU), hibernated (on disk only).

    running <-> paused        host.pause, host.resume
    running <-> hibernated    host.hibernate, host.wake

The host decides, the row repeats what it said. Changes of one sandbox take turns in this process, each from the question to
the host until its answer is recorded, so rows can not end up in an order in which the host never was. A host also changes
states by itself (a request wakes, a shutdown hibernates); it tells so, and `agree` asks how things are now rather than
believing news that may be old. Whatever a row says, nothing breaks: a host brings a sandbox back for a request that needs it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from pandastack.control.access import Caller
from pandastack.control.hosts import Host, deadline
from pandastack.control.meters import Meters
from pandastack.control.sandboxes import Sandboxes, not_usable
from pandastack.control.settings import ControlSettings
from pandastack.control.store import Store
from pandastack.control.store.sandboxes import USABLE, SandboxRow
from pandastack.control.work import Crew, Turns
from pandastack.errors import Conflict, PandastackError, SandboxNotFound, SandboxNotRunning
from pandastack.wire.host import HostSandbox
from pandastack.wire.ids import SandboxId

log = structlog.get_logger(__name__)

SLOW = "the host did not finish the change of state in time"


class States:
    """The states of all sandboxes of one host."""

    def __init__(self, store: Store, host: Host, sandboxes: Sandboxes, crew: Crew, settings: ControlSettings, meters: Meters) -> None:
        self._store = store
        self._host = host
        self._sandboxes = sandboxes
        self._crew = crew
        self._settings = settings
        self._meters = meters
        self._turns = Turns()
        self._rousing: dict[SandboxId, asyncio.Future[HostSandbox]] = {}
        self._dozing: set[SandboxId] = set()
        self._doze_after: dict[SandboxId, float] = {}

    # Asked for by a client. All of it can be repeated, and is finished even if the client leaves.

    async def pause(self, caller: Caller, sandbox_id: str) -> HostSandbox:
        """A hibernated sandbox stays as it is."""
        row = await self.usable(caller, sandbox_id)
        return await self._crew.finish("pause", self._change(row.id, lambda: self._host.pause(row.id)))

    async def resume(self, caller: Caller, sandbox_id: str) -> HostSandbox:
        return await self._rouse(await self.usable(caller, sandbox_id))

    async def wake(self, caller: Caller, sandbox_id: str) -> HostSandbox:
        return await self._rouse(await self.usable(caller, sandbox_id))

    async def hibernate(self, caller: Caller, sandbox_id: str) -> HostSandbox:
        row = await self.usable(caller, sandbox_id)
        return await self._crew.finish("hibernate", self._hibernate(row.id, "request"))

    async def usable(self, caller: Caller, sandbox_id: str) -> SandboxRow:
        """A sandbox that can be worked in, at once or after it was brought back. Raises SandboxNotFound, SandboxNotRunning."""
        row = await self._sandboxes.get(caller, sandbox_id)
        if row.status not in USABLE:
            raise not_usable(row)
        return row

    async def running(self, caller: Caller, sandbox_id: str) -> SandboxRow:
        """The same, brought back first where need be: once, for all who ask at the same time. Raises as `Host.wake` too."""
        row = await self.usable(caller, sandbox_id)
        if row.status == "running":
            return row
        await self._rouse(row)
        return await self.usable(caller, sandbox_id)

    async def _rouse(self, row: SandboxRow) -> HostSandbox:
        future = self._rousing.get(row.id)
        if future is None:
            future = self._crew.start("wake", self._bring_back(row))
            self._rousing[row.id] = future
            future.add_done_callback(lambda _done: self._rousing.pop(row.id, None))
        return await asyncio.shield(future)

    async def _bring_back(self, row: SandboxRow) -> HostSandbox:
        ask = self._host.resume if row.status == "paused" else self._host.wake
        outcome = "internal"
        try:
            state = await self._change(row.id, lambda: ask(row.id))
            outcome = "ok"
            return state
        except PandastackError as error:
            outcome = error.code
            raise
        finally:
            if row.status == "hibernated":
                self._meters.wakes.labels(outcome).inc()

    # Asked for by the idle timer

    def doze(self, row: SandboxRow) -> None:
        """Begin to hibernate a persistent sandbox that was idle for its ttl, unless that is under way or has just failed."""
        now = time.monotonic()
        self._doze_after = {sandbox_id: after for sandbox_id, after in self._doze_after.items() if after > now}
        if row.id not in self._dozing and row.id not in self._doze_after:
            self._dozing.add(row.id)
            self._crew.start("hibernate idle", self._doze(row))

    async def _doze(self, row: SandboxRow) -> None:
        try:
            await self._hibernate(row.id, "idle", decided_on=row)
        except Conflict:
            log.info("sandbox.busy_again", sandbox=row.id)
        except Exception:
            # It goes on as it was. Trying again at once would stop its processes every few seconds, for nothing.
            self._doze_after[row.id] = time.monotonic() + self._settings.hibernate_retry_s
            raise
        finally:
            self._dozing.discard(row.id)

    # Asked for by the end of this process

    async def hibernate_persistent(self) -> None:
        """Save what is persistent and runs, side by side, within the time an operator grants for it (0: leave all running).

        What is not done by then, or refuses, runs on: the next start finds it.
        """
        budget_s = self._settings.shutdown_hibernate_s
        rows = [row for row in await self._store.sandboxes.list_of_any_tenant("running") if row.persistent] if budget_s else []
        if not rows:
            return
        work = [self._crew.start("hibernate at shutdown", self._hibernate(row.id, "shutdown")) for row in rows]
        _, late = await asyncio.wait(work, timeout=budget_s)
        done = sum(not future.cancelled() and future.done() and future.exception() is None for future in work)
        log.info("shutdown.hibernated", done=done, of=len(rows), late=len(late))

    async def _hibernate(self, sandbox_id: SandboxId, reason: str, *, decided_on: SandboxRow | None = None) -> HostSandbox:
        outcome = "internal"
        idle_for_s = None if decided_on is None else float(decided_on.ttl_seconds)

        async def ask() -> HostSandbox:
            if decided_on is not None and not await self._still_due(decided_on):
                raise Conflict("the sandbox is not due any more")
            return await self._host.hibernate(sandbox_id, reason=reason, idle_for_s=idle_for_s)

        try:
            state = await self._change(sandbox_id, ask)
            outcome = "ok"
            log.info("sandbox.hibernated", sandbox=sandbox_id, cause=reason)
            return state
        except PandastackError as error:
            outcome = error.code
            raise
        finally:
            self._meters.hibernations.labels(reason, outcome).inc()

    async def _still_due(self, row: SandboxRow) -> bool:
        """Whether what its owner had set, when the timer decided, is still set."""
        now = await self._store.sandboxes.find_of_any_tenant(row.id)
        return now is not None and (now.status, now.persistent, now.ttl_seconds, kept_awake(now)) == (
            "running",
            True,
            row.ttl_seconds,
            False,
        )

    # What the host says

    def changing(self, sandbox_id: SandboxId) -> bool:
        """True while somebody here waits for its host and will record what it says."""
        return self._turns.busy(sandbox_id)

    async def agree(self, sandbox_id: SandboxId, reason: str | None = None) -> None:
        """Record the state in which the host has it now. What the host does not know is left to the sweep."""
        async with self._turns.of(sandbox_id):
            try:
                async with deadline(self._settings.host_timeout_s):
                    state = await self._host.get(sandbox_id)
            except SandboxNotFound:
                return
            why = None if state.status == "running" else state.status_reason or reason
            if state.status == "failed":
                await self._store.sandboxes.mark_failed_of_any_tenant(sandbox_id, why or "error", time.time_ns() // 1000)
            elif state.status in USABLE:
                if await self._store.sandboxes.mark_found_of_any_tenant(sandbox_id, state.status, why):
                    log.info("sandbox.found", sandbox=sandbox_id)
                else:
                    await self._record(state, why)

    async def _change(self, sandbox_id: SandboxId, ask: Callable[[], Awaitable[HostSandbox]]) -> HostSandbox:
        """One turn: ask the host, record its answer. Raises where the sandbox can not be used any more when it is over."""
        async with self._turns.of(sandbox_id):
            async with deadline(self._settings.state_timeout_s, SLOW):
                state = await ask()
            if state.status not in USABLE:
                raise SandboxNotRunning(f"the sandbox is {state.status}", sandbox_status=state.status, status_reason=state.status_reason)
            reason = None if state.status == "running" else state.status_reason
            if not await self._record(state, reason):
                row = await self._store.sandboxes.find_of_any_tenant(sandbox_id)
                raise SandboxNotFound("no such sandbox") if row is None else not_usable(row)
            return state

    async def rewound(self, sandbox_id: SandboxId, ask: Callable[[], Awaitable[HostSandbox]]) -> HostSandbox:
        """The same for a restore, which also ends that a sandbox is failed."""
        async with self._turns.of(sandbox_id):
            async with deadline(self._settings.state_timeout_s, SLOW):
                state = await ask()
            if not await self._store.sandboxes.mark_restored_of_any_tenant(sandbox_id, boot_mode=state.boot_mode, boot_ms=state.boot_ms):
                raise SandboxNotFound("no such sandbox")
            return state

    async def _record(self, state: HostSandbox, reason: str | None) -> bool:
        return await self._store.sandboxes.set_state_of_any_tenant(
            state.id, state.status, reason, boot_mode=state.boot_mode, boot_ms=state.boot_ms
        )


def kept_awake(row: SandboxRow) -> bool:
    return row.keep_awake_us is not None and row.keep_awake_us > time.time_ns() // 1000
