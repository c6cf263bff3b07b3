"""Saved states on disk: durable before they are known, and refused with a reason when they are not what was saved."""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pandastack.errors import DiskFull, SnapshotNotFound, SnapshotUnusable
from pandastack.host.storage import snapshots as module
from pandastack.host.storage.snapshots import Origin, Saved, SavedFile, Snapshots
from pandastack.wire.ids import SandboxId, SnapshotId, new_snapshot_id

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
    env={"NAME": "value"},
)
CONTENT = {"pages.img": b"\x01" * 100_000, "checkpoint.img": b"state"}


@pytest.fixture
def store(tmp_path: Path) -> Snapshots:
    made = Snapshots(tmp_path / "snapshots", low_water_mib=0)
    made.open()
    return made


async def saved(store: Snapshots, kind: Any = "snapshot") -> Saved:
    snapshot_id = new_snapshot_id()
    async with store.writing(snapshot_id) as folder:
        for name, content in CONTENT.items():
            (folder / name).write_bytes(content)
        return await store.publish(snapshot_id, kind, ORIGIN)


def names(store: Snapshots) -> list[str]:
    return sorted(path.name for path in store._root.rglob("*"))


async def test_what_was_saved_is_there_after_a_restart(store: Snapshots) -> None:
    made = await saved(store)
    again = Snapshots(store._root, low_water_mib=0)
    again.open()
    found = await again.check(made.manifest.id)
    assert found == made
    assert found.manifest.origin == ORIGIN
    assert {name: (found.folder / name).read_bytes() for name in CONTENT} == CONTENT
    assert found.size_bytes >= 100_000
    assert [one.manifest.id for one in again.list("snapshot")] == [made.manifest.id]
    assert again.list("hibernation") == []


def _memory(path: Path, *pieces: tuple[int, bytes], size: int = 20 << 20) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for at, content in pieces:
            file.seek(at)
            file.write(content)
    return path


def digest(path: Path, **how: Any) -> str:
    with ThreadPoolExecutor(2) as pool:
        return module._measure(path, pool, **how).sha256


def test_a_digest_is_of_what_is_in_a_file_and_where_not_of_its_holes(tmp_path: Path) -> None:
    first, page = _memory(tmp_path / "first", (0, b"a"), (300_000, b"b" * 5000), ((20 << 20) - 3, b"end")), bytes(4096)
    # Zeros that were written are as good as a hole.
    same = _memory(tmp_path / "same", (1 << 20, page * 200), (0, b"a"), (300_000, b"b" * 5000), ((20 << 20) - 3, b"end"))
    full = tmp_path / "full"
    full.write_bytes(first.read_bytes())
    assert digest(same) == digest(first) == digest(full)
    assert digest(full, pieced=False) == hashlib.sha256(full.read_bytes()).hexdigest()
    others = [
        _memory(tmp_path / "moved", (1, b"a"), (300_000, b"b" * 5000), ((20 << 20) - 3, b"end")),
        _memory(tmp_path / "block", (262_144, b"a"), (300_000, b"b" * 5000), ((20 << 20) - 3, b"end")),
        _memory(tmp_path / "piece", (8 << 20, b"a"), (300_000, b"b" * 5000), ((20 << 20) - 3, b"end")),
        _memory(tmp_path / "less", (0, b"a"), (300_000, b"b" * 4999), ((20 << 20) - 3, b"end")),
        _memory(tmp_path / "more", (0, b"a"), (300_000, b"b" * 5000), (12 << 20, b"c"), ((20 << 20) - 3, b"end")),
        _memory(tmp_path / "none"),
    ]
    assert len({digest(other) for other in others} | {digest(first)}) == len(others) + 1


async def test_a_state_of_an_early_version_is_still_checked(store: Snapshots) -> None:
    made = await saved(store)
    files = {name: SavedFile(size=len(content), sha256=hashlib.sha256(content).hexdigest()) for name, content in CONTENT.items()}
    module._write(made.folder / "manifest.json", made.manifest.model_copy(update={"files": files}))
    store.open()
    await store.check(made.manifest.id)
    (made.folder / "pages.img").write_bytes(b"\x02" * 100_000)
    with pytest.raises(SnapshotUnusable, match="changed"):
        await store.check(made.manifest.id)


async def test_a_sparse_file_is_checked_however_it_lies_on_the_disk(store: Snapshots) -> None:
    snapshot_id = new_snapshot_id()
    async with store.writing(snapshot_id) as folder:
        _memory(folder / "mem", (4 << 20, b"page"))
        saved = await store.publish(snapshot_id, "snapshot", ORIGIN)
    assert saved.size_bytes < 1 << 20
    path = saved.folder / "mem"
    path.write_bytes(path.read_bytes())
    assert await store.check(snapshot_id) == saved
    with path.open("r+b") as file:
        file.seek(7 << 20)
        file.write(b"x")
    with pytest.raises(SnapshotUnusable):
        await store.check(snapshot_id)


