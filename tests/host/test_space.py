"""Clones, what files take alone and with others, and how much is left. What needs an XFS is in contracts/test_pool.py."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from pandastack.host.storage import space
from pandastack.host.storage.space import Space


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sparse file: data, a hole of 8 MiB, data."""
    path = tmp_path / "source"
    with path.open("wb") as file:
        file.write(os.urandom(70_000))
        file.seek(8 << 20)
        file.write(b"end")
    return path


def test_a_clone_has_the_same_bytes_is_private_and_keeps_its_holes(source: Path, tmp_path: Path) -> None:
    space.clone(source, tmp_path / "copy")
    copy = tmp_path / "copy"
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o600
    assert copy.stat().st_blocks * 512 < 1 << 20
    with copy.open("r+b") as file:
        file.write(b"changed")
    assert not source.read_bytes().startswith(b"changed")


@pytest.mark.parametrize("refusal", [errno.EXDEV, errno.EOPNOTSUPP, None])
def test_where_the_kernel_does_not_copy_between_two_file_systems_a_clone_is_copied_by_hand(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int | None
) -> None:
    def copy_file_range(*_: object) -> int:
        if refusal is None:
            return 0  # So some file systems say that they cannot.
        raise OSError(refusal, "not between these")

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    monkeypatch.setattr(fcntl, "ioctl", cannot)
    # One that does not say where its holes are, such as 9p.
    monkeypatch.setattr(os, "lseek", lambda _fd, position, whence: position if whence == os.SEEK_DATA else source.stat().st_size)
    space.clone(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20, "zeros stay holes"


def test_a_clone_is_also_made_on_a_file_system_of_another_kind(source: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == source.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        space.clone(source, Path(folder) / "copy")
        assert (Path(folder) / "copy").read_bytes() == source.read_bytes()


def test_a_disk_that_fails_while_it_is_copied_by_hand_is_no_copy(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "copy_file_range", broken)
    monkeypatch.setattr(fcntl, "ioctl", cannot)
    with pytest.raises(OSError, match="no space"):
        space.clone(source, tmp_path / "copy")


def cannot(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "not supported")


@pytest.mark.parametrize("content", [b"", bytes(1 << 20)])
def test_an_empty_file_and_one_of_zeros_are_cloned(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "source").write_bytes(content)
    space.clone(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


def test_a_clone_never_replaces_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        space.clone(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"somebody's"


def test_a_disk_that_fails_is_no_disk_that_cannot_share(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "ioctl", broken)
    with pytest.raises(OSError, match="input/output"):
        space.clone(source, tmp_path / "copy")


def test_a_second_name_makes_a_file_shared_until_it_is_gone(source: Path, tmp_path: Path) -> None:
    alone = space.of(source)
    assert alone.own_bytes > 70_000
    assert alone.shared_bytes == 0
    os.link(source, tmp_path / "second")
    assert space.of(source) == Space(shared_bytes=alone.own_bytes)
    (tmp_path / "second").unlink()
    assert space.of(source, tmp_path / "missing") == alone
    assert space.of(tmp_path / "missing") == Space()


def test_whether_blocks_are_shared_is_found_out_and_leaves_nothing(tmp_path: Path) -> None:
    assert space.shares_blocks(tmp_path) in (True, False)
    assert list(tmp_path.iterdir()) == []
    assert space.shares_blocks(tmp_path / "missing") is None


def test_what_is_free_is_never_more_than_below(tmp_path: Path) -> None:
    tmpfs = Path("/dev/shm")
    assert space.free_bytes(tmp_path, tmpfs) <= min(space.free_bytes(tmp_path), space.free_bytes(tmpfs)) + (64 << 20)
