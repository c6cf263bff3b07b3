"""What differs between the files of two points: snapshots, or sandboxes as they are now. Paths are bytes: `path_b64` is exact."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from pandastack.wire.files import FileType
from pandastack.wire.host import Record
from pandastack.wire.sandboxes import View

# In one tree; more is refused rather than compared for minutes.
MAX_ENTRIES = 500_000
# In one answer.
MAX_CHANGES = 100_000
DEFAULT_CHANGES = 10_000

ChangeLimit = Annotated[int, Field(ge=1, le=MAX_CHANGES)]
ChangeKind = Literal["added", "removed", "modified", "metadata", "type"]


class HostPoint(Record):
    """One side of a comparison: the state that was saved in a snapshot, or a sandbox as it is."""

    kind: Literal["snapshot", "sandbox"]
    id: str


class FileSide(View):
    """A name on one side. `mode` is octal text such as "0644"; `size` is 0 for a directory.

    `target` is where a symbolic link leads, `target_b64` the same exactly where it is not valid UTF-8.
    """

    type: FileType
    size: int
    mode: str
    uid: int
    gid: int
    target: str | None = None
    target_b64: str | None = None


class FileChange(View):
    """One name that differs. `before` is absent for what was added, `after` for what was removed.

    `modified`: other content, or another target of a link; mode and owner may differ too. `metadata`: mode or owner only. `type`: a
    file became a directory, and the like. Times alone are no change. `omitted`: a patch does not contain it, because it is too
    large, or neither a file nor a link.
    """

    path: str
    path_b64: str | None = None
    kind: ChangeKind
    before: FileSide | None = None
    after: FileSide | None = None
    omitted: bool = False


class HostChange(NamedTuple):
    """A change, and its part of a patch (empty where git knows no such change, or none was asked for)."""

    change: FileChange
    patch: bytes


class FileDiff(View):
    """Sorted by the parts of the paths. `truncated`: there are more changes than were asked for."""

    a: str
    b: str
    path: str
    changes: list[FileChange]
    truncated: bool = False
