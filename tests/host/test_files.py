"""Files: names are bytes, listings come in batches, and what the guest refuses is typed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from hosts import run, wanted
from pandastack.control.hosts import closing
from pandastack.errors import DiskFull, FileConflict, FileNotFound, InvalidRequest
from pandastack.host import files
from pandastack.host.app import HostService
from pandastack.wire.files import ChangeMode
from pandastack.wire.guest import FileStat
from pandastack.wire.ids import SandboxId

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture
async def box(host: HostService) -> SandboxId:
    return (await host.create(wanted())).id


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def content(host: HostService, box: SandboxId, path: bytes) -> bytes:
    _, data = await host.read_file(box, path)
    async with closing(data):
        return b"".join([piece async for piece in data])


@pytest.mark.parametrize("size", [0, 1, 65_536, 3_000_001])
async def test_content_of_any_size_is_read_as_written(host: HostService, box: SandboxId, size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    assert await host.write_file(box, b"/root/f", pieces(data[: size // 2], data[size // 2 :])) == size
    assert await content(host, box, b"/root/f") == data


@pytest.mark.parametrize("name", [b"plain", "\u20ac".encode(), b"\xff\xfe", b"new\nline", b"-rf", b" "])
async def test_names_are_bytes(host: HostService, box: SandboxId, name: bytes) -> None:
    await host.write_file(box, b"/tmp/" + name, pieces(b"x"))
    (entry,) = [entry async for batch in host.list_dir(box, b"/tmp") for entry in batch]
    assert entry.name == name.decode("utf-8", "replace")
    assert (entry.name_b64 is None) == (name.decode("utf-8", "replace").encode() == name)
    assert await content(host, box, b"/tmp/" + name) == b"x"
    await host.remove_file(box, b"/tmp/" + name, recursive=False)


async def test_a_large_directory_comes_in_batches(host: HostService, box: SandboxId) -> None:
    for first in (0, 550):
        await asyncio.gather(*(host.write_file(box, b"/tmp/d/%d" % number, pieces(b"")) for number in range(first, first + 550)))
    sizes = [len(batch) async for batch in host.list_dir(box, b"/tmp/d")]
    assert (sum(sizes), max(sizes)) == (1100, 512)


async def test_mode_and_owner_change_and_stay(host: HostService, box: SandboxId) -> None:
    await host.write_file(box, b"/tmp/f", pieces(b"old"), mode=0o640, owner="nobody")
    await host.write_file(box, b"/tmp/f", pieces(b"new"))
    entry = await host.stat_file(box, b"/tmp/f")
    assert (entry.mode, entry.uid) == ("0640", 65534)
    await host.change_mode(box, b"/tmp/f", ChangeMode(path="/tmp/f", mode="4755", owner="1000:1001"))
    entry = await host.stat_file(box, b"/tmp/f")
    assert (entry.mode, entry.uid, entry.gid) == ("4755", 1000, 1001)
    with pytest.raises(InvalidRequest):
        await host.change_mode(box, b"/tmp/f", ChangeMode(path="/tmp/f", owner="nosuchuser"))


async def test_a_full_disk_is_typed_and_what_was_there_stays(host: HostService) -> None:
    box = (await host.create(wanted(disk_mb=1))).id
    await host.write_file(box, b"/root/f", pieces(b"old"))
    with pytest.raises(DiskFull):
        await host.write_file(box, b"/root/f", pieces(b"x" * (2 << 20)))
    assert await content(host, box, b"/root/f") == b"old"


async def test_refusals_are_typed(host: HostService, box: SandboxId) -> None:
    await host.write_file(box, b"/tmp/d/f", pieces(b"x"))
    for call, error in (
        (host.read_file(box, b"/tmp/d"), FileConflict),
        (host.remove_file(box, b"/tmp/d", recursive=False), FileConflict),
        (host.move_file(box, b"/tmp/d/f", b"/root", overwrite=False), FileConflict),
        (host.make_dir(box, b"/tmp/d/f", parents=True, mode=0o755), FileConflict),
        (host.write_file(box, b"/tmp/d", pieces(b"x")), FileConflict),
        (host.write_file(box, b"/tmp/d/f/g", pieces(b"x")), FileConflict),
        (host.stat_file(box, b"/tmp/nothing"), FileNotFound),
        (host.move_file(box, b"/nothing", b"/tmp/x", overwrite=True), FileNotFound),
        (host.stat_file(box, b"relative"), InvalidRequest),
    ):
        with pytest.raises(error):
            await call


async def test_a_watch_says_when_it_begins_and_what_changed(host: HostService, box: SandboxId) -> None:
    async with asyncio.timeout(20), closing(host.watch_files(box, b"/tmp", recursive=True)) as batches:
        assert await anext(batches) == []
        await host.write_file(box, b"/tmp/d/\xff", pieces(b"x"))
        seen = await anext(batches)
        assert [(event.type, event.path, event.path_b64) for event in seen] == [
            ("create", "/tmp/d", None),
            ("modify", "/tmp/d/\ufffd", "L3RtcC9kL/8="),
        ]
        await host.remove_file(box, b"/tmp/d", recursive=True)
        assert [event.type for event in await anext(batches)] == ["delete"]
    assert await run(host, box, "echo on") == (b"on\n", 0)


async def test_an_upload_whose_source_fails_leaves_the_old_file(host: HostService, box: SandboxId) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        raise ConnectionResetError("the client left")

    await host.write_file(box, b"/tmp/f", pieces(b"old"))
    with pytest.raises(ConnectionResetError):
        await host.write_file(box, b"/tmp/f", broken())
    assert await content(host, box, b"/tmp/f") == b"old"


def test_an_entry_shows_mode_and_time_as_people_expect() -> None:
    stat = FileStat(name="f", type="file", size=3, mode=0o4755, mtime_ns=1_500_000_000_900_000_000, uid=1, gid=2)
    entry = files.entry(stat, b"/d/f")
    assert (entry.path, entry.mode, entry.mtime, entry.mtime_ns, entry.is_dir) == (
        "/d/f",
        "4755",
        1_500_000_000,
        1_500_000_000_900_000_000,
        False,
    )
