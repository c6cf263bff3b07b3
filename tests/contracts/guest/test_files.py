"""What the host may rely on, asked of the real daemon: files and folders."""

# Looking at /proc or a directory of three names does not block a loop.
# ruff: noqa: ASYNC240, PTH208

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.host.guest import Guest

from .daemons import MIB, Daemon, pieces, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


class TestFiles:
    async def test_write_and_read_any_bytes_under_any_name(self, guest: Guest, tmp_path: Path) -> None:
        data = os.urandom(3 * MIB + 17)
        path = os.fsencode(tmp_path) + b"/new/\xff\n\xe4"
        assert await guest.write_file(path, pieces(data), mode=0o640) == len(data)
        stat, body = await guest.read_file(path)
        assert b"".join([piece async for piece in body]) == data
        assert (stat.size, stat.mode, stat.type, stat.name_bytes) == (len(data), 0o640, "file", b"\xff\n\xe4")
        _, body = await guest.read_file(path, offset=5, length=10)
        assert b"".join([piece async for piece in body]) == data[5:15]
        assert [entry.name_bytes async for entry in guest.list_dir(str(tmp_path / "new"))] == [b"\xff\n\xe4"]

    async def test_aborted_write_leaves_the_old_file_and_nothing_else(self, plain: Daemon, one: Guest, tmp_path: Path) -> None:
        target = tmp_path / "file"
        target.write_bytes(b"old")

        async def stops_half_way() -> AsyncIterator[bytes]:
            yield bytes(MIB)
            raise RuntimeError("the client hung up")

        with pytest.raises(RuntimeError):
            await one.write_file(str(target), stops_half_way())
        await until(lambda: os.listdir(tmp_path) == ["file"])
        stream = one.connection.start("file.write", {"path": str(target)}, data=True)
        await stream.send(bytes(MIB))
        await until(lambda: len(os.listdir(tmp_path)) == 2)
        await one.close()
        again = await plain.open(fresh=False)
        await until(lambda: os.listdir(tmp_path) == ["file"])
        assert target.read_bytes() == b"old"
        await again.close()

    async def test_write_keeps_mode_and_follows_links(self, one: Guest, tmp_path: Path) -> None:
        (tmp_path / "real").write_bytes(b"old")
        (tmp_path / "real").chmod(0o755)
        (tmp_path / "link").symlink_to("real")
        await one.write_file(str(tmp_path / "link"), b"new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real").read_bytes() == b"new"
        assert (tmp_path / "real").stat().st_mode & 0o777 == 0o755

    async def test_large_directories_come_in_batches(self, one: Guest, tmp_path: Path) -> None:
        for n in range(3000):
            (tmp_path / f"{'x' * 100}{n}").touch()
        assert len([entry async for entry in one.list_dir(str(tmp_path))]) == 3000

    async def test_errors_are_typed(self, one: Guest, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        base = str(tmp_path)
        for call, kind, code in [
            (one.stat(base + "/none"), errors.FileNotFound, "not_found"),
            (one.read_file(base + "/full"), errors.FileConflict, "is_a_directory"),
            (one.remove(base + "/full"), errors.FileConflict, "not_empty"),
            (one.mkdir(base + "/full", parents=False), errors.FileConflict, "exists"),
            (one.stat(base + "/full/file/x"), errors.FileConflict, "not_a_directory"),
            (one.stat("relative"), errors.InvalidRequest, "invalid"),
            (one.move(base + "/full/file", base + "/full"), errors.FileConflict, "exists"),
            (one.write_file(base + "/full", b""), errors.FileConflict, "is_a_directory"),
            (one.write_file("/proc/none/x", b"x"), errors.PandastackError, None),
        ]:
            with pytest.raises(kind) as caught:
                await call
            if code:
                assert caught.value.guest_code == code

    async def test_making_moving_and_removing(self, one: Guest, tmp_path: Path) -> None:
        base = str(tmp_path)
        assert await one.mkdir(base + "/a/b", mode=0o700)
        assert not await one.mkdir(base + "/a/b")
        await one.write_file(base + "/a/b/file", b"1")
        await one.chmod(base + "/a", mode=0o750, recursive=True)
        assert (tmp_path / "a/b/file").stat().st_mode & 0o777 == 0o750
        await one.move(base + "/a", base + "/c")
        await one.move(base + "/c/b/file", f"/dev/shm/guest-test-{os.getpid()}")
        await one.move(f"/dev/shm/guest-test-{os.getpid()}", base + "/back")
        assert (tmp_path / "back").read_bytes() == b"1"
        await one.remove(base + "/c", recursive=True)
        assert os.listdir(tmp_path) == ["back"]

    async def test_watch_sees_changes_below(self, one: Guest, tmp_path: Path) -> None:
        seen: set[tuple[str, str]] = set()
        async with one.watch(str(tmp_path), recursive=True) as batches:
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "file").write_bytes(b"x")
            (tmp_path / "new").rename(tmp_path / "moved")
            await asyncio.sleep(0.1)
            (tmp_path / "moved" / "file").unlink()
            async for batch in batches:
                seen |= {(event.type, os.path.relpath(event.path_bytes.decode(), tmp_path)) for event in batch.events}
                if ("delete", "moved/file") in seen:
                    break
        assert {("create", "new"), ("move_from", "new"), ("move_to", "moved")} <= seen
        # Where it was when the guest came to look: both names are true at some moment.
        assert {("create", "new/file"), ("create", "moved/file")} & seen

    async def test_a_tree_is_read_in_order_also_while_nothing_moves(self, guest: Guest, tmp_path: Path) -> None:
        root = tmp_path / "tree"
        (root / "a" / "deep").mkdir(parents=True)
        for name in ("a/z", "a.c", "b"):
            (root / name).write_text(name)
        (root / os.fsdecode(b"odd\n\xff")).write_text("odd")
        (root / "link").symlink_to("/nowhere")
        os.mkfifo(root / "pipe")
        (root / ".pandastack-half").write_text("an upload")
        expected = [b"", b"a", b"a/deep", b"a/z", b"a.c", b"b", b"link", b"odd\n\xff", b"pipe"]
        for freeze in (False, True):
            if freeze:
                await guest.seal(freeze=True)
            found = [entry async for entry in guest.scan(root, 9)]
            assert [entry.path_bytes for entry in found] == expected
            assert [entry.type for entry in found] == ["directory"] * 3 + ["file"] * 3 + ["symlink", "file", "other"]
            assert found[6].target_bytes == b"/nowhere"
            status = (root / "b").stat()
            assert (found[5].size, found[5].mtime_ns, found[5].ctime_ns) == (1, status.st_mtime_ns, status.st_ctime_ns)
            paths = [os.fsencode(root) + b"/" + name for name in (b"b", b"link", b"a", b"gone", b"odd\n\xff")]
            hashes = [hashlib.sha256(text).hexdigest() if text else None for text in (b"b", None, None, None, b"odd")]
            assert await guest.digests(paths) == hashes
            _, body = await guest.read_file(root / "b")
            assert b"".join([piece async for piece in body]) == b"b"
            with pytest.raises(errors.TooLarge):
                [entry async for entry in guest.scan(root, 8)]
            with pytest.raises(errors.FileNotFound):
                [entry async for entry in guest.scan(root / "gone", 8)]
        assert await guest.unseal() >= 0
        assert [entry.path_bytes for entry in [entry async for entry in guest.scan(root / "b", 1)]] == [b""]
        assert await guest.digests([b"/gone"] * 1000) == [None] * 1000
