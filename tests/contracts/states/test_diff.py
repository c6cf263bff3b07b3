"""What a host says of the files of two points, over every runtime of this machine: the rules of `control.hosts.Host.diff`.

Only gVisor has links, owners, clocks and shared memory to show; what the in-memory guest has is asked of both.
"""

# ruff: noqa: ASYNC240 - a folder of seven names does not block a loop

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hosts import until
from pandastack.control.hosts import closing
from pandastack.errors import FileNotFound, SandboxNotFound, SnapshotNotFound
from pandastack.host.app import HostService
from pandastack.wire.diff import HostChange, HostPoint
from pandastack.wire.files import ChangeMode
from pandastack.wire.host import HostFork
from pandastack.wire.ids import SandboxId, new_sandbox_id, new_snapshot_id

from ..benches import PATIENCE
from .places import Place, children, run

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300 * PATIENCE)]

ODD = b'/w/a "quoted"\\ name\nwith \xff\t'


def point(name: str) -> HostPoint:
    return HostPoint(kind="sandbox", id=name)


def saved(name: str) -> HostPoint:
    return HostPoint(kind="snapshot", id=name)


async def write(host: HostService, box: SandboxId, path: bytes, data: bytes) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield data

    await host.write_file(box, path, pieces())


async def snapshot(host: HostService, box: SandboxId) -> HostPoint:
    name = new_snapshot_id()
    await host.snapshot(box, name)
    return saved(name)


async def differences(host: HostService, a: HostPoint, b: HostPoint, path: bytes = b"/w", *, patch: bool = False) -> list[HostChange]:
    async with asyncio.timeout(60 * PATIENCE), closing(host.diff(a, b, path, patch=patch)) as found:
        return [change async for change in found]


def kinds(found: list[HostChange]) -> dict[str, str]:
    return {change.path: change.kind for change, _ in found}


def apply(folder: Path, found: list[HostChange]) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    subprocess.run(["git", "apply", "-"], cwd=folder, input=b"".join(patch for _, patch in found), check=True)


async def test_two_points_of_one_sandbox(host: HostService, box: SandboxId, tmp_path: Path) -> None:
    before = {
        b"same": b"as it is\n",
        b"text": b"one\ntwo\nthree",
        b"binary": bytes(range(256)) * 8,
        b"gone/deep/file": b"x\n",
        b"mode": b"#!\n",
    }
    for name, data in before.items():
        await write(host, box, b"/w/" + name, data)
        (tmp_path / name.decode()).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name.decode()).write_bytes(data)
    one = await snapshot(host, box)
    await write(host, box, b"/w/text", b"one\n2\nthree\n")
    await write(host, box, b"/w/binary", bytes(range(255, -1, -1)) * 8)
    await write(host, box, ODD, b"odd\n")
    await write(host, box, b"/w/empty", b"")
    await host.remove_file(box, b"/w/gone", recursive=True)
    await host.change_mode(box, b"/w/mode", ChangeMode(path="/w/mode", mode="0755"))
    two = await snapshot(host, box)
    await write(host, box, b"/w/later", b"seen only as it is now\n")

    found = await differences(host, one, two, patch=True)
    shown = ODD.decode("utf-8", "replace")
    assert kinds(found) == {
        shown: "added", "/w/binary": "modified", "/w/empty": "added", "/w/gone": "removed", "/w/gone/deep": "removed",
        "/w/gone/deep/file": "removed", "/w/mode": "metadata", "/w/text": "modified",
    }  # fmt: skip
    assert next(change for change, _ in found if change.path == shown).path_b64
    mode = next(change for change, _ in found if change.kind == "metadata")
    assert mode.before
    assert mode.after
    assert (mode.before.mode, mode.after.mode) == ("0644", "0755")
    apply(tmp_path, found)
    assert (tmp_path / "text").read_bytes() == b"one\n2\nthree\n"
    assert (tmp_path / "binary").read_bytes() == bytes(range(255, -1, -1)) * 8
    assert (bytes(tmp_path) + b"/" + ODD[3:]) in [bytes(path) for path in tmp_path.iterdir()]
    assert (tmp_path / "mode").stat().st_mode & 0o111
    assert not (tmp_path / "gone").exists()
    assert (tmp_path / "empty").read_bytes() == b""

    assert kinds(await differences(host, two, point(box))) == {"/w/later": "added"}
    assert kinds(await differences(host, point(box), two)) == {"/w/later": "removed"}
    assert await differences(host, one, one) == []
    assert kinds(await differences(host, one, two, b"/w/text")) == {"/w/text": "modified"}
    assert kinds(await differences(host, one, two, b"/w/gone/")) == kinds(
        [change for change in found if change.change.path.startswith("/w/gone")]
    )
    with pytest.raises(FileNotFound):
        await differences(host, one, two, b"/nowhere")
    assert (await host.describe()).capacity.sandboxes == 1, "views give back what they took"


async def test_a_hibernated_sandbox_is_read_and_sleeps_on(place: Place, host: HostService, box: SandboxId) -> None:
    await write(host, box, b"/w/file", b"before\n")
    one = await snapshot(host, box)
    await write(host, box, b"/w/file", b"after\n")
    await host.hibernate(box, reason="request")
    assert kinds(await differences(host, one, point(box))) == {"/w/file": "modified"}
    assert (await host.get(box)).status == "hibernated"
    # What it had in memory is given back when nobody waits for that.
    await until(lambda: list(place.left()) == ["ledger"])
    assert (await host.describe()).capacity.sandboxes == 0
    assert await run(host, box, "cat /w/file") == "after\n"


