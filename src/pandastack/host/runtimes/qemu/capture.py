"""Saves the memory of a guest: its own pages, copied while it stands still, over the file that it was restored from.

The memory of a guest is a private mapping of a saved file, or of nothing. What it wrote is its own; all other pages are still those
of the file. So a new saved state is a copy of that file (sharing its blocks) with the own pages over it, and needs no file of an
earlier generation. Finding the pages takes 2 ms for 256 MiB, copying a fifth of a millisecond per MiB; pages of zeros become holes.
Source: Linux Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.pages import PAGE_BYTES, ZEROS, clear

_ENTRY_BYTES = 8
# The highest byte of an entry: 0x80 present, 0x40 swapped, 0x20 a page of a file or of shared memory.
_OWN = bytes(bool(b & 0xC0 and not b & 0x20) for b in range(256))
# The one below: 0x80 written since somebody cleared it.
_WRITTEN = bytes(bool(b & 0x80) for b in range(256))
_RUNS = re.compile(b"\1+")
_PIECES = 1024  # IOV_MAX
_MOST_BYTES = 1 << 20  # Of a piece that is written at once: 1024 of them are less than one call can move.
_KEEP_BYTES = 256 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_writev.restype = ctypes.c_ssize_t


class _Piece(ctypes.Structure):
    """struct iovec."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Pages that follow each other, from `offset` in the guest's memory on. Bytes, multiples of a page."""

    offset: int
    length: int


def length(runs: Sequence[Run]) -> int:
    """In bytes."""
    return sum(run.length for run in runs)


