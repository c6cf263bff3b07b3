"""Chunks, their cache and the depot, over a folder and over an S3 server."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from pandastack.errors import ObjectStoreUnavailable
from pandastack.host.storage import chunks, depot
from pandastack.host.storage.chunk_cache import ChunkCache
from pandastack.host.storage.chunks import CHUNK_BYTES, ChunkLost, Chunks, Index
from pandastack.host.storage.depot import Depot
from pandastack.host.storage.objects import Missing, Objects

MIB = 1 << 20


class Counting(Objects):
    """The real store, with a count of what was asked of it, and as slow as wanted."""

    def __init__(self, url: str, *, delay_s: float = 0.0, timeout_s: float = 30.0) -> None:
        super().__init__(url, timeout_s=timeout_s)
        self.gets: list[str] = []
        self.puts: list[str] = []
        self.delay_s = delay_s
        self._count = threading.Lock()

    def get(self, key: str) -> bytes:
        with self._count:
            self.gets.append(key)
        time.sleep(self.delay_s)
        return super().get(key)

    def put(self, key: str, data: bytes) -> None:
        with self._count:
            self.puts.append(key)
        super().put(key, data)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture
def far() -> Iterator[Path]:
    """A folder on another file system than the caches: of a store that is near nothing is kept."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "folder":
        return str(request.getfixturevalue("far"))
    endpoint = request.getfixturevalue("s3")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"b{os.urandom(6).hex()}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
    return f"s3://{bucket}/below"


@pytest.fixture
def store(url: str) -> Iterator[Counting]:
    objects = Counting(url)
    yield objects
    objects.close()


@pytest.fixture
def folder(far: Path) -> Iterator[Counting]:
    objects = Counting(str(far))
    yield objects
    objects.close()


@pytest.fixture
def reading(tmp_path: Path) -> Iterator[Callable[..., Chunks]]:
    """Readers with a cache each, closed at the end."""
    made: list[Chunks] = []

    def reader(objects: Objects, *, cache: str = "cache", limit_bytes: int = 1 << 30, **options: float) -> Chunks:
        made.append(Chunks(objects, ChunkCache(tmp_path / cache, limit_bytes), **options))  # type: ignore[arg-type]
        return made[-1]

    yield reader
    for one in made:
        one.close()


def memory(path: Path, seed: bytes = b"m") -> Path:
    """17 MiB and a bit: data, a hole, zeros that were written, data, and a short end."""
    with path.open("xb") as file:
        file.write(seed * CHUNK_BYTES)
        file.seek(2 * CHUNK_BYTES)
        file.write(bytes(CHUNK_BYTES))
        file.write(os.urandom(CHUNK_BYTES))
        file.write(b"end" * 1000)
    return path


def kept(where: Depot, name: str, path: Path) -> Index:
    with where.putting(name):
        return where.put(name, {"mem": path}).files["mem"]


