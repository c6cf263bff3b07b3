"""What the host may rely on of a storage pool, on real loop devices and a real XFS. Needs root, xfsprogs and a kernel with XFS."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pandastack.errors import Conflict, DiskFull, HostUnfit, InvalidRequest
from pandastack.host import checks
from pandastack.host.storage import pool as module
from pandastack.host.storage import space, status
from pandastack.host.storage.disks import Disks
from pandastack.host.storage.pool import Pool
from pandastack.host.storage.snapshots import Snapshots

from .test_disks import loops, mounts

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="pools need root"),
    pytest.mark.skipif(not Path("/dev/loop-control").exists(), reason="this machine has no loop devices"),
    pytest.mark.skipif(shutil.which("mkfs.xfs", path=module._SBIN_PATH) is None, reason="xfsprogs is not installed"),
    pytest.mark.skipif("\txfs\n" not in Path("/proc/filesystems").read_text(), reason="this kernel has no XFS"),
]

GIB = 1 << 30


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    """A data directory; after the test no mount and no loop device may be left of it."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    yield folder
    Pool(folder).close()
    assert (mounts(folder), loops(folder)) == ([], [])


@pytest.fixture
def pool(data: Path) -> Pool:
    made = Pool(data)
    made.init(size_bytes=2 * GIB)
    return made


def test_a_pool_is_made_once_and_takes_what_is_written(data: Path) -> None:
    pool = Pool(data)
    assert (pool.record(), pool.root, pool.below) == (None, data, None)
    assert pool.init(size_bytes=2 * GIB) == (data / "pool.xfs", 2 * GIB)
    assert (pool.root, pool.below, pool.mounted) == (data / "pool", data, False)
    file = (data / "pool.xfs").stat()
    assert (file.st_size, file.st_mode & 0o777) == (2 * GIB, 0o600)
    assert file.st_blocks * 512 < 200 << 20, "it is sparse"
    before = file.st_ino, (data / "pool.json").read_bytes()
    assert Pool(data).init(data / "other", 4 * GIB) == (data / "pool.xfs", 2 * GIB)
    assert ((data / "pool.xfs").stat().st_ino, (data / "pool.json").read_bytes()) == before
    assert sorted(path.name for path in data.iterdir()) == ["pool.json", "pool.xfs"]


def test_it_is_mounted_unmounted_and_found_again_with_what_was_in_it(data: Path, pool: Pool) -> None:
    pool.open()
    (pool.root / "file").write_text("kept")
    pool.open()
    assert len(mounts(data)) == 1, "one that an earlier life left mounted is used as it is"
    pool.close()
    assert (mounts(data), loops(data)) == ([], [])
    again = Pool(data)
    again.open()
    assert (again.root / "file").read_text() == "kept"
    (line,) = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split()[4] == str(again.root)]
    assert {"nosuid", "nodev", "noexec"} <= set(line.split()[5].split(","))


def test_a_data_directory_can_be_moved_with_its_pool(data: Path, pool: Pool, tmp_path: Path) -> None:
    pool.open()
    (pool.root / "file").write_text("kept")
    pool.close()
    moved = data.rename(tmp_path / "moved")
    again = Pool(moved)
    again.open()
    try:
        assert (again.file, (again.root / "file").read_text()) == (moved / "pool.xfs", "kept")
    finally:
        again.close()
    moved.rename(data)


def test_it_stays_while_somebody_uses_it(data: Path, pool: Pool) -> None:
    pool.open()
    with (pool.root / "file").open("w"):
        pool.close()
        assert len(mounts(data)) == 1
    pool.close()
    assert mounts(data) == []


def test_copies_share_blocks_until_they_are_written_and_the_numbers_say_so(pool: Pool) -> None:
    pool.open()
    source, copy = pool.root / "source", pool.root / "copy"
    source.write_bytes(os.urandom(8 << 20))
    os.sync()
    assert space.shares_blocks(pool.root) is True
    assert space.of(source) == space.Space(own_bytes=8 << 20)
    space.clone(source, copy)
    assert space.of(source) == space.of(copy) == space.Space(shared_bytes=8 << 20)
    with copy.open("r+b") as file:
        file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
    assert space.of(copy) == space.Space(own_bytes=1 << 20, shared_bytes=7 << 20)
    source.unlink()
    ends = time.monotonic() + 20  # XFS gives the blocks of a removed file back a moment later.
    while space.of(copy) != space.Space(own_bytes=8 << 20):
        assert time.monotonic() < ends, space.of(copy)
        time.sleep(0.01)