async def test_a_paused_one_is_resumed_as_for_any_request(host: HostService, box: SandboxId) -> None:
    await write(host, box, b"/w/file", b"before\n")
    one = await snapshot(host, box)
    await host.pause(box)
    assert await differences(host, one, point(box)) == []
    assert (await host.get(box)).status == "running"


async def test_forks_are_compared(host: HostService, box: SandboxId) -> None:
    await write(host, box, b"/w/file", b"parent\n")
    left, right = await host.fork(HostFork(parent=box, children=children(2)))
    assert await differences(host, point(left.id), point(right.id)) == []
    await write(host, left.id, b"/w/file", b"left\n")
    await write(host, right.id, b"/w/right", b"right\n")
    assert kinds(await differences(host, point(left.id), point(right.id))) == {"/w/file": "modified", "/w/right": "added"}
    assert kinds(await differences(host, point(box), point(left.id))) == {"/w/file": "modified"}


async def test_what_is_unknown(host: HostService, box: SandboxId) -> None:
    with pytest.raises(SnapshotNotFound):
        await differences(host, saved(new_snapshot_id()), point(box))
    with pytest.raises(SandboxNotFound):
        await differences(host, point(box), point(new_sandbox_id()))


async def test_who_leaves_in_the_middle_leaves_nothing(place: Place, host: HostService, box: SandboxId) -> None:
    for number in range(5):
        await write(host, box, b"/srv/w/%d" % number, b"x\n")
    one = await snapshot(host, box)
    await host.remove_file(box, b"/srv/w", recursive=True)
    two = await snapshot(host, box)
    before = place.left()
    found: Any = host.diff(one, two, b"/srv", patch=True)
    assert (await anext(found)).change.path
    assert place.left() != before
    await found.aclose()
    assert place.left() == before
    assert (await host.describe()).capacity.sandboxes == 1


@pytest.fixture
def real(place: Place) -> None:
    if place.snapshots.parent.name != "data":
        pytest.skip("only a real kernel has this")


@pytest.fixture
def wide(place: Place) -> bytes:
    """As much as can be read in the time of a test: the whole root, but where the guest that reads it is emulated."""
    return b"/etc" if place.shares else b"/"


@pytest.mark.usefixtures("real")
class TestRealFiles:
    async def test_nothing_that_changed_hides(self, host: HostService, box: SandboxId, tmp_path: Path) -> None:
        await run(
            host,
            box,
            "mkdir /w; cd /w; printf aaaa > times; printf aaaa > mapped; ln -s old link; ln -s a type; printf keep > owner; : > touched",
        )
        (tmp_path / "link").symlink_to("old")
        (tmp_path / "type").symlink_to("a")
        for name, data in (("times", "aaaa"), ("mapped", "aaaa"), ("owner", "keep"), ("touched", "")):
            (tmp_path / name).write_text(data)
        one = await snapshot(host, box)
        mapped = "import mmap; f=open('mapped','r+b'); m=mmap.mmap(f.fileno(), 0); m[0]=66; m.close()"
        await run(
            host, box,
            f'cd /w; touch -r times /tmp/ref; printf bbbb > times; touch -r /tmp/ref times; python3 -c "{mapped}"; ln -sfn new link; '
            "rm type; printf file > type; chown 1000:1001 owner; touch -d 2001-01-01 touched; rm /tmp/ref",
        )  # fmt: skip
        found = await differences(host, one, point(box), patch=True)
        assert kinds(found) == {
            "/w/link": "modified", "/w/mapped": "modified", "/w/owner": "metadata", "/w/times": "modified", "/w/type": "type",
        }  # fmt: skip
        sides = {change.path: (change.before, change.after) for change, _ in found}
        assert [side.target for side in sides["/w/link"] if side] == ["old", "new"]
        assert [(side.uid, side.gid) for side in sides["/w/owner"] if side] == [(0, 0), (1000, 1001)]
        apply(tmp_path, found)
        assert (tmp_path / "link").readlink() == Path("new")
        assert (tmp_path / "type").read_text() == "file"
        assert (tmp_path / "mapped").read_text() == "Baaa"

    async def test_of_the_whole_root_only_what_changed_is_told(self, host: HostService, box: SandboxId, wide: bytes) -> None:
        one = await snapshot(host, box)
        await run(host, box, "touch /usr/bin/env; rm /usr/bin/tac; echo '# more' >> /etc/passwd; echo x > /dev/shm/other; chmod 700 /root")
        two = await snapshot(host, box)
        expected = {"/etc/passwd": "modified", "/usr/bin/tac": "removed"}
        expected = {path: kind for path, kind in expected.items() if path.startswith(wide.decode())}
        found = kinds(await differences(host, one, two, wide))
        found.pop("/root", None)  # Its mode in the image is a matter of the distribution.
        assert found == expected
        assert kinds(await differences(host, one, two, b"/dev/shm")) == {"/dev/shm/other": "added"}

    async def test_a_running_one_may_change_meanwhile(self, place: Place, host: HostService, box: SandboxId) -> None:
        await run(host, box, "mkdir /w; for i in $(seq 300); do echo $i > /w/$i; done")
        one = await snapshot(host, box)
        script = """
import os, shutil, time
end = time.monotonic() + 4
while time.monotonic() < end:
    shutil.rmtree("/w"); os.mkdir("/w")
    for name in range(300):
        open(f"/w/{name}", "w").write(str(time.monotonic()))
"""
        await write(host, box, b"/root/churn.py", script.encode())
        churn = asyncio.create_task(run(host, box, "python3 /root/churn.py"))
        while not churn.done():
            for patch in (False, True):
                await differences(host, one, point(box), b"/w" if place.shares else b"/", patch=patch)
        await churn
        assert (await host.get(box)).status == "running"
