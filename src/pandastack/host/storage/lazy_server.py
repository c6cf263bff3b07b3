"""The program that shows saved memory as files before it is here: a read-only file system whose files are indexes of chunks.

A process of its own, one per host, started and watched by `lazy`: never the one that maps the files, which would wait for itself.
It holds the FUSE connection that it was given and a control socket, and has no capability. `/<digest>` is the file that the
index of that digest describes; the index is read from a folder, and proved. Reading fetches chunks; one that cannot be had is EIO
for the reader, and is remembered under the reader's user, because each machine is a user of its own.

The first reader of a file is watched for a while: the order in which it needs chunks is written beside the index and into
the object store, and whoever opens the file next has them fetched side by side, in that order.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import socket
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mfusepy
from pydantic import ValidationError

from pandastack.errors import ObjectStoreUnavailable
from pandastack.host.storage import chunks
from pandastack.host.storage.chunk_cache import ChunkCache
from pandastack.host.storage.chunks import CHUNK_BYTES, ChunkLost, Chunks, Index
from pandastack.host.storage.depot import ORDERS
from pandastack.host.storage.lazy import HURRY, PAGE
from pandastack.host.storage.objects import Missing, Objects
from pandastack.host.storage.paging import Paging

_MEMORY_BYTES = 64 << 20  # The kernel reads a chunk in four parts, and proving it takes all of it.
_FOREVER_S = 86400.0  # The content of a file never changes: it is its name.
_WATCHED_S, _QUIET_S = 30.0, 3.0
_MOST_ORDER_BYTES = 1 << 20
_AHEAD, _IN_A_ROW = 4, 3  # Who read so many chunks in a row will want so many more.
_MAX_MESSAGE = 65536
_MOST_FAILURES = 400
_PAGE_BYTES = 4096


class _File:
    """One index, and who has read what of it."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.opened = 0
        self.touched: dict[int, None] = {}
        self.latest, self.in_a_row = -1, 0
        self.first = self.last = time.monotonic()
        self.watched = False
        self.order: list[int] | None = None