def test_a_file_of_many_extents_is_counted_whole(pool: Pool) -> None:
    pool.open()
    source, copy = pool.root / "source", pool.root / "copy"
    with source.open("wb") as file:
        for index in range(1500):
            file.seek(index * 65536)
            file.write(os.urandom(4096))
    os.sync()
    space.clone(source, copy)
    found = space.of(copy)
    assert found.shared_bytes == 1500 * 4096
    assert found.own_bytes < 1 << 20, "the list of extents is its own"


async def test_disks_lie_in_it_and_what_is_deleted_is_given_back(data: Path, pool: Pool) -> None:
    pool.open()
    disks = Disks(pool.root / "disks", low_water_mib=0, below=pool.below)
    first, second = await disks.create("a", 512), await disks.create("b", 512)
    assert disks.space("b").shared_bytes > 0, "both began as the same empty image"
    empty = (data / "pool.xfs").stat().st_blocks
    (first / "large").write_bytes(os.urandom(100 << 20))
    assert disks.space("a").own_bytes > 99 << 20, "also what the kernel did not write yet"
    assert list(second.iterdir()) == []
    os.sync()
    assert ((data / "pool.xfs").stat().st_blocks - empty) * 512 > 90 << 20
    for disk in ("a", "b"):
        await disks.delete(disk)
    os.sync()
    pool.close()  # Waits for the discards.
    assert ((data / "pool.xfs").stat().st_blocks - empty) * 512 < 30 << 20


def test_a_data_directory_in_use_is_left_alone(data: Path) -> None:
    pool = Pool(data)
    for name, what in (("ledger/s.json", "sandboxes"), ("disks/m1.img", "sandboxes"), ("snapshots/0-1/manifest.json", "saved states")):
        path = data / name
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        with pytest.raises(Conflict, match=what) as refused:
            pool.init(size_bytes=2 * GIB)
        assert "--data-dir" in (refused.value.hint or "")
        assert path.read_text() == "{}"
        shutil.rmtree(data / name.split("/", 1)[0])
    (data / "disks" / "empty").mkdir(parents=True)
    (data / "snapshots" / ".new").mkdir(parents=True)
    (data / "control.db").write_text("records")
    pool.init(size_bytes=2 * GIB)
    assert sorted(path.name for path in data.iterdir()) == ["control.db", "pool.json", "pool.xfs"]


def test_a_file_that_is_there_is_never_overwritten(data: Path) -> None:
    (data / "pool.xfs").write_text("somebody's")
    with pytest.raises(Conflict, match="exists already"):
        Pool(data).init(size_bytes=2 * GIB)
    assert (data / "pool.xfs").read_text() == "somebody's"
    assert Pool(data).record() is None


def test_what_makes_no_sense_is_refused_and_leaves_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(data)
    with pytest.raises(InvalidRequest, match="at least"):
        pool.init(size_bytes=GIB)
    with pytest.raises(InvalidRequest, match="no folder"):
        pool.init(data / "missing" / "pool.xfs", 2 * GIB)
    with monkeypatch.context() as without:
        without.setattr(module, "_SBIN_PATH", "/nowhere")
        with pytest.raises(HostUnfit, match=r"mkfs\.xfs is missing") as unfit:
            pool.init(size_bytes=2 * GIB)
        assert "xfsprogs" in (unfit.value.hint or "")
    with monkeypatch.context() as without:
        without.setattr(module.space, "shares_blocks", lambda _folder: False)
        with pytest.raises(HostUnfit, match="share blocks"):
            pool.init(size_bytes=2 * GIB)
    assert list(data.iterdir()) == []
    assert pool.record() is None


