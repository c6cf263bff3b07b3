"""Sandboxes as the public API shows them. `openapi/public.json` is generated from these shapes.

A sandbox is `creating` -> `running` -> gone. In between it may be `paused` (in memory, without CPU) or `hibernated` (on disk
only); `status_reason` then says who asked: `request`, `idle`, `shutdown`. It becomes `failed` when it can not be used any
more: `oom` (its memory limit), `exited`, `host_restarted`, `guest` (its daemon broke the protocol), `error`, `memory_...`
(a part of its memory could not be fetched, see `MEMORY_LOST`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from pandastack.wire.isolation import AUTO

SandboxStatus = Literal["creating", "running", "paused", "hibernated", "failed", "deleting"]

MEMORY_LOST = {
    f"memory_{why}": f"a part of its memory could not be fetched: {text}"
    for why, text in {
        "missing": "it is not in the object store any more",
        "damaged": "it is damaged in the object store",
        "timeout": "the object store did not answer in time",
        "refused": "the object store refuses its host",
        "unreachable": "the object store could not be reached",
        "server": "the process of its host that fetches it ended",
    }.items()
}

MAX_TTL_SECONDS = 30 * 24 * 3600
MAX_METADATA_KEYS = 64
MAX_CHECKPOINTS = 500

TemplateName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=128)]
MetadataValue = Annotated[str, StringConstraints(max_length=1024)]
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
EnvValue = Annotated[str, StringConstraints(max_length=128 * 1024, pattern=r"^[^\x00]*$")]
Isolation = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Env = Annotated[dict[EnvName, EnvValue], Field(max_length=1024)]


class Shape(BaseModel):
    """Base of what a client sends: an unknown field is an error, because a typo must not change the meaning."""

    model_config = ConfigDict(extra="forbid")


class View(BaseModel):
    """Base of what the API answers: a newer server may add fields, an older client ignores them."""

    model_config = ConfigDict(extra="ignore")


class VolumeMount(Shape):
    name: str
    read_only: bool = False


class Checkpoints(Shape):
    """The points that a sandbox takes by itself: after every n-th command, or every so many seconds in which something happened.

    At most `keep` of them and `max_mb` (MiB) on disk are kept: the newest always, older ones further and further apart.
    """

    every_execs: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    every_seconds: Annotated[int, Field(ge=5, le=MAX_TTL_SECONDS)] | None = None
    keep: Annotated[int, Field(ge=1, le=MAX_CHECKPOINTS)] = 20
    max_mb: Annotated[int, Field(ge=1, le=1 << 26)] = 4096

    @model_validator(mode="after")
    def _exactly_one(self) -> Checkpoints:
        if (self.every_execs is None) == (self.every_seconds is None):
            raise ValueError("give exactly one of every_execs and every_seconds")
        return self


class SandboxCreate(Shape):
    """Body of `POST /v1/sandboxes`. Sizes are MiB; limits left out come from the template.

    `isolation` is what it must run on at least: `auto` (the strongest runtime that works there), `microvm` (one with a kernel of
    its own), or the name of a runtime, such as `qemu`. With `from_snapshot` it must be what the snapshot was made on.
    """

    template: TemplateName = "code-interpreter"
    ttl_seconds: Annotated[int, Field(ge=0, le=MAX_TTL_SECONDS)] | None = None
    persistent: bool = False
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA_KEYS)] = {}
    env: Env = {}
    cpu: Annotated[float, Field(gt=0, le=1024)] | None = None
    memory_mb: Annotated[int, Field(ge=64, le=1 << 22)] | None = None
    disk_mb: Annotated[int, Field(ge=64, le=1 << 26)] | None = None
    from_snapshot: Annotated[str, StringConstraints(max_length=64)] | None = None
    volumes: Annotated[list[VolumeMount], Field(max_length=16)] = []
    checkpoints: Checkpoints | None = None
    isolation: Isolation = AUTO


class SandboxView(View):
    """A sandbox. `guest_ip`, `host_tap`, `mac` and `vsock_cid` are kept for existing clients; empty where not used.

    `template` is the name that was asked for and `template_actual` the image it got; they differ only where
    `template_note` says why. `boot_ms` is the time from the request to a confirmed guest identity.

    `runtime` to `own_kernel` are what it really runs on: `isolation` is `gvisor` or `microvm`, `acceleration` what runs the code of
    a microVM (`kvm`, or `tcg`: emulation) and null where there is none.
    """

    id: str
    template: str = "code-interpreter"
    template_actual: str | None = None
    template_note: str | None = None
    status: str = "unknown"
    status_reason: str | None = None
    cpu: float | int = 1
    memory_mb: int = 512
    disk_mb: int | None = None
    metadata: dict[str, str] = {}
    persistent: bool = False
    ttl_seconds: int | None = None
    created_at: str | int | None = None
    boot_ms: int | None = None
    boot_mode: str | None = None
    runtime: str | None = None
    isolation: str | None = None
    acceleration: str | None = None
    own_kernel: bool = False
    host_id: str | None = None
    fork_parent_id: str | None = None
    fork_tree_id: str | None = None
    from_snapshot: str | None = None
    guest_ip: str | None = None
    host_tap: str = ""
    mac: str = ""
    vsock_cid: int = 0


class SandboxPage(View):
    """A page of a filtered list; `next_cursor` is null on the last one."""

    items: list[SandboxView]
    next_cursor: str | None = None


class CheckpointState(View):
    """What was set, and what came of it: the automatic points there are, their bytes, and why the last try failed, if it did."""

    every_execs: int | None = None
    every_seconds: int | None = None
    keep: int
    max_mb: int
    points: int = 0
    size_bytes: int = 0
    last_error: str | None = None


class Lifecycle(View):
    """`idle_seconds` counts from the last request or the end of the last work inside; `idle_reason` says which.

    After `ttl_seconds` (0: never) of that a persistent sandbox is hibernated and any other deleted, but not before
    `keep_awake_until` (RFC 3339). `checkpoints` is null where it takes none by itself.
    """

    ttl_seconds: int
    persistent: bool
    idle_seconds: int
    idle_reason: str | None = None
    status: str | None = None
    keep_awake_until: str | None = None
    checkpoints: CheckpointState | None = None


class LifecyclePatch(Shape):
    """What is left out, or null, stays as it is."""

    ttl_seconds: Annotated[int, Field(ge=0, le=MAX_TTL_SECONDS)] | None = None
    persistent: bool | None = None
    keep_awake_seconds: Annotated[int, Field(ge=0, le=MAX_TTL_SECONDS)] | None = None
    checkpoints: Checkpoints | Literal["off"] | None = None


class SandboxMetrics(View):
    """`GET .../metrics`: what the sandbox costs its host. Bytes and seconds; `threads` counts host threads."""

    pid: int
    uptime_seconds: float
    host_cpu_seconds: float
    host_cpu_percent: float
    host_rss_bytes: int
    host_vsz_bytes: int
    threads: int
    memory_limit_bytes: int
    guest: dict[str, Any] | None = None
