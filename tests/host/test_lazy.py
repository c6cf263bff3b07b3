"""Files that are not here yet: a real FUSE mount, its process, and who reads from it. Needs root and FUSE."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from pandastack.host.storage import chunks
from pandastack.host.storage.chunks import CHUNK_BYTES, Index
from pandastack.host.storage.depot import ORDERS, Depot
from pandastack.host.storage.lazy import LazyMemory
from pandastack.host.storage.objects import Objects
from pandastack.host.storage.paging import Paging, Region

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and FUSE"),
]
USER = 0x7000_0001
READ = """
import hashlib, mmap, os, sys
fd, user, start, end = map(int, sys.argv[1:])
os.setuid(user)
memory = mmap.mmap(fd, os.fstat(fd).st_size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
print(hashlib.sha256(memory[start:end]).hexdigest())
"""
# What a VMM does: it registers memory, hands the userfaultfd over, and runs a guest that touches it.
VMM = """
import ctypes, hashlib, json, mmap, os, socket, struct, sys
path, size, page = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
libc = ctypes.CDLL(None, use_errno=True)
memory = mmap.mmap(-1, size + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
address += -address % (2 << 20)
uffd = libc.syscall(323, os.O_CLOEXEC)
assert uffd >= 0, ctypes.get_errno()
def call(number, data):
    buffer = ctypes.create_string_buffer(data, len(data))
    assert libc.ioctl(uffd, ctypes.c_ulong(number), buffer) == 0, (hex(number), os.strerror(ctypes.get_errno()))
call(0xC018AA3F, struct.pack("<QQQ", 0xAA, 1 << 3, 0))
call(0xC020AA00, struct.pack("<QQQQ", address, size, 1, 0))
connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
connection.connect(path)
half = size // 2 // page * page
regions = [
    {"base_host_virt_addr": address, "size": half, "offset": 0, "page_size": page},
    {"base_host_virt_addr": address + half, "size": size - half, "offset": half, "page_size": page},
]
socket.send_fds(connection, [json.dumps(regions).encode()], [uffd])
def read(start, end):
    return hashlib.sha256(ctypes.string_at(address + start, end - start)).hexdigest()
for line in sys.stdin:
    words = line.split()
    start, end = int(words[1]), int(words[2])
    if words[0] == "read":
        print(read(start, end), flush=True)
    elif words[0] == "write":
        ctypes.memset(address + start, 7, end - start)
        print("written", flush=True)
    elif words[0] == "free":
        assert libc.madvise(ctypes.c_void_p(address + start), ctypes.c_size_t(end - start), 4) == 0
        print("freed", flush=True)
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Nine chunks, of which every other one is zeros."""
    path = tmp_path / "mem"
    with path.open("xb") as file:
        for number in range(0, 9, 2):
            file.seek(number * CHUNK_BYTES)
            file.write(os.urandom(CHUNK_BYTES))
    return path


class World:
    def __init__(self, root: Path, store: Path) -> None:
        self.root = root
        self.store = str(store)
        self.objects = Objects(self.store)
        self.depot = Depot(self.objects, "here")
        self.lazy = self.another()

    def another(self) -> LazyMemory:
        cache = self.root / "chunks"
        return LazyMemory(self.root / "run", self.root / "indexes", objects=self.store, cache=cache, cache_mb=512)

    def kept(self, source: Path) -> Index:
        with self.depot.putting("one"):
            return self.depot.put("one", {"mem": source}).files["mem"]

    def lose(self, index: Index, number: int) -> None:
        digest = index.chunks[number]
        assert digest is not None
        self.objects.delete([chunks.key(digest)])


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    # On another file system than the cache: of a store that is near nothing is kept.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as store:
        made = World(tmp_path, Path(store))
        yield made
        made.lazy.close(needed=False)
        made.objects.close()
    assert left(tmp_path) == []


def left(root: Path) -> list[str]:
    """Mounts and run files that are still there."""
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(root) in line]
    return mounts + [str(path) for path in root.glob("run/**/*")]


async def read(file: Path, start: int, end: int, user: int = USER) -> tuple[int, str]:
    """How a process of that user ended that mapped the file, and the digest of what it read."""
    with file.open("rb") as opened:
        command = [sys.executable, "-c", READ, *map(str, (opened.fileno(), user, start, end))]
        done = await asyncio.to_thread(subprocess.run, command, pass_fds=[opened.fileno()], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.strip()


def digest(source: Path, start: int, end: int) -> str:
    return hashlib.sha256(source.read_bytes()[start:end]).hexdigest()


async def test_a_mapped_file_is_what_was_kept_and_is_fetched_where_it_is_touched(world: World, source: Path) -> None:
    index = world.kept(source)
    size = index.size
    file = await world.lazy.file(index)
    assert await read(file, 0, 4096) == (0, digest(source, 0, 4096))
    assert (await world.lazy.status()).fetched == 1
    assert await read(file, 0, size) == (0, digest(source, 0, size))
    assert (await world.lazy.status()).fetched == 5
    assert await world.lazy.why(file, USER) is None
    with pytest.raises(OSError, match="Read-only"):
        file.open("r+b")
    with pytest.raises(FileNotFoundError):
        file.with_name("0" * 64).open("rb")


async def test_the_order_of_the_first_reader_is_kept_and_fetched_ahead(world: World, source: Path) -> None:
    index = world.kept(source)
    file = await world.lazy.file(index)
    for number in (6, 2):
        await read(file, number * CHUNK_BYTES, number * CHUNK_BYTES + 10)
    async with asyncio.timeout(10):
        while world.objects.age_s(ORDERS + index.digest) is None:  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.1)
    assert world.objects.get(ORDERS + index.digest) == b"[6, 2]"
    world.lazy.close(needed=False)
    # As on another host, which has neither the order nor a chunk.
    (world.root / "indexes" / f"{index.digest}.order").unlink()
    shutil.rmtree(world.root / "chunks")
    world.lazy = world.another()
    file = await world.lazy.file(index)
    async with asyncio.timeout(10):
        # Nobody has read anything.
        while (await world.lazy.status()).fetched < 2:  # noqa: ASYNC110 - another process fetches
            await asyncio.sleep(0.05)


async def test_a_missing_chunk_is_an_error_for_who_touches_it_and_for_nobody_else(world: World, source: Path) -> None:
    index = world.kept(source)
    world.lose(index, 4)
    file = await world.lazy.file(index)
    at = 4 * CHUNK_BYTES + CHUNK_BYTES // 2
    assert (await read(file, at, at + 10))[0] == -signal.SIGBUS
    assert await world.lazy.why(file, USER) == "missing"
    assert await read(file, 0, 4096, USER + 1) == (0, digest(source, 0, 4096))
    assert await world.lazy.why(file, USER + 1) is None
    # The host reads for copies: it sees the error, and no machine has lost anything.
    with file.open("rb") as opened, pytest.raises(OSError, match="Input/output error"):
        os.pread(opened.fileno(), 10, at)
    assert await world.lazy.why(file, 0) is None
    assert await world.lazy.failure(index) == "missing"


async def test_what_the_kernel_reads_beside_what_is_touched_is_missed_by_nobody(world: World, source: Path) -> None:
    index = world.kept(source)
    world.lose(index, 4)
    file = await world.lazy.file(index)
    for start in (4 * CHUNK_BYTES - 8192, 5 * CHUNK_BYTES):
        for page in range(start, start + 8192, 4096):
            assert await read(file, page, page + 4096) == (0, digest(source, page, page + 4096))
    assert await world.lazy.why(file, USER) is None
    assert (await read(file, 4 * CHUNK_BYTES, 4 * CHUNK_BYTES + 10))[0] == -signal.SIGBUS
    assert await world.lazy.why(file, USER) == "missing"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_dead_server_is_noticed_and_replaced(
    world: World, source: Path, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pandastack.host.storage.lazy.ANSWER_TIMEOUT_S", 1.0)
    index, told = world.kept(source), asyncio.Event()
    file = await world.lazy.file(index)
    with file.open("rb"):
        watching = asyncio.create_task(world.lazy.run(lambda: _set(told)))
        await asyncio.sleep(0)
        told.clear()
        os.kill((await world.lazy.status()).pid, how)
        async with asyncio.timeout(10):
            await told.wait()
        assert await world.lazy.why(file, USER) == "server"
        again = await world.lazy.file(index)
        assert again != file
        assert await read(again, 0, 4096) == (0, digest(source, 0, 4096))
        assert await world.lazy.why(file, USER) == "server", "what was on the first one is lost all the same"
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _set(event: asyncio.Event) -> None:
    event.set()


async def test_the_server_is_found_again_after_a_restart(world: World, source: Path) -> None:
    index = world.kept(source)
    file = await world.lazy.file(index)
    pid = (await world.lazy.status()).pid
    world.lazy.close(needed=True)
    world.lazy = world.another()
    world.lazy.recover()
    assert (await world.lazy.status()).pid == pid
    assert await world.lazy.file(index) == file
    assert world.lazy.shows(file)
    os.kill(pid, signal.SIGKILL)
    world.lazy.close(needed=True)
    world.lazy = world.another()
    world.lazy.recover()
    assert (await world.lazy.status()).pid == 0
    assert not list((world.root / "run").iterdir())


class Vmm:
    """The program that stands for a VMM, served by the world."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    async def do(self, verb: str, start: int, end: int) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{verb} {start} {end}\n")
        self.process.stdin.flush()
        return (await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), 30)).strip()


