"""File systems in files: mounted from loop devices that free themselves with the last mount. Needs root; calls block."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path

from pandastack.errors import HostUnfit, RuntimeFailed

# From linux/loop.h and sys/mount.h.
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_AUTOCLEAR, _LO_FLAGS_DIRECT_IO = 4, 16
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOATIME = 2, 4, 8, 1024
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def mount(image: Path, directory: Path, kind: str, options: str, *, direct: bool = False) -> None:
    """Mount the file system of that kind in `image`. All or nothing. Raises OSError, HostUnfit where loop devices are missing.

    `direct`: do not keep what is read and written in memory a second time, as pages of `image`. Where it cannot be, it is kept.
    """
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        device, device_fd = _attach(fd, _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_DIRECT_IO if direct else 0))
        try:
            # AUTOCLEAR: the device is free again when the mount ends, also when nobody is left to free it.
            flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_NOATIME
            if _libc.mount(os.fsencode(device), os.fsencode(directory), kind.encode(), flags, options.encode()) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(directory))
        finally:
            os.close(device_fd)
    finally:
        os.close(fd)


def unmount(directory: Path) -> None:
    """The topmost mount, written out whole. Raises OSError: EBUSY while somebody uses it, EINVAL where there is none."""
    if _libc.umount2(os.fsencode(directory), 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(directory))


def unmount_all(directory: Path) -> None:
    """Every mount there, also while it is in use: it ends with its last user, and its loop device with it."""
    while _libc.umount2(os.fsencode(directory), _MNT_DETACH) == 0:
        pass


def _attach(image_fd: int, flags: int) -> tuple[str, int]:
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
    struct.pack_into("<I", info, 52, flags)
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
