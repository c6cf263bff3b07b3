"""The sandboxes of this host: looking them up, the way to their guests, what is told of them, and how one ends.

Part of the conductor, below `states` and `sandboxes`, which say what happens to a sandbox and in which order. Here is what both
need: one map, one stream of events, and the only two ways out of it (`fail`, `end`).
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
from collections import deque

import structlog

from pandastack.errors import PandastackError, SandboxNotFound
from pandastack.host.admission import Admission
from pandastack.host.backends import Backends
from pandastack.host.guest import Guest
from pandastack.host.ledger import Ledger
from pandastack.host.machines import CONNECT_TIMEOUT_S, Machines, Ready
from pandastack.host.runtimes.base import Machine
from pandastack.host.sandbox import Sandbox, not_running
from pandastack.host.storage.lazy import LazyMemory
from pandastack.wire.host import EventKind, HostEvent, HostSandbox
from pandastack.wire.ids import SandboxId

log = structlog.get_logger(__name__)

_EVENTS_KEPT = 10_000


class Registry:
    """All sandboxes of this host, and the players that hold what they have."""

    def __init__(self, ledger: Ledger, backends: Backends, admission: Admission, lazy: LazyMemory) -> None:
        self.ledger = ledger
        self.lazy = lazy
        self.backends = backends
        self.admission = admission
        # Restores are bound by CPU: more of them at once than cores only makes each of them later.
        self.starts = asyncio.Semaphore(max(2, os.cpu_count() or 1))
        self._all: dict[SandboxId, Sandbox] = {}
        self._events: deque[HostEvent] = deque(maxlen=_EVENTS_KEPT)
        self._sequence = 0
        self._event = asyncio.Event()

    # Looking

    def find(self, sandbox_id: SandboxId) -> Sandbox | None:
        return self._all.get(sandbox_id)

    def get(self, sandbox_id: SandboxId) -> Sandbox:
        sandbox = self._all.get(sandbox_id)
        if sandbox is None:
            raise SandboxNotFound("no such sandbox", sandbox_id=sandbox_id)
        return sandbox

    def list(self) -> builtins.list[Sandbox]:
        return [*self._all.values()]

    def has(self, sandbox: Sandbox) -> bool:
        """False once it was deleted, also where another one has its id now."""
        return self._all.get(sandbox.id) is sandbox and not sandbox.going

    def require(self, sandbox: Sandbox) -> None:
        """Raises SandboxNotFound for one that was deleted, or is being deleted."""
        if not self.has(sandbox):
            raise SandboxNotFound("the sandbox was deleted meanwhile", sandbox_id=sandbox.id)

    def machines(self, sandbox: Sandbox) -> Machines:
        """Those of its runtime. Raises RuntimeUnavailable, but not for one that is in memory."""
        return self.backends.of(sandbox.entry.runtime).machines

    def view(self, sandbox: Sandbox) -> HostSandbox:
        return sandbox.view()

    async def events(self, after: int, timeout_s: float) -> builtins.list[HostEvent]:
        if not (self._events and self._events[-1].seq > after):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._event.wait()
        return [event for event in self._events if event.seq > after]

    def tell(self, kind: EventKind, sandbox_id: SandboxId, reason: str | None = None) -> None:
        self._sequence += 1
        self._events.append(HostEvent(seq=self._sequence, kind=kind, sandbox_id=sandbox_id, reason=reason))
        self._event.set()
        self._event = asyncio.Event()

    # Coming

    def keep(self, sandbox: Sandbox) -> None:
        """Remember one that does not run: failed, or hibernated."""
        self._all[sandbox.id] = sandbox

    def enter(self, sandbox: Sandbox) -> None:
        """It runs, with its guest connected, and its end will be noticed."""
        sandbox.pressed = False
        sandbox.status = "running"
        sandbox.touch()
        if sandbox.guest is not None:
            sandbox.guest.connection.on_activity = sandbox.activity
            # Processes may have come with it, and nobody else will say so.
            sandbox.activity(sandbox.guest.connection.greeting.live)
        self._all[sandbox.id] = sandbox
        sandbox.watch = asyncio.create_task(self._watch(sandbox), name=f"watch {sandbox.id}")

    async def _watch(self, sandbox: Sandbox) -> None:
        machine = sandbox.machine
        assert machine is not None  # noqa: S101
        reason: str = await machine.ended()
        if reason == "exited":
            reason = await self._memory_lost(machine) or reason
        if reason != "stopped":
            await self.fail(sandbox, reason)

    async def fail_those_that_lost_memory(self) -> None:
        """End every sandbox of which a part of the memory could not be fetched; some of them would go on with wrong answers.

        Side by side: to end one may take a while, and no other shall run on meanwhile.
        """

        async def look(sandbox: Sandbox, machine: Machine) -> None:
            if (reason := await self._memory_lost(machine)) is not None:
                await self.fail(sandbox, reason)

        alive = [(one, one.machine) for one in self.list() if one.machine is not None and one.status in ("running", "paused")]
        await asyncio.gather(*(look(sandbox, machine) for sandbox, machine in alive))

    async def _memory_lost(self, machine: Machine) -> str | None:
        """As the reason of a failure; None where all of its memory is there, or can be had."""
        source = machine.memory_source
        if source is None or not self.lazy.shows(source.file):
            return None
        why = await self.lazy.why(source.file, source.user)
        return None if why is None else f"memory_{why}"

    def memory_files(self) -> set[str]:
        """The names of the files of `lazy` that machines have mapped."""
        sources = [sandbox.machine.memory_source for sandbox in self.list() if sandbox.machine is not None]
        return {source.file.name for source in sources if source is not None and self.lazy.shows(source.file)}

    # The way to the guest

    async def reach(self, sandbox: Sandbox) -> tuple[Machine, Guest]:
        """Machine and guest of one that is in memory, thawed and connected. The caller holds its lock.

        Raises SandboxNotRunning.
        """
        machine = sandbox.machine
        if sandbox.status not in ("running", "paused") or machine is None:
            raise not_running(sandbox, sandbox.entry.reason)
        if sandbox.frozen:
            await machine.thaw()
            sandbox.frozen = False
        if sandbox.guest is None or sandbox.guest.closed:
            sandbox.guest = await self.connect(sandbox, machine)
        return machine, sandbox.guest

    async def connect(self, sandbox: Sandbox, machine: Machine) -> Guest:
        guest = await Guest.open(await machine.connect(), token=sandbox.entry.token, timeout_s=CONNECT_TIMEOUT_S)
        guest.connection.on_activity = sandbox.activity
        return guest

    # Going

    async def fail(self, sandbox: Sandbox, reason: str) -> None:
        if sandbox.status in ("failed", "hibernated") or not self.has(sandbox):
            return  # Known already, or safe elsewhere, or deleted: an entry written now would be a ghost after the next restart.
        sandbox.status = "failed"
        sandbox.entry.state = "failed"
        sandbox.entry.reason = reason
        sandbox.over.set()
        sandbox.working = False
        try:
            self.ledger.write(sandbox.entry)
        except PandastackError as error:
            # What it holds must be given back even so; the next life would say "host_restarted" instead.
            log.error("the reason of a failure could not be kept", sandbox_id=sandbox.id, error=error.message)
        log.warning("sandbox failed", sandbox_id=sandbox.id, reason=reason)
        self.tell("failed", sandbox.id, reason)
        await self.end(sandbox)

    async def end(self, sandbox: Sandbox) -> None:
        """Give back all that a sandbox holds; the caller says what it is from now on.

        Finishes even if its caller is cancelled; who asks meanwhile joins it, and after a failure it can be repeated.
        """
        watch, sandbox.watch = sandbox.watch, None
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()
        if sandbox.ending is None or sandbox.ending.done():
            sandbox.ending = asyncio.create_task(self._give_back(sandbox), name=f"end {sandbox.id}")
        await asyncio.shield(sandbox.ending)

    def part(self, sandbox: Sandbox) -> Ready:
        """Take the machine of a sandbox that goes on without one; the caller gives back what that holds.

        Its room is somebody else's from now on: memory and CPU are free in a moment, and it may want room again before that.
        """
        machine, guest, watch = sandbox.machine, sandbox.guest, sandbox.watch
        assert machine is not None  # noqa: S101 - its state was just saved
        assert guest is not None  # noqa: S101
        sandbox.machine = sandbox.guest = sandbox.watch = None
        if watch is not None:
            watch.cancel()
        self.admission.release(sandbox.id)
        return Ready(machine, guest)

    async def _give_back(self, sandbox: Sandbox) -> None:
        guest, sandbox.guest = sandbox.guest, None
        if guest is not None:
            await guest.close()
        if sandbox.machine is not None:
            await self.machines(sandbox).discard(sandbox.machine)
            sandbox.machine = None  # Only now: a stop that failed must be tried again.
        self.admission.release(sandbox.id)

    def forget(self, sandbox: Sandbox) -> None:
        """After its end: nobody knows it any more."""
        self._all.pop(sandbox.id, None)
        sandbox.over.set()  # Nobody needs to wait for a reason.
        self.ledger.remove(sandbox.id)
