"""What a data directory has and what takes it: for `pandastack storage status`. Only looks; mounts nothing. Calls block."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pandastack.host.storage import space
from pandastack.host.storage.pool import Pool


class Status(BaseModel):
    """Sizes are bytes. `reflink` is found out by trying; it and `takes` are None while the pool is not mounted.

    `free_bytes` is what can be written, also where a sparse pool file is larger than what is free below it (`below_free_bytes`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_dir: Path
    pool_file: Path | None = None
    pool_mounted: bool = False
    pool_declined: bool = False
    problem: str | None = None
    file_system: str | None = None
    reflink: bool | None = None
    size_bytes: int
    used_bytes: int
    free_bytes: int
    below_free_bytes: int | None = None
    takes: dict[str, int | None]


def look(data_dir: Path, *, images: Path, captures: Path | None = None) -> Status:
    """`images` is where images and baked states are, `captures` where forks are copied through when not in the data directory."""
    pool = Pool(data_dir)
    record, file = pool.record(), pool.file
    away = file is not None and not pool.mounted
    below = None if pool.below is None or not pool.below.is_dir() else pool.below
    folders = {
        "disks": pool.root / "disks",
        "captures": captures or pool.root / "captures",
        "snapshots": pool.root / "snapshots",
        "images": images,
    }
    takes = {name: None if away and pool.root in folder.parents else _taken(folder) for name, folder in folders.items()}
    place = _existing(data_dir if away else pool.root)
    status = os.statvfs(place)
    size, used, free = (
        status.f_blocks * status.f_frsize,
        (status.f_blocks - status.f_bfree) * status.f_frsize,
        space.free_bytes(place, below),
    )
    if away and file is not None:
        known = file.stat() if file.exists() else None
        size, used = (known.st_size, known.st_blocks * 512) if known is not None else (0, 0)
        free = min(max(0, size - used), free)
    return Status(
        data_dir=data_dir,
        pool_file=file,
        pool_mounted=file is not None and not away,
        pool_declined=record is not None and file is None,
        problem=pool.problem(),
        file_system=None if away else _kind(place),
        reflink=None if away else space.shares_blocks(place),
        size_bytes=size,
        used_bytes=used,
        free_bytes=free,
        below_free_bytes=None if below is None else space.free_bytes(below),
        takes=takes,
    )


def render(status: Status) -> str:
    """For people: a line per fact."""
    reflink = {True: "yes", False: "no; `pandastack storage init` makes a pool that can", None: "not tried"}[status.reflink]
    pool = str(status.pool_file) if status.pool_file is not None else "none"
    if status.pool_file is not None and not status.pool_mounted:
        pool += " (not mounted: a server does that when it starts)"
    lines = [
        ("data directory", str(status.data_dir)),
        ("pool", pool),
        ("file system", status.file_system or "unknown while the pool is not mounted"),
        ("files share blocks", reflink),
        ("size", _shown(status.size_bytes)),
        ("used", _shown(status.used_bytes)),
        ("free", _shown(status.free_bytes)),
        *([("free below the pool", _shown(status.below_free_bytes))] if status.below_free_bytes is not None else []),
        *((name, _shown(taken)) for name, taken in status.takes.items()),
        *([("problem", status.problem)] if status.problem else []),
    ]
    width = max(len(name) for name, _ in lines)
    return "".join(f"{name:<{width}}  {value}\n" for name, value in lines)


def _shown(size_bytes: int | None) -> str:
    return "unknown while the pool is not mounted" if size_bytes is None else f"{size_bytes / (1 << 20):,.0f} MiB"


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _kind(folder: Path) -> str | None:
    """The name of its file system, as the kernel says it."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            return right.split(" ", 1)[0]
    return None


def _taken(folder: Path) -> int:
    """Blocks below a folder on its own file system, each file once; what vanishes meanwhile does not count."""
    total, seen = 0, set()
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not os.path.ismount(os.path.join(place, name))]  # noqa: PTH118
        for name in files:
            try:
                known = os.lstat(os.path.join(place, name))  # noqa: PTH118
            except FileNotFoundError:
                continue
            if (known.st_dev, known.st_ino) not in seen:
                seen.add((known.st_dev, known.st_ino))
                total += known.st_blocks * 512
    return total
