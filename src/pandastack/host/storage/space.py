"""Blocks on disk: copies that share them, what a file takes alone and with others, and how much is left.

Called by the other modules of storage, the doctor and the conductor. Calls block, for milliseconds unless a large file
has to be copied in full.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

# From linux/fs.h and linux/fiemap.h.
_FICLONE = 0x40049409
_FIEMAP = 0xC020660B
_EXTENT = struct.Struct("<QQQQQIIII")
_EXTENTS_AT_ONCE = 512
_MOST_EXTENTS = 16_384
_LAST, _SHARED = 0x1, 0x2000
_PIECE_BYTES = 128 << 10
_PUNCH_AND_KEEP_SIZE = 0x03  # linux/falloc.h
# How file systems say that they cannot; anything else is a failure.
_CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENOSYS)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@dataclass(frozen=True, kw_only=True)
class Space:
    """`own_bytes` would be free if it were deleted now; `shared_bytes` would not, because something else uses them too."""

    own_bytes: int = 0
    shared_bytes: int = 0

    def __add__(self, other: Space) -> Space:
        return Space(own_bytes=self.own_bytes + other.own_bytes, shared_bytes=self.shared_bytes + other.shared_bytes)


def clone(source: Path, target: Path) -> None:
    """A new private file with the content of `source`: sharing its blocks until either is written, where the file system can.

    Elsewhere the parts that hold data are copied. Raises OSError; then there may be half of it.
    """
    read_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        write_fd = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            if not _share(read_fd, write_fd):
                _copy_sparse(read_fd, write_fd)
        finally:
            os.close(write_fd)
    finally:
        os.close(read_fd)


def clear(fd: int, start: int, length: int) -> None:
    """Zeros there, as a hole where the file system can. The file keeps its length."""
    if _libc.fallocate(fd, _PUNCH_AND_KEEP_SIZE, start, length) != 0:
        code = ctypes.get_errno()
        if code not in _CANNOT:
            raise OSError(code, os.strerror(code))
        _write(fd, bytes(length), start)


def shares_blocks(folder: Path) -> bool | None:
    """Whether files in that folder can share blocks: two are made, asked, and removed. None where none can be made, as on a full disk."""
    try:
        with tempfile.TemporaryFile(dir=folder) as source, tempfile.TemporaryFile(dir=folder) as copy:
            source.write(bytes(65536))
            source.flush()
            return _share(source.fileno(), copy.fileno())
    except OSError:
        return None


def of(*paths: Path) -> Space:
    """What these files take. A file with a second name, or blocks that a clone has too, are shared; what is missing takes nothing."""
    total = Space()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                total += _of(fd)
            finally:
                os.close(fd)
    return total


def free_bytes(folder: Path, below: Path | None = None) -> int:
    """What can still be written in `folder`. With `below`, the folder of the sparse file that it is in, never more than fits there."""
    statuses = [os.statvfs(place) for place in (folder, below) if place is not None]
    return min(status.f_bavail * status.f_frsize for status in statuses)


def used_bytes(folder: Path) -> int:
    """What is taken of the file system that the folder is on."""
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def _of(fd: int) -> Space:
    status = os.fstat(fd)
    taken = status.st_blocks * 512
    shared = taken if status.st_nlink > 1 else min(taken, _shared_extents(fd))
    return Space(own_bytes=taken - shared, shared_bytes=shared)


def _shared_extents(fd: int) -> int:
    """Bytes of a file in extents that another file has as well; 0 where the file system cannot tell.

    Of a file in more pieces than that only the first `_MOST_EXTENTS` are looked at: a sandbox can make any number of them.
    """
    shared, start = 0, 0
    for _ in range(_MOST_EXTENTS // _EXTENTS_AT_ONCE):
        # struct fiemap: start, length, flags, mapped extents, room for extents, reserved; then the extents.
        buffer = bytearray(struct.pack("<QQIIII", start, (1 << 64) - 1 - start, 0, 0, _EXTENTS_AT_ONCE, 0))
        buffer += bytes(_EXTENTS_AT_ONCE * _EXTENT.size)
        try:
            fcntl.ioctl(fd, _FIEMAP, buffer)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            return shared
        (count,) = struct.unpack_from("<I", buffer, 20)
        for index in range(count):
            logical, _physical, length, _, _, flags, *_ = _EXTENT.unpack_from(buffer, 32 + index * _EXTENT.size)
            shared += length if flags & _SHARED else 0
            start = logical + length
            if flags & _LAST:
                return shared
        if count == 0:
            return shared
    return shared


def _share(read_fd: int, write_fd: int) -> bool:
    try:
        fcntl.ioctl(write_fd, _FICLONE, read_fd)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return False
    return True


def _copy_sparse(read_fd: int, write_fd: int) -> None:
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
        _copy(read_fd, write_fd, start, position)


def _copy(read_fd: int, write_fd: int, start: int, end: int) -> None:
    """A part that holds data, by the kernel alone where it copies between these two file systems."""
    try:
        while start < end and (count := os.copy_file_range(read_fd, write_fd, end - start, start, start)):
            start += count
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    # Elsewhere by hand. Zeros stay holes, because a file system such as 9p does not tell where it has some.
    while start < end and (piece := os.pread(read_fd, min(end - start, _PIECE_BYTES), start)):
        if piece.count(0) < len(piece):
            _write(write_fd, piece, start)
        start += len(piece)


def _write(fd: int, piece: bytes, position: int) -> None:
    written = 0
    while written < len(piece):
        written += os.pwrite(fd, memoryview(piece)[written:], position + written)
