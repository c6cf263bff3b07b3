"""What control asks of a host, and a host's answers. Calls go down; a host never opens a connection upward.

Every call names ids that were made at the top, so any of them can be repeated without making a second thing.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from pandastack.wire.ids import HostId, SandboxId, SnapshotId
from pandastack.wire.templates import TemplateView

MachineStatus = Literal["starting", "running", "paused", "hibernated", "failed"]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HostCreate(Record):
    """Make sandbox `id`, of a template or as the continuation of `snapshot`. Repeating it while it exists answers the existing one.

    Sizes are MiB; what is left out is the template's, or with a snapshot the snapshot's. With one `env` goes over its environment.
    `isolation` is `auto`, `microvm`, or the name of a runtime; with a snapshot it must be what the snapshot was made on.
    """

    id: SandboxId
    template: str
    hostname: str
    env: dict[str, str] = {}
    cpu: float | None = None
    memory_mb: int | None = None
    disk_mb: int | None = None
    snapshot: SnapshotId | None = None
    isolation: str = "auto"


class HostChild(Record):
    """One child of a fork: its id was made at the top, everything else comes from the parent."""

    id: SandboxId
    hostname: str


class HostFork(Record):
    """Clone the live sandbox `parent` into `children`, all or none. Repeating it while they exist answers them.

    With `snapshot`, one of the parent's own, the children are what it was then, and the parent is not touched.
    """

    parent: SandboxId
    children: list[HostChild]
    snapshot: SnapshotId | None = None


class HostRewind(Record):
    """Make `sandbox` what it was when `snapshot`, one of its own, was taken. With `undo`, what it is now is saved first, under that id."""

    sandbox: SandboxId
    snapshot: SnapshotId
    undo: SnapshotId | None = None


class HostSnapshot(Record):
    """A durable snapshot as its host knows it. Sizes are MiB, `size_bytes` is what it takes on disk."""

    id: SnapshotId
    sandbox_id: SandboxId
    template: str
    template_actual: str
    runtime: str
    cpu: float
    memory_mb: int
    disk_mb: int
    size_bytes: int
    created_us: int


class HostSandbox(Record):
    """A sandbox as its host knows it. `runtime` to `own_kernel` say what it really runs on, as in `RuntimeInfo`.

    `busy` is true while user processes run or requests are in flight. `idle_s` is 0 while busy, else the seconds since it last
    was; `idle_reason` puts that in words. `stored_bytes` is what a hibernated one takes on disk.
    """

    id: SandboxId
    status: MachineStatus
    status_reason: str | None = None
    template: str
    template_actual: str
    template_note: str | None = None
    runtime: str
    isolation: str
    acceleration: str | None = None
    own_kernel: bool = False
    cpu: float
    memory_mb: int
    disk_mb: int
    boot_mode: str
    boot_ms: int
    busy: bool = False
    idle_s: float = 0.0
    idle_reason: str | None = None
    stored_bytes: int = 0


class HostRewound(Record):
    """The sandbox as it is now, and what it was before: None where that was not asked for, or there was nothing to save (`failed`)."""

    sandbox: HostSandbox
    undo: HostSnapshot | None


class HostCapacity(Record):
    """Totals and what is promised to sandboxes (reserved, not used). MiB and cores."""

    memory_mb: int
    memory_reserved_mb: int
    cpu: float
    cpu_reserved: float
    disk_mb: int
    disk_reserved_mb: int
    sandboxes: int
    sandboxes_max: int


class RuntimeInfo(Record):
    """One runtime on this host: whether it works here, and if not why and what to do.

    `isolation` is `none`, `gvisor` or `microvm`; `acceleration` what runs the code of a microVM, `kvm` or `tcg` (emulation). Of
    one that does not work they say what it would have at best.
    """

    name: str
    works: bool
    version: str | None = None
    reason: str | None = None
    hint: str | None = None
    isolation: str = ""
    acceleration: str | None = None
    capabilities: dict[str, bool] = {}


class HostInfo(Record):
    """Reported upward on request. `runtime` is the one that `auto` means; `runtimes` are the strongest first.

    Defaults and limits let placement refuse before anything is spent.
    """

    id: HostId
    version: str
    runtime: str | None
    runtimes: list[RuntimeInfo]
    capacity: HostCapacity
    templates: list[TemplateView]
    slots_ready: int = 0
    slots_wanted: int = 0


EventKind = Literal["failed", "adopted", "gone", "running", "paused", "hibernated", "pressure"]


class HostEvent(Record):
    """Something that control must know though it did not ask for it: a sandbox failed, was found again, is gone, changed its status.

    `pressure`: it needs nearly all of its memory, and will be ended if it needs more.
    """

    seq: int
    kind: EventKind
    sandbox_id: SandboxId
    reason: str | None = None


class Output(NamedTuple):
    """Bytes that a process wrote: `offset` is the position of `data[0]` in that channel since the process started."""

    channel: Literal["stdout", "stderr"]
    offset: int
    data: bytes


class ProcessExit(Record):
    """The last item of an output stream. `exit_code` is 128 + n after signal n; `reason` says who ended it."""

    exit_code: int
    signal: str | None = None
    reason: Literal["exited", "signaled", "timeout", "killed"]
    stdout_bytes: int
    stderr_bytes: int
    duration_ms: int


class OutputSlice(Record):
    """A bounded piece of the output that a process left behind. `offset` may be later than asked: older bytes are gone."""

    offset: int
    data: bytes
    end: int
    running: bool