def own_runs(pid: int, address: int, size_bytes: int, *, soft_dirty: bool = False) -> list[Run]:
    """Where the process has pages of its own in `size_bytes` from `address` on. Raises RuntimeFailed when it is gone.

    With `soft_dirty` only those that were written since its soft-dirty bits were cleared.
    """
    try:
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:  # noqa: PTH123 - unbuffered
            entries = os.pread(pagemap.fileno(), size_bytes // PAGE_BYTES * _ENTRY_BYTES, address // PAGE_BYTES * _ENTRY_BYTES)
    except OSError as error:
        raise RuntimeFailed("the memory of the machine cannot be looked at", detail=str(error)) from error
    if len(entries) != size_bytes // PAGE_BYTES * _ENTRY_BYTES:
        raise RuntimeFailed("the memory of the machine is not where it was")
    chosen = entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(_OWN)
    if soft_dirty:
        written = entries[_ENTRY_BYTES - 2 :: _ENTRY_BYTES].translate(_WRITTEN)
        chosen = (int.from_bytes(chosen) & int.from_bytes(written)).to_bytes(len(chosen))
    runs = _RUNS.finditer(chosen)
    return [Run(offset=run.start() * PAGE_BYTES, length=(run.end() - run.start()) * PAGE_BYTES) for run in runs]


class Arena:
    """Memory to copy into. The kernel gave it its pages already: to fault them in while a guest waits takes ten times as long."""

    def __init__(self) -> None:
        self._memory = _populated(PAGE_BYTES)

    def reserve(self, size_bytes: int) -> None:
        """Make room for that much; what was in it is lost."""
        if len(self._memory) < size_bytes:
            self._memory.close()
            self._memory = _populated(size_bytes)

    def release(self) -> None:
        """Give back what is more than is worth keeping."""
        if len(self._memory) > _KEEP_BYTES:
            self._memory.close()
            self._memory = _populated(PAGE_BYTES)

    def copy(self, pid: int, address: int, runs: Sequence[Run], *, at: int = 0) -> int:
        """The pages of `runs`, one behind the other from byte `at` on; returns where they end.

        Lets other threads run meanwhile. Raises RuntimeFailed when the process is gone.
        """
        self._grow(at + length(runs), keep=at)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        position = at
        for start in range(0, len(runs), _PIECES):
            some = runs[start : start + _PIECES]
            remote = (_Piece * len(some))(*[_Piece(address + run.offset, run.length) for run in some])
            self._read(pid, _Piece(base + position, length(some)), remote)
            position += length(some)
        return position

    def _read(self, pid: int, local: _Piece, remote: ctypes.Array[_Piece]) -> None:
        # One call moves at most 2 GiB less a page.
        wanted, done = local.length, 0
        index, skip = 0, 0
        while done < wanted:
            rest = (_Piece * (len(remote) - index)).from_buffer_copy(bytes(remote)[index * ctypes.sizeof(_Piece) :])
            rest[0].base, rest[0].length = rest[0].base + skip, rest[0].length - skip
            into = _Piece(local.base + done, wanted - done)
            count = _libc.process_vm_readv(pid, ctypes.byref(into), 1, rest, len(rest), 0)
            if count <= 0:
                raise RuntimeFailed("the memory of the machine cannot be read", detail=os.strerror(ctypes.get_errno()))
            done += count
            skip += count
            while index < len(remote) and skip >= remote[index].length:
                skip -= remote[index].length
                index += 1

    def _grow(self, size_bytes: int, *, keep: int) -> None:
        """As `reserve`, but the first `keep` bytes stay what they are."""
        if len(self._memory) < size_bytes:
            before, self._memory = self._memory, _populated(size_bytes)
            self._memory[:keep] = before[:keep]
            before.close()

    def pieces(self, runs: Sequence[Run], *, at: int = 0) -> Iterator[tuple[int, memoryview | None, int]]:
        """What was copied, as offset in the guest's memory, content, length; the content of pages of zeros is None."""
        view = memoryview(self._memory)
        position = at
        for run in runs:
            begin, empty = 0, self._memory[position : position + PAGE_BYTES] == ZEROS
            for offset in range(PAGE_BYTES, run.length + PAGE_BYTES, PAGE_BYTES):
                here = position + offset
                last = offset >= run.length
                now = empty if last else self._memory[here : here + PAGE_BYTES] == ZEROS
                if now != empty or last:
                    yield run.offset + begin, None if empty else view[position + begin : here], offset - begin
                    begin, empty = offset, now
            position += run.length


class Arenas:
    """One arena for each snapshot that is being made."""

    def __init__(self) -> None:
        self._free: list[Arena] = []
        self._lock = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[Arena]:
        with self._lock:
            arena = self._free.pop() if self._free else Arena()
        try:
            yield arena
        finally:
            arena.release()
            with self._lock:
                if not self._free:
                    self._free.append(arena)


def write(arena: Arena, runs: Sequence[Run], target: Path, *, at: int = 0) -> int:
    """Lay what was copied over `target`, a file as long as the guest's memory. Returns how many bytes were written."""
    written = 0
    fd = os.open(target, os.O_RDWR | os.O_CLOEXEC)
    try:
        for offset, content, size in arena.pieces(runs, at=at):
            if content is None:
                clear(fd, offset, size)
                continue
            done = 0
            while done < size:
                done += os.pwrite(fd, content[done:], offset + done)
            written += size
    finally:
        os.close(fd)
    return written


def inject(arena: Arena, runs: Sequence[Run], base_fd: int, pid: int, address: int, *, at: int = 0) -> int:
    """Lay what was copied over the memory of a process that has mapped `base_fd` at `address`. Returns how many bytes were written."""
    zeros = memoryview(bytearray(_MOST_BYTES))
    told = []
    for offset, content, size in arena.pieces(runs, at=at):
        for start in range(0, size, _MOST_BYTES):
            part = min(size - start, _MOST_BYTES)
            if content is not None:
                told.append((offset + start, content[start : start + part]))
            elif _has_data(base_fd, offset + start, part):
                told.append((offset + start, zeros[:part]))
    _put(pid, address, told)
    return sum(len(view) for _, view in told)


def _put(pid: int, address: int, pieces: Sequence[tuple[int, memoryview]]) -> None:
    """Write pieces, by their offset in the guest's memory, into that of a process. Raises RuntimeFailed when it is gone."""
    for start in range(0, len(pieces), _PIECES):
        some = pieces[start : start + _PIECES]
        local = (_Piece * len(some))(*[_Piece(ctypes.addressof(ctypes.c_char.from_buffer(view)), len(view)) for _, view in some])
        remote = (_Piece * len(some))(*[_Piece(address + offset, len(view)) for offset, view in some])
        wanted = sum(len(view) for _, view in some)
        if _libc.process_vm_writev(pid, local, len(some), remote, len(some), 0) != wanted:
            raise RuntimeFailed("the memory of the machine cannot be written", detail=os.strerror(ctypes.get_errno()))


def _has_data(fd: int, offset: int, size: int) -> bool:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) < offset + size
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise


def _populated(size_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