async def test_one_that_was_not_finished_leaves_nothing(store: Snapshots) -> None:
    async def broken_off() -> None:
        async with store.writing(new_snapshot_id()) as folder:
            (folder / "pages.img").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await broken_off()
    assert names(store) == [".new"]


async def test_what_a_killed_daemon_left_is_cleared(store: Snapshots) -> None:
    made = await saved(store)
    left = store._root / ".new" / new_snapshot_id()
    left.mkdir()
    (left / "pages.img").write_bytes(b"half")
    store.open()
    assert not left.exists()
    assert store.get(made.manifest.id) == made


@pytest.mark.parametrize("nth", range(6))
async def test_it_is_not_known_unless_every_step_to_the_disk_worked(store: Snapshots, nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = os.fsync

    def fsync(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == nth + 1:
            raise OSError(28, "no space left on device")
        real(fd)

    monkeypatch.setattr(module.os, "fsync", fsync)
    if nth >= 5:  # Two files, the manifest, the folder, the root: there is no sixth.
        await saved(store)
        assert calls == 5
        return
    with pytest.raises(DiskFull):
        await saved(store)
    assert names(store) == [".new"]
    assert store.list("snapshot") == []


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("damaged", lambda folder: flip(folder / "pages.img", 50_000)),
        ("damaged", lambda folder: flip(folder / "checkpoint.img", 0)),
        ("damaged", lambda folder: flip(folder / "manifest.json", 3)),
        ("damaged", lambda folder: flip(folder / "manifest.json", 200)),
        ("damaged", lambda folder: os.truncate(folder / "manifest.json", 100)),
        ("truncated", lambda folder: os.truncate(folder / "pages.img", 99_999)),
        ("truncated", lambda folder: (folder / "pages.img").write_bytes(CONTENT["pages.img"] + b"more")),
        ("missing", lambda folder: (folder / "checkpoint.img").unlink()),
        ("missing", lambda folder: (folder / "manifest.json").unlink()),
    ],
)
async def test_one_that_was_changed_is_refused_with_a_reason(store: Snapshots, reason: str, change: Any) -> None:
    made = await saved(store)
    change(made.folder)
    with pytest.raises(SnapshotUnusable) as refused:
        await store.check(made.manifest.id)
    assert refused.value.fields["reason"] == reason


async def test_every_bit_of_a_small_one_is_guarded(store: Snapshots) -> None:
    made = await saved(store)
    for name in ("checkpoint.img", "manifest.json"):
        for at in range((made.folder / name).stat().st_size):
            flip(made.folder / name, at)
            with pytest.raises(SnapshotUnusable):
                await store.check(made.manifest.id)
            flip(made.folder / name, at)
    await store.check(made.manifest.id)


async def test_the_copy_of_another_one_is_foreign(store: Snapshots) -> None:
    one, other = await saved(store), await saved(store)
    shutil.copyfile(one.folder / "manifest.json", other.folder / "manifest.json")
    with pytest.raises(SnapshotUnusable) as refused:
        await store.check(other.manifest.id)
    assert refused.value.fields["reason"] == "foreign"
    # Nor is it known after a restart; it is left where it is, for somebody to look at.
    store.open()
    assert [known.manifest.id for known in store.list("snapshot")] == [one.manifest.id]
    assert other.folder.exists()


async def test_deleting_removes_it_and_can_be_repeated(store: Snapshots) -> None:
    made = await saved(store)
    await store.delete(made.manifest.id)
    await store.delete(made.manifest.id)
    assert names(store) == [".new"]
    with pytest.raises(SnapshotNotFound):
        await store.check(made.manifest.id)


async def test_a_second_name_shares_the_bytes_and_outlives_the_first(store: Snapshots) -> None:
    first = await saved(store, "hibernation")
    second = await store.copy(first, new_snapshot_id(), "snapshot")
    assert (first.folder / "pages.img").samefile(second.folder / "pages.img")
    await store.delete(first.manifest.id)
    assert (await store.check(second.manifest.id)).manifest.kind == "snapshot"


async def test_hibernations_that_nobody_refers_to_are_swept_and_snapshots_never(store: Snapshots) -> None:
    kept, lost, snapshot = await saved(store, "hibernation"), await saved(store, "hibernation"), await saved(store)
    assert await store.sweep({kept.manifest.id}) == 1
    store.get(kept.manifest.id)
    store.get(snapshot.manifest.id)
    with pytest.raises(SnapshotNotFound):
        store.get(lost.manifest.id)


async def test_a_capture_that_would_not_fit_is_refused_before_it_begins(tmp_path: Path) -> None:
    free_mib = shutil.disk_usage(tmp_path).free >> 20
    store = Snapshots(tmp_path / "snapshots", low_water_mib=max(0, free_mib - 100))
    store.open()
    store.require_space(1 << 20)
    with pytest.raises(DiskFull):
        store.require_space(1 << 40)


async def test_an_unknown_one_is_not_found(store: Snapshots) -> None:
    with pytest.raises(SnapshotNotFound):
        store.get(SnapshotId("00000000-0000-4000-8000-00000000000f"))
