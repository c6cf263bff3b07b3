"""What calls give back. Everything here is frozen; texts come with the exact bytes wherever the two can differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NotRequired, TypedDict

from pandastack import errors
from pandastack.wire.diff import ChangeKind
from pandastack.wire.files import FileType
from pandastack.wire.processes import ExecResult as WireExecResult
from pandastack.wire.sandboxes import SandboxMetrics
from pandastack.wire.snapshots import SnapshotView
from pandastack.wire.templates import BakeProgress
from pandastack.wire.templates import TemplateView as Template
from pandastack.wire.usage import Quota, SandboxUsage, WorkspaceUsage

__all__ = [
    "BakeProgress",
    "Checkpoints",
    "ExecResult",
    "FileChange",
    "FileEvent",
    "FileInfo",
    "FileSide",
    "FileWritten",
    "Lifecycle",
    "Me",
    "OutputEvent",
    "OutputSlice",
    "Promoted",
    "Quota",
    "SandboxMetrics",
    "SandboxUsage",
    "Snapshot",
    "Template",
    "Token",
    "WorkspaceUsage",
]

Channel = Literal["stdout", "stderr"]


class Lifecycle(TypedDict):
    """Seconds. `ttl_seconds` 0 means that the sandbox does not expire; nothing happens to it before `keep_awake_until`."""

    ttl_seconds: int
    persistent: bool
    idle_seconds: int
    idle_reason: NotRequired[str | None]
    status: NotRequired[str | None]
    keep_awake_until: NotRequired[str | None]
    checkpoints: NotRequired[Checkpoints | None]


class Checkpoints(TypedDict):
    """The points that a sandbox takes by itself; `points` there are, of `size_bytes`. `last_error`: why the last try failed."""

    every_execs: int | None
    every_seconds: int | None
    keep: int
    max_mb: int
    points: int
    size_bytes: int
    last_error: str | None


class Promoted(TypedDict):
    """`deleted` are the ids of siblings that are gone; `failures` says why the others are not."""

    winner: str
    tree_id: str | None
    deleted: list[str]
    failures: dict[str, str]


class Me(TypedDict):
    user_id: str
    email: str | None
    current_org: str | None
    orgs: list[dict[str, Any]]
    auth_method: str
    role: NotRequired[str]


class FileWritten(TypedDict):
    path: str
    bytes: int


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a finished command said.

    `stdout` and `stderr` are text, with U+FFFD for what is not UTF-8; `*_bytes` are exact. A command that ended by
    signal n has exit code 128 + n and the signal's name in `signal`. Where output was longer than the limit it is cut:
    `truncated` is true, the text ends with a line that says so, `*_total` count everything the command wrote, and the
    rest can be read with `sandbox.processes.get(result.process_id).read_output(...)`.
    """

    stdout: str
    stderr: str
    exit_code: int
    duration_ms: int = 0
    signal: str | None = None
    truncated: bool = False
    process_id: str | None = None
    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""
    stdout_total: int = 0
    stderr_total: int = 0

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    def check(self, command: str = "") -> ExecResult:
        """Itself, or CommandFailed (fields `exit_code`, `stdout`, `stderr`, `signal`, `result`)."""
        if self.exit_code == 0:
            return self
        shown = command if len(command) <= 200 else command[:200] + "..."
        lines = self.stderr.strip().splitlines()
        raise errors.CommandFailed(
            f"command exited with code {self.exit_code}" + (f": {shown}" if shown else ""),
            hint=f"its last words: {lines[-1][:300]}" if lines else None,
            exit_code=self.exit_code, stdout=self.stdout, stderr=self.stderr, signal=self.signal, result=self,
        )  # fmt: skip

    @classmethod
    def from_wire(cls, wire: WireExecResult, stdout_bytes: bytes, stderr_bytes: bytes) -> ExecResult:
        return cls(
            stdout=wire.stdout, stderr=wire.stderr, exit_code=wire.exit_code, duration_ms=wire.duration_ms,
            signal=wire.signal, truncated=wire.truncated, process_id=wire.process_id,
            stdout_bytes=stdout_bytes, stderr_bytes=stderr_bytes,
            stdout_total=wire.stdout_bytes or len(stdout_bytes), stderr_total=wire.stderr_bytes or len(stderr_bytes),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class OutputEvent:
    """A piece of output. `offset` is the position of its first byte in that channel since the command began.

    `text` never ends in half a character: such bytes wait for the next piece. `skipped` counts bytes just before this
    piece that were gone before they could be read; 0 unless the reader was away or slow while much was written.
    """

    channel: Channel
    data: bytes
    offset: int
    text: str
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class OutputSlice:
    """A bounded piece of what a process wrote; `offset` is later than asked where older bytes are gone."""

    offset: int
    data: bytes
    end: int
    running: bool


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One name in a directory. `path` and `name` carry any Linux name: bytes outside UTF-8 as `os.fsdecode` shows them.

    `mode` is octal text such as "0644", `mtime` whole seconds since 1970. `is_dir` is false for a link to a directory.
    """

    name: str
    path: str
    is_dir: bool
    size: int = 0
    mode: str = ""
    mtime: int = 0
    type: FileType = "file"
    mtime_ns: int = 0
    uid: int = 0
    gid: int = 0
    target: str | None = None


@dataclass(frozen=True, slots=True)
class FileSide:
    """A name on one side of a comparison. `mode` is octal text such as "0644"; `target` is where a symbolic link leads."""

    type: FileType
    size: int
    mode: str
    uid: int = 0
    gid: int = 0
    target: str | None = None


@dataclass(frozen=True, slots=True)
class FileChange:
    """A name that differs between two points: `added`, `removed`, `modified`, `metadata` (mode or owner only) or `type`.

    `path` carries any Linux name: bytes outside UTF-8 as `os.fsdecode` shows them. `omitted`: it is too large for a patch, or neither
    a file nor a link.
    """

    path: str
    kind: ChangeKind
    before: FileSide | None = None
    after: FileSide | None = None
    omitted: bool = False


@dataclass(frozen=True, slots=True)
class FileEvent:
    """One change. `overflow` means that some changes were lost: look at the directory again."""

    type: Literal["create", "modify", "delete", "move", "attrib", "overflow"]
    path: str


@dataclass(frozen=True, slots=True)
class Token:
    """An API key. `token`, the key itself, is there only in the answer to `create`. `name` is its label."""

    prefix: str
    name: str = ""
    token: str | None = None
    created_at: str | None = None
    expires_at: str | None = None
    last_used_at: str | None = None
    scopes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Token(prefix={self.prefix!r}, name={self.name!r})"


@dataclass(frozen=True, slots=True)
class Snapshot(Mapping[str, Any]):
    """The memory and the files of a sandbox at one moment; `create(from_snapshot=snapshot.id)` continues from there.

    `status` is `durable` (its bytes are on disk), `verified` (a restore of it was tried and worked) or `failed` (it was
    tried and did not, `status_reason` says why). `cause` says who took it: `request`, or, by itself, `checkpoint` (`label` is
    the command after which), `pressure` (its memory was nearly full) or `restore` (what it was before it was restored). Of its
    `size_bytes` on disk a delete would free `own_bytes`; both parts, and `location`, are None in lists. `location` is `local`, or `store`
    for one that was offloaded to the object store. The facts can also be read as those of a dict: `snapshot["id"]`.
    """

    id: str
    sandbox_id: str
    template: str = ""
    template_actual: str | None = None
    status: str = "durable"
    status_reason: str | None = None
    size_bytes: int = 0
    own_bytes: int | None = None
    shared_bytes: int | None = None
    location: str | None = None
    created_at: str | None = None
    cpu: float | int | None = None
    memory_mb: int | None = None
    disk_mb: int | None = None
    runtime: str | None = None
    workspace: str = ""
    cause: str = "request"
    label: str = ""

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    @classmethod
    def from_wire(cls, view: SnapshotView) -> Snapshot:
        known = {field.name: getattr(view, field.name) for field in fields(cls)}
        return cls(**{**known, "created_at": None if view.created_at is None else str(view.created_at)})
