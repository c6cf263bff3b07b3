"""The chunks that a host has: one folder for all its processes and installs, of bounded size, the least recently used out first.

A cache and no more: what is in it is checked by who reads it, anybody may empty it, and where nothing can be written nothing is
kept. Below `root`:

    ab/ab12...      a chunk, under the name of its content; it appears by one rename
    lock            whoever adds or removes one holds it; its text is how many bytes there are
    flights         one byte of it is locked for each chunk that is being fetched, so that others wait instead of fetching it too
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import struct
import time
from collections.abc import Iterator
from pathlib import Path

_POLL_S = 0.005
_TOUCH_EVERY_S = 60.0
_LEFT_AFTER_S = 3600.0  # Whoever was writing a file that old is gone.
_ROOM = 0.9  # Emptied to that share, so that not every put has to look at all of them.


class ChunkCache:
    """At most `limit_bytes` in the folder `root`. Calls block briefly, except `fetching`."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root = root
        self._limit_bytes = limit_bytes
        with contextlib.suppress(OSError):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(self, digest: str) -> bytes | None:
        """What is kept under that name, unproved."""
        path = self._path(digest)
        try:
            with path.open("rb") as file:
                if time.time() - os.fstat(file.fileno()).st_mtime > _TOUCH_EVERY_S:
                    os.utime(path)
                return file.read()
        except OSError:
            return None

    def has(self, digest: str) -> bool:
        return self._path(digest).exists()

    def put(self, digest: str, data: bytes) -> None:
        """Keep it if there is room for it at all."""
        if len(data) > self._limit_bytes or self.has(digest):
            return
        path = self._path(digest)
        temporary = path.with_name(f".{secrets.token_hex(8)}")
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                temporary.write_bytes(data)
                with self._counting() as count:
                    total = count.read()
                    if total + len(data) > self._limit_bytes:
                        total = self._make_room(len(data))
                    temporary.replace(path)
                    count.write(total + len(data))
            finally:
                temporary.unlink(missing_ok=True)

    def drop(self, digest: str) -> None:
        """Idempotent."""
        with contextlib.suppress(OSError), self._counting() as count:
            size = self._path(digest).stat().st_size
            self._path(digest).unlink()
            count.write(max(0, count.read() - size))

    def on_one_disk_with(self, folder: Path | None) -> bool:
        try:
            return folder is not None and folder.stat().st_dev == self.root.stat().st_dev
        except OSError:
            return False

    @contextlib.contextmanager
    def fetching(self, digest: str, timeout_s: float) -> Iterator[None]:
        """While the block runs no other process fetches that chunk; after `timeout_s` in vain this one does all the same."""
        try:
            fd = os.open(self.root / "flights", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            yield
            return
        try:
            # struct flock: write lock, from the beginning, at that byte, one byte long. Of the open file, so threads are told apart too.
            lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, int(digest[:15], 16), 1, 0)
            ends = time.monotonic() + timeout_s
            while time.monotonic() < ends:
                try:
                    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
                    break
                except BlockingIOError:
                    time.sleep(_POLL_S)
                except OSError:
                    break
            yield
        finally:
            os.close(fd)

    def _path(self, digest: str) -> Path:
        return self.root / digest[:2] / digest

    @contextlib.contextmanager
    def _counting(self) -> Iterator[_Count]:
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield _Count(fd)
        finally:
            os.close(fd)

    def _make_room(self, wanted_bytes: int) -> int:
        """Remove the least recently used ones; the bytes that are left. The caller holds the lock."""
        found: list[tuple[float, int, str]] = []
        for folder in os.scandir(self.root):
            if not folder.is_dir():
                continue
            for file in os.scandir(folder.path):
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat()
                    if not file.name.startswith("."):
                        found.append((status.st_mtime, status.st_size, file.path))
                    elif time.time() - status.st_mtime > _LEFT_AFTER_S:
                        Path(file.path).unlink()
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total + wanted_bytes <= self._limit_bytes * _ROOM:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total


class _Count:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> int:
        text = os.pread(self._fd, 20, 0)
        return int(text) if text.strip().isdigit() else 0

    def write(self, total: int) -> None:
        os.pwrite(self._fd, f"{total:20d}".encode(), 0)
