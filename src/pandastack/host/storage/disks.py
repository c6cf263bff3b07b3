"""One disk per sandbox: a sparse file with an ext4 of exactly the promised size, mounted from a loop device.

The size is enforced by the file system itself, so a full disk is an ordinary "no space left" inside and nothing outside.
Blocks are used when written and given back when freed (discard). An empty image is made once per size and
then copied, which costs a few milliseconds instead of a mkfs. Called by the conductor; runs as root.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path

from pandastack.errors import DiskFull, HostUnfit, RuntimeFailed

MKFS_TIMEOUT_S = 60.0
_SBIN_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
# From linux/loop.h and sys/mount.h.
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_AUTOCLEAR = 4
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOATIME = 2, 4, 8, 1024
_MNT_DETACH = 2
_FICLONE = 0x40049409

_libc = ctypes.CDLL(None, use_errno=True)


class Disks:
    """Disks under `root`: `<id>.img` and the mounted directory `<id>/`. `low_water_mib` stays free on the host."""

    def __init__(self, root: Path, *, low_water_mib: int = 1024) -> None:
        self._root = root
        self._empty = root / "empty"
        self._low_water_mib = low_water_mib
        self._making: dict[int, asyncio.Lock] = {}

    def free_mib(self) -> int:
        """What the host's file system still has, less the low-water reserve; never negative."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.statvfs(self._root)
        return max(0, (status.f_bavail * status.f_frsize >> 20) - self._low_water_mib)

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
            _copy_sparse(empty, image)
            directory.mkdir(mode=0o700)
            _mount_loop(image, directory)
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
        while _libc.umount2(os.fsencode(directory), _MNT_DETACH) == 0:
            pass  # Once per mount; the loop device frees itself with the last of them.
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


def _copy_sparse(source: Path, target: Path) -> None:
    """Share the blocks where the file system can, else copy only the parts that hold data."""
    read_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        write_fd = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(OSError):
                fcntl.ioctl(write_fd, _FICLONE, read_fd)
                return
            size = os.fstat(read_fd).st_size
            os.truncate(write_fd, size)
            position = 0
            while position < size:
                try:
                    start = os.lseek(read_fd, position, os.SEEK_DATA)
                except OSError as error:
                    if error.errno == errno.ENXIO:
                        break
                    raise
                position = os.lseek(read_fd, start, os.SEEK_HOLE)
                while start < position:
                    start += os.copy_file_range(read_fd, write_fd, position - start, start, start)
        finally:
            os.close(write_fd)
    finally:
        os.close(read_fd)


def _mount_loop(image: Path, directory: Path) -> None:
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        device, device_fd = _attach(fd)
        try:
            # AUTOCLEAR: the device is free again when the mount ends, also when nobody is left to free it.
            flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_NOATIME
            if _libc.mount(os.fsencode(device), os.fsencode(directory), b"ext4", flags, b"discard") != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(directory))
        finally:
            os.close(device_fd)
    finally:
        os.close(fd)


def _attach(image_fd: int) -> tuple[str, int]:
    """A free loop device for the file. Another process may take the one we were told of; then ask again."""
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostUnfit(
            "this machine has no loop devices, so disk limits cannot be enforced",
            hint="load the module: modprobe loop (in a container: run it privileged)",
        ) from error
    # struct loop_config: fd, block size, then loop_info64 (flags at byte 52 of it), reserved words.
    info = bytearray(232)
    struct.pack_into("<I", info, 52, _LO_FLAGS_AUTOCLEAR)
    config = struct.pack("<II", image_fd, 0) + bytes(info) + bytes(64)
    try:
        for _ in range(64):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            device = f"/dev/loop{number}"
            if not Path(device).exists():
                os.mknod(device, 0o600 | 0o060000, os.makedev(7, number))
            device_fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device_fd, _LOOP_CONFIGURE, config)
                return device, device_fd
            except OSError as error:
                os.close(device_fd)
                if error.errno != errno.EBUSY:
                    raise
        raise RuntimeFailed("no free loop device could be had")
    finally:
        os.close(control)


def _as_disk_error(error: BaseException, text: str) -> DiskFull | RuntimeFailed:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(text + ": the host's disk is full", hint="free space on the file system of the data directory")
    return RuntimeFailed(text, detail=str(error))
