"""Large files as chunks named by their content: what of a file there is, whatever it was cut from, is stored once.

An *index* is a file's length and the digests of its pieces of 4 MiB, None for a piece of zeros, which is stored nowhere. Chunks are
shared by all that uses one object store, also by different tenants' memory, so a digest must be one that nobody can find a
second content for: BLAKE3. It is checked by who reads, before a byte is used: neither the store nor the cache is trusted.

`Chunks` is the reader: from the cache of this host, or else from the store, each chunk once however many want it at the same
time, in this process and in others. Calls block, from any thread; every one of them ends.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field

from pandastack.errors import ObjectStoreUnavailable
from pandastack.host.storage import space
from pandastack.host.storage.chunk_cache import ChunkCache
from pandastack.host.storage.objects import Missing, Objects

CHUNK_BYTES = 4 << 20
PREFIX = "chunks/"
_ZEROS = bytes(CHUNK_BYTES)
_READING, _AHEAD = 16, 8

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Why = Literal["missing", "damaged", "timeout", "refused", "unreachable"]


class ChunkLost(Exception):
    """A chunk cannot be had: it is not in the store (`missing`), not what it should be (`damaged`), or the store does not answer."""

    def __init__(self, digest: str, why: Why) -> None:
        super().__init__(f"chunk {digest}: {why}")
        self.digest = digest
        self.why = why


class Index(BaseModel):
    """What a file consists of. `digest` names this very index, and so the content of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=0)
    chunks: tuple[Digest | None, ...]

    @cached_property
    def digest(self) -> str:
        return digest_of(self.encoded)

    @cached_property
    def encoded(self) -> bytes:
        return self.model_dump_json().encode()

    def length(self, number: int) -> int:
        """Of that chunk: all but the last are as long."""
        return min(CHUNK_BYTES, self.size - number * CHUNK_BYTES)

    def has(self, number: int, other: Index) -> bool:
        """Whether a file of this index, cut or extended by zeros to the length of the other's, has the other's chunk there."""
        if number >= len(self.chunks):
            return other.chunks[number] is None
        return self.chunks[number] == other.chunks[number] and self.length(number) == other.length(number)

    @property
    def stored(self) -> set[str]:
        return {digest for digest in self.chunks if digest is not None}


def digest_of(data: bytes | memoryview) -> str:
    return blake3(data).hexdigest()


def key(digest: str) -> str:
    return f"{PREFIX}{digest[:2]}/{digest}"


def name_of(object_key: str) -> str:
    return object_key.rsplit("/", 1)[1]


