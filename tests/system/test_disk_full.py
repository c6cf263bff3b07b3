"""A host whose disk is full: what needs room is refused, what does not goes on, and freeing some is all it takes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pandastack import errors

from . import notes
from .conftest import MakeServer
from .servers import until

SIZE_MIB = 3000
RESERVE_MIB = 64
BALLAST_MIB = 100


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of SIZE_MIB. Asked for before `own_server`, so that it is there until that has ended."""
    image, folder = tmp_path / "small.img", tmp_path / "small"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(SIZE_MIB << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def leave_mib(folder: Path, mib: int) -> Path:
    """Fill the file system but for so much."""
    filler = folder / "filler"
    status = os.statvfs(folder)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - (mib << 20))
    return filler


def test_what_has_no_room_is_refused_and_the_sandbox_goes_on(small: Path, own_server: MakeServer) -> None:
    server = own_server(work=small / "server", environ={"PANDASTACK_DISK_LOW_WATER_MB": str(RESERVE_MIB)})
    client = server.client(max_create_retry_seconds=0)
    sandbox, other = (client.sandboxes.create("base", persistent=True, disk_mb=512) for _ in range(2))
    notes.begin(sandbox, ballast_mib=BALLAST_MIB)
    told = []
    verbs: list[Callable[[], object]] = [sandbox.snapshot, sandbox.hibernate, sandbox.fork, lambda: sandbox.fork(count=3)]

    def all_refused() -> None:
        for verb in verbs:
            with pytest.raises(errors.DiskFull) as refused:
                verb()
            assert refused.value.http_status == 507, refused.value
            told.append(f"word-{len(told)}")
            assert notes.add(sandbox, told[-1]) == told
            assert sandbox.refresh().status == "running"
        assert {one.id for one in client.sandboxes.list()} == {sandbox.id, other.id}
        assert client.snapshots.list() == []
        assert [path.name for path in (server.data / "snapshots").rglob("*")] == [".new"]
        assert list((server.data / "captures").iterdir()) == []
        assert len(server.machines()) == 2

    # Little more than the reserve: known before anything is stopped.
    filler = leave_mib(small, RESERVE_MIB + 20)
    all_refused()
    assert other.exec("echo fine").stdout == "fine\n"
    other.filesystem.write("/var/file", "content")
    filler.unlink()
    # Room for its memory, but not for the files on its disk as well.
    sandbox.exec("head -c 200M /dev/urandom > /var/large; sync", check=True)
    filler = leave_mib(small, RESERVE_MIB + BALLAST_MIB + 100)
    all_refused()
    # Not even the reserve is there any more.
    filler.unlink()
    filler = leave_mib(small, 2)
    all_refused()
    with pytest.raises(errors.DiskFull):
        client.sandboxes.create("base", disk_mb=512)
    assert client.sandboxes.get(other.id).exec("cat /var/file").stdout == "content"
    other.kill()
    with pytest.raises(errors.SandboxNotFound):
        client.sandboxes.get(other.id)
    filler.unlink()
    # The same server, with room again.
    name = sandbox.snapshot()
    children = sandbox.fork(count=2)
    assert [notes.add(child, "child") for child in children] == [[*told, "child"]] * 2
    for child in children:
        child.kill()
    sandbox.hibernate()
    assert notes.add(sandbox, "woken") == [*told, "woken"]
    with client.sandboxes.create(from_snapshot=name) as copy:
        assert notes.add(copy, "copy") == [*told, "copy"]


def test_a_hibernated_sandbox_wakes_on_a_full_disk_or_says_why_not(small: Path, own_server: MakeServer) -> None:
    server = own_server(work=small / "server", environ={"PANDASTACK_DISK_LOW_WATER_MB": str(RESERVE_MIB)})
    client = server.client(max_create_retry_seconds=0)
    sandbox = client.sandboxes.create("base", persistent=True, disk_mb=512)
    notes.begin(sandbox)
    sandbox.exec("head -c 100M /dev/urandom > /var/large; sync", check=True)
    sandbox.hibernate()
    filler = leave_mib(small, 20)
    with pytest.raises(errors.DiskFull):
        sandbox.exec("true")
    assert sandbox.refresh().status == "hibernated"
    until(lambda: server.machines() == set(), "what was tried is gone")
    filler.unlink()
    assert notes.add(sandbox, "word") == ["word"]
