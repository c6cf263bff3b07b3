"""The memory of a machine's processes, as the kernel accounts for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from pandastack.host.runtimes.base import Memory


def of(pids: Iterable[int], *, files_are_shared: bool = False) -> Memory:
    """Own: anonymous memory and memory files, where processes of one machine share a page each is charged its part of it.
    Shared: mapped pages of files, of the process that has most of them, because they all run the same program.

    With `files_are_shared` memory files are shared, too, and only what a process wrote itself is its own: that of a machine which maps
    a saved memory. Processes that end meanwhile do not count. A millisecond or so per GiB; blocks.
    """
    own = shared = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            parts = _kib(Path(f"/proc/{pid}/smaps_rollup"))
            own += parts.get("Pss_Anon", 0) + (0 if files_are_shared else parts.get("Pss_Shmem", 0))
            status = _kib(Path(f"/proc/{pid}/status"))
            shared = max(shared, status.get("RssFile", 0) + (status.get("RssShmem", 0) if files_are_shared else 0))
    return Memory(own_bytes=own << 10, shared_bytes=shared << 10)


def _kib(path: Path) -> dict[str, int]:
    """The lines of the form `Name: 12 kB`."""
    fields = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in fields if len(words) == 3 and words[2] == "kB"}
