"""What this host has promised, on disk before the first side effect, so that a restart can adopt or clear.

One JSON file per sandbox under `<data>/ledger`. Entries are written with a rename but not synced: they must survive the
death of this process, not of the machine, because no running sandbox survives that either. A hibernated one does, so its
entry is written `durable`. States: `creating` -> `running` <-> `hibernated` -> (file removed); `failed` keeps the reason until
the sandbox is deleted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from pandastack.errors import DiskFull
from pandastack.wire.host import HostCreate
from pandastack.wire.ids import SandboxId

log = structlog.get_logger(__name__)


class Entry(BaseModel):
    """A sandbox as this host remembers it. `token` opens the guest's loopback listener after a restart.

    `runtime` to `own_kernel` say what it runs on (`isolation` is empty in entries of older versions). `env` is what its processes
    get, `guest` the folder of the daemon that runs in it, `snapshot` the saved state of a hibernated one. `machine_id` and hostname
    stay the same for life.
    """

    model_config = ConfigDict(extra="forbid")

    request: HostCreate
    state: Literal["creating", "running", "hibernated", "failed"]
    machine: str = ""
    runtime: str = ""
    isolation: str = ""
    acceleration: str | None = None
    own_kernel: bool = False
    template_actual: str = ""
    template_note: str | None = None
    rootfs: str = ""
    cpu: float = 0
    memory_mb: int = 0
    disk_mb: int = 0
    token: str = ""
    env: dict[str, str] = {}
    guest: str = ""
    machine_id: str = ""
    paused: bool = False
    snapshot: str = ""
    boot_mode: str = ""
    boot_ms: int = 0
    reason: str | None = None

    def running_in(self, machine: str, on: Mapping[str, Any], *, token: str, machine_id: str, boot_mode: str, boot_ms: int) -> Entry:
        """The same sandbox brought back in a new machine, whatever it was before; `on` are the facts of its runtime."""
        now = {**on, "machine": machine, "token": token, "machine_id": machine_id, "boot_mode": boot_mode, "boot_ms": boot_ms}
        return self.model_copy(update={**now, "state": "running", "snapshot": "", "paused": False, "reason": None})


class Ledger:
    """Blocking, but each call is one small file; the page cache answers."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self) -> list[Entry]:
        """Every entry of an earlier life. A file that does not parse is set aside and reported, never trusted."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        entries = []
        for path in sorted(self._root.glob("*.json")):
            try:
                entries.append(Entry.model_validate_json(path.read_bytes()))
            except (ValidationError, OSError) as error:
                log.error("ledger entry is unreadable and was set aside", path=path.name, error=str(error)[:500])
                with contextlib.suppress(OSError):
                    path.rename(path.with_suffix(".unreadable"))
        for path in self._root.glob("*.tmp"):
            path.unlink(missing_ok=True)
        return entries

    def write(self, entry: Entry, *, durable: bool = False) -> None:
        """Begin or change an entry; atomic. Raises DiskFull where the folder takes nothing more."""
        path = self._path(entry.request.id)
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_bytes(entry.model_dump_json().encode())
            if durable:
                _sync(temporary)
            temporary.replace(path)
            if durable:
                _sync(self._root)
        except OSError as error:
            raise DiskFull(
                "this host cannot write to its data directory", hint="free space on its file system", detail=str(error)
            ) from error

    def remove(self, sandbox_id: SandboxId) -> None:
        self._path(sandbox_id).unlink(missing_ok=True)

    def _path(self, sandbox_id: SandboxId) -> Path:
        # The id was checked to be a UUID at the edge; a second look costs nothing and this is a path.
        name = os.path.basename(sandbox_id)  # noqa: PTH119
        return self._root / f"{name}.json"


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
