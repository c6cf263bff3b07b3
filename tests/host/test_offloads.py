"""A saved state on its way to the object store: wherever it is stopped, it can be used; what it is used from there is what was saved."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pandastack.errors import DiskFull, HostUnfit, ObjectStoreUnavailable, PandastackError, SnapshotNotFound, SnapshotUnusable
from pandastack.host.storage import snapshots as module
from pandastack.host.storage.chunk_cache import ChunkCache
from pandastack.host.storage.chunks import CHUNK_BYTES, Chunks, Index
from pandastack.host.storage.depot import Depot
from pandastack.host.storage.lazy import LazyMemory
from pandastack.host.storage.objects import Objects
from pandastack.host.storage.offloads import Offloads
from pandastack.host.storage.snapshots import Origin, Saved, Snapshots
from pandastack.wire.ids import SandboxId, new_snapshot_id

pytestmark = pytest.mark.anyio
ORIGIN = Origin(
    sandbox_id=SandboxId("00000000-0000-4000-8000-000000000000"),
    template="base",
    template_actual="base",
    runtime="fake",
    runtime_key="k",
    guest="g",
    rootfs="/images/base/rootfs",
    cpu=1,
    memory_mb=256,
    disk_mb=256,
)
CONTENT = {"disk": os.urandom(CHUNK_BYTES) + bytes(CHUNK_BYTES) + b"end", "mem": os.urandom(2 * CHUNK_BYTES), "state": b"small"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Failing(Objects):
    """The real store, whose `fail_at`-th write fails."""

    fail_at = 0
    writes = 0

    def put(self, key: str, data: bytes) -> None:
        self.writes += 1
        if self.writes == self.fail_at:
            raise ObjectStoreUnavailable("the object store did not answer in time", reason="timeout")
        super().put(key, data)


class World:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = Failing(str(root / "objects"))
        self.snapshots = Snapshots(root / "snapshots", low_water_mib=0)
        self.snapshots.open()
        self.reader = Chunks(self.objects, ChunkCache(root / "chunks", 1 << 30))
        # Nobody here maps memory, so its process is never started.
        lazy = LazyMemory(root / "run", root / "indexes", objects="", cache=root / "chunks", cache_mb=0)
        self.offloads = Offloads(self.snapshots, Depot(self.objects, "here"), self.reader, lazy)

    async def saved(self) -> Saved:
        snapshot_id = new_snapshot_id()
        async with self.snapshots.writing(snapshot_id) as folder:
            for name, content in CONTENT.items():
                (folder / name).write_bytes(content)
            return await self.snapshots.publish(snapshot_id, "snapshot", ORIGIN)

    async def usable(self, snapshot_id: str) -> Saved:
        """The state, after it proved to be what was saved."""
        saved = await self.snapshots.check(snapshot_id)
        async with self.offloads.opened(saved, "") as there:
            assert {name: (there.folder / name).read_bytes() for name in CONTENT} == CONTENT
        return saved

    def restarted(self) -> None:
        again = Snapshots(self.root / "snapshots", low_water_mib=0)
        again.open()
        self.snapshots = again
        self.offloads = Offloads(again, Depot(self.objects, "here"), self.reader, self.offloads.lazy)

    def close(self) -> None:
        self.reader.close()
        self.objects.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


async def test_only_small_files_stay(world: World) -> None:
    made = await world.saved()
    gone = await world.offloads.offload(made.manifest.id)
    assert gone.away is not None
    assert sorted(gone.away.files) == ["disk", "mem"]
    assert sorted(path.name for path in gone.folder.iterdir()) == ["away.json", "manifest.json", "state"]
    assert gone.size_bytes < made.size_bytes / 100
    assert await world.offloads.offload(made.manifest.id) == gone
    assert await world.usable(made.manifest.id) == gone
    world.restarted()
    assert await world.usable(made.manifest.id) == gone
    assert not list((world.root / "snapshots" / ".new").iterdir())


async def test_it_is_usable_whichever_write_to_the_store_fails(world: World) -> None:
    made = await world.saved()
    for number in range(1, 20):
        world.objects.writes, world.objects.fail_at = 0, number
        try:
            await world.offloads.offload(made.manifest.id)
        except ObjectStoreUnavailable:
            world.restarted()
            assert (await world.usable(made.manifest.id)).away is None
            # And nothing of it stays in the store.
            world.objects.fail_at = 0
            await world.offloads.sweep(list, grace_s=-1)
            assert [found.key for found in world.objects.list("")] == []
        else:
            break
    assert number > 4, "the reference and each of its chunks was refused once"
    assert (await world.usable(made.manifest.id)).away is not None


@pytest.mark.parametrize("step", ["_remember_away", "_drop"])
async def test_it_is_usable_when_the_host_dies_before_or_after_the_list_is_written(
    world: World, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await world.saved()

    def dies(*_: Any) -> None:
        raise DiskFull("as if it had died here")

    with monkeypatch.context() as dying:
        dying.setattr(module, step, dies)
        with pytest.raises(DiskFull):
            await world.offloads.offload(made.manifest.id)
    assert (made.folder / "mem").exists()
    world.restarted()
    found = await world.usable(made.manifest.id)
    assert (found.away is None) == (step == "_remember_away")
    assert (made.folder / "mem").exists() == (step == "_remember_away")


async def test_who_reads_it_meanwhile_reads_to_the_end(world: World) -> None:
    made = await world.saved()
    async with world.offloads.opened(made, "") as there:
        going = asyncio.create_task(world.offloads.offload(made.manifest.id))
        async with asyncio.timeout(20):
            while world.snapshots.get(made.manifest.id).away is None:  # noqa: ASYNC110 - a thread does it
                await asyncio.sleep(0.01)
        # From now on the store is asked; for this one everything is still here.
        assert (there.folder / "mem").read_bytes() == CONTENT["mem"]
        assert not going.done()
    await going
    assert not (made.folder / "mem").exists()


async def test_memory_is_fetched_in_full_where_it_cannot_be_shown(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await world.saved()
    gone = await world.offloads.offload(made.manifest.id)

    async def unfit(_index: Index) -> Path:
        raise HostUnfit("this machine has no FUSE")

    monkeypatch.setattr(world.offloads.lazy, "file", unfit)
    async with world.offloads.opened(gone, "mem") as there:
        assert not (there.folder / "mem").is_symlink()
        assert (there.folder / "mem").read_bytes() == CONTENT["mem"]
    shown = world.root / "elsewhere"

    async def fit(_index: Index) -> Path:
        return shown

    monkeypatch.setattr(world.offloads.lazy, "file", fit)
    async with world.offloads.opened(gone, "mem") as there:
        assert (there.folder / "mem").readlink() == shown
        assert (there.folder / "disk").read_bytes() == CONTENT["disk"]
    assert not there.folder.exists()


async def test_giving_it_up_leaves_it_where_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await world.saved()
    began = asyncio.Event()
    loop = asyncio.get_running_loop()
    really = world.objects.put

    def slow(key: str, data: bytes) -> None:
        loop.call_soon_threadsafe(began.set)
        really(key, data)

    monkeypatch.setattr(world.objects, "put", slow)
    going = asyncio.create_task(world.offloads.offload(made.manifest.id))
    await began.wait()
    going.cancel()
    with pytest.raises(asyncio.CancelledError):
        await going
    assert (await world.usable(made.manifest.id)).away is None
    assert list(world.objects.list("snapshots/")) == []


async def test_a_deleted_one_takes_its_chunks_along_unless_somebody_reads_them(world: World) -> None:
    one, other = await world.saved(), await world.saved()
    for made in (one, other):
        await world.offloads.offload(made.manifest.id)
    assert len(list(world.objects.list("chunks/"))) == 4, "the same files are stored once"
    await world.snapshots.delete(one.manifest.id)
    assert await world.offloads.sweep(list, grace_s=-1) == 0
    away = world.snapshots.get(other.manifest.id).away
    assert away is not None
    await world.snapshots.delete(other.manifest.id)
    assert await world.offloads.sweep(lambda: [away.files["mem"].digest], grace_s=-1) == 0
    assert await world.offloads.sweep(list, grace_s=-1) == 4
    assert list(world.objects.list("")) == []


@pytest.mark.parametrize("what", ["chunk", "list", "small file"])
async def test_what_is_not_what_was_saved_is_refused(world: World, what: str) -> None:
    made = await world.saved()
    gone = await world.offloads.offload(made.manifest.id)
    target = {
        "chunk": next((world.root / "objects" / "chunks").rglob("*/*")),
        "list": gone.folder / "away.json",
        "small file": gone.folder / "state",
    }[what]
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    with pytest.raises(SnapshotUnusable) as refused:
        await world.usable(made.manifest.id)
    assert refused.value.reason == "damaged"


async def test_a_store_that_does_not_answer_is_no_fault_of_the_state(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await world.saved()
    await world.offloads.offload(made.manifest.id)

    def silent(_key: str) -> bytes:
        raise ObjectStoreUnavailable("the object store did not answer in time", reason="timeout")

    with monkeypatch.context() as away:
        away.setattr(world.objects, "get", silent)
        with pytest.raises(ObjectStoreUnavailable) as later:
            await world.usable(made.manifest.id)
    assert isinstance(later.value, PandastackError)
    assert later.value.reason == "timeout"
    await world.usable(made.manifest.id)
    with pytest.raises(SnapshotNotFound):
        await world.offloads.offload(new_snapshot_id())
