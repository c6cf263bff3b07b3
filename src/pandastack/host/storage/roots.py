"""Roots: the root file systems of templates as raw ext4 images, from which the disks of microVMs are cloned.

Runs on a host. On disk, below the root folder: `<name>-<hash12>.ext4`, mode 0444, appearing by one rename; `.work/` and `.locks/`
are of makers. Nothing is mounted: mkfs.ext4 reads the directory. The same directory gives the same bytes, whenever it is
read, so UUID, hash seed and times come from the image's digest or are constant; only times of modification are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import stat
import struct
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from pandastack.errors import TemplateBuildError
from pandastack.host.storage import commands, locks
from pandastack.host.storage.build import check_space
from pandastack.host.storage.commands import CommandFailed
from pandastack.host.storage.failures import explain
from pandastack.host.storage.images import Image

_FORMAT = "1"  # of what is made here: raise it when the same image shall give other bytes
_DEADLINE_S = 600.0
_MIB = 1 << 20
_BLOCK_BYTES = 4096
_SPARE_BYTES = 64 * _MIB  # holds the journal, too
_MOST_BYTES = 1 << 40  # to which an image can grow online: decides how much is kept free for group descriptors
_JOURNAL_MIB = 32
_TIME = 1577836800  # 2020-01-01, what every inode was created, changed and read at
_NAMESPACE = uuid.UUID("5d3f8fd0-5d2c-4bb5-9d0e-6a2f1a1c0e54")
# All that a kernel of 2019 knows, and said in full: what mke2fs makes by default differs between releases of Debian.
_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,"
    "extra_isize,metadata_csum"
)
_MOUNT_POINTS = {".pandastack": 0o755, "dev": 0o755, "proc": 0o755, "run": 0o755, "sys": 0o755, "tmp": 0o1777}
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*-[0-9a-f]{12}\.ext4\Z")


class Roots:
    """`root` is a folder on a file system with room for images, best the one that the disks of machines are on."""

    def __init__(self, root: Path, *, mkfs: str = "mkfs.ext4", debugfs: str = "debugfs") -> None:
        self._root = root
        self._mkfs, self._debugfs = mkfs, debugfs

    def path(self, image: Image) -> Path:
        """Where the root of an image is, or will be."""
        key = hashlib.sha256(f"{_FORMAT} {image.digest}".encode()).hexdigest()
        return self._root / f"{image.name}-{key[:12]}.ext4"

    async def ensure(self, image: Image) -> Path:
        """The image's root, made first if it must be (seconds); as long as its content needs, a quarter more, and 64 MiB.

        Raises HostUnfit where mkfs.ext4 or debugfs is missing, DiskFull, or TemplateBuildError. Cancelling ends the work.
        """
        target = self.path(image)
        if target.exists():
            return target
        for folder in (".work", ".locks"):
            await asyncio.to_thread((self._root / folder).mkdir, mode=0o700, parents=True, exist_ok=True)
        async with locks.held(self._root / ".locks" / f"{target.name}.lock"):
            if target.exists():
                return target
            work = self._root / ".work" / target.name
            await asyncio.to_thread(_clear, work)
            await asyncio.to_thread(work.mkdir, mode=0o700)
            try:
                await self._make(image, work)
                await asyncio.to_thread(_publish, work / "image", target)
            finally:
                # Not in a thread, so that a cancellation cannot come in between; there are three files.
                _clear(work)
        return target

    def prune(self, keep: Collection[Path]) -> list[Path]:
        """Remove the roots that are not in `keep`, and return them. Machines hold clones, so none is in use. Blocks."""
        removed = []
        for path in sorted(self._root.glob("*.ext4")):
            if path in keep or not _NAME.match(path.name):
                continue
            with locks.attempt(self._root / ".locks" / f"{path.name}.lock") as ours:
                if ours:
                    path.unlink(missing_ok=True)
                    removed.append(path)
        return removed

    async def _make(self, image: Image, work: Path) -> None:
        content = await asyncio.to_thread(_measure, image.rootfs)
        check_space(self._root, content.size_bytes + _SPARE_BYTES)
        file = work / "image"
        with file.open("wb") as empty:
            empty.truncate(_length(content.size_bytes))
        await self._run(_mkfs(self._mkfs, image, content, file), image, work)
        script = work / "script"
        await asyncio.to_thread(lambda: script.write_text("".join(_corrections(file, image.rootfs))))
        said = await self._run([self._debugfs, "-w", "-f", str(script), str(file)], image, work)
        # It repeats each command, and what else it says is trouble, although it ends with 0.
        trouble = [line for line in said if line and not line.startswith("debugfs")]
        if trouble:
            raise TemplateBuildError(
                f"the root of {image.name} could not be finished: {trouble[0][:300]}", template=image.name, step="root"
            )

    async def _run(self, argv: list[str], image: Image, work: Path) -> list[str]:
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "E2FSPROGS_FAKE_TIME": str(_TIME)}
        # Newer releases go by this one.
        environment |= {"SOURCE_DATE_EPOCH": str(_TIME), "MKE2FS_CONFIG": "/dev/null", "PATH": f"{environment['PATH']}:/usr/sbin:/sbin"}
        program = await asyncio.to_thread(shutil.which, argv[0], path=environment["PATH"])
        lines: list[str] = []
        log = work / "log"
        try:
            await commands.run(
                [program or argv[0], *argv[1:]],
                log=log,
                deadline_s=_DEADLINE_S,
                environment=environment,
                on_line=lambda line: lines.append(line) if line is not None else None,
            )
        except CommandFailed as failed:
            raise explain(failed, template=image.name, step="root", log=log) from failed
        return lines


@dataclass(frozen=True, kw_only=True)
class _Content:
    size_bytes: int
    inodes: int


def _measure(rootfs: Path) -> _Content:
    """What a tree needs in blocks, a hard-linked file once."""
    size, seen = 0, set()
    for folder, _, files in os.walk(rootfs):
        for path in (folder, *(os.path.join(folder, name) for name in files)):  # noqa: PTH118 (20 000 Path objects are slow)
            info = os.lstat(path)
            if info.st_ino not in seen:
                seen.add(info.st_ino)
                # A file with holes has fewer blocks than bytes, one on a file system that allocates ahead more.
                held = min(info.st_size, info.st_blocks * 512) if stat.S_ISREG(info.st_mode) else info.st_size
                size += -(-max(held, 1 if stat.S_ISDIR(info.st_mode) else 0) // _BLOCK_BYTES) * _BLOCK_BYTES
    return _Content(size_bytes=size, inodes=len(seen))


def _length(content_bytes: int) -> int:
    return -(-(content_bytes + content_bytes // 4 + _SPARE_BYTES) // _MIB) * _MIB


def _mkfs(program: str, image: Image, content: _Content, file: Path) -> list[str]:
    # Bytes for each inode, which growing keeps: what is usual, or less for a tree of many small files.
    ratio = 16384
    while ratio > _BLOCK_BYTES and _length(content.size_bytes) // ratio < 2 * content.inodes:
        ratio //= 2
    options = {
        "hash_seed": uuid.uuid5(_NAMESPACE, f"seed {image.digest}"),
        "lazy_itable_init": 1,  # The file is new, so all in it is zero.
        "lazy_journal_init": 1,
        "root_owner": "0:0",
        "resize": _MOST_BYTES // _BLOCK_BYTES,
    }
    extended = ",".join(["nodiscard", *(f"{name}={value}" for name, value in options.items())])
    return [
        program, "-q", "-F", "-b", str(_BLOCK_BYTES), "-I", "256", "-i", str(ratio), "-m", "0", "-J", f"size={_JOURNAL_MIB}",
        "-U", str(uuid.uuid5(_NAMESPACE, image.digest)), "-O", _FEATURES, "-E", extended, "-d", str(image.rootfs), str(file),
    ]  # fmt: skip


def _corrections(file: Path, rootfs: Path) -> Iterator[str]:
    """Commands of debugfs: mount points that the tree lacks, and the times that mke2fs took from the host's file system."""
    root = rootfs.lstat()
    for name, mode in _MOUNT_POINTS.items():
        if not os.path.lexists(rootfs / name):
            yield f"mkdir /{name}\nsif /{name} mode 0{stat.S_IFDIR | mode:o}\n"
    yield f"sif / mode 0{stat.S_IFDIR | stat.S_IMODE(root.st_mode):o}\nsif / uid {root.st_uid}\nsif / gid {root.st_gid}\n"
    yield f"sif / mtime @{int(root.st_mtime)}\n"
    for inode in _inodes(file):
        yield "".join(f"sif <{inode}> {field} @{_TIME}\n" for field in ("atime", "ctime", "crtime"))


