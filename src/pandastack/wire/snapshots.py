"""Snapshots, forks and what becomes of them, as the public API shows them.

A snapshot is `capturing` -> `durable` -> `verified`. Only a durable one is listed: its bytes and their digests are on disk.
`verified` means that a restore of it was tried and worked; one that did not restore is `failed`, and `status_reason` says why.
A sandbox's snapshots are the *points* of its history. Those that nobody asked for stay `durable`, are bounded in number, and end
with it; their `cause` is `checkpoint` (its policy), `pressure` (it was about to run out of memory) or `restore` (what it was before).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pandastack.wire.sandboxes import MAX_METADATA_KEYS, MetadataKey, MetadataValue, SandboxView, Shape, View
from pandastack.wire.usage import Location

SnapshotStatus = Literal["capturing", "durable", "verified", "failed"]
SnapshotCause = Literal["request", "checkpoint", "pressure", "restore"]

MAX_FORKS = 16
MAX_LABEL = 200

PointId = Annotated[str, Field(max_length=64)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA_KEYS)]


class SnapshotView(View):
    """A snapshot. `size_bytes` is what it takes on disk: `own_bytes`, which a delete would free, and `shared_bytes`, which others
    use too. These two and `location` are told by the GET of one snapshot, elsewhere null: one whose memory and disk are in the object
    store is at `store`, not `local`, and takes next to nothing here. `label` is the command after which a checkpoint was taken.

    `mem_path` and `state_path` are kept, empty, for existing clients.
    """

    id: str
    sandbox_id: str
    workspace: str = ""
    template: str = ""
    template_actual: str | None = None
    status: str = "durable"
    status_reason: str | None = None
    size_bytes: int = 0
    own_bytes: int | None = None
    shared_bytes: int | None = None
    location: Location | None = None
    created_at: str | int | None = None
    cpu: float | int | None = None
    memory_mb: int | None = None
    disk_mb: int | None = None
    runtime: str | None = None
    cause: str = "request"
    label: str = ""
    mem_path: str = ""
    state_path: str = ""


class SnapshotList(View):
    """Newest first."""

    snapshots: list[SnapshotView]


class History(View):
    """`GET .../history`: every point of a sandbox, newest first."""

    points: list[SnapshotView]


class RestoreRequest(Shape):
    """Body of `POST .../restore`. `point` is a snapshot of this sandbox; `undo` saves what the sandbox is now first."""

    point: PointId
    undo: bool = True


class Restored(SandboxView):
    """The sandbox as it is now. `undo_point` is what it was before; null where that was not saved, or it had failed."""

    undo_point: str | None = None


class ForkRequest(Shape):
    """Body of `POST .../fork`. Every child gets `metadata` over its parent's; `mode` is accepted and means nothing.

    With `at`, a snapshot of this sandbox, the children are what it was then.
    """

    metadata: Metadata = {}
    count: Annotated[int, Field(ge=1, le=MAX_FORKS)] = 1
    mode: str | None = None
    at: PointId | None = None


class ForkTreeRequest(Shape):
    """Body of `POST .../fork-tree`."""

    metadata: Metadata = {}
    count: Annotated[int, Field(ge=1, le=MAX_FORKS)] = 2
    at: PointId | None = None


class Forked(View):
    """The children of one instant, in order; `sandbox` is the first. `errors` is always empty: forks are all or none.

    `snapshot_id` is the point they were made of, empty where they are what the parent was just then.
    """

    tree_id: str
    parent_id: str
    snapshot_id: str
    sandbox: SandboxView
    children: list[SandboxView]
    at: str
    errors: list[dict[str, str | int]] = []


class PromoteRequest(Shape):
    """Body of `POST .../promote`. `tree_id` is taken from the sandbox where it is left out."""

    cleanup_siblings: bool = False
    tree_id: Annotated[str, Field(max_length=64)] | None = None


class Promoted(View):
    """`failures` maps the ids of siblings that could not be deleted to why."""

    winner: str
    tree_id: str | None
    deleted: list[str]
    failures: dict[str, str]


class StateView(View):
    """The answer of hibernate and wake."""

    status: str
