"""Snapshots in the object store: memory comes when it is touched, and what cannot come fails who needs it, and nobody else."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import httpx2
import pytest
from moto.server import ThreadedMotoServer

from hosts import sharing_blocks
from pandastack import errors
from pandastack.host.storage.lazy import Status
from pandastack.host.storage.lazy import _Server as LazyServer
from pandastack.sdk.sandboxes import Sandbox

from .conftest import MakeServer
from .servers import RUN_DIR, Server, until
from .test_microvms import TRIED_WITHIN_S

FILE, FILE_MB = "/dev/shm/kept", 96
MAKE = f"head -c {FILE_MB}M /dev/urandom > {FILE} && sync && echo disk > /var/note && sha256sum {FILE}"
SUM = f"sha256sum {FILE}"


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("qemu-system-x86_64") is None or shutil.which("mkfs.xfs") is None:
        pytest.skip("microVMs need root, qemu-system-x86 and xfsprogs")
    if not Path("/dev/fuse").exists():
        pytest.skip("this machine has no FUSE")
    with sharing_blocks(tmp_path_factory.mktemp("xfs") / "file") as folder:
        yield folder


@pytest.fixture
def objects() -> Iterator[Path]:
    """A folder on another file system than the cache, as a store that is far away would be: of one that is near nothing is kept."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def host(objects: Path, xfs: Path, own_server: MakeServer, tmp_path: Path) -> Server:
    """A server with an object store and a chunk cache of its own, on which QEMU works. The store is there until the server has ended."""
    return with_store(str(objects), xfs, own_server, tmp_path)


def with_store(store: str, xfs: Path, own_server: MakeServer, tmp_path: Path, **more: str) -> Server:
    environ = {"PANDASTACK_OBJECT_STORE": store, "PANDASTACK_CHUNK_CACHE_DIR": str(tmp_path / "chunks"), **more}
    server = own_server(work=xfs / tmp_path.name, environ=environ)
    client = server.client()

    def bake() -> bool:
        try:
            for _ in client.templates.bake("base", "qemu"):
                pass
        except errors.RuntimeUnavailable as error:
            if error.retry_after_s is None:
                raise
            return False  # It is being tried.
        return True

    until(bake, "QEMU was tried and its template baked", TRIED_WITHIN_S, every_s=1)
    return server


def said(sandbox: Sandbox, command: str) -> str:
    return sandbox.exec(command, check=True, timeout_seconds=120).stdout.strip()


def lazy(server: Server) -> Status:
    """What the process that serves memory says; zeros where there is none."""
    for folder in (RUN_DIR / server.install / "lazy").glob("*"):
        return LazyServer(folder).ask()
    return Status()


def offloaded(server: Server, isolation: str = "qemu") -> tuple[Sandbox, str, str]:
    """A sandbox with something in memory, a snapshot of it in the object store, and the digest of that."""
    client = server.client()
    one = client.sandboxes.create("base", isolation=isolation, memory_mb=512)
    digest = said(one, MAKE)
    name = one.snapshot()
    before = client.snapshots.wait_verified(name, 120)
    after = client.snapshots.offload(name)
    assert (before.location, after.location) == ("local", "store")
    assert before.own_bytes is not None
    assert after.own_bytes is not None
    assert before.own_bytes > FILE_MB << 20
    assert after.own_bytes < 4 << 20
    assert client.snapshots.offload(name) == after
    return one, name, digest


def forget(objects: Path, cache: Path) -> None:
    """Every chunk is gone, in the store and in the cache."""
    shutil.rmtree(objects / "chunks")
    shutil.rmtree(cache)


def test_a_microvm_goes_on_at_once_and_its_memory_follows(host: Server) -> None:
    client = host.client()
    _, name, digest = offloaded(host)
    later = client.sandboxes.create(from_snapshot=name)
    first = lazy(host).fetched
    assert said(later, f"cat /var/note; {SUM}").split("\n") == ["disk", digest]
    fetched = lazy(host).fetched
    assert 0 < first < fetched - 2 * FILE_MB // 4 // 3, "most of the file was fetched when it was read"
    second = client.sandboxes.create(from_snapshot=name)
    assert said(second, SUM) == digest
    assert lazy(host).fetched == fetched, "the second time everything is here"
    _what_becomes_of_it(host, later, second, digest)
    # Those that go on need what was deleted.
    client.snapshots.delete(name)
    with pytest.raises(errors.SnapshotNotFound):
        client.sandboxes.create(from_snapshot=name)
    assert said(later, SUM) == digest


def _what_becomes_of_it(server: Server, later: Sandbox, second: Sandbox, digest: str) -> None:
    """Fork, sleep, pause and a restart of the server, as with any other."""
    said(later, "echo own > /dev/shm/own")
    with later.fork() as child:
        assert said(child, f"{SUM}; cat /dev/shm/own").split("\n") == [digest, "own"]
        said(child, f"echo changed > {FILE}")
    assert said(later, SUM) == digest
    later.hibernate()
    assert said(later, f"{SUM}; cat /dev/shm/own").split("\n") == [digest, "own"]
    second.pause()
    server.stop()
    server.start()
    again = server.client().sandboxes.get(second.id)
    assert said(again, SUM) == digest
    assert lazy(server).fetched > 0, "it is the same process as before"


