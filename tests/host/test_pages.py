"""Pages laid over a file: holes stay holes, and zeros become some."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pandastack.host.runtimes import pages
from pandastack.host.runtimes.pages import PAGE_BYTES


@pytest.fixture
def files(tmp_path: Path) -> tuple[int, int, Path]:
    for name in ("source", "target"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1024 * PAGE_BYTES)
    fds = [os.open(tmp_path / name, os.O_RDWR) for name in ("source", "target")]
    return fds[0], fds[1], tmp_path / "target"


def test_only_what_the_source_holds_is_written(files: tuple[int, int, Path]) -> None:
    source, target, path = files
    os.pwrite(target, b"t" * PAGE_BYTES * 4, 10 * PAGE_BYTES)
    os.pwrite(source, b"s" * PAGE_BYTES, 11 * PAGE_BYTES)
    os.pwrite(source, b"e" * PAGE_BYTES, 1023 * PAGE_BYTES)
    held, written = pages.lay_over(source, target)
    content = path.read_bytes()
    assert content[10 * PAGE_BYTES : 14 * PAGE_BYTES] == b"t" * PAGE_BYTES + b"s" * PAGE_BYTES + b"t" * PAGE_BYTES * 2
    assert content[1023 * PAGE_BYTES :] == b"e" * PAGE_BYTES
    assert held >= written == 2 * PAGE_BYTES or held == written


def test_zeros_become_holes(files: tuple[int, int, Path]) -> None:
    source, target, path = files
    os.pwrite(target, b"t" * PAGE_BYTES * 512, 0)
    os.pwrite(source, b"s" * PAGE_BYTES + bytes(PAGE_BYTES * 510) + b"s" * PAGE_BYTES, 0)
    os.fsync(source)
    held, written = pages.lay_over(source, target)
    os.fsync(target)
    assert (held, written) == (512 * PAGE_BYTES, 2 * PAGE_BYTES)
    assert path.read_bytes()[: 512 * PAGE_BYTES] == b"s" * PAGE_BYTES + bytes(PAGE_BYTES * 510) + b"s" * PAGE_BYTES
    assert path.stat().st_blocks * 512 < 64 * PAGE_BYTES


def test_a_source_that_is_empty_changes_nothing(files: tuple[int, int, Path]) -> None:
    source, target, path = files
    os.pwrite(target, b"t" * PAGE_BYTES, 0)
    assert pages.lay_over(source, target) == (0, 0)
    assert path.read_bytes()[:PAGE_BYTES] == b"t" * PAGE_BYTES
