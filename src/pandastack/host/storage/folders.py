"""One plain folder per machine, for runtimes whose machines bring a disk image of the promised size themselves.

The same interface as `disks`. Nothing here bounds what is written: the size of the image does, and only its driver writes
into the folder. Called by the conductor.
"""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Collection
from pathlib import Path

from pandastack.errors import DiskFull, RuntimeFailed
from pandastack.host.storage import space


class Folders:
    """Folders below `root`. `low_water_mib` and `below` as for `disks.Disks`."""

    def __init__(self, root: Path, *, low_water_mib: int = 1024, below: Path | None = None) -> None:
        self._root = root
        self._below = below
        self._low_water_mib = low_water_mib

    def free_mib(self) -> int:
        """What the host's file system still has, less the low-water reserve; never negative."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        return max(0, (space.free_bytes(self._root, self._below) >> 20) - self._low_water_mib)

    def path(self, disk: str) -> Path:
        """Where a folder is, made or not."""
        return self._root / disk

    async def create(self, disk: str, size_mib: int) -> Path:
        """An empty folder; `size_mib` is up to the image that goes into it. Raises DiskFull at the low-water mark."""
        if self.free_mib() <= 0:
            raise DiskFull(
                "the host's disk is nearly full",
                hint="free space on the file system of the data directory, or move it",
            )
        path = self.path(disk)
        try:
            # Not in a thread: one that a cancelled create left behind would make it after the undo.
            path.mkdir(mode=0o700)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull("the host's disk is full", hint="free space on the file system of the data directory") from error
            raise RuntimeFailed("a folder for a sandbox's disk could not be made", detail=str(error)) from error
        return path

    def space(self, disk: str) -> space.Space:
        """What the files of a folder take of the host. One that does not exist takes nothing. Blocks briefly."""
        return space.of(*(path for path in self.path(disk).rglob("*") if path.is_file() and not path.is_symlink()))

    async def delete(self, disk: str) -> None:
        """Idempotent."""
        await asyncio.to_thread(shutil.rmtree, self.path(disk), True)

    async def sweep(self, keep: Collection[str]) -> list[str]:
        """Remove every folder not in `keep` and return their ids."""
        return await asyncio.to_thread(self._sweep, frozenset(keep))

    def _sweep(self, keep: frozenset[str]) -> list[str]:
        if not self._root.exists():
            return []
        gone = sorted(path.name for path in self._root.iterdir() if path.name not in keep)
        for disk in gone:
            shutil.rmtree(self.path(disk), ignore_errors=True)
        return gone