@pytest.fixture
def s3() -> Iterator[dict[str, str]]:
    """The settings of a server with an empty bucket `snapshots`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        address, port = server.get_host_and_port()
        url, region = f"http://{address}:{port}", "us-east-1"
        client = boto3.client("s3", endpoint_url=url, aws_access_key_id="test", aws_secret_access_key="test", region_name=region)
        client.create_bucket(Bucket="snapshots")
        yield {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": region, "AWS_ENDPOINT_URL": url}
    finally:
        server.stop()


def test_an_s3_server_will_do(s3: dict[str, str], xfs: Path, own_server: MakeServer, tmp_path: Path) -> None:
    """The process that serves memory must reach it too, with the same credentials."""
    server = with_store("s3://snapshots/of-a-test", xfs, own_server, tmp_path, **s3)
    client = server.client()
    _, name, digest = offloaded(server)
    with client.sandboxes.create(from_snapshot=name) as later:
        assert said(later, f"cat /var/note; {SUM}").split("\n") == ["disk", digest]
        assert lazy(server).fetched > 0


def test_gvisor_fetches_all_of_it_first(host: Server, objects: Path, tmp_path: Path) -> None:
    client = host.client()
    one, name, digest = offloaded(host, "gvisor")
    with client.sandboxes.create(from_snapshot=name) as later:
        assert said(later, f"cat /var/note; {SUM}").split("\n") == ["disk", digest]
    assert lazy(host) == Status(), "no process serves what nobody maps"
    one.restore(name)
    assert said(one, SUM) == digest
    forget(objects, tmp_path / "chunks")
    with pytest.raises(errors.SnapshotUnusable, match="is missing"):
        client.sandboxes.create(from_snapshot=name)
    assert said(one, SUM) == digest


def test_a_missing_chunk_fails_who_needs_it(host: Server, objects: Path, tmp_path: Path) -> None:
    client = host.client()
    one, name, digest = offloaded(host)
    later = client.sandboxes.create(from_snapshot=name)
    other = client.sandboxes.create(from_snapshot=name)
    said(later, "true")
    said(other, "echo alive")
    forget(objects, tmp_path / "chunks")
    began = time.monotonic()
    with pytest.raises(errors.SandboxNotRunning, match="a part of its memory could not be fetched: it is not in the object store any more"):
        said(later, SUM)
    assert time.monotonic() - began < 20
    until(lambda: later.refresh().status == "failed", "it is failed", 15)
    assert later.status_reason == "memory_missing"
    # It has the same file, and touches nothing that it did not touch before.
    assert said(other, "echo alive") == "alive"
    assert said(one, SUM) == digest
    with pytest.raises(errors.SnapshotUnusable, match="is missing"):
        client.sandboxes.create(from_snapshot=name)


def test_a_killed_server_of_memory_fails_its_sandboxes_and_is_replaced(host: Server) -> None:
    client = host.client()
    one, name, digest = offloaded(host)
    later, paused = client.sandboxes.create(from_snapshot=name), client.sandboxes.create(from_snapshot=name)
    paused.pause()
    os.kill(lazy(host).pid, signal.SIGKILL)
    until(lambda: later.refresh().status == "failed" and paused.refresh().status == "failed", "they are failed", 30)
    assert (later.status_reason, paused.status_reason) == ("memory_server", "memory_server")
    with pytest.raises(errors.SandboxNotRunning, match="the process of its host that fetches it ended"):
        said(later, "true")
    assert said(one, SUM) == digest
    with client.sandboxes.create(from_snapshot=name) as again:
        assert said(again, SUM) == digest
        # One that stands still and does not answer is as good as dead.
        os.kill(lazy(host).pid, signal.SIGSTOP)
        until(lambda: again.refresh().status == "failed", "it is failed", 30)
    with client.sandboxes.create(from_snapshot=name) as last:
        assert said(last, SUM) == digest


@pytest.mark.parametrize("after_s", [0.05, 0.3, 0.8])
def test_a_snapshot_survives_the_death_of_the_host_while_it_is_offloaded(host: Server, after_s: float) -> None:
    client = host.client()
    one = client.sandboxes.create("base", isolation="qemu", memory_mb=512)
    digest = said(one, MAKE)
    name = one.snapshot()
    client.snapshots.wait_verified(name, 120)

    def offload() -> None:
        with contextlib.suppress(httpx2.HTTPError):
            host.http("POST", f"/v1/snapshots/{name}/offload")

    asking = threading.Thread(target=offload)
    asking.start()
    time.sleep(after_s)
    host.kill()
    asking.join(30)
    host.start()
    client = host.client()
    for _ in range(2):
        with client.sandboxes.create(from_snapshot=name) as later:
            assert said(later, SUM) == digest
        client.snapshots.offload(name)
    assert client.snapshots.get(name).location == "store"