def test_a_file_becomes_chunks_and_comes_back(store: Counting, reading: Callable[..., Chunks], tmp_path: Path) -> None:
    source = memory(tmp_path / "mem")
    index = kept(Depot(store, "here"), "one", source)
    assert index.size == source.stat().st_size
    assert [digest is None for digest in index.chunks] == [False, True, True, False, False]
    assert Index.model_validate_json(index.encoded).digest == index.digest
    reader = reading(store)
    reader.assemble(index, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert (tmp_path / "back").stat().st_blocks * 512 < 3 * CHUNK_BYTES, "zeros take no room"
    assert reader.fetched == 3
    reader.assemble(index, tmp_path / "again")
    assert reader.fetched == 3, "the second time everything is here"


def test_what_an_image_that_is_here_has_is_not_fetched(folder: Counting, reading: Callable[..., Chunks], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(4 * CHUNK_BYTES) + b"end")
    disk = tmp_path / "disk"
    shutil.copyfile(image, disk)
    with disk.open("r+b") as file:
        file.seek(CHUNK_BYTES)
        file.write(os.urandom(10))  # Changed, cleared, and longer than it was.
        file.seek(2 * CHUNK_BYTES)
        file.write(bytes(CHUNK_BYTES))
        file.truncate(7 * CHUNK_BYTES)
        file.seek(6 * CHUNK_BYTES)
        file.write(b"far")
    index = kept(Depot(folder, "here"), "one", disk)
    for number, (end, fetched) in enumerate(((disk.stat().st_size, 3), (2 * CHUNK_BYTES + 5, 1))):
        wanted = disk.read_bytes()[:end]
        disk.write_bytes(wanted)
        index = kept(Depot(folder, "here"), f"cut{number}", disk)
        reader = reading(folder, cache=f"cache{number}")
        reader.assemble(index, tmp_path / f"back{number}", like=image)
        assert (tmp_path / f"back{number}").read_bytes() == wanted
        assert reader.fetched == fetched


def test_what_is_there_already_is_not_sent_again(store: Counting, tmp_path: Path) -> None:
    where = Depot(store, "here")
    kept(where, "one", memory(tmp_path / "one"))
    first = [key for key in store.puts if key.startswith(chunks.PREFIX)]
    assert len(first) == 3
    kept(where, "two", memory(tmp_path / "two"))
    second = [key for key in store.puts if key.startswith(chunks.PREFIX)][3:]
    assert len(second) == 1, "only what is random differs"


def test_the_chunks_of_a_state_go_when_nothing_refers_to_them(store: Counting, reading: Callable[..., Chunks], tmp_path: Path) -> None:
    where, other = Depot(store, "here"), Depot(store, "there")
    one, two = kept(where, "one", memory(tmp_path / "one")), kept(other, "two", memory(tmp_path / "two"))
    assert where.sweep(lambda: ["one"], list, grace_s=0) == 0
    assert where.sweep(list, lambda: [one.digest], grace_s=0) == 0, "a machine reads from it, though it was deleted"
    assert where.sweep(list, list, grace_s=3600) == 0, "they are too young"
    assert where.sweep(list, list, grace_s=-1) == 1
    reader = reading(store)
    reader.assemble(two, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "two").read_bytes()
    with pytest.raises(ChunkLost, match="missing"):
        reader.assemble(one, tmp_path / "gone")
    assert not list(store.list("sweeps/")), "no sweep seems to be under way"


def test_an_upload_waits_for_the_sweep_that_may_not_know_of_it(folder: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old chunk that the upload finds is in the sweep's list. It must be sent again, after the sweep took it."""
    where = Depot(folder, "here")
    index = kept(where, "one", memory(tmp_path / "one"))
    where.remove("one")
    deleting, go_on = threading.Event(), threading.Event()
    really = folder.delete

    def held(keys: list[str]) -> None:
        if any(key.startswith(chunks.PREFIX) for key in keys):
            deleting.set()
            assert go_on.wait(20)
        really(keys)

    monkeypatch.setattr(folder, "delete", held)
    with ThreadPoolExecutor(2) as pool:
        sweep = pool.submit(where.sweep, list, list, grace_s=-1)
        assert deleting.wait(20)
        upload = pool.submit(kept, Depot(folder, "there"), "two", tmp_path / "one")
        time.sleep(0.3)
        assert not upload.done()
        go_on.set()
        assert sweep.result(20) == 3
        assert upload.result(20).digest == index.digest
    for digest in index.stored:
        assert folder.age_s(chunks.key(digest)) is not None


def test_a_reference_that_nobody_can_read_stops_the_sweep(folder: Counting, tmp_path: Path) -> None:
    where = Depot(folder, "here")
    kept(where, "one", memory(tmp_path / "one"))
    folder.put("snapshots/newer/x", b'{"format": 2}')
    assert where.sweep(list, list, grace_s=-1) == 0


@pytest.mark.parametrize("at", ["store", "cache"])
def test_a_flipped_bit_is_never_used(folder: Counting, far: Path, reading: Callable[..., Chunks], tmp_path: Path, at: str) -> None:
    index = kept(Depot(folder, "here"), "one", memory(tmp_path / "mem"))
    (digest, *_) = sorted(index.stored)
    reader = reading(folder)
    good = reader.read(digest)
    path = far / chunks.key(digest) if at == "store" else tmp_path / "cache" / digest[:2] / digest
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if at == "cache":
        assert reader.read(digest) == good
        assert path.read_bytes() == good, "it was replaced"
    else:
        reader.cache.drop(digest)
        with pytest.raises(ChunkLost, match="damaged"):
            reader.read(digest)
        assert not reader.cache.has(digest)


def test_a_missing_chunk_says_so(store: Counting, reading: Callable[..., Chunks]) -> None:
    with pytest.raises(ChunkLost) as lost:
        reading(store).read("ab" * 32)
    assert lost.value.why == "missing"
    with pytest.raises(Missing):
        store.get("nothing")
    assert store.age_s("nothing") is None
    store.delete(["nothing", "nor/this"])


def test_many_who_want_one_chunk_make_one_request(folder: Counting, reading: Callable[..., Chunks], tmp_path: Path) -> None:
    index = kept(Depot(folder, "here"), "one", memory(tmp_path / "mem"))
    (digest, *_) = index.stored
    folder.delay_s = 0.2
    # Two readers with one cache stand for two processes: they share nothing else.
    readers = [reading(folder), reading(folder)]
    with ThreadPoolExecutor(12) as pool:
        found = set(pool.map(lambda number: readers[number % 2].read(digest), range(12)))
    assert len(found) == 1
    assert folder.gets.count(chunks.key(digest)) == 1


def test_a_store_that_hangs_costs_a_bounded_time(tmp_path: Path, reading: Callable[..., Chunks]) -> None:
    objects = Counting(str(tmp_path / "objects"), delay_s=2.0)
    reader = reading(objects, timeout_s=0.3)
    began = time.monotonic()
    with pytest.raises(ChunkLost, match="timeout"):
        reader.read("ab" * 32)
    with pytest.raises(ChunkLost, match="timeout"):  # Who joins the one that hangs waits no longer.
        reader.read("ab" * 32)
    assert time.monotonic() - began < 1.5
    objects.close()


def test_a_store_that_nobody_answers_for_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    objects = Objects("s3://bucket", timeout_s=3)
    began = time.monotonic()
    with pytest.raises(ObjectStoreUnavailable):
        objects.get("x")
    assert time.monotonic() - began < 4
    objects.close()


def test_prefetching_runs_side_by_side(folder: Counting, reading: Callable[..., Chunks], tmp_path: Path) -> None:
    path = tmp_path / "many"
    path.write_bytes(b"".join(bytes([number]) * CHUNK_BYTES for number in range(1, 9)))
    index = kept(Depot(folder, "here"), "one", path)
    folder.delay_s = 0.2
    reader = reading(folder)
    began = time.monotonic()
    assert all(flight.result(10) for flight in reader.prefetch(index.stored))
    assert time.monotonic() - began < 1.0, "one after the other they take 1.6 s"
    folder.gets.clear()
    assert [reader.read(digest)[:1] for digest in index.chunks if digest] == [bytes([number]) for number in range(1, 9)]
    assert not folder.gets


def test_of_a_folder_on_the_same_disk_nothing_is_kept(tmp_path: Path, reading: Callable[..., Chunks]) -> None:
    objects = Counting(str(tmp_path / "objects"))
    index = kept(Depot(objects, "here"), "one", memory(tmp_path / "mem"))
    reader = reading(objects)
    reader.assemble(index, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "mem").read_bytes()
    assert not list((tmp_path / "cache").glob("??"))
    objects.close()


def test_the_cache_keeps_its_limit_and_what_was_used_last(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path / "cache", limit_bytes=10 * MIB)
    names = [f"{number:02x}" * 32 for number in range(20)]
    for age, name in enumerate(names):
        cache.put(name, bytes(MIB))
        path = tmp_path / "cache" / name[:2] / name
        os.utime(path, (1_000_000 + age,) * 2)
        if age:
            cache.get(names[0])  # It is read all the time.
        assert sum(file.stat().st_size for file in (tmp_path / "cache").glob("??/*")) <= 10 * MIB
    assert cache.has(names[0])
    assert cache.has(names[19])
    assert not cache.has(names[1])
    cache.put("ff" * 32, bytes(11 * MIB))
    assert not cache.has("ff" * 32), "it would never fit"
    assert not list((tmp_path / "cache").glob("??/.*"))


def test_several_writers_keep_the_limit_together(tmp_path: Path) -> None:
    caches = [ChunkCache(tmp_path / "cache", limit_bytes=8 * MIB) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda number: caches[number % 4].put(f"{number:064x}", bytes(MIB)), range(100)):
            pass
    assert 4 * MIB <= sum(file.stat().st_size for file in (tmp_path / "cache").glob("??/*")) <= 8 * MIB


def test_grace_and_sweep_times_leave_room_for_each_other() -> None:
    assert depot.GRACE_S > 2 * depot.SWEEP_S
