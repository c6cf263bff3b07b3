"""Tracking what a process writes, tried on a real one with whatever this kernel has."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.pages import PAGE_BYTES
from pandastack.host.runtimes.qemu import capture, dirty, mapping
from pandastack.host.runtimes.qemu.capture import Arena, Run

PAGES = 2048
SIZE = PAGES * PAGE_BYTES
_CHILD = """
import ctypes, mmap, os, sys
size, path = int(sys.argv[1]), sys.argv[2]
if path:
    memory = mmap.mmap(os.open(path, os.O_RDONLY), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
else:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    for number in line.split()[1:]:
        place = int(number) * 4096
        if line.startswith("read"):
            memory[place]
        elif line.startswith("kernel"):
            with open("/dev/urandom", "rb", buffering=0) as source:
                source.readinto(memoryview(memory)[place : place + 4096])
        else:
            memory[place : place + 8] = line.split()[0].encode().ljust(8)
    print("done", flush=True)
"""


class Child:
    def __init__(self, base: Path | None) -> None:
        argv = [sys.executable, "-c", _CHILD, str(SIZE), str(base or "")]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = int(self.process.stdout.readline())
        pidfd = os.pidfd_open(self.process.pid)
        try:
            with mapping.in_its_name(self.process.pid) as call:
                dirty.allow(call, pidfd, self.address, SIZE)
        finally:
            os.close(pidfd)

    def do(self, what: str, *pages: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what} {' '.join(map(str, pages))}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def tracking(self) -> dirty.Tracking:
        found = dirty.tracking(self.process.pid, self.address, SIZE)
        if found is None:
            pytest.skip("this kernel tracks no writes: it is older than 6.7, and has no soft-dirty bits")
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def child_of() -> Iterator[Callable[[Path | None], Child]]:
    if os.geteuid() != 0:
        pytest.skip("the memory of a process is root's to look at")
    made: list[Child] = []

    def make(base: Path | None) -> Child:
        made.append(Child(base))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    file = tmp_path / "base"
    file.write_bytes(b"base".ljust(PAGE_BYTES, b".") * PAGES)
    return file


def _pages(runs: list[Run]) -> list[int]:
    return [run.offset // PAGE_BYTES + number for run in runs for number in range(run.length // PAGE_BYTES)]


@pytest.mark.parametrize("on_a_file", [True, False])
def test_what_is_written_after_the_beginning_is_told(child_of: Callable[[Path | None], Child], base: Path, on_a_file: bool) -> None:
    child = child_of(base if on_a_file else None)
    tracking = child.tracking()
    child.do("first", 3, 4, 5, 700)
    if on_a_file:
        child.do("read", 1000)
    assert _pages(tracking.begin()) == [3, 4, 5, 700]
    assert tracking.written() == []
    child.do("read", 3, 4, 900)
    child.do("again", 4, 1500)
    child.do("kernel", 5)
    expected = {4, 5, 1500} if on_a_file else {4, 5, 1500, 900}  # Where there is no file, a page of zeros is one of its own.
    assert {4, 5, 1500} <= set(_pages(tracking.written())) <= expected
    assert set(_pages(tracking.begin())) >= {3, 4, 5, 700, 1500}
    assert tracking.written() == [], "a new beginning forgets"


def test_a_copy_in_two_steps_is_what_the_process_has(child_of: Callable[[Path | None], Child], base: Path, tmp_path: Path) -> None:
    rng = random.Random(11)
    child, arena = child_of(base), Arena()
    tracking = child.tracking()
    for turn in range(5):
        child.do(f"a{turn}", *rng.sample(range(PAGES), 400))
        early = tracking.begin()
        at = arena.copy(child.process.pid, child.address, early)
        child.do(f"b{turn}", *rng.sample(range(PAGES), 50))
        late = tracking.written()
        assert capture.length(late) <= 51 * PAGE_BYTES
        end = arena.copy(child.process.pid, child.address, late, at=at)
        assert end == at + capture.length(late)
        saved = tmp_path / f"saved{turn}"
        saved.write_bytes(base.read_bytes())
        capture.write(arena, early, saved)
        capture.write(arena, late, saved, at=at)
        with open(f"/proc/{child.process.pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123 - unbuffered
            assert saved.read_bytes() == os.pread(memory.fileno(), SIZE, child.address)


def test_a_process_that_is_gone(child_of: Callable[[Path | None], Child], base: Path) -> None:
    child = child_of(base)
    tracking = child.tracking()
    child.end()
    for ask in (tracking.begin, tracking.written):
        with pytest.raises((OSError, RuntimeFailed)):
            ask()
    assert dirty.tracking(child.process.pid, child.address, SIZE) is None or dirty._has_soft_dirty()
