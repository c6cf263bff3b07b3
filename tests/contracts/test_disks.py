"""What the host may rely on of a sandbox's disk, on real loop devices. Needs root and a kernel with the loop module."""

# ruff: noqa: ASYNC221, ASYNC240 - nothing else runs in the loops of these tests
from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pandastack.errors import DiskFull, HostUnfit, RuntimeFailed
from pandastack.host.storage import disks as module
from pandastack.host.storage.disks import Disks

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="disks need root"),
    pytest.mark.skipif(not Path("/dev/loop-control").exists(), reason="this machine has no loop devices"),
    pytest.mark.skipif(shutil.which("mkfs.ext4", path=module._SBIN_PATH) is None, reason="e2fsprogs is not installed"),
]


def mounts(root: Path) -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split()[4].startswith(str(root))]


def loops(root: Path) -> list[str]:
    """Backing files of loop devices below the folder, also those whose file was removed."""
    found = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            text = file.read_text().strip()
        except OSError:
            continue  # Freed this moment.
        if text.startswith(str(root)):
            found.append(text)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder for disks; after the test nothing of the kernel's may be left of it."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a number is all that is wanted
    folder = tmp_path / "disks"
    yield folder
    made = Disks(folder)
    asyncio.run(made.sweep([]))
    assert (mounts(folder), loops(folder)) == ([], [])
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # noqa: PTH208


@pytest.fixture
def disks(root: Path) -> Disks:
    return Disks(root, low_water_mib=0)


async def test_a_disk_has_the_promised_size_and_not_more(disks: Disks) -> None:
    directory = await disks.create("a", 32)
    assert directory == disks.path("a")
    with pytest.raises(OSError, match="No space left"):
        (directory / "big").write_bytes(bytes(40 << 20))
    (directory / "big").unlink()
    (directory / "most").write_bytes(bytes(26 << 20))


async def test_a_new_disk_is_empty_private_and_runs_nothing(disks: Disks) -> None:
    directory = await disks.create("a", 32)
    assert list(directory.iterdir()) == []
    (line,) = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split()[4] == str(directory)]
    assert {"nosuid", "nodev", "noexec"} <= set(line.split()[5].split(","))
    assert disks.path("a").with_suffix(".img").stat().st_mode & 0o777 == 0o600


async def test_disks_are_apart(disks: Disks) -> None:
    one, other = await asyncio.gather(disks.create("a", 32), disks.create("b", 32))
    (one / "file").write_text("mine")
    assert list(other.iterdir()) == []
    await disks.delete("a")
    third = await disks.create("c", 32)
    assert list(third.iterdir()) == [], "nothing of an older disk is seen again"


async def test_blocks_are_used_when_written_and_given_back_when_freed(disks: Disks) -> None:
    directory = await disks.create("a", 64)
    image = disks.path("a").with_suffix(".img")
    empty = image.stat().st_blocks
    assert empty * 512 < 4 << 20
    (directory / "file").write_bytes(os.urandom(16 << 20))
    subprocess.run(["sync", "-f", str(directory)], check=True)
    assert image.stat().st_blocks - empty > 30_000
    (directory / "file").unlink()
    subprocess.run(["sync", "-f", str(directory)], check=True)
    assert image.stat().st_blocks - empty < 5_000


async def test_a_delete_is_idempotent_and_frees_the_loop_device(disks: Disks, root: Path) -> None:
    await disks.create("a", 32)
    assert len(loops(root)) == 1
    await disks.delete("a")
    await disks.delete("a")
    await disks.delete("never")
    assert (mounts(root), loops(root)) == ([], [])
    assert sorted(path.name for path in root.iterdir()) == ["empty"]


async def test_a_delete_while_somebody_holds_a_file_open_still_lets_go(disks: Disks, root: Path) -> None:
    directory = await disks.create("a", 32)
    with (directory / "file").open("w") as file:
        file.write("x")
        await disks.delete("a")
        assert (mounts(root), (root / "a").exists()) == ([], False)


async def test_a_sweep_removes_all_but_what_is_kept_mounted_or_not(disks: Disks, root: Path) -> None:
    for name in ("keep", "mounted", "unmounted"):
        await disks.create(name, 32)
    subprocess.run(["umount", str(root / "unmounted")], check=True)
    (root / "half.img").write_bytes(b"")
    (root / "empty-folder").mkdir()
    assert await disks.sweep(["keep"]) == ["empty-folder", "half", "mounted", "unmounted"]
    assert mounts(root) == [str(root / "keep")]
    assert await Disks(root).sweep(["keep"]) == []


async def test_the_low_water_mark_refuses_before_anything_is_made(root: Path) -> None:
    full = Disks(root, low_water_mib=1 << 30)
    assert full.free_mib() == 0
    with pytest.raises(DiskFull) as refused:
        await full.create("a", 32)
    assert refused.value.hint
    assert list(root.iterdir()) == []


async def test_a_full_host_is_typed_and_leaves_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", str(small)], check=True)
    try:
        with contextlib.suppress(OSError), (small / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        with pytest.raises((DiskFull, RuntimeFailed)):
            await Disks(small / "disks", low_water_mib=-10).create("a", 64)
        assert mounts(small / "disks") == []
        assert not (small / "disks" / "a.img").exists()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


async def test_a_disk_that_is_there_already_is_not_taken_over(disks: Disks, root: Path) -> None:
    root.mkdir(exist_ok=True)
    (root / "a.img").write_bytes(b"somebody's")
    with pytest.raises((RuntimeFailed, OSError)):
        await disks.create("a", 32)


async def test_a_mount_that_fails_leaves_nothing(disks: Disks, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.loops, "mount", lambda *_: (_ for _ in ()).throw(OSError(5, "no")))
    with pytest.raises(RuntimeFailed):
        await disks.create("a", 32)
    assert sorted(path.name for path in root.iterdir()) == ["empty"]


async def test_a_machine_without_loop_devices_is_unfit(disks: Disks, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without(path: object, *rest: object, **more: object) -> int:
        if path == "/dev/loop-control":
            raise FileNotFoundError(path)
        return real(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(module.os, "open", without)
    with pytest.raises(HostUnfit, match="loop") as unfit:
        await disks.create("a", 32)
    assert "modprobe" in (unfit.value.hint or "")
    assert sorted(path.name for path in root.iterdir()) == ["empty"]


async def test_a_machine_without_mkfs_is_unfit(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SBIN_PATH", "/nowhere")
    with pytest.raises(HostUnfit, match="mkfs") as unfit:
        await disks.create("a", 33)
    assert "e2fsprogs" in (unfit.value.hint or "")


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.003, 0.006, 0.01, 0.02])
async def test_a_create_that_is_cancelled_leaves_nothing(disks: Disks, root: Path, after_s: float) -> None:
    await disks.create("warm", 32)
    creating = asyncio.create_task(disks.create("a", 32))
    await asyncio.sleep(after_s)
    creating.cancel()
    await asyncio.gather(creating, return_exceptions=True)
    if not creating.cancelled():
        await disks.delete("a")
    assert mounts(root) == [str(root / "warm")]
    assert not (root / "a.img").exists()


async def test_many_at_once_get_a_device_each(disks: Disks, root: Path) -> None:
    names = [f"d{number}" for number in range(12)]
    await asyncio.gather(*(disks.create(name, 32) for name in names))
    assert len(set(loops(root))) == 12
    await asyncio.gather(*(disks.delete(name) for name in names))