@contextlib.asynccontextmanager
async def vmm(world: World, index: Index) -> AsyncIterator[tuple[Vmm, Path]]:
    path = world.root / "uffd"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)
    file = await world.lazy.file(index)
    await asyncio.to_thread(world.lazy.page, file, listener, USER)
    listener.close()
    command = [sys.executable, "-c", VMM, str(path), str(index.size), "4096"]
    with started(command) as process:
        yield Vmm(process), file


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_faults_of_a_userfaultfd_are_served(world: World, source: Path) -> None:
    index = world.kept(source)
    async with vmm(world, index) as (machine, file):
        assert await machine.do("read", 5, 100) == digest(source, 5, 100)
        assert (await world.lazy.status()).fetched == 1
        # A page that is there already is in the middle of a block that is not.
        page = 6 * CHUNK_BYTES + 8192
        assert await machine.do("write", 8 * CHUNK_BYTES, 8 * CHUNK_BYTES + 4096) == "written"
        assert await machine.do("read", page, page + 4096) == digest(source, page, page + 4096)
        assert await machine.do("read", 0, 8 * CHUNK_BYTES) == digest(source, 0, 8 * CHUNK_BYTES)
        # What it gave back is zeros; around it nothing changes.
        assert await machine.do("free", page, page + 4096) == "freed"
        assert await machine.do("read", page, page + 4096) == hashlib.sha256(bytes(4096)).hexdigest()
        assert await machine.do("free", 2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 8192) == "freed"
        assert await machine.do("read", 2 * CHUNK_BYTES + 8192, 3 * CHUNK_BYTES) == digest(source, 2 * CHUNK_BYTES + 8192, 3 * CHUNK_BYTES)
        assert await machine.do("read", 2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 8192) == hashlib.sha256(bytes(8192)).hexdigest()
        assert await world.lazy.why(file, USER) is None


