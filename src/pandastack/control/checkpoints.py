"""Points that a sandbox takes by itself: after every n-th command, or every so many seconds in which something happened.

    a command ends -> (its n-th) capture begins -> whatever would change something waits -> durable -> thinned out
    a timer is due -> (it runs, and was busy since the last point) the same, and nobody waits
    its memory is nearly full -> (it is persistent, or has a policy) the same, before it may be ended for that

A point taken after a command is what the command left: its answer is not held up, the next request that changes something in
that sandbox is. A checkpoint that fails is none of the command's business: it is counted, its reason is shown by the lifecycle of
the sandbox, and there is no other try for a while. How many commands have ended is kept in memory only: a restart begins to count
anew.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import structlog

from pandastack.control.creates import Creates
from pandastack.control.hosts import Host, deadline
from pandastack.control.meters import Meters
from pandastack.control.settings import ControlSettings
from pandastack.control.snapshots import Snapshots
from pandastack.control.store import Store
from pandastack.control.store.sandboxes import USABLE, SandboxRow
from pandastack.control.store.snapshots import LISTED
from pandastack.control.thinning import Point, thin
from pandastack.control.work import Crew
from pandastack.errors import PandastackError, SandboxNotFound
from pandastack.wire.host import HostSandbox
from pandastack.wire.ids import ProcessId, SandboxId
from pandastack.wire.processes import Command
from pandastack.wire.sandboxes import Checkpoints as Policy
from pandastack.wire.snapshots import MAX_LABEL, SnapshotCause

log = structlog.get_logger(__name__)

# What holds for the points of restores where no policy was set.
DEFAULT = Policy(every_execs=1)
COMMANDS_KEPT = 1000


@dataclass
class _Track:
    """What is known of one sandbox. Times are monotonic seconds; `commands` are those whose end was not seen yet, with their labels."""

    commands: OrderedDict[ProcessId, str] = field(default_factory=OrderedDict)
    ended: int = 0
    label: str = ""
    job: asyncio.Future[None] | None = None
    every_s: int | None = None
    due: float = 0.0
    taken: float | None = None
    not_before: float = 0.0
    pressed: bool = False
    pressure_not_before: float = 0.0


class Checkpoints:
    """The checkpoints of all sandboxes of one host."""

    def __init__(
        self, store: Store, host: Host, creates: Creates, snapshots: Snapshots, crew: Crew, settings: ControlSettings, meters: Meters
    ) -> None:
        self._store = store
        self._host = host
        self._creates = creates
        self._snapshots = snapshots
        self._crew = crew
        self._settings = settings
        self._meters = meters
        self._tracks: dict[SandboxId, _Track] = {}
        self._absent: set[SandboxId] = set()

    # Commands

    async def turn(self, row: SandboxRow) -> None:
        """Wait until what the last command left is safe. Never raises for a checkpoint that failed."""
        track = self._tracks.get(row.id)
        if track is not None and track.job is not None and _every_execs(row):
            await asyncio.wait([track.job])

    def began(self, row: SandboxRow, process_id: ProcessId, command: Command) -> None:
        """A command runs."""
        if _every_execs(row):
            commands = self._tracks.setdefault(row.id, _Track()).commands
            commands[process_id] = label_of(command)
            if len(commands) > COMMANDS_KEPT:
                commands.popitem(last=False)

    def ended(self, row: SandboxRow, process_id: ProcessId) -> None:
        """Its end was seen; that somebody sees it again counts for nothing."""
        track, every = self._tracks.get(row.id), _every_execs(row)
        if track is None or every is None or (label := track.commands.pop(process_id, None)) is None:
            return
        track.ended, track.label = track.ended + 1, label
        if track.ended >= every:
            self._begin(row.id, track)

    def changed(self, sandbox_id: SandboxId) -> None:
        """It has another policy, or another history: begin anew, and hold to the bounds."""
        if track := self._tracks.get(sandbox_id):
            track.commands.clear()
            track.ended, track.every_s, track.taken, track.not_before = 0, None, None, 0.0
        self._crew.start("thin", self.thin(sandbox_id))

    # Timers

    async def tick(self) -> None:
        """Take the points that are due by time. Nothing is woken or resumed for one."""
        rows = await self._store.sandboxes.list_with_checkpoints_of_any_tenant()
        absent = self._tracks.keys() - {row.id for row in rows}
        # Twice in a row, because the list is a moment old.
        for gone in self._absent & absent:
            track = self._tracks[gone]
            if track.job is None and time.monotonic() >= max(track.not_before, track.pressure_not_before):
                del self._tracks[gone]
        self._absent = absent
        due = [row for row in rows if row.status == "running" and self._is_due(row)]
        if not due:
            return
        async with deadline(self._settings.host_timeout_s):
            states = {state.id: state for state in await self._host.list()}
        for row in due:
            track = self._tracks[row.id]
            if row.id in states and _happened(states[row.id], track.taken):
                self._begin(row.id, track)

    def _is_due(self, row: SandboxRow) -> bool:
        every_s: int | None = (row.checkpoints or {}).get("every_seconds")
        if every_s is None:
            return False
        track, now = self._tracks.setdefault(row.id, _Track()), time.monotonic()
        first = track.every_s != every_s
        if not first and now < track.due:
            return False
        track.every_s, track.due = every_s, now + every_s
        return not first

    # Memory

    async def pressed(self, sandbox_id: SandboxId) -> None:
        """Save what must not be lost: if the sandbox needs more memory still, it is ended, and can then be restored from here."""
        row = await self._store.sandboxes.find_of_any_tenant(sandbox_id)
        if row is None or row.status != "running" or not (row.persistent or row.checkpoints is not None):
            return
        track, now = self._tracks.setdefault(row.id, _Track()), time.monotonic()
        if track.job is not None:
            track.pressed = True  # Once more when that is done: it began before.
        elif now >= max(track.not_before, track.pressure_not_before):
            # A sandbox can swing about the threshold as fast as it likes.
            track.pressure_not_before = now + self._settings.pressure_rest_s
            track.job = self._crew.start("checkpoint", self._save_pressed(row, track))

    async def _save_pressed(self, row: SandboxRow, track: _Track) -> None:
        try:
            await self._take(row, track, label="", cause="pressure")
        finally:
            track.job, track.pressed = None, False

    def _ended(self, sandbox_id: SandboxId, track: _Track) -> None:
        track.job = None
        if track.pressed:
            track.pressed = False
            self._crew.start("save under pressure", self.pressed(sandbox_id))

    # Taking one

    def _begin(self, sandbox_id: SandboxId, track: _Track) -> None:
        if track.job is None and time.monotonic() >= track.not_before:
            track.job = self._crew.start("checkpoint", self._run(sandbox_id, track))

    async def _run(self, sandbox_id: SandboxId, track: _Track) -> None:
        try:
            again = True
            while again:
                # Another command may end while this is being saved.
                track.ended, again = 0, False
                row = await self._store.sandboxes.find_of_any_tenant(sandbox_id)
                if row is not None and row.checkpoints is not None and row.status in USABLE:
                    again = await self._take(row, track, label=track.label) and track.ended >= (_every_execs(row) or track.ended + 1)
        finally:
            self._ended(sandbox_id, track)

    async def _take(self, row: SandboxRow, track: _Track, *, label: str, cause: SnapshotCause = "checkpoint") -> bool:
        """Whether there is one more point."""
        began, outcome = time.monotonic(), "ok"
        error: str | None = None
        try:
            await self._snapshots.checkpoint(row, label, cause=cause)
        except SandboxNotFound as gone:
            outcome = gone.code
        except Exception as failure:
            outcome, error = "internal", "internal error"
            if isinstance(failure, PandastackError):
                outcome, error = failure.code, f"{failure.code}: {failure.message}"
            track.not_before = time.monotonic() + self._settings.checkpoint_retry_s
            log.warning("checkpoint.failed", sandbox=row.id, error=repr(failure))
        self._meters.checkpoints.labels(outcome).inc()
        if error != row.checkpoint_error:
            await self._store.sandboxes.note_checkpoint_of_any_tenant(row.id, error)
        if outcome != "ok":
            return False
        track.taken = began
        self._crew.start("thin", self.thin(row.id))
        return True

    async def thin(self, sandbox_id: SandboxId) -> None:
        """Delete the automatic points of a sandbox that are over its bounds. One that is being used stays until the next time."""
        row = await self._store.sandboxes.find_of_any_tenant(sandbox_id)
        if row is None:
            return
        policy = Policy.model_validate(row.checkpoints) if row.checkpoints is not None else DEFAULT
        points = [
            Point(id=found.id, at_us=found.created_us, size_bytes=found.size_bytes)
            for found in await self._store.snapshots.automatic_of_any_tenant(sandbox_id)
        ]
        for gone in thin(points, keep=policy.keep, max_bytes=policy.max_mb << 20, now_us=time.time_ns() // 1000):
            if not self._creates.is_used(gone) and await self._store.snapshots.mark_deleting_of_any_tenant(gone, LISTED):
                await self._creates.finish_delete_snapshot(gone)


def label_of(command: Command) -> str:
    """The command in one line, cut."""
    text = command.code or command.cmd or shlex.join(command.argv or [])
    return " ".join(text.split())[:MAX_LABEL]


def _every_execs(row: SandboxRow) -> int | None:
    every: int | None = (row.checkpoints or {}).get("every_execs")
    return every


def _happened(state: HostSandbox, taken: float | None) -> bool:
    """Whether it did anything since then."""
    return state.status == "running" and (state.busy or taken is None or time.monotonic() - state.idle_s > taken)