def index_of(path: Path, pool: ThreadPoolExecutor) -> Index:
    """Read a file and name its chunks; holes are not read. Raises OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        count = -(-size // CHUNK_BYTES)
        found = pool.map(lambda number: _digest_at(file.fileno(), number, size), range(count))
        return Index(size=size, chunks=tuple(found))


def _digest_at(fd: int, number: int, size: int) -> str | None:
    data = read_at(fd, number, size)
    return None if data is None else digest_of(data)


def read_at(fd: int, number: int, size: int) -> bytes | None:
    """The content of a chunk of an open file; None for zeros. Raises OSError, also where the file became shorter."""
    start = number * CHUNK_BYTES
    length = min(CHUNK_BYTES, size - start)
    try:
        if os.lseek(fd, start, os.SEEK_DATA) >= start + length:
            return None
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None  # There is only a hole left.
    data = os.pread(fd, length, start)
    if len(data) != length:
        raise OSError(errno.EIO, "a file became shorter while it was read")
    return None if data == (_ZEROS if length == CHUNK_BYTES else bytes(length)) else data


class Chunks:
    """Reads chunks, and keeps the last few in memory (`memory_bytes`). `timeout_s` is how long anybody waits for one."""

    def __init__(self, objects: Objects, cache: ChunkCache, *, timeout_s: float = 45.0, memory_bytes: int = 0) -> None:
        self.objects = objects
        self.cache = cache
        self.fetched = 0
        """How many came from the store in the life of this object."""
        # On one disk with the store, a copy of a chunk would be as far away as the chunk, and take its place twice.
        self._caching = not cache.on_one_disk_with(objects.folder)
        self._timeout_s = timeout_s
        self._most = memory_bytes // CHUNK_BYTES
        self._recent: OrderedDict[str, bytes] = OrderedDict()
        self._flights: dict[str, Future[bytes]] = {}
        self._here: dict[tuple[str, int, int, int], Index] = {}
        self._lock = threading.Lock()
        self._reading = ThreadPoolExecutor(_READING, thread_name_prefix="chunks")
        # A pool of its own: whoever waits for a chunk now must not queue behind what may be wanted later.
        self._ahead = ThreadPoolExecutor(_AHEAD, thread_name_prefix="chunks-ahead")

    def close(self) -> None:
        for pool in (self._reading, self._ahead):
            pool.shutdown(wait=False, cancel_futures=True)

    def read(self, digest: str) -> bytes:
        """The content, proved. Raises ChunkLost, at the latest after `timeout_s`."""
        with self._lock:
            if (data := self._recent.get(digest)) is not None:
                self._recent.move_to_end(digest)
                return data
        try:
            return self._reading.submit(self._had, digest).result(self._timeout_s)
        except TooLate as error:
            raise ChunkLost(digest, "timeout") from error

    def prefetch(self, digests: Iterable[str]) -> list[Future[bool]]:
        """Have chunks in the cache soon, side by side. Those that fail are left to who needs them; a result says if it is there."""
        return [self._ahead.submit(self._prefetched, digest) for digest in digests]

    def _prefetched(self, digest: str) -> bool:
        if self._caching and not self.cache.has(digest):
            try:
                self._had(digest)
            except ChunkLost:
                return False
        return True

    def _had(self, digest: str) -> bytes:
        """Fetch it, or wait for who does."""
        with self._lock:
            if (data := self._recent.get(digest)) is not None:
                return data
            flight = self._flights.get(digest)
            ours = flight is None
            if flight is None:
                flight = self._flights[digest] = Future()
        if not ours:
            try:
                return flight.result(self._timeout_s)
            except TooLate as error:
                raise ChunkLost(digest, "timeout") from error
        try:
            data = self._fetch(digest)
        except BaseException as error:
            with self._lock:
                del self._flights[digest]
            flight.set_exception(error if isinstance(error, ChunkLost) else ChunkLost(digest, "unreachable"))
            raise
        with self._lock:
            del self._flights[digest]
            if self._most:
                self._recent[digest] = data
                while len(self._recent) > self._most:
                    self._recent.popitem(last=False)
        flight.set_result(data)
        return data

    def _fetch(self, digest: str) -> bytes:
        if (data := self._cached(digest)) is not None:
            return data
        with self.cache.fetching(digest, self._timeout_s):
            if (data := self._cached(digest)) is not None:
                return data  # By another process, meanwhile.
            # What arrived damaged may be whole the next time: what is stored so will not be.
            for _ in range(2):
                data = self._from_store(digest)
                if digest_of(data) == digest:
                    if self._caching:
                        self.cache.put(digest, data)
                    return data
            raise ChunkLost(digest, "damaged")

    def _cached(self, digest: str) -> bytes | None:
        data = self.cache.get(digest)
        if data is not None and digest_of(data) != digest:
            self.cache.drop(digest)
            return None
        return data

    def _from_store(self, digest: str) -> bytes:
        try:
            data = self.objects.get(key(digest))
        except Missing as error:
            raise ChunkLost(digest, "missing") from error
        except ObjectStoreUnavailable as error:
            raise ChunkLost(digest, error.fields.get("reason", "unreachable")) from error
        with self._lock:
            self.fetched += 1
        return data

    def assemble(self, index: Index, target: Path, *, like: Path | None = None) -> None:
        """Write the file that an index describes; zeros are holes. Raises ChunkLost, OSError; then there is half of it.

        `like` is a file that is here and has much of the same content in the same places: of that nothing is fetched, and blocks are
        shared where the file system can.
        """
        known = Index(size=0, chunks=()) if like is None else self._index_here(like)
        if like is None:
            target.touch(mode=0o600, exist_ok=False)
        else:
            space.clone(like, target)
        fd = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.truncate(fd, index.size)
            differing = [number for number in range(len(index.chunks)) if not known.has(number, index)]
            for number in differing:
                if index.chunks[number] is None:
                    space.clear(fd, number * CHUNK_BYTES, index.length(number))
            self._write_those(fd, [(number, digest) for number in differing if (digest := index.chunks[number]) is not None])
        finally:
            os.close(fd)

    def _write_those(self, fd: int, places: Sequence[tuple[int, str]]) -> None:
        for start in range(0, len(places), _READING):
            some = places[start : start + _READING]
            # Not all at once: each waits in memory until it is written.
            for (number, digest), flight in zip(some, [self._reading.submit(self._had, digest) for _, digest in some], strict=True):
                try:
                    data = flight.result(self._timeout_s)
                except TooLate as error:
                    raise ChunkLost(digest, "timeout") from error
                _write_all(fd, data, number * CHUNK_BYTES)

    def _index_here(self, path: Path) -> Index:
        """Of a file that is here and does not change; it is read the first time."""
        status = path.stat()
        identity = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
        with self._lock:
            index = self._here.get(identity)
        if index is None:
            index = index_of(path, self._reading)
            with self._lock:
                self._here[identity] = index
        return index


def _write_all(fd: int, data: bytes, position: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(fd, memoryview(data)[written:], position + written)
