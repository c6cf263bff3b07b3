"""Saved states of sandboxes on disk: written whole, proved by digests, and gone without a trace when they were not finished.

Runs on a host; called by the conductor. Below `root`:

    <id>/manifest.json  ...    a durable state: the runtime's files, and what they are; it appears by one rename
    <id>/away.json             where there is one, the files that it names are in the object store, see `offloads`
    .new/<id>/                 one being written, or what a killed one left; the next start clears it

The order of `publish` is the promise: every file, then the manifest with their sizes and digests, then the folder, then its
name are on disk before anybody is told. Whoever reads checks all of it before anything in the copy moves, so a state that was
cut short, changed, or copied here from elsewhere is refused with a reason. The first line of a manifest is the SHA-256 of
the rest: it is not there against forgers (only root writes here) but against disks.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pandastack.errors import DiskFull, SnapshotNotFound, SnapshotUnusable
from pandastack.host.storage import space
from pandastack.host.storage.depot import Kept
from pandastack.wire.ids import SandboxId, SnapshotId

log = structlog.get_logger(__name__)

_MANIFEST, _AWAY = "manifest.json", "away.json"
_NEW = ".new"
_MAX_MANIFEST_BYTES = 16 << 20
_WRITE_EVERY_S = 0.01
_READERS_POLL_S = 0.05
_BLOCK_BYTES, _PIECE_BYTES = 256 << 10, 8 << 20
_DIGESTING = 2  # Threads; more would only take the processor from the sandboxes.
_ZEROS = bytes(_BLOCK_BYTES)
_SYNC_FILE_RANGE_WRITE = 2  # From linux/fs.h: begin to write dirty pages, wait for nothing.

_libc = ctypes.CDLL(None)

Kind = Literal["snapshot", "hibernation"]
S = TypeVar("S", bound=BaseModel)


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SavedFile(_Shape):
    """`pieced`: how `sha256` was made, see `_digest`; states of early versions have the plain one of the file."""

    size: int = Field(ge=0)
    sha256: str
    pieced: bool = False


class Origin(_Shape):
    """Of what a state was taken, and all that is needed to bring it back. Sizes are MiB.

    `runtime_key` names the builds and the processor that can restore it, `guest` the folder of the guest daemon that runs
    in it, `rootfs` the image below it.
    """

    sandbox_id: SandboxId
    template: str
    template_actual: str
    template_note: str | None = None
    runtime: str
    runtime_key: str
    guest: str
    rootfs: str
    cpu: float
    memory_mb: int
    disk_mb: int
    env: dict[str, str] = {}


class Manifest(_Shape):
    format: Literal[1] = 1
    id: SnapshotId
    kind: Kind
    created_us: int
    origin: Origin
    files: dict[str, SavedFile]


class Saved(_Shape):
    """A durable state: `folder` holds the files that the runtime wrote. `size_bytes` is what they take on disk.

    `away` are those of them that are in the object store instead.
    """

    manifest: Manifest
    folder: Path
    size_bytes: int
    away: Kept | None = None


class Snapshots:
    """The states below `root`. `low_water_mib` stays free on its file system, and on that of `below` as for `disks.Disks`."""

    def __init__(self, root: Path, *, low_water_mib: int = 1024, below: Path | None = None) -> None:
        self._root = root
        self._below = below
        self._low_water_mib = low_water_mib
        self._known: dict[SnapshotId, Saved] = {}
        self._readers: Counter[SnapshotId] = Counter()

    def open(self) -> None:
        """Read what there is. Unfinished ones are removed, unreadable ones stay where they are and are reported."""
        (self._root / _NEW).mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in (self._root / _NEW).iterdir():
            shutil.rmtree(left, ignore_errors=True)
        self._known.clear()
        for folder in sorted(self._root.iterdir()):
            if folder.name == _NEW or not folder.is_dir():
                continue
            try:
                manifest = _read(folder)
                away = _read_away(folder, manifest)
            except SnapshotUnusable as error:
                log.error("a saved state is unreadable and is left alone", path=str(folder), error=error.message)
                continue
            if away is not None:
                _drop(folder, away)  # A killed one may have come no further.
            self._known[manifest.id] = Saved(manifest=manifest, folder=folder, size_bytes=_allocated(folder), away=away)

    def list(self, kind: Kind) -> list[Saved]:
        return [saved for saved in self._known.values() if saved.manifest.kind == kind]

    def get(self, snapshot_id: str) -> Saved:
        """What is known of a state, unchecked. Raises SnapshotNotFound."""
        saved = self._known.get(SnapshotId(snapshot_id))
        if saved is None:
            raise SnapshotNotFound("no such snapshot", snapshot_id=snapshot_id)
        return saved

    def require_space(self, bytes_wanted: int) -> None:
        """Refuse a capture that would not fit, before anything is stopped for it. Raises DiskFull."""
        free = space.free_bytes(self._root, self._below) - (self._low_water_mib << 20)
        if bytes_wanted > free:
            raise DiskFull(
                f"a saved state may need {bytes_wanted >> 20} MiB, but {max(0, free) >> 20} MiB are free above the reserve",
                hint="delete snapshots or hibernated sandboxes, or give the data directory more space",
            )

    @contextlib.asynccontextmanager
    async def writing(self, snapshot_id: SnapshotId) -> AsyncIterator[Path]:
        """A new, empty folder for a runtime to write into. What is in it when the block ends without `publish` is removed."""
        folder = self._root / _NEW / snapshot_id
        await asyncio.to_thread(_fresh, folder)
        # The disk writes from the beginning on, rather than all at once when `publish` waits for it.
        ahead = asyncio.create_task(_write_ahead(folder), name=f"write ahead {snapshot_id}")
        try:
            yield folder
        finally:
            ahead.cancel()
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, True))

    async def publish(self, snapshot_id: SnapshotId, kind: Kind, origin: Origin) -> Saved:
        """Make the folder of `writing` a durable state. Raises DiskFull; then there is none."""
        publishing = asyncio.ensure_future(asyncio.to_thread(self._publish, snapshot_id, kind, origin))
        try:
            return await asyncio.shield(publishing)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: it would publish after its caller had cleaned up.
            await asyncio.wait([publishing])
            await self.delete(snapshot_id)
            raise

    def _publish(self, snapshot_id: SnapshotId, kind: Kind, origin: Origin) -> Saved:
        source, target = self._root / _NEW / snapshot_id, self._root / snapshot_id
        try:
            paths = sorted(source.iterdir())
            # Digests come from the page cache while the disk writes.
            with ThreadPoolExecutor(1 + _DIGESTING) as pool:
                syncing = pool.submit(_sync, *paths)
                files = {path.name: _measure(path, pool) for path in paths}
                syncing.result()
            created_us = time.time_ns() // 1000
            manifest = Manifest(id=snapshot_id, kind=kind, created_us=created_us, origin=origin, files=files)
            _write(source / _MANIFEST, manifest)
            _sync(source)
            source.rename(target)
            _sync(self._root)
        except OSError as error:
            shutil.rmtree(target, ignore_errors=True)
            raise DiskFull(
                "the saved state could not be written to disk",
                hint="free space on the file system of the data directory",
                detail=str(error),
            ) from error
        saved = self._known[snapshot_id] = Saved(manifest=manifest, folder=target, size_bytes=_allocated(target))
        return saved

    async def copy(self, source: Saved, snapshot_id: SnapshotId, kind: Kind) -> Saved:
        """A second name for a state: its files are never changed, so both share them."""
        async with self.writing(snapshot_id) as folder:
            for name in source.manifest.files:
                os.link(source.folder / name, folder / name)
            return await self.publish(snapshot_id, kind, source.manifest.origin)

    def space(self, snapshot_id: str) -> space.Space:
        """What a state takes of the disk; a file that another state has too is shared. Blocks briefly. Raises SnapshotNotFound."""
        saved = self.get(snapshot_id)
        return space.of(*(saved.folder / name for name in (*saved.manifest.files, _MANIFEST, _AWAY)))

    async def check(self, snapshot_id: str) -> Saved:
        """A state that is exactly what was saved, as far as it is here: what is in the object store is proved when it is read.

        Raises SnapshotNotFound, SnapshotUnusable with its `reason`.
        """
        with self.reading(snapshot_id) as saved:
            await asyncio.to_thread(_check, saved)
            return saved

    # Files that go to the object store

    @contextlib.contextmanager
    def reading(self, snapshot_id: str) -> Iterator[Saved]:
        """A state whose files stay where they are while the block runs. Raises SnapshotNotFound."""
        saved = self.get(snapshot_id)
        self._readers[saved.manifest.id] += 1
        try:
            yield saved
        finally:
            self._readers[saved.manifest.id] -= 1

    @contextlib.asynccontextmanager
    async def scratch(self) -> AsyncIterator[Path]:
        """An empty folder beside the states, on their file system, for as long as the block lasts."""
        folder = self._root / _NEW / uuid.uuid4().hex
        await asyncio.to_thread(_fresh, folder)
        try:
            yield folder
        finally:
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, True))

    async def send_away(self, snapshot_id: str, away: Kept) -> Saved:
        """Remember, durably, that these files are in the object store, and remove them here when the last who reads them has done."""
        saved = self.get(snapshot_id)
        await asyncio.to_thread(_remember_away, saved.folder, away)
        gone = saved.model_copy(update={"away": away})
        self._known[saved.manifest.id] = gone
        while self._readers[saved.manifest.id]:  # noqa: ASYNC110 - seldom, and each event for it would have to be made and kept
            await asyncio.sleep(_READERS_POLL_S)
        await asyncio.to_thread(_drop, saved.folder, away)
        if self._known.get(saved.manifest.id) is not gone:
            raise SnapshotNotFound("the snapshot was deleted meanwhile", snapshot_id=snapshot_id)
        gone = self._known[saved.manifest.id] = gone.model_copy(update={"size_bytes": _allocated(saved.folder)})
        return gone

    async def delete(self, snapshot_id: str) -> None:
        """Idempotent. After a power cut it may be back; whoever keeps the records deletes it again."""
        saved = self._known.pop(SnapshotId(snapshot_id), None)
        if saved is not None:
            await asyncio.shield(asyncio.to_thread(self._remove, saved.folder))

    def _remove(self, folder: Path) -> None:
        # Renamed first: half of a state must never look like one.
        trash = self._root / _NEW / f"{folder.name}.gone"
        shutil.rmtree(trash, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    async def sweep(self, keep: Collection[str]) -> int:
        """Remove the hibernations that no sandbox refers to; returns how many."""
        gone = [saved.manifest.id for saved in self.list("hibernation") if saved.manifest.id not in keep]
        for snapshot_id in gone:
            await self.delete(snapshot_id)
        return len(gone)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)


async def _write_ahead(folder: Path) -> None:
    """Have the kernel write what is in the files already, again and again, until cancelled."""
    while True:
        await asyncio.sleep(_WRITE_EVERY_S)
        await asyncio.to_thread(_start_writing, folder)


def _start_writing(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Whatever is wrong, `publish` will say.
        for path in folder.iterdir():
            with path.open("rb") as file:
                _libc.sync_file_range(file.fileno(), ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def _measure(path: Path, pool: Executor, *, pieced: bool = True) -> SavedFile:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = _digest(file.fileno(), size, pool) if pieced else hashlib.file_digest(file, "sha256").hexdigest()
    return SavedFile(size=size, sha256=digest, pieced=pieced)


def _digest(fd: int, size: int, pool: Executor) -> str:
    """The digest of the digests of a file's pieces, which are made side by side.

    That of a piece is of its blocks which are not all zero, each with its place: the memory of a machine then costs what it uses and
    not what it could, wherever the file has holes.
    """
    whole = hashlib.sha256()
    for piece in pool.map(lambda start: _piece_digest(fd, start, min(size, start + _PIECE_BYTES)), range(0, size, _PIECE_BYTES)):
        whole.update(piece)
    return whole.hexdigest()


def _piece_digest(fd: int, position: int, end: int) -> bytes:
    digest, buffer = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # There is only a hole left.
            raise
        if start >= end:
            break
        position = start - start % _BLOCK_BYTES
        count = os.preadv(fd, [buffer], position)
        if count < min(_BLOCK_BYTES, end - position):
            raise OSError(errno.EIO, "a file became shorter while it was read")
        block = buffer if count == _BLOCK_BYTES else buffer[:count]
        if block != (_ZEROS if count == _BLOCK_BYTES else bytes(count)):
            digest.update(position.to_bytes(8, "little"))
            digest.update(block)
        position += _BLOCK_BYTES
    return digest.digest()


def _sync(*paths: Path) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _write(path: Path, shape: BaseModel) -> None:
    body = shape.model_dump_json().encode()
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    _sync(path)


def _read(folder: Path) -> Manifest:
    """The manifest of a folder. Raises SnapshotUnusable."""
    manifest = _read_shape(folder / _MANIFEST, Manifest, "its manifest")
    if manifest.id != folder.name:
        raise _unusable("foreign", "it is the copy of another snapshot")
    return manifest


def _read_shape(path: Path, shape: type[S], what: str) -> S:
    """What `_write` wrote. Raises SnapshotUnusable."""
    try:
        with path.open("rb") as file:
            digest, _, body = file.read(_MAX_MANIFEST_BYTES).partition(b"\n")
    except OSError as error:
        raise _unusable("missing", f"{what} cannot be read") from error
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise _unusable("damaged", f"{what} was changed")
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        raise _unusable("foreign", f"{what} is of a format that this version does not know") from error


def _read_away(folder: Path, manifest: Manifest) -> Kept | None:
    """What of a state is in the object store; None where all of it is here. Raises SnapshotUnusable."""
    if not (folder / _AWAY).exists():
        return None
    away = _read_shape(folder / _AWAY, Kept, "the list of what is in the object store")
    for name, index in away.files.items():
        if name not in manifest.files:
            raise _unusable("foreign", f"{name} is none of its files")
        _expect(name, manifest.files[name], index.size)
    return away


def _remember_away(folder: Path, away: Kept) -> None:
    try:
        _write(folder / f"{_AWAY}.new", away)
        (folder / f"{_AWAY}.new").replace(folder / _AWAY)
        _sync(folder)
    except OSError as error:
        (folder / f"{_AWAY}.new").unlink(missing_ok=True)
        raise DiskFull("where the saved state is could not be written to disk", hint="free space", detail=str(error)) from error


def _drop(folder: Path, away: Kept) -> None:
    for name in away.files:
        (folder / name).unlink(missing_ok=True)


def _check(saved: Saved) -> None:
    manifest = _read(saved.folder)
    if manifest != saved.manifest:
        raise _unusable("foreign", "its manifest was replaced")
    if _read_away(saved.folder, manifest) != saved.away:
        raise _unusable("foreign", "the list of what is in the object store was replaced")
    here = {name: file for name, file in manifest.files.items() if saved.away is None or name not in saved.away.files}
    for name, expected in here.items():
        _expect(name, expected, _sized(saved.folder / name))
    with ThreadPoolExecutor(_DIGESTING) as pool:
        for name, expected in here.items():
            if _measure(saved.folder / name, pool, pieced=expected.pieced) != expected:
                raise _unusable("damaged", f"{name} was changed")


def _sized(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _expect(name: str, expected: SavedFile, size: int | None) -> None:
    if size is None:
        raise _unusable("missing", f"{name} is missing")
    if size != expected.size:
        raise _unusable("truncated", f"{name} has {size} bytes instead of {expected.size}")


def _unusable(reason: str, text: str) -> SnapshotUnusable:
    return SnapshotUnusable(f"the saved state cannot be used: {text}", hint="use another one", reason=reason)


def _allocated(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())