def test_a_missing_file_stops_the_start_and_nothing_is_begun_beside_it(data: Path, pool: Pool) -> None:
    (data / "pool.xfs").rename(data / "away")
    with pytest.raises(HostUnfit, match="is missing") as unfit:
        pool.open()
    assert "nothing was changed" in (unfit.value.hint or "")
    with pytest.raises(HostUnfit, match="is missing"):
        pool.init(size_bytes=2 * GIB)
    assert checks.reflink(data).ok is False
    assert status.look(data, images=data / "cache").problem == f"{data / 'pool.xfs'} is missing"
    assert sorted(path.name for path in data.iterdir()) == ["away", "pool.json"]
    (data / "away").rename(data / "pool.xfs")
    pool.open()


def test_a_damaged_file_stops_the_start(data: Path, pool: Pool) -> None:
    with (data / "pool.xfs").open("r+b") as file:
        head = file.read(4096)
        file.seek(0)
        file.write(bytes(4096))
    with pytest.raises(HostUnfit, match="damaged"):
        pool.open()
    with (data / "pool.xfs").open("r+b") as file:
        file.write(head[:8] + os.urandom(504) + head[512:])
    with pytest.raises(HostUnfit, match="cannot be mounted") as unfit:
        pool.open()
    assert "xfs_repair" in (unfit.value.hint or "")
    assert mounts(data) == []
    with (data / "pool.xfs").open("r+b") as file:
        file.write(head)
    pool.open()


def test_the_pool_of_another_data_directory_is_not_taken_for_ones_own(data: Path, pool: Pool, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Pool(other).init(size_bytes=2 * GIB)
    (other / "pool.xfs").replace(data / "pool.xfs")
    with pytest.raises(HostUnfit, match="another storage pool"):
        pool.open()
    assert mounts(data) == []


def test_a_record_that_cannot_be_read_stops_the_start(data: Path, pool: Pool) -> None:
    (data / "pool.json").write_text("{")
    with pytest.raises(HostUnfit, match="nobody knows where the data is"):
        pool.open()


def test_a_folder_with_something_in_it_is_not_hidden_by_the_mount(data: Path, pool: Pool) -> None:
    (data / "pool").mkdir()
    (data / "pool" / "file").write_text("somebody's")
    with pytest.raises(HostUnfit, match="is not empty"):
        pool.open()
    (data / "pool" / "file").unlink()


def test_a_no_is_remembered_and_can_be_taken_back(data: Path) -> None:
    pool = Pool(data)
    pool.decline()
    record = Pool(data).record()
    assert record is not None
    assert record.file is None
    assert Pool(data).root == data
    pool.open()
    assert status.look(data, images=data / "cache").pool_declined
    pool.init(size_bytes=2 * GIB)
    pool.decline()
    assert Pool(data).file == data / "pool.xfs", "a pool that is there cannot be declined away"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 GiB, which a sparse pool can be larger than."""
    image, folder = tmp_path / "small.img", tmp_path / "small"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(GIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_pool_promises_no_more_than_its_file_can_grow(small: Path, data: Path) -> None:
    pool = Pool(data)
    pool.init(small / "pool.xfs", 10 * GIB)
    pool.open()
    try:
        found = status.look(data, images=data / "cache")
        assert (found.file_system, found.reflink, found.pool_file) == ("xfs", True, small / "pool.xfs")
        assert found.size_bytes > 9 * GIB
        assert found.below_free_bytes is not None
        assert abs(found.free_bytes - found.below_free_bytes) < 16 << 20
        assert found.free_bytes < GIB
        disks = Disks(pool.root / "disks", low_water_mib=100, below=pool.below)
        saved = Snapshots(pool.root / "snapshots", low_water_mib=100, below=pool.below)
        saved.open()
        saved.require_space(300 << 20)
        with (small / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, space.free_bytes(small) - (90 << 20))
        assert disks.free_mib() == 0
        with pytest.raises(DiskFull):
            await disks.create("a", 64)
        with pytest.raises(DiskFull):
            saved.require_space(1)
        (small / "filler").unlink()
        await disks.create("a", 64)
        await disks.delete("a")
    finally:
        pool.close()
    assert mounts(data) == []
