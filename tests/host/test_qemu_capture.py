"""Saving memory, tried on a real process: a child that has a private mapping of a file, or of nothing, and writes to it."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.pages import PAGE_BYTES
from pandastack.host.runtimes.qemu import capture
from pandastack.host.runtimes.qemu.capture import Arena, Arenas, Run
from pandastack.host.storage import space

PAGES = 4096
_CHILD = """
import ctypes, mmap, os, sys
pages, path = int(sys.argv[1]), sys.argv[2]
if path:
    fd = os.open(path, os.O_RDONLY)
    memory = mmap.mmap(fd, pages * 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
else:
    memory = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    what, page, count = line.split()
    start, end = int(page) * 4096, (int(page) + int(count)) * 4096
    if what == "read":
        bytes(memory[start:end])
    elif what == "zero":
        memory[start:end] = bytes(end - start)
    else:
        for number in range(int(page), int(page) + int(count)):
            memory[number * 4096 : number * 4096 + 4096] = (what + str(number)).encode().ljust(4096, b"-")
    print("done", flush=True)
"""

Writer = Callable[[str, int, int], None]


def _page(what: str, number: int) -> bytes:
    return (what + str(number)).encode().ljust(PAGE_BYTES, b"-")


class Child:
    def __init__(self, base: Path | None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(PAGES), str(base or "")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = int(self.process.stdout.readline())

    def do(self, what: str, page: int, count: int = 1) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what} {page} {count}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def runs(self) -> list[Run]:
        return capture.own_runs(self.process.pid, self.address, PAGES * PAGE_BYTES)

    def save(self, target: Path) -> int:
        runs, arena = self.runs(), Arena()
        arena.copy(self.process.pid, self.address, runs)
        return capture.write(arena, runs, target)

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
    """A saved memory: pages 100 to 199 and 1000 have content, the rest are holes."""
    file = tmp_path / "base"
    with file.open("wb") as out:
        out.truncate(PAGES * PAGE_BYTES)
        for number in [*range(100, 200), 1000]:
            out.seek(number * PAGE_BYTES)
            out.write(_page("base", number))
    return file


def test_only_what_was_written_is_its_own(child_of: Callable[[Path | None], Child], base: Path) -> None:
    child = child_of(base)
    child.do("read", 0, PAGES)
    assert child.runs() == []
    child.do("a", 150)
    child.do("a", 151)
    child.do("b", 3000, 10)
    assert child.runs() == [Run(offset=150 * 4096, length=8192), Run(offset=3000 * 4096, length=40960)]


def test_a_saved_memory_is_that_of_the_process(child_of: Callable[[Path | None], Child], base: Path, tmp_path: Path) -> None:
    child = child_of(base)
    child.do("a", 150, 2)
    child.do("zero", 160, 5)
    child.do("zero", 2000, 5)
    child.do("b", 3000, 1)
    saved = tmp_path / "saved"
    space.clone(base, saved)
    assert child.save(saved) == 3 * PAGE_BYTES, "zeros are not written"
    content = saved.read_bytes()
    expected = bytearray(base.read_bytes())
    for number, page in ((150, _page("a", 150)), (151, _page("a", 151)), (3000, _page("b", 3000))):
        expected[number * 4096 : (number + 1) * 4096] = page
    expected[160 * 4096 : 165 * 4096] = bytes(5 * 4096)
    assert content == expected
    with saved.open("rb") as file:
        assert os.lseek(file.fileno(), 160 * 4096, os.SEEK_DATA) == 165 * 4096, "zeros over content are a hole"
        assert os.lseek(file.fileno(), 1001 * 4096, os.SEEK_DATA) == 3000 * 4096
    assert base.read_bytes()[150 * 4096 :].startswith(b"base150")


def test_a_memory_without_a_file_is_saved_sparsely(child_of: Callable[[Path | None], Child], tmp_path: Path) -> None:
    child = child_of(None)
    child.do("read", 0, 100)
    child.do("zero", 200, 100)
    child.do("a", 1000, 3)
    saved = tmp_path / "saved"
    saved.touch()
    os.truncate(saved, PAGES * PAGE_BYTES)
    child.save(saved)
    assert saved.stat().st_blocks * 512 <= 4 * PAGE_BYTES
    assert saved.read_bytes()[1000 * 4096 : 1003 * 4096] == b"".join(_page("a", number) for number in (1000, 1001, 1002))


def test_scattered_pages_come_to_their_places(child_of: Callable[[Path | None], Child], tmp_path: Path) -> None:
    """More pieces than the kernel takes at once."""
    child = child_of(None)
    for number in range(0, PAGES, 3):
        child.do("x", number)
    runs, arena = child.runs(), Arena()
    assert len(runs) == -(-PAGES // 3)
    assert len(runs) > 1024
    arena.copy(child.process.pid, child.address, runs)
    for offset, content, length in arena.pieces(runs):
        assert content is not None
        assert bytes(content) == _page("x", offset // PAGE_BYTES)
        assert length == PAGE_BYTES


def test_pieces_are_told_apart_by_zeros() -> None:
    rng = random.Random(7)
    pages = [rng.choice([b"", b"x", b"y"]) for _ in range(400)]
    arena = Arena()
    arena.reserve(400 * PAGE_BYTES)
    for number, content in enumerate(pages):
        arena._memory[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = content.ljust(PAGE_BYTES, b"\0")
    runs = [Run(offset=5 * PAGE_BYTES, length=150 * PAGE_BYTES), Run(offset=500 * PAGE_BYTES, length=250 * PAGE_BYTES)]
    seen = {}
    last = -1
    for offset, piece, length in arena.pieces(runs):
        assert offset > last, "in order"
        last = offset
        for number in range(length // PAGE_BYTES):
            page = bytes(piece[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]) if piece is not None else bytes(PAGE_BYTES)
            seen[offset // PAGE_BYTES + number] = page.rstrip(b"\0")
    assert seen == dict(zip([*range(5, 155), *range(500, 750)], pages, strict=True))
    assert sum(1 for _ in arena.pieces(runs)) < 400, "neighbours of a kind are one piece"


def test_an_arena_is_kept_and_a_large_one_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_KEEP_BYTES", 1 << 20)
    arenas = Arenas()
    with arenas.one() as first, arenas.one() as second:
        assert first is not second
        first.reserve(1 << 20)
        second.reserve(2 << 20)
    with arenas.one() as again:
        assert again is second, "the first that came back"
        assert len(again._memory) < 1 << 20


def test_a_process_that_is_gone_is_an_error(child_of: Callable[[Path | None], Child]) -> None:
    child = child_of(None)
    child.do("a", 0)
    runs = child.runs()
    child.end()
    with pytest.raises(RuntimeFailed):
        child.runs()
    with pytest.raises(RuntimeFailed):
        Arena().copy(child.process.pid, child.address, runs)


def test_the_arena_is_anonymous_memory_of_its_own() -> None:
    arena = Arena()
    arena.reserve(3 * PAGE_BYTES)
    assert isinstance(arena._memory, mmap.mmap)
    assert len(arena._memory) == 3 * PAGE_BYTES
