"""The memory of a machine's processes, as the kernel accounts for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from pandastack.host.runtimes.base import Memory


def of_vmm(pid: int) -> Memory:
    """That of a process which maps a saved memory. Own: what it wrote itself. Shared: mapped pages of files, in memory or on disk.

    A millisecond or so per GiB; blocks.
    """
    with contextlib.suppress(OSError):
        own, status = _kib(Path(f"/proc/{pid}/smaps_rollup")).get("Pss_Anon", 0), _kib(Path(f"/proc/{pid}/status"))
        return Memory(own_bytes=own << 10, shared_bytes=(status.get("RssFile", 0) + status.get("RssShmem", 0)) << 10)
    return Memory()


def files_of(pids: Iterable[int]) -> int:
    """Bytes of mapped files on disk, of the process that has most of them, because they all run the same program. Blocks."""
    most = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # One that ended meanwhile.
            most = max(most, _kib(Path(f"/proc/{pid}/status")).get("RssFile", 0))
    return most << 10


def _kib(path: Path) -> dict[str, int]:
    """The lines of the form `Name: 12 kB`."""
    fields = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in fields if len(words) == 3 and words[2] == "kB"}
