"""A server whose data is in a storage pool: made, used, left, found again after the machine was restarted, and full."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pandastack import errors

from . import notes
from .conftest import MakeServer
from .servers import Server, until
from .test_disk_full import leave_mib

pytestmark = pytest.mark.skipif(shutil.which("mkfs.xfs", path="/usr/sbin:/sbin") is None, reason="xfsprogs is not installed")

RESERVE_MIB = 64


def storage(server: Server, *arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "pandastack.cli", "storage", *arguments, "--data-dir", str(server.data)]
    done = subprocess.run(command, env=server.environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def status(server: Server) -> dict[str, Any]:
    return dict(json.loads(storage(server, "status", "--json")))


def kernel_has(server: Server) -> list[str]:
    """Mounts and loop devices of the data directory."""
    return [line for line in server.left() if line.startswith(("mount", "loop"))]


def test_everything_in_a_pool_is_there_after_a_restart_of_server_and_machine(own_server: MakeServer) -> None:
    server = own_server(start=False)
    assert storage(server, "init", "--size-gb", "8").strip() == str(server.data / "pool.xfs")
    assert storage(server, "init") == f"{server.data / 'pool.xfs'}\n", "a second time changes nothing"
    assert kernel_has(server) == [], "it is mounted by the server"
    server.start()
    server.bake("base")
    client = server.client()
    sandbox = client.sandboxes.create("base", persistent=True)
    notes.begin(sandbox)
    assert notes.add(sandbox, "first") == ["first"]
    sandbox.filesystem.write("/var/file", "on disk")
    snapshot_id = sandbox.snapshot()
    child = sandbox.fork()
    child.set_persistent(True)
    child.hibernate()
    found = status(server)
    assert (found["file_system"], found["reflink"], found["pool_mounted"], found["problem"]) == ("xfs", True, True, None)
    assert found["takes"]["snapshots"] > 1 << 20
    assert "stop it" in storage(server, "init", code=1), "not beside a running server"
    for folder in ("disks", "captures", "snapshots"):
        assert (server.data / "pool" / folder).is_dir()
        assert not (server.data / folder).exists()

    # A crash leaves it mounted, and the next start uses it as it is.
    server.kill()
    assert kernel_has(server) != []
    server.start()
    assert notes.add(sandbox, "crashed") == ["first", "crashed"]

    # An orderly stop hibernates, and then nothing uses it: what a restart of the machine would leave.
    server.stop()
    until(lambda: not kernel_has(server), "the pool is unmounted")
    away = status(server)
    assert (away["pool_mounted"], away["reflink"], away["takes"]["snapshots"]) == (False, None, None)
    server.start()
    assert notes.add(sandbox, "stopped") == ["first", "crashed", "stopped"]
    assert sandbox.filesystem.read("/var/file") == b"on disk"
    assert notes.add(child, "child") == ["first", "child"]
    with client.sandboxes.create(from_snapshot=snapshot_id) as copy:
        assert notes.add(copy, "copy") == ["first", "copy"]

    # The machine goes down without a word: of what was hibernated, nothing is lost.
    for one in (sandbox, child):
        one.hibernate()
    until(lambda: not list((server.data / "pool" / "disks").glob("*.img")), "their disks are given back")
    server.kill()
    subprocess.run(["umount", str(server.data / "pool")], check=True)
    # A process that was just starting elsewhere may have had it in its own view of the mounts.
    until(lambda: not [line for line in kernel_has(server) if "pool.xfs" in line], "the pool is unmounted")
    server.start()
    assert notes.add(sandbox, "down")[-2:] == ["stopped", "down"]
    assert [found.id for found in client.snapshots.list()] == [snapshot_id]


def test_a_lost_or_damaged_pool_stops_the_start_and_nothing_is_begun_beside_it(own_server: MakeServer) -> None:
    server = own_server(start=False)
    storage(server, "init", "--size-gb", "4")
    server.start()
    server.bake("base")
    client = server.client()
    sandbox = client.sandboxes.create("base", persistent=True)
    sandbox.filesystem.write("/var/file", "kept")
    server.stop()

    file, away = server.data / "pool.xfs", server.data / "away"
    file.rename(away)
    before = sorted(path.name for path in server.data.iterdir())
    with pytest.raises(AssertionError, match=r"pool\.xfs is missing"):
        server.start()
    assert sorted(path.name for path in server.data.iterdir()) == before
    file.write_bytes(bytes(8192))
    with pytest.raises(AssertionError, match="is damaged"):
        server.start()
    assert "is damaged" in refused_by_the_doctor(server)
    away.replace(file)
    server.start()
    assert sandbox.filesystem.read("/var/file") == b"kept"


def refused_by_the_doctor(server: Server) -> str:
    """What it says of blocks that can be shared, which it cannot like."""
    environ = {**server.environ, "PANDASTACK_DATA_DIR": str(server.data)}
    command = [sys.executable, "-m", "pandastack.host", "doctor", "--json"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    (check,) = [check for check in json.loads(done.stdout)["checks"] if check["name"] == "reflink"]
    assert check["ok"] is False
    return str(check["detail"])


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, smaller than the pool in it says. Asked for before `own_server`, so that it outlives it."""
    image, folder = tmp_path / "small.img", tmp_path / "small"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(2000 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_sparse_pool_on_a_full_disk_refuses_early_and_goes_on_with_room_again(small: Path, own_server: MakeServer) -> None:
    server = own_server(start=False, environ={"PANDASTACK_DISK_LOW_WATER_MB": str(RESERVE_MIB)})
    storage(server, "init", "--file", str(small / "pool.xfs"), "--size-gb", "20")
    server.start()
    server.bake("base")
    client = server.client(max_create_retry_seconds=0)
    sandbox, other = (client.sandboxes.create("base", persistent=True, disk_mb=512) for _ in range(2))
    notes.begin(sandbox, ballast_mib=50)
    kept = other.snapshot()
    other.filesystem.write("/var/file", "content")
    other.exec("sync", check=True)
    filler = leave_mib(small, RESERVE_MIB + 20)
    told: list[str] = []
    for verb in (sandbox.snapshot, sandbox.hibernate, sandbox.fork):
        with pytest.raises(errors.DiskFull) as refused:
            verb()
        assert refused.value.http_status == 507
        told.append(f"word-{len(told)}")
        assert notes.add(sandbox, told[-1]) == told
    # Reading, listing, working and deleting go on.
    assert {one.id for one in client.sandboxes.list()} == {sandbox.id, other.id}
    assert other.exec("cat /var/file").stdout == "content"
    assert sandbox.usage().memory_own_bytes > 50 << 20
    # Next to nothing is left below, and a sandbox writes what its own disk has room for.
    filler.unlink()
    filler = leave_mib(small, 2)
    other.exec("head -c 300M /dev/urandom > /var/large; sync", timeout_seconds=120)
    with pytest.raises(errors.DiskFull):
        sandbox.snapshot()
    assert notes.add(sandbox, "still") == [*told, "still"]
    told.append("still")
    client.snapshots.delete(kept)
    assert client.snapshots.list() == []
    other.kill()
    filler.unlink()
    sandbox.hibernate()
    assert notes.add(sandbox, "woken") == [*told, "woken"]


def _up_in_a_terminal(server: Server, answer: str | None, *more: str) -> tuple[str, int]:
    """Start it with a terminal, type the answer when it asks, and stop it when it is ready; what it said, and how it ended."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(server.command(*more), env=server.environ, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    said, asked = b"", False
    deadline = time.monotonic() + 120
    while b"pandastack is ready" not in said and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.5)[0]:
            try:
                said += os.read(ours, 65536)
            except OSError:
                break
        if b"[y/N]" in said and not asked and answer is not None:
            os.write(ours, answer.encode() + b"\n")
            asked = True
    child.terminate()
    code = child.wait(60)
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;]*m", "", said.decode(errors="replace")), code


def test_up_asks_once_in_a_terminal_and_never_without_one(own_server: MakeServer) -> None:
    server = own_server(start=False)
    said, code = _up_in_a_terminal(server, "n")
    assert code == 0, said
    assert said.count("[y/N]") == 1
    assert status(server)["pool_declined"]
    said, _ = _up_in_a_terminal(server, None)
    assert "[y/N]" not in said, "a no is remembered"
    other = own_server(start=False)
    said, code = _up_in_a_terminal(other, "y")
    assert code == 0, said
    assert (other.data / "pool.xfs").exists()
    silent = own_server()
    assert "pandastack storage init" in silent.said()
    assert not (silent.data / "pool.json").exists()
    silent.stop()
    # Told by an option, also without a terminal.
    told = own_server(start=False)
    command = told.command
    told.command = lambda *more: command("--pool", *more)  # type: ignore[method-assign]
    told.start()
    assert status(told)["pool_mounted"]