async def test_of_what_a_vmm_says_that_it_gave_back_only_its_memory_counts(world: World, source: Path) -> None:
    index = world.kept(source)
    with socket.socket(socket.AF_UNIX) as listener:
        paging = Paging(listener, index, cast(Any, None), print)
    low, high = Region(address=1 << 30, size=8 << 12, offset=0), Region(address=1 << 40, size=8 << 12, offset=8 << 12)
    paging._regions = [low, high]
    paging._remove(0, (1 << 30) + (2 << 12))
    paging._remove((1 << 40) + (7 << 12), 1 << 47)
    assert paging._removed == bytes([1, 1] + [0] * 13 + [1]) + bytes(index.size // 4096 - 16)
    assert paging._was_removed(low.pages((1 << 30) + 4096, (1 << 30) + (4 << 12)))
    assert not paging._was_removed(low.pages((1 << 30) + (2 << 12), (1 << 30) + (8 << 12)))


@pytest.mark.parametrize(("code", "told"), [(errno.ENOMEM, ["unreachable"]), (errno.ESRCH, []), (errno.ENOENT, [])])
async def test_a_page_that_cannot_be_put_there_is_told_unless_the_machine_is_going(
    world: World, source: Path, monkeypatch: pytest.MonkeyPatch, code: int, told: list[str]
) -> None:
    failed: list[str] = []
    with socket.socket(socket.AF_UNIX) as listener:
        paging = Paging(listener, world.kept(source), cast(Any, None), failed.append)
    monkeypatch.setattr(paging, "_put", lambda *_: (0, code))
    assert paging._fill(0, 8192, None, 4096)
    assert failed == told


async def test_a_fault_that_cannot_be_served_ends_the_machine_with_a_reason(world: World, source: Path) -> None:
    index = world.kept(source)
    world.lose(index, 4)
    async with vmm(world, index) as (machine, file):
        assert await machine.do("read", 0, 4096) == digest(source, 0, 4096)
        assert await machine.do("read", 4 * CHUNK_BYTES, 4 * CHUNK_BYTES + 1) == ""
        assert machine.process.wait(10) == -signal.SIGBUS
        assert await world.lazy.why(file, USER) == "missing"


async def test_a_machine_whose_pages_nobody_serves_any_more_is_known(world: World, source: Path) -> None:
    """It hangs in its next fault; the host has to end it, and is told."""
    index = world.kept(source)
    async with vmm(world, index) as (machine, file):
        assert await machine.do("read", 0, 4096) == digest(source, 0, 4096)
        os.kill((await world.lazy.status()).pid, signal.SIGKILL)
        assert await world.lazy.why(file, USER) == "server"


async def test_who_says_nonsense_is_not_served(world: World, source: Path) -> None:
    index = world.kept(source)
    for said in (b"{}", b"[]]", b'[{"base_host_virt_addr": 0, "size": 1073741824, "offset": 0, "page_size": 4096}]'):
        path = world.root / "uffd"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(1)
        await asyncio.to_thread(world.lazy.page, await world.lazy.file(index), listener, USER)
        listener.close()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(10)
            connection.connect(str(path))
            pipe = os.pipe()
            socket.send_fds(connection, [said], [pipe[0]])
            for fd in pipe:
                os.close(fd)
            assert await asyncio.to_thread(connection.recv, 1) == b"", "it hangs up"
    assert (await world.lazy.status()).pid > 0