def _inodes(file: Path) -> Iterator[int]:
    """The inodes in use that are not the file system's own, from its bitmaps, and the root."""
    yield 2
    with file.open("rb") as image:
        image.seek(1024)
        superblock = image.read(1024)
        (inodes,) = struct.unpack_from("<I", superblock, 0x00)
        (per_group,) = struct.unpack_from("<I", superblock, 0x28)
        (first,) = struct.unpack_from("<I", superblock, 0x54)
        (descriptor_bytes,) = struct.unpack_from("<H", superblock, 0xFE)
        image.seek(_BLOCK_BYTES)
        descriptors = image.read(inodes // per_group * descriptor_bytes)
        for group in range(inodes // per_group):
            descriptor = descriptors[group * descriptor_bytes :][:descriptor_bytes]
            (low,), (high,) = struct.unpack_from("<I", descriptor, 0x04), struct.unpack_from("<I", descriptor, 0x24)
            (flags,) = struct.unpack_from("<H", descriptor, 0x12)
            if flags & 1:  # None of its inodes was ever used, and its bitmap is not written.
                continue
            image.seek((high << 32 | low) * _BLOCK_BYTES)
            bitmap = image.read(per_group // 8)
            for bit in range(per_group):
                number = group * per_group + bit + 1
                if bitmap[bit // 8] >> bit % 8 & 1 and number >= first:
                    yield number


def _publish(file: Path, target: Path) -> None:
    """One rename, then the folder that holds the name: after a power cut a root is whole or absent."""
    file.chmod(0o444)
    _sync(file)
    file.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(work: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(work)
