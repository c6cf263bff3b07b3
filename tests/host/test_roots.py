"""Raw ext4 roots of templates: nothing of a tree is lost, the same tree gives the same bytes, and troubles have names."""

# ruff: noqa: ASYNC221, ASYNC240 - nothing else runs meanwhile

from __future__ import annotations

import asyncio
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import cast

import pytest

from pandastack.errors import DiskFull, HostUnfit, TemplateBuildError
from pandastack.host.storage.images import Image
from pandastack.host.storage.recipes import Recipe
from pandastack.host.storage.roots import Roots

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="device nodes and owners need root"),
    pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="e2fsprogs is not installed"),
]


def image_of(rootfs: Path, digest: str = "a" * 64, name: str = "base") -> Image:
    return Image(
        name=name, requested=name, rootfs=rootfs, digest=digest, size_bytes=0, distribution="d", note=None,
        recipe=cast(Recipe, None), manifest={},
    )  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    for name in ("etc", "usr/bin", "tmp", "dev", "proc", "odd"):
        (root / name).mkdir(parents=True)
    root.chmod(0o755)
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    os.utime(root / "etc/passwd", (1_700_000_000, 1_600_000_000))
    (root / "usr/bin/sudo").write_bytes(os.urandom(300_000))
    (root / "usr/bin/sudo").chmod(0o4755)
    (root / "usr/bin/other").hardlink_to(root / "usr/bin/sudo")
    (root / "etc/link").symlink_to("passwd")
    (root / "etc/long").symlink_to("x" * 200)
    (root / "etc/mine").write_text("mine")
    os.chown(root / "etc/mine", 1000, 70000)
    os.setxattr(root / "etc/mine", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    os.mknod(root / "dev/zero", stat.S_IFCHR, os.makedev(1, 5))
    (root / "dev/zero").chmod(0o666)
    os.mkfifo(root / "odd/pipe")
    (root / 'odd/a b "c"\nd').write_text("odd")
    with (root / "odd/holes").open("wb") as holes:
        holes.truncate(3 << 30)
    return root


def debugfs(path: Path, command: str) -> str:
    return subprocess.run(["debugfs", "-R", command, str(path)], check=True, capture_output=True, text=True).stdout


async def test_nothing_of_a_tree_is_lost(tree: Path, tmp_path: Path) -> None:
    path = await Roots(tmp_path / "roots").ensure(image_of(tree))
    info = path.stat()
    assert (stat.S_IMODE(info.st_mode), info.st_size % (1 << 20)) == (0o444, 0)
    assert 64 << 20 <= info.st_size <= 68 << 20
    assert info.st_blocks * 512 < 4 << 20  # what is written, without the empty rest
    subprocess.run(["e2fsck", "-fn", str(path)], check=True, capture_output=True)
    assert debugfs(path, "cat /etc/passwd") == "root:x:0:0::/root:/bin/sh\n"
    passwd = debugfs(path, "stat /etc/passwd")
    times = dict(re.findall(r"(\w+): (0x\w+):", passwd))
    assert int(times["mtime"], 16) == 1_600_000_000
    assert {times["atime"], times["ctime"], times["crtime"]} == {hex(1577836800)}
    sudo = debugfs(path, "stat /usr/bin/sudo")
    assert re.search(r"Mode:\s+04755", sudo)
    assert re.search(r"Links: 2\b", sudo)
    assert debugfs(path, "stat /usr/bin/other") == sudo
    dumped = tmp_path / "dumped"
    debugfs(path, f"dump /usr/bin/sudo {dumped}")
    assert dumped.read_bytes() == (tree / "usr/bin/sudo").read_bytes()
    assert 'Fast link dest: "passwd"' in debugfs(path, "stat /etc/link")
    assert debugfs(path, "cat /etc/long") == "x" * 200
    mine = debugfs(path, "stat /etc/mine")
    assert re.search(r"User:\s+1000\s+Group:\s+70000", mine)
    assert "security.capability" in debugfs(path, "ea_list /etc/mine")
    zero = debugfs(path, "stat /dev/zero")
    assert re.search(r"Device major/minor number: 0*1:0*5\b", zero)
    assert re.search(r"Mode:\s+0666", zero)
    assert "Type: FIFO" in debugfs(path, "stat /odd/pipe")
    assert len(re.findall("odd|pipe|holes|a b", debugfs(path, "ls -p /odd"))) == 3
    assert re.search(r"Size: 3221225472\b", debugfs(path, "stat /odd/holes"))
    for name, mode in {".pandastack": "0755", "run": "0755", "sys": "0755", "proc": "0755", "tmp": "01777"}.items():
        assert re.search(rf"Type: directory\s+Mode:\s+{mode}\b", debugfs(path, f"stat /{name}")), name
    header = subprocess.run(["dumpe2fs", "-h", str(path)], check=True, capture_output=True, text=True).stdout
    fields = dict(line.split(":", 1) for line in header.splitlines() if ":" in line)
    assert int(fields["Reserved block count"]) == 0
    assert {"has_journal", "resize_inode", "metadata_csum"} <= set(fields["Filesystem features"].split())
    # A block of descriptors is for 64 groups of 128 MiB.
    assert (int(fields["Reserved GDT blocks"]) + 1) * 64 * 128 >= 100 << 10


async def test_the_same_tree_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    one = await Roots(tmp_path / "one").ensure(image_of(tree))
    await asyncio.sleep(1.1)
    for path in tree.rglob("*"):
        if not path.is_symlink() and path.name != "pipe":
            os.utime(path, (1_800_000_000, path.stat().st_mtime))  # Somebody has read it, and changed and undone it.
    two = await Roots(tmp_path / "two").ensure(image_of(tree))
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()
    other = await Roots(tmp_path / "two").ensure(image_of(tree, "b" * 64))
    assert other.name != two.name
    assert b"".join([other.read_bytes()]) != two.read_bytes()  # A UUID of its own.


async def test_two_who_ask_at_once_make_it_once(tree: Path, tmp_path: Path) -> None:
    counting = tmp_path / "mkfs"
    counting.write_text(f'#!/bin/sh\necho made >> {tmp_path}/count\nexec mkfs.ext4 "$@"\n')
    counting.chmod(0o755)
    first, second = Roots(tmp_path / "roots", mkfs=str(counting)), Roots(tmp_path / "roots", mkfs=str(counting))
    paths = await asyncio.gather(first.ensure(image_of(tree)), second.ensure(image_of(tree)), first.ensure(image_of(tree)))
    assert len(set(paths)) == 1
    assert (tmp_path / "count").read_text() == "made\n"
    assert list((tmp_path / "roots/.work").iterdir()) == []
    assert first.prune([paths[0]]) == []
    assert first.prune([]) == [paths[0]]
    assert not paths[0].exists()


async def test_a_cancelled_maker_leaves_nothing_and_nobody(tree: Path, tmp_path: Path) -> None:
    slow = tmp_path / "mkfs"
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    slow.chmod(0o755)
    roots = Roots(tmp_path / "roots", mkfs=str(slow))
    making = asyncio.create_task(roots.ensure(image_of(tree)))
    async with asyncio.timeout(10):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.01)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert list((tmp_path / "roots/.work").iterdir()) == []
    assert (await Roots(tmp_path / "roots").ensure(image_of(tree))).exists()


