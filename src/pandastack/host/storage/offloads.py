"""Saved states whose large files are in the object store: how they get there, and how they are used from there.

    offload:  checked -> chunks and a reference in the store -> `away.json` (durable) -> the large files here removed
    opened:   a folder as the runtime wrote it: small files linked, large ones fetched, and memory as a file of `lazy`

Until `away.json` is on disk the state is what it was, whatever happens; from then on the object store is where its bytes are.
Called by the conductor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

import structlog

from pandastack.errors import DiskFull, HostUnfit, ObjectStoreUnavailable, PandastackError, SnapshotUnusable
from pandastack.host.storage.chunks import ChunkLost, Chunks, Index
from pandastack.host.storage.depot import Depot, Kept
from pandastack.host.storage.lazy import LazyMemory
from pandastack.host.storage.snapshots import Saved, Snapshots

log = structlog.get_logger(__name__)

SWEEP_EVERY_S = 3600.0
DISK = "disk"
"""What runtimes whose machines have an image as their root call the file of it in a saved state."""
LEAST_BYTES = 1 << 20
"""Smaller files stay: they are not worth a request."""


class Offloads:
    """The states of `snapshots` that are in the store of `depot` and `chunks`."""

    def __init__(self, snapshots: Snapshots, depot: Depot, chunks: Chunks, lazy: LazyMemory, *, least_bytes: int = LEAST_BYTES) -> None:
        self.lazy = lazy
        self._snapshots = snapshots
        self._depot = depot
        self._chunks = chunks
        self._least_bytes = least_bytes
        self._sweep_due = asyncio.Event()

    # There

    async def offload(self, snapshot_id: str) -> Saved:
        """Put a state into the object store. Idempotent; when it fails, or is cancelled, the state is where it was.

        Raises SnapshotNotFound, SnapshotUnusable, ObjectStoreUnavailable, DiskFull.
        """
        with self._snapshots.reading(snapshot_id) as saved:
            if saved.away is not None:
                return saved
            await self._snapshots.check(snapshot_id)
            large = {name: saved.folder / name for name, file in saved.manifest.files.items() if file.size >= self._least_bytes}
            stop = threading.Event()
            held = contextlib.ExitStack()
            held.enter_context(self._depot.putting(snapshot_id))
            putting = asyncio.ensure_future(asyncio.to_thread(self._depot.put, snapshot_id, large, stopped=stop.is_set))
            try:
                kept = await asyncio.shield(putting)
            except BaseException as error:
                # The thread has to be at its end before somebody removes the files.
                stop.set()
                await asyncio.gather(putting, return_exceptions=True)
                held.close()
                await self._give_up(snapshot_id)
                if isinstance(error, OSError):
                    raise SnapshotUnusable("the saved state cannot be read", reason="damaged", detail=str(error)) from error
                raise
        with held:
            return await self._snapshots.send_away(snapshot_id, kept)

    async def _give_up(self, snapshot_id: str) -> None:
        with contextlib.suppress(ObjectStoreUnavailable):  # The next sweep removes it.
            await asyncio.shield(asyncio.to_thread(self._depot.remove, snapshot_id))

    # Used from there

    @contextlib.asynccontextmanager
    async def opened(self, saved: Saved, memory_file: str) -> AsyncIterator[Saved]:
        """The state with a `folder` that has all of its files, for as long as the block lasts. What was mapped meanwhile stays mapped.

        `memory_file` is the one that its runtime maps. Raises SnapshotNotFound, SnapshotUnusable where something is missing or damaged
        there, ObjectStoreUnavailable, DiskFull. An error of the block that has that as its cause becomes one of these.
        """
        with self._snapshots.reading(saved.manifest.id) as now:
            if now.away is None:
                yield now
                return
            async with self._snapshots.scratch() as folder:
                await self._fill(now, now.away, folder, memory_file)
                try:
                    yield now.model_copy(update={"folder": folder})
                except PandastackError as error:
                    index = now.away.files.get(memory_file)
                    why = await self.lazy.failure(index) if index is not None else None
                    if why is not None:
                        raise _unusable(why) from error
                    raise

    async def _fill(self, saved: Saved, away: Kept, folder: Path, memory_file: str) -> None:
        self._require_space(away, memory_file)
        large = dict(away.files)
        # First: its chunks are on their way while the others are fetched.
        if memory_file in large and (shown := await self._shown(large[memory_file])) is not None:
            (folder / memory_file).symlink_to(shown)
            del large[memory_file]
        for name, index in large.items():
            try:
                await asyncio.to_thread(self._chunks.assemble, index, folder / name, like=self._like(saved, name))
            except ChunkLost as lost:
                log.error("a chunk of a saved state cannot be had", snapshot_id=saved.manifest.id, file=name, error=str(lost))
                raise _unusable(lost.why) from lost
            except OSError as error:
                raise DiskFull("a saved state could not be fetched", hint="free space", detail=str(error)) from error
        for name in saved.manifest.files:
            if name not in away.files:
                os.link(saved.folder / name, folder / name)

    def _like(self, saved: Saved, name: str) -> Path | None:
        """The image that a disk began as, where the runtime has one and it is here: most of it never changes."""
        root = Path(saved.manifest.origin.rootfs)
        return root if name == DISK and root.is_file() else None

    async def _shown(self, index: Index) -> Path | None:
        """Memory as a file that is fetched where it is touched; None where this machine can only fetch all of it."""
        try:
            return await self.lazy.file(index)
        except HostUnfit as error:
            log.warning("memory is fetched in full", reason=error.message, hint=error.hint, detail=error.fields.get("detail"))
            return None

    def _require_space(self, away: Kept, memory_file: str) -> None:
        self._snapshots.require_space(sum(len(index.stored) for name, index in away.files.items() if name != memory_file) << 22)

    # Away with what nobody needs

    def sweep_soon(self) -> None:
        self._sweep_due.set()

    async def run(self, in_use: Callable[[], Collection[str]]) -> None:
        """Sweep now and then, until cancelled. `in_use` are the indexes of which machines have mapped files."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_EVERY_S):
                    await self._sweep_due.wait()
            self._sweep_due.clear()
            try:
                await self.sweep(in_use)
            except ObjectStoreUnavailable as error:
                log.warning("the object store could not be swept", error=error.message, detail=error.fields.get("detail"))

    async def sweep(self, in_use: Callable[[], Collection[str]], **options: float) -> int:
        """Remove what nothing refers to any more, here and in the store; returns how many chunks."""
        removed = await asyncio.to_thread(self._depot.sweep, self._names, in_use, **options)
        needed = {index.digest for saved in self._snapshots.list("snapshot") if saved.away for index in saved.away.files.values()}
        await asyncio.to_thread(self.lazy.forget_indexes, needed | set(in_use()))
        return removed

    def _names(self) -> Collection[str]:
        return [saved.manifest.id for saved in self._snapshots.list("snapshot") if saved.away is not None]


def _unusable(why: str) -> PandastackError:
    if why in ("missing", "damaged"):
        return SnapshotUnusable(
            f"the saved state cannot be used: a part of it in the object store is {why}", hint="use another one", reason=why
        )
    return ObjectStoreUnavailable("a part of the saved state could not be fetched", hint="try again later", reason=why, retry_after_s=5)