class Files(mfusepy.Operations):  # type: ignore[misc]
    use_ns = True

    def __init__(self, indexes: Path, reader: Chunks) -> None:
        self._indexes = indexes
        self._reader = reader
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()
        self._since = time.time_ns()
        self._failures: dict[tuple[str, int], str] = {}
        self._failed = 0

    # What the kernel asks for

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        times = {"st_atime": self._since, "st_mtime": self._since, "st_ctime": self._since}
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o555, "st_nlink": 2, **times}
        index = self._file(path).index
        blocks = len(index.stored) * (CHUNK_BYTES >> 9)
        return {"st_mode": stat.S_IFREG | 0o444, "st_nlink": 1, "st_size": index.size, "st_blocks": blocks, **times}

    def open(self, path: str, flags: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise mfusepy.FuseOSError(errno.EROFS)
        file = self._file(path)
        with self._lock:
            file.opened += 1
        self._hurry_in_thread(file)
        return 0

    def release(self, path: str, fh: int) -> int:
        file = self._file(path)
        with self._lock:
            file.opened -= 1
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        # All or an error: to the kernel less would be the end of the file, and zeros from there on.
        file = self._file(path)
        user = mfusepy.fuse_get_context()[0]
        pieces, at, end = [], offset, min(offset + size, file.index.size)
        try:
            while at < end:
                number = at // CHUNK_BYTES
                start = at - number * CHUNK_BYTES
                length = min(end - at, CHUNK_BYTES - start)
                pieces.append(self._piece(file, number, start, length))
                at += length
        except ChunkLost as lost:
            print(f"chunk {number} of {file.index.digest} for user {user}: {lost}", file=sys.stderr, flush=True)  # noqa: T201
            # The host reads too, for a copy: it sees the error itself, and no machine has missed anything.
            # Nor has it of what the kernel read around a touched page: where that failed, it asks for the page alone.
            if user != 0 and end - offset <= _PAGE_BYTES:
                self._fail(file, user, lost.why)
            raise mfusepy.FuseOSError(errno.EIO) from lost
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, file: _File, number: int, start: int, length: int) -> bytes:
        digest = file.index.chunks[number]
        if digest is None:
            return bytes(length)
        self._touch(file, number)
        return self._reader.read(digest)[start : start + length]

    def _file(self, path: str) -> _File:
        name = path[1:]
        with self._lock:
            file = self._files.get(name)
        if file is None:
            file = _File(self._index(name))
            with self._lock:
                file = self._files.setdefault(name, file)
        return file

    def _index(self, name: str) -> Index:
        if len(name) != 64 or not name.isalnum():
            raise mfusepy.FuseOSError(errno.ENOENT)
        try:
            encoded = (self._indexes / name).read_bytes()
            index = Index.model_validate_json(encoded)
        except (OSError, ValidationError) as error:
            raise mfusepy.FuseOSError(errno.ENOENT) from error
        if chunks.digest_of(encoded) != name:
            raise mfusepy.FuseOSError(errno.EIO)
        return index

    def page(self, name: str, user: int, listener: socket.socket) -> None:
        """Serve one machine whose faults come by a userfaultfd."""
        file = self._file(f"/{name}")
        paging = Paging(listener, file.index, self._reader, lambda why: self._fail(file, user, why))
        threading.Thread(target=paging.run, name=f"paging {user}", daemon=True).start()
        self._hurry_in_thread(file)

    def _fail(self, file: _File, user: int, why: str) -> None:
        with self._lock:
            self._failed += 1
            if len(self._failures) < _MOST_FAILURES:
                self._failures.setdefault((file.index.digest, user), why)

    # Ahead of who reads

    def hurry(self, name: str) -> None:
        with contextlib.suppress(OSError):  # Whoever opens it will see that too.
            self._hurry_in_thread(self._file(f"/{name}"))

    def _hurry_in_thread(self, file: _File) -> None:
        threading.Thread(target=self._hurry, args=(file,), name="prefetch", daemon=True).start()

    def _touch(self, file: _File, number: int) -> None:
        following = [file.index.chunks[one] for one in range(number + 1, min(number + 1 + _AHEAD, len(file.index.chunks)))]
        with self._lock:
            if number != file.latest:
                file.in_a_row = file.in_a_row + 1 if number == file.latest + 1 else 0
            fresh, file.latest = number not in file.touched, number
            file.touched[number] = None
            file.last = time.monotonic()
        if fresh and file.in_a_row >= _IN_A_ROW:
            self._reader.prefetch([digest for digest in following if digest is not None])

    def _hurry(self, file: _File) -> None:
        """Fetch what the first run needed; or find out what that is."""
        with self._lock:
            first, file.watched = not file.watched, True
            file.first = time.monotonic() if first else file.first
        if file.order is None and first:
            file.order = self._known_order(file.index)
        if file.order is not None:
            self._reader.prefetch([digest for number in file.order if (digest := file.index.chunks[number]) is not None])
        elif first:
            self._watch(file)

    def _known_order(self, index: Index) -> list[int] | None:
        local = self._indexes / f"{index.digest}.order"
        try:
            encoded = local.read_bytes() if local.exists() else self._reader.objects.get(ORDERS + index.digest)
            order = json.loads(encoded[:_MOST_ORDER_BYTES])
        except (OSError, ValueError, Missing, ObjectStoreUnavailable):
            return None
        # It only says what to fetch first, so whatever it is, nothing worse than a needless request comes of it.
        if not isinstance(order, list) or not all(isinstance(one, int) and 0 <= one < len(index.chunks) for one in order):
            return None
        return order

    def _watch(self, file: _File) -> None:
        ends = time.monotonic() + _WATCHED_S
        while time.monotonic() < ends and (not file.touched or time.monotonic() - file.last < _QUIET_S):
            time.sleep(0.2)
        with self._lock:
            file.order = list(file.touched)
        encoded = json.dumps(file.order).encode()
        with contextlib.suppress(OSError):
            temporary = self._indexes / f"{file.index.digest}.order.new"
            temporary.write_bytes(encoded)
            temporary.replace(self._indexes / f"{file.index.digest}.order")
        with contextlib.suppress(ObjectStoreUnavailable):
            self._reader.objects.put(ORDERS + file.index.digest, encoded)

    # What the host asks for

    def status(self) -> dict[str, Any]:
        with self._lock:
            return {
                "pid": os.getpid(),
                "failures": [[digest, user, why] for (digest, user), why in self._failures.items()],
                "failed": self._failed,
                "fetched": self._reader.fetched,
                "opened": sum(file.opened for file in self._files.values()),
            }


def _control(listener: socket.socket, files: Files) -> None:
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_answer, args=(client, files), name="control", daemon=True).start()


def _answer(client: socket.socket, files: Files) -> None:
    with client, contextlib.suppress(OSError):
        while True:
            request, fds, _, _ = socket.recv_fds(client, _MAX_MESSAGE, 1)
            if not request:
                return
            if request.startswith(HURRY):
                files.hurry(request.removeprefix(HURRY).decode())
            elif request.startswith(PAGE):
                user, name = request.removeprefix(PAGE).decode().split()
                files.page(name, int(user), socket.socket(fileno=fds[0]))
            client.send(json.dumps(files.status()).encode())


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("fuse", int), ("listener", int), ("cache_mb", int), ("indexes", Path), ("cache", Path), ("objects", str)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, required=True)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    reader = Chunks(Objects(given.objects), ChunkCache(given.cache, given.cache_mb << 20), memory_bytes=_MEMORY_BYTES)
    files = Files(given.indexes, reader)
    listener = socket.socket(fileno=given.listener)
    threading.Thread(target=_control, args=(listener, files), name="control", daemon=True).start()
    mfusepy.FUSE(
        files,
        f"/dev/fd/{given.fuse}",
        foreground=True,
        fsname="pandastack-lazy",
        kernel_cache=True,
        entry_timeout=_FOREVER_S,
        attr_timeout=_FOREVER_S,
    )
    os._exit(0)  # Unmounted. Threads that still fetch have nobody to fetch for.


if __name__ == "__main__":
    main()