async def test_many_small_files_have_their_inodes(tmp_path: Path) -> None:
    root = tmp_path / "rootfs"
    for folder in range(20):
        (root / str(folder)).mkdir(parents=True)
        for number in range(500):
            (root / str(folder) / str(number)).touch()
    path = await Roots(tmp_path / "roots").ensure(image_of(root))
    header = subprocess.run(["dumpe2fs", "-h", str(path)], check=True, capture_output=True, text=True).stdout
    assert int(dict(re.findall(r"^(Free inodes):\s+(\d+)", header, re.MULTILINE))["Free inodes"]) > 5_000


async def test_troubles_have_names(tree: Path, tmp_path: Path) -> None:
    for arguments in ({"mkfs": "mkfs.gone"}, {"debugfs": "debugfs.gone"}):
        with pytest.raises(HostUnfit, match=r"gone could not be started") as missing:
            await Roots(tmp_path / "roots", **arguments).ensure(image_of(tree))
        assert missing.value.hint
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho No space left on device; exit 1\n")
    failing.chmod(0o755)
    with pytest.raises(DiskFull):
        await Roots(tmp_path / "roots", mkfs=str(failing)).ensure(image_of(tree))
    failing.write_text("#!/bin/sh\necho sif: no such thing; exit 0\n")
    with pytest.raises(TemplateBuildError, match="no such thing"):
        await Roots(tmp_path / "roots", debugfs=str(failing)).ensure(image_of(tree))
    assert [path.name for path in (tmp_path / "roots").iterdir() if path.suffix] == []
    assert list((tmp_path / "roots/.work").iterdir()) == []
