"""The saved memory of one machine: what it was restored from, and what its next state is laid over.

What is saved of a running machine is what it wrote since it was last saved (or restored, or booted), laid over the memory
that was saved then. That one is kept under a second name of the file, `base`, beside the jail. Where it is not known for sure
that both fit, the next state is saved whole, which takes longer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes import microvms, pages
from pandastack.host.runtimes.firecracker import client, jail
from pandastack.host.runtimes.microvms import MEMORY

BASE = "base"


class SavedMemory:
    """Below the folder `place`, which is the machine's and not its jail's. Calls block."""

    def __init__(self, place: Path, size_bytes: int, clone: Callable[[Path, Path], None]) -> None:
        self._size_bytes = size_bytes
        self._clone = clone
        self._base = place / BASE
        self.whole = False
        """The next state must be saved whole."""

    # Restored from.

    def put(self, saved: Path, root: Path) -> client.MemoryBackend:
        """Have it in a jail, for a Firecracker that is to load it."""
        jail.share(saved, root / MEMORY, self._clone)
        return client.MemoryBackend(backend_path=MEMORY)

    def loaded(self, root: Path) -> None:
        """It is mapped. The next state is written over a copy of the same file."""
        (root / MEMORY).replace(self._base)

    # Saved.

    def write(self, pid: int, target: Path, *, whole: bool) -> tuple[int, int]:
        """What the Firecracker with that pid has saved, as a complete memory; how many bytes were taken, and written."""
        if self._base.exists() and not whole:
            self._clone(self._base, target)
        else:
            target.touch(mode=0o600, exist_ok=False)
            os.truncate(target, self._size_bytes)
        with (
            microvms.held(jail.saved_file(pid, MEMORY)) as source_fd,
            microvms.held(os.open(target, os.O_RDWR | os.O_CLOEXEC)) as written_fd,
        ):
            if os.fstat(source_fd).st_size != self._size_bytes:
                raise RuntimeFailed("the memory that was saved is not as large as the machine's")
            return pages.lay_over(source_fd, written_fd)

    def share_as_base(self, saved: Path) -> None:
        """What is saved next is written over this. From here on it must not change, and machines map it."""
        new = self._base.with_suffix(".new")
        new.unlink(missing_ok=True)
        saved.chmod(0o444)
        try:
            new.hardlink_to(saved)
        except OSError:
            # On another file system, or too often. To copy it now would cost as much as the next state does if it is whole.
            return
        new.replace(self._base)
        self.whole = False

    def forget(self) -> None:
        for path in (self._base, self._base.with_suffix(".new")):
            path.unlink(missing_ok=True)
