"""One disk per sandbox: a sparse file with an ext4 of exactly the promised size, mounted from a loop device.

The size is enforced by the file system itself, so a full disk is an ordinary "no space left" inside and nothing outside.
Blocks are used when written and given back when freed (discard). An empty image is made once per size and
then cloned, which costs a few milliseconds instead of a mkfs. Called by the conductor; runs as root.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from pandastack.errors import DiskFull, HostUnfit, RuntimeFailed
from pandastack.host.storage import loops, space

MKFS_TIMEOUT_S = 60.0
_SBIN_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"


class Disks:
    """Disks under `root`: `<id>.img` and the mounted directory `<id>/`. `low_water_mib` stays free on its file system, and on
    that of `below`: the folder of the file that `root` is in, where it is in a pool.
    """

    def __init__(self, root: Path, *, low_water_mib: int = 1024, below: Path | None = None) -> None:
        self._root = root
        self._below = below
        self._empty = root / "empty"
        self._low_water_mib = low_water_mib
        self._making: dict[int, asyncio.Lock] = {}

    def free_mib(self) -> int:
        """What the host's file system still has, less the low-water reserve; never negative."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        return max(0, (space.free_bytes(self._root, self._below) >> 20) - self._low_water_mib)

    def path(self, disk: str) -> Path:
        """Where a disk is mounted, made or not."""
        return self._root / disk

    async def create(self, disk: str, size_mib: int) -> Path:
        """Make and mount a disk; all or nothing. Returns the directory.

        Raises DiskFull at the low-water mark, HostUnfit where loop devices are missing.
        """
        if self.free_mib() <= 0:
            raise DiskFull(
                "the host's disk is nearly full",
                hint="free space on the file system of the data directory, or move it",
            )
        async with self._making.setdefault(size_mib, asyncio.Lock()):
            empty = await asyncio.to_thread(self._empty_image, size_mib)
        making = asyncio.ensure_future(asyncio.to_thread(self._create, disk, empty))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: it would mount the disk after its caller had cleaned up.
            await asyncio.wait([making])
            await self.delete(disk)
            raise

    def space(self, disk: str) -> space.Space:
        """What a disk takes of the host, also what the kernel did not write yet. One that does not exist takes nothing. Blocks briefly."""
        image = space.of(self._root / f"{disk}.img")
        written = space.used_bytes(self._root / disk) if (self._root / disk).is_mount() else 0
        return replace(image, own_bytes=max(image.own_bytes, written - image.shared_bytes))

    async def delete(self, disk: str) -> None:
        """Unmount and remove. Idempotent."""
        await asyncio.to_thread(self._delete, disk)

    async def sweep(self, keep: Collection[str]) -> list[str]:
        """Remove every disk not in `keep` and return their ids."""
        return await asyncio.to_thread(self._sweep, frozenset(keep))

    def _empty_image(self, size_mib: int) -> Path:
        image = self._empty / f"{size_mib}.ext4"
        if image.exists():
            return image
        self._empty.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=self._empty, suffix=".tmp")
        os.close(fd)
        temporary = Path(name)
        try:
            os.truncate(temporary, size_mib << 20)
            # No journal: the disk does not outlive its sandbox's processes, and half the metadata is half the copy.
            # Few inodes: the runtime keeps the guest's files in one large file.
            options = ["-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode", "-N", "64", "-E", "lazy_itable_init=1,nodiscard"]
            command = ["mkfs.ext4", *options, str(temporary)]
            subprocess.run(command, check=True, capture_output=True, timeout=MKFS_TIMEOUT_S, env={"PATH": _SBIN_PATH})
            temporary.replace(image)
        except FileNotFoundError as error:
            raise HostUnfit("mkfs.ext4 is missing", hint="install the package e2fsprogs") from error
        except (subprocess.SubprocessError, OSError) as error:
            raise _as_disk_error(error, "an empty disk image could not be made") from error
        finally:
            temporary.unlink(missing_ok=True)
        return image

    def _create(self, disk: str, empty: Path) -> Path:
        image, directory = self._root / f"{disk}.img", self._root / disk
        try:
            space.clone(empty, image)
            directory.mkdir(mode=0o700)
            loops.mount(image, directory, "ext4", "discard")
            with contextlib.suppress(OSError):
                (directory / "lost+found").rmdir()
        except BaseException as error:
            self._delete(disk)
            if isinstance(error, OSError):
                raise _as_disk_error(error, "a sandbox disk could not be made") from error
            raise
        return directory

    def _delete(self, disk: str) -> None:
        image, directory = self._root / f"{disk}.img", self._root / disk
        loops.unmount_all(directory)
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()
        image.unlink(missing_ok=True)

    def _sweep(self, keep: frozenset[str]) -> list[str]:
        if not self._root.exists():
            return []
        found = {path.stem for path in self._root.glob("*.img")}
        found |= {path.name for path in self._root.iterdir() if path.is_dir() and path != self._empty}
        gone = sorted(found - keep)
        for disk in gone:
            self._delete(disk)
        return gone


def _as_disk_error(error: BaseException, text: str) -> DiskFull | RuntimeFailed:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(text + ": the host's disk is full", hint="free space on the file system of the data directory")
    return RuntimeFailed(text, detail=str(error))
