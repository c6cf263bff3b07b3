"""One sandbox of a host, as its conductor keeps it: what was promised, the machine, the way to its guest, and what it does now."""

from __future__ import annotations

import asyncio
import time

from pandastack.errors import SandboxNotRunning
from pandastack.host.guest import Guest
from pandastack.host.ledger import Entry
from pandastack.host.runtimes.base import Limits, Machine
from pandastack.wire.host import HostSandbox, MachineStatus
from pandastack.wire.ids import SandboxId
from pandastack.wire.sandboxes import MEMORY_LOST


class Sandbox:
    """One sandbox of this host, and the way to its guest."""

    def __init__(self, entry: Entry, machine: Machine | None) -> None:
        self.entry = entry
        self.machine = machine
        self.status: MachineStatus = entry.state if entry.state in ("failed", "hibernated") else "starting"
        self.guest: Guest | None = None
        self.requests = 0
        self.working = False  # Commands run inside.
        self.strays = False  # Processes run inside that commands left behind; only looking tells.
        self.heard = time.monotonic()  # When the guest last gave a sign of life.
        self.looked = False  # Since the last sign of life; before, nobody knows whether it is idle.
        self.frozen = False
        self.held = False  # It is being saved: requests wait for their turn, and find it as it is then.
        self.stored_bytes = 0  # On disk, while it is hibernated.
        self.last_busy = time.monotonic()
        self.lock = asyncio.Lock()  # Guards every change of state, and reconnecting.
        self.over = asyncio.Event()  # Set when it has failed.
        self.watch: asyncio.Task[None] | None = None
        self.ending: asyncio.Task[None] | None = None
        self.going = False  # It is being deleted: nothing brings it back.
        self.pressed = False  # It needs nearly all of its memory, which was told.
        self.silences = 0  # How often in a row the guest did not answer while nothing was asked of it.

    @property
    def id(self) -> SandboxId:
        return self.entry.request.id

    @property
    def busy(self) -> bool:
        return self.status == "running" and (self.requests > 0 or self.working or self.strays)

    @property
    def limits(self) -> Limits:
        return Limits(cpu=self.entry.cpu, memory_mib=self.entry.memory_mb, disk_mib=self.entry.disk_mb)

    def idle_for(self, seconds: float) -> bool:
        """Whether nothing has happened for longer than that, as far as a look inside can tell."""
        return self.status == "running" and not self.busy and self.looked and time.monotonic() - self.last_busy > seconds

    def touch(self) -> None:
        self.last_busy = self.heard = time.monotonic()
        self.looked = False

    def activity(self, live: int) -> None:
        """The guest says how many user processes run."""
        self.working = live > 0
        self.touch()

    def view(self) -> HostSandbox:
        idle_s = 0.0 if self.busy or not self.looked else round(time.monotonic() - self.last_busy, 3)
        reason = (
            f"it is {self.status}"
            if self.status != "running"
            else "a request is under way"
            if self.requests
            else "processes run inside"
            if self.working or self.strays
            else "no request and no process"
        )
        entry = self.entry
        return HostSandbox(
            id=self.id,
            status=self.status,
            status_reason=entry.reason,
            template=entry.request.template,
            template_actual=entry.template_actual,
            template_note=entry.template_note,
            runtime=entry.runtime,
            isolation=entry.isolation,
            acceleration=entry.acceleration,
            own_kernel=entry.own_kernel,
            cpu=entry.cpu,
            memory_mb=entry.memory_mb,
            disk_mb=entry.disk_mb,
            boot_mode=entry.boot_mode,
            boot_ms=entry.boot_ms,
            busy=self.busy,
            idle_s=idle_s,
            idle_reason=reason,
            stored_bytes=self.stored_bytes,
        )


def not_running(sandbox: Sandbox, reason: str | None) -> SandboxNotRunning:
    why = {
        "oom": "it used more memory than its limit and was ended",
        "exited": "its first process ended",
        "host_restarted": "its host was restarted and it could not be found again",
        "runtime_missing": "the runtime that it was on does not work on its host any more",
        "state_lost": "what was saved of it is missing or damaged",
        "guest": "the daemon inside broke its protocol or stopped answering",
        **MEMORY_LOST,
    }.get(reason or "", reason or "unknown")
    return SandboxNotRunning(
        f"the sandbox is {sandbox.status}: {why}" if sandbox.status == "failed" else f"the sandbox is {sandbox.status}",
        hint="restore one of its points, or create a new one" if sandbox.status == "failed" else None,
        sandbox_status=sandbox.status,
        status_reason=reason,
    )
