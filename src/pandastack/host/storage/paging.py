"""Memory that comes when it is touched, for a VMM that hands over its userfaultfd (Firecracker's `Uffd` backend).

Part of the program `lazy_server`; one thread for each machine. The VMM connects to a socket, and sends which of its addresses
are which part of the saved memory, with the userfaultfd. From then on each first touch of a page is an event, and the toucher waits
until the page is there. A whole block is copied for it (2 MiB, or as much as is left), because an event costs as much as copying a
few hundred KiB. What the machine gave back (a balloon) is zeros when it is touched again.

A part that cannot be had is told to `failed`, and its pages are poisoned where the kernel can: whoever touches them gets SIGBUS.
Source: Firecracker docs/snapshotting/handling-page-faults-on-snapshot-resume.md, linux/userfaultfd.h.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pandastack.host.storage.chunks import CHUNK_BYTES, ChunkLost, Chunks, Index

BLOCK_BYTES = 2 << 20
CONNECT_TIMEOUT_S = 60.0
_PAGE_BYTES = 4096
_MOST_REGIONS_BYTES = 65536
_EVENT_BYTES, _EVENTS_AT_ONCE = 32, 64
_PAGEFAULT, _REMOVE, _UNMAP = 0x12, 0x15, 0x16
_COPY, _ZEROPAGE, _WAKE, _POISON = 0xC028AA03, 0xC020AA04, 0x8010AA02, 0xC020AA08

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


class _Copy(ctypes.Structure):
    """struct uffdio_copy; `done` is how much was, or a negative error."""

    _fields_ = [(name, ctypes.c_int64 if name == "done" else ctypes.c_uint64) for name in ("dst", "src", "length", "mode", "done")]


class _Range(ctypes.Structure):
    """struct uffdio_zeropage and uffdio_poison; struct uffdio_range is how it begins."""

    _fields_ = [(name, ctypes.c_int64 if name == "done" else ctypes.c_uint64) for name in ("start", "length", "mode", "done")]


@dataclass(frozen=True, kw_only=True)
class Region:
    """Addresses of the VMM, from `address` on, that are the saved memory from `offset` on."""

    address: int
    size: int
    offset: int
    page_bytes: int = _PAGE_BYTES

    @classmethod
    def read(cls, item: dict[str, Any], memory_bytes: int) -> Region:
        """As the VMM says it. Raises ValueError where that cannot be."""
        try:
            page = int(item.get("page_size") or int(item.get("page_size_kib", 4)) << 10)
            region = cls(address=int(item["base_host_virt_addr"]), size=int(item["size"]), offset=int(item["offset"]), page_bytes=page)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("a region has not what it must have") from error
        if page not in (_PAGE_BYTES, BLOCK_BYTES) or region.address % page or region.size % page or region.offset % page:
            raise ValueError("a region does not consist of pages")
        if region.size <= 0 or region.offset < 0 or region.offset + region.size > memory_bytes:
            raise ValueError("a region is outside of the saved memory")
        return region

    def pages(self, start: int, end: int) -> range:
        """The numbers in the saved memory of what is at these addresses in here; none where they end before they start."""
        first = (self.offset + start - self.address) // _PAGE_BYTES
        return range(first, max(first, (self.offset + end - self.address) // _PAGE_BYTES))


class Paging:
    """Serves the machine that connects to `listener`, from the file that `index` describes."""

    def __init__(self, listener: socket.socket, index: Index, reader: Chunks, failed: Callable[[str], None]) -> None:
        self._listener = listener
        self._index = index
        self._reader = reader
        self._failed = failed
        self._regions: list[Region] = []
        self._removed = bytearray(index.size // _PAGE_BYTES)  # By the number of a page in the saved memory.
        self._uffd = -1

    def run(self) -> None:
        """Until the machine is over."""
        with self._listener:
            self._listener.settimeout(CONNECT_TIMEOUT_S)
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # Nobody came: its start failed.
        with connection:
            connection.settimeout(CONNECT_TIMEOUT_S)
            try:
                self._greet(connection)
            except (OSError, ValueError, RecursionError):
                self._failed("unreachable")
                return
            try:
                self._serve(connection)
            finally:
                os.close(self._uffd)

    def _greet(self, connection: socket.socket) -> None:
        data, fds, _, _ = socket.recv_fds(connection, _MOST_REGIONS_BYTES, 4)
        if len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise ValueError("there is no userfaultfd")
        self._uffd = fds[0]
        try:
            self._regions = [Region.read(item, self._index.size) for item in json.loads(data)]
        except BaseException:
            os.close(self._uffd)
            raise
        os.set_blocking(self._uffd, False)

    def _serve(self, connection: socket.socket) -> None:
        poll = select.poll()
        poll.register(self._uffd, select.POLLIN)
        # Never more said: when it hangs up, the machine is over.
        poll.register(connection, select.POLLIN)
        waiting: list[int] = []
        while True:
            # What could not be done because something else was to be read first is tried again at once.
            for fd, event in poll.poll(0 if waiting else None):
                if fd != self._uffd or event & (select.POLLHUP | select.POLLERR):
                    return
            for kind, first, second in self._events():
                if kind == _PAGEFAULT:
                    waiting.append(second)
                elif kind in (_REMOVE, _UNMAP):
                    self._remove(first, second)
            waiting = [address for address in waiting if not self._bring(address)]

    def _remove(self, first: int, second: int) -> None:
        """Whatever a VMM says that it gave back, only what it has of the memory counts."""
        for region in self._regions:
            pages = region.pages(max(first, region.address), min(second, region.address + region.size))
            self._removed[pages.start : pages.stop] = bytes([1]) * len(pages)

    def _events(self) -> Iterator[tuple[int, int, int]]:
        """Kind, and the two words that come with it: flags and address of a fault, start and end of what was given back."""
        try:
            data = os.read(self._uffd, _EVENT_BYTES * _EVENTS_AT_ONCE)
        except BlockingIOError:
            return
        for position in range(0, len(data), _EVENT_BYTES):
            yield data[position], *struct.unpack_from("<QQ", data, position + 8)

    def _bring(self, address: int) -> bool:
        """Have the page of an address there. False where an event must be read before that."""
        region = next((one for one in self._regions if one.address <= address < one.address + one.size), None)
        if region is None:
            return True  # Of no memory of the guest.
        page = address - address % region.page_bytes
        start = max(region.address, address - address % BLOCK_BYTES)
        end = min(region.address + region.size, address - address % BLOCK_BYTES + BLOCK_BYTES)
        if self._was_removed(region.pages(start, end)):
            # Only what is asked for: the rest of the block may have been given back, and is zeros then.
            start, end = page, page + region.page_bytes
            if self._was_removed(region.pages(start, end)):
                return self._fill(start, end - start, None, region.page_bytes)
        try:
            data = self._content(region.offset + start - region.address, end - start)
        except ChunkLost as lost:
            self._failed(lost.why)
            self._poison(page, region.page_bytes)
            return True
        return self._fill(start, end - start, data, region.page_bytes)

    def _was_removed(self, pages: range) -> bool:
        """Some of them."""
        return 1 in self._removed[pages.start : pages.stop]

    def _content(self, offset: int, length: int) -> bytes | None:
        """Of the saved memory; None for zeros."""
        pieces, end = [], offset + length
        while offset < end:
            number = offset // CHUNK_BYTES
            start = offset - number * CHUNK_BYTES
            some = min(end - offset, CHUNK_BYTES - start)
            digest = self._index.chunks[number]
            pieces.append(bytes(some) if digest is None else self._reader.read(digest)[start : start + some])
            offset += some
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return None if data.count(0) == length else data

    def _fill(self, start: int, length: int, data: bytes | None, page_bytes: int) -> bool:
        """Put content there, zeros for None, and wake who waits. Pages that are there already stay. False as for `_bring`."""
        if data is None and page_bytes != _PAGE_BYTES:
            data = bytes(length)  # The kernel has no page of zeros of that size.
        position = 0
        while position < length:
            done, code = self._put(start + position, length - position, data, position)
            position += done
            if code == errno.EAGAIN and done:
                continue  # Why it stopped, the next call says.
            if code == errno.EAGAIN:
                return False
            if code == errno.EEXIST:
                # Whoever waits for that one would wait on.
                self._ioctl(_WAKE, _Range(start=start + position, length=page_bytes))
                position += page_bytes
            elif code:
                if code not in (errno.ESRCH, errno.ENOENT):
                    self._failed("unreachable")  # Whoever waits would wait on.
                return True  # The machine is going, or its memory was unmapped.
        return True

    def _put(self, address: int, length: int, data: bytes | None, position: int) -> tuple[int, int]:
        """How much came there, and the error that stopped it."""
        if data is None:
            zeros = _Range(start=address, length=length)
            code = self._ioctl(_ZEROPAGE, zeros)
            return (length, 0) if code == 0 else (max(0, zeros.done), code)
        source = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
        copy = _Copy(dst=address, src=source + position, length=length)
        code = self._ioctl(_COPY, copy)
        return (length, 0) if code == 0 else (max(0, copy.done), code)

    def _poison(self, start: int, length: int) -> None:
        """Since Linux 6.6. Before that the toucher waits until its machine is ended."""
        self._ioctl(_POISON, _Range(start=start, length=length))

    def _ioctl(self, request: int, argument: ctypes.Structure) -> int:
        """The error number, or 0."""
        return 0 if _libc.ioctl(self._uffd, request, ctypes.addressof(argument)) == 0 else ctypes.get_errno()
