"""What things take of a machine, as the public API shows it. Everything is bytes, as of now.

*Own* is what would be free if the thing were deleted now; *shared* is used by others as well and would stay.
"""

from __future__ import annotations

from typing import Literal

from pandastack.wire.sandboxes import View

Location = Literal["local", "store"]


class SandboxUsage(View):
    """`GET .../usage`. Nothing is woken for it.

    Memory is that of the processes that carry the sandbox: `shared` are mapped pages of files, such as the runtime's program,
    which all sandboxes share. The disk is what was written to it since the start; the template below it is shared by all
    and not counted. `stored_*` is the saved state of a hibernated sandbox, which then has neither memory nor a disk.
    """

    id: str
    status: str
    memory_own_bytes: int = 0
    memory_shared_bytes: int = 0
    disk_own_bytes: int = 0
    disk_shared_bytes: int = 0
    stored_own_bytes: int = 0
    stored_shared_bytes: int = 0


class StateUsage(View):
    """A saved state on disk. Of one whose `location` is `store` only a little is: the object store has the rest."""

    own_bytes: int
    shared_bytes: int
    location: Location = "local"


class Quota(View):
    """How much of something is used, and how much there may be: `limit` and `left` are null where nobody set a limit."""

    used: int
    limit: int | None = None
    left: int | None = None


class WorkspaceUsage(View):
    """`GET /v1/usage`: one workspace. `stored_bytes` is the sum of `snapshot_bytes` and `hibernated_bytes`, each state in full."""

    sandboxes: Quota
    snapshots: Quota
    stored_bytes: Quota
    snapshot_bytes: int
    hibernated_bytes: int
