"""The saved memory of one machine: what it was restored from, and what its next state is laid over.

What is saved of a running machine is what it wrote since it was last saved (or restored, or booted), laid over the memory
that was saved then. That one is kept under a second name of the file, `base`, beside the jail. Where it is not known for sure
that both fit, the next state is saved whole, which takes longer.

A memory that is a link is a file that is not here yet. The process maps it like any other, through a mount in its jail; or, where the
runtime has a pager, its pages are copied into memory of its own, when they are touched, over a userfaultfd. Until it is first saved
its base is that file, and a copy of it fetches what is not here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes import microvms, pages
from pandastack.host.runtimes.base import Pager
from pandastack.host.runtimes.firecracker import client, command, jail
from pandastack.host.runtimes.firecracker.attach import attach
from pandastack.host.runtimes.microvms import MEMORY

BASE = "base"


class SavedMemory:
    """Below the folder `place`, which is the machine's and not its jail's. Calls block."""

    def __init__(self, place: Path, size_bytes: int, clone: Callable[[Path, Path], None]) -> None:
        self.source: Path | None = None
        """The file that it was restored from, under the name it had then."""
        self._size_bytes = size_bytes
        self._clone = clone
        self._base = place / BASE
        self._here = True
        self.whole = False
        """The next state must be saved whole."""

    # Restored from.

    def put(self, saved: Path, root: Path, *, pid: int, user: int, pager: Pager | None) -> client.MemoryBackend:
        """Have it in the jail of the Firecracker with that pid and user, which is to load it. Raises RuntimeFailed, HostUnfit."""
        self._here = not saved.is_symlink()
        if self._here:
            self.source = saved.resolve()
            jail.share(saved, root / MEMORY, self._clone)
            return client.MemoryBackend(backend_path=MEMORY)
        self.source = saved.readlink()
        if pager is not None:
            with jail.listening(root, command.PAGES, user) as listener:
                pager.page(self.source, listener, user)
            return client.MemoryBackend(backend_path=command.PAGES, backend_type="Uffd")
        (root / MEMORY).touch()
        try:
            attach(self.source, pid, MEMORY)
        except OSError as error:
            hint = "have a Linux of 5.2 or newer that lets this process mount, or set PANDASTACK_FIRECRACKER_MEMORY=userfaultfd"
            raise RuntimeFailed("saved memory that is not here cannot be shown to a machine", hint=hint, detail=str(error)) from error
        return client.MemoryBackend(backend_path=MEMORY)

    def loaded(self, root: Path) -> None:
        """It is mapped. The next state is written over a copy of the same file."""
        if self._here:
            (root / MEMORY).replace(self._base)

    # Saved.

    def write(self, pid: int, target: Path, *, whole: bool) -> tuple[int, int]:
        """What the Firecracker with that pid has saved, as a complete memory; how many bytes were taken, and written."""
        base = self._base if self._base.exists() else self.source
        if base is not None and not whole:
            self._clone(base, target)
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
