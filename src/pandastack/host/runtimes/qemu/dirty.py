"""Tells which pages of a guest were written since a moment, so that most of its memory can be copied while it runs.

Two ways of Linux: write protection that the kernel lifts by itself and remembers (from 6.7 on; the process has to hold a userfaultfd
for its memory), and soft-dirty bits (older kernels of Debian; for the whole process). A kernel may have neither: then nothing is
told, and all is copied while the guest stands still. Sources: Linux Documentation/admin-guide/mm/{pagemap,soft-dirty,userfaultfd}.rst.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pandastack.host.runtimes.pages import PAGE_BYTES
from pandastack.host.runtimes.qemu import capture
from pandastack.host.runtimes.qemu.capture import Run
from pandastack.host.runtimes.qemu.mapping import Call

# linux/userfaultfd.h, asm/unistd_64.h
_USERFAULTFD, _PIDFD_GETFD = 323, 438
_USER_MODE_ONLY = 1
_API, _WP_ASYNC, _MODE_WP = 0xAA, 1 << 15, 1 << 1
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
# linux/fs.h
_PAGEMAP_SCAN = 0xC0606610
_PROTECT_MATCHING, _MUST_BE_TRACKED = 1 << 0, 1 << 1
_WRITTEN, _FILE, _PRESENT, _SWAPPED = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_ARGUMENTS = struct.Struct("=12Q")
_REGION = struct.Struct("=3Q")
_REGIONS = 8192
_SOFT_DIRTY = 1 << 7  # Of the second highest byte of an entry in pagemap.

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """`begin` says which pages the process has of its own, and remembers from then on which are written; `written` tells those.

    Both raise RuntimeFailed or OSError when the process is gone.
    """

    begin: Callable[[], list[Run]]
    written: Callable[[], list[Run]]


def allow(call: Call, pidfd: int, address: int, size_bytes: int) -> None:
    """Let the memory of a process that stands still be tracked by write protection, where the kernel can; silently not elsewhere.

    Nobody has to answer any fault: the process keeps the descriptor, which makes no difference to it.
    """
    try:
        number = call(_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY)
        fd = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            return
        try:
            fcntl.ioctl(fd, _UFFDIO_API, struct.pack("=3Q", _API, _WP_ASYNC, 0))
            fcntl.ioctl(fd, _UFFDIO_REGISTER, struct.pack("=4Q", address, size_bytes, _MODE_WP, 0))
        finally:
            os.close(fd)
    except OSError:
        return


def tracking(pid: int, address: int, size_bytes: int) -> Tracking | None:
    """A way to track the memory there, if there is one."""
    end = address + size_bytes

    def scan(flags: int, wanted: int) -> list[Run]:
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:  # noqa: PTH123 - unbuffered
            found = _scan(pagemap.fileno(), address, end, flags, wanted)
            return [Run(offset=start - address, length=stop - start) for start, stop in found]

    def clear() -> list[Run]:
        with open(f"/proc/{pid}/clear_refs", "wb", buffering=0) as clear_refs:  # noqa: PTH123 - unbuffered
            clear_refs.write(b"4")
        return capture.own_runs(pid, address, size_bytes)

    try:
        scan(_MUST_BE_TRACKED, _WRITTEN)
    except OSError:
        if not _has_soft_dirty():
            return None
        return Tracking(begin=clear, written=lambda: capture.own_runs(pid, address, size_bytes, soft_dirty=True))
    return Tracking(begin=lambda: scan(_PROTECT_MATCHING | _MUST_BE_TRACKED, 0), written=lambda: scan(_MUST_BE_TRACKED, _WRITTEN))


def _scan(pagemap: int, start: int, end: int, flags: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Ranges of pages that are the process's own, and in all `wanted` categories."""
    regions = ctypes.create_string_buffer(_REGION.size * _REGIONS)
    pending: tuple[int, int] | None = None
    while start < end:
        asked = [_ARGUMENTS.size, flags, start, end, 0, ctypes.addressof(regions), _REGIONS, 0]
        asked += [_FILE, _FILE | wanted, _PRESENT | _SWAPPED, _PRESENT | _SWAPPED]
        arguments = bytearray(_ARGUMENTS.pack(*asked))
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, arguments)
        for index in range(count):
            begins, ends, _ = _REGION.unpack_from(regions, index * _REGION.size)
            if pending is not None and pending[1] == begins:
                pending = (pending[0], ends)
                continue
            if pending is not None:
                yield pending
            pending = (begins, ends)
        start = _ARGUMENTS.unpack(arguments)[4]
    if pending is not None:
        yield pending


@functools.cache
def _has_soft_dirty() -> bool:
    """Whether a page that was written just now is marked as such."""
    with mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page, open("/proc/self/pagemap", "rb") as pagemap:  # noqa: PTH123
        page[0] = 1
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        return bool(os.pread(pagemap.fileno(), 8, address // PAGE_BYTES * 8)[6] & _SOFT_DIRTY)
