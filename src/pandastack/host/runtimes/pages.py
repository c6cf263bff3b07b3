"""Pages of memory in files: those that are zero are holes."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

PAGE_BYTES = 4096
ZEROS = bytes(PAGE_BYTES)
_PUNCH_AND_KEEP_SIZE = 0x03  # linux/falloc.h
_PIECE_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def clear(fd: int, offset: int, length: int) -> None:
    """Make that part of a file a hole, if it holds anything."""
    try:
        if os.lseek(fd, offset, os.SEEK_DATA) >= offset + length:
            return
    except OSError as error:
        if error.errno == errno.ENXIO:  # No data from there to the end.
            return
        raise
    if _libc.fallocate(fd, _PUNCH_AND_KEEP_SIZE, offset, length) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))
        os.pwrite(fd, bytes(length), offset)


def lay_over(source_fd: int, target_fd: int) -> tuple[int, int]:
    """Write what a sparse file holds over another one of its length. Returns how much it holds, and how much of that is not zero.

    Bytes, in whole pages. What is zero becomes a hole, also where the target has something.
    """
    held = written = 0
    for start, end in _parts(source_fd):
        held += end - start
        for offset in range(start, end, _PIECE_BYTES):
            piece = memoryview(os.pread(source_fd, min(_PIECE_BYTES, end - offset), offset))
            for begin, finish, zero in _runs(piece):
                if zero:
                    clear(target_fd, offset + begin, finish - begin)
                    continue
                done = begin
                while done < finish:
                    done += os.pwrite(target_fd, piece[done:finish], offset + done)
                written += finish - begin
    return held, written


def _parts(fd: int) -> Iterator[tuple[int, int]]:
    """Where a file holds data."""
    end, size = 0, os.fstat(fd).st_size
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def _runs(piece: memoryview) -> Iterator[tuple[int, int, bool]]:
    """Pages that follow each other and are all zero, or all not."""
    begin, zero = 0, piece[:PAGE_BYTES] == ZEROS
    for offset in range(PAGE_BYTES, len(piece), PAGE_BYTES):
        now = piece[offset : offset + PAGE_BYTES] == ZEROS
        if now != zero:
            yield begin, offset, zero
            begin, zero = offset, now
    yield begin, len(piece), zero
