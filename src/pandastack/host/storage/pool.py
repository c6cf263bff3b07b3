"""A pool: an XFS in a file, for data directories whose own file system cannot share blocks. Made once, mounted while a server runs.

    <data>/pool.json     says which file is the pool, and the id in it; or that the operator wants none
    <data>/pool.xfs      the file, sparse, unless another was named
    <data>/pool/         where it is mounted: disks, captures and snapshots are below it, everything else stays outside

The record decides. Where there is one, the data is in that pool and nowhere else: a file that is missing, damaged or another one
stops the start, and never is an empty folder taken in its place. Called by `app`, `storage init` and the doctor, by whoever
holds the lock of the data directory. Needs root; calls block.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from pandastack.errors import Conflict, DiskFull, HostUnfit, InvalidRequest
from pandastack.host.storage import loops, space

log = structlog.get_logger(__name__)

MIN_GIB = 2.0  # mkfs.xfs itself wants 300 MiB; what is below the low-water reserve has no use.
SHARE = 0.75
"""Of the free space, where no size is asked for. The file is sparse: it takes what is written, and gives back what is deleted."""

_MKFS_TIMEOUT_S = 300.0
_SBIN_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_MARK = ".pandastack-pool"
_MOVED = ("disks", "captures", "snapshots")
_KEEP_FREE_BYTES = 1 << 30


class Record(BaseModel):
    """`file` is None where the operator wants no pool. One beside the record has no folder in its name, so that both can be moved."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Path | None
    id: str = ""


class Pool:
    """The pool of a data directory, or its absence."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._record = data_dir / "pool.json"
        self.directory = data_dir / "pool"

    def record(self) -> Record | None:
        """None where nothing was ever decided. Raises HostUnfit for a record that cannot be read."""
        try:
            return Record.model_validate_json(self._record.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise HostUnfit(
                f"{self._record} is damaged, so that nobody knows where the data is",
                hint='write {"file": "/path/of/the/pool.xfs", "id": ""} to it, or restore it from a backup',
                detail=str(error),
            ) from error

    @property
    def file(self) -> Path | None:
        record = self.record()
        return None if record is None or record.file is None else self._data_dir.absolute() / record.file

    @property
    def root(self) -> Path:
        """Below what disks, captures and snapshots are."""
        return self._data_dir if self.file is None else self.directory

    @property
    def below(self) -> Path | None:
        """The folder of the file: what is written into the pool is written there in the end."""
        file = self.file
        return None if file is None else file.parent

    @property
    def mounted(self) -> bool:
        try:
            return self.directory.stat().st_dev != self._data_dir.stat().st_dev
        except FileNotFoundError:
            return False

    def problem(self) -> str | None:
        """What is wrong with the file, as far as can be said without mounting it."""
        file = self.file
        if file is None:
            return None
        try:
            with file.open("rb") as stream:
                return None if stream.read(4) == b"XFSB" else f"{file} is damaged: it does not begin as an XFS does"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"

    # A server's life

    def open(self) -> None:
        """Mount it, if there is one and an earlier life did not leave it mounted. Raises HostUnfit; nothing is changed then."""
        file, record = self.file, self.record()
        if file is None or record is None:
            return
        if self.mounted:
            self._check_mark(file, record.id)
            return
        if problem := self.problem():
            raise HostUnfit(f"the storage pool cannot be used: {problem}", hint=_remedy(file))
        self._mount(file)
        try:
            self._check_mark(file, record.id)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmount it, if nobody uses it; else it stays, and the next start finds it."""
        if not self.mounted:
            return
        try:
            loops.unmount(self.directory)
            self.directory.rmdir()
        except OSError as error:
            log.warning("the storage pool stays mounted", path=str(self.directory), error=error.strerror)

    def _mount(self, file: Path) -> None:
        self.directory.mkdir(mode=0o700, exist_ok=True)
        try:
            # A name that is written to while nothing is mounted on it would be hidden by the mount, and lost with the next one.
            if any(self.directory.iterdir()):
                raise HostUnfit(f"{self.directory} is not empty", hint="move away what is in it: the storage pool is mounted there")
            loops.mount(file, self.directory, "xfs", "discard", direct=True)
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise HostUnfit(
                    "this kernel has no XFS, which the storage pool needs", hint="modprobe xfs, or use another kernel"
                ) from error
            raise HostUnfit(
                f"the storage pool {file} cannot be mounted ({error.strerror})", hint=_remedy(file), detail=str(error)
            ) from error

    def _check_mark(self, file: Path, expected: str) -> None:
        try:
            known = (self.directory / _MARK).read_text().strip()
        except OSError as error:
            raise HostUnfit(f"the storage pool {file} cannot be read ({error.strerror})", hint=_remedy(file)) from error
        if expected and known != expected:
            raise HostUnfit(f"{file} is another storage pool than the one of this data directory", hint=_remedy(file))

    # Making one

    def decline(self) -> None:
        """Remember that no pool is wanted. One that is there stays."""
        if self.file is None:
            self._write(Record(file=None))

    def in_the_way(self) -> str | None:
        """What must be gone before the data can be elsewhere: it would be lost from sight, and is too much to be moved in passing."""
        found = [path for path in _entries(self._data_dir / "ledger") if path.suffix == ".json"]
        found += [path for path in _entries(self._data_dir / "disks") if path.name != "empty"]
        saved = [path for path in _entries(self._data_dir / "snapshots") if path.name != ".new"]
        if not found and not saved:
            return None
        return "there are " + " and ".join(name for name, some in (("sandboxes", found), ("saved states", saved)) if some)

    def init(self, file: Path | None = None, size_bytes: int | None = None) -> tuple[Path, int]:
        """Make the pool and use it from now on. All or nothing, except that one that was made already is left as it is.

        Returns the file and its size. Raises Conflict where sandboxes or saved states exist or the file does, InvalidRequest for a
        size that makes no sense, HostUnfit where mkfs.xfs or XFS are missing, DiskFull.
        """
        if (known := self.file) is not None:
            if problem := self.problem():
                raise HostUnfit(f"there is a storage pool, but {problem}", hint=_remedy(known))
            return known, known.stat().st_size
        loops.unmount_all(self.directory)  # What a killed `init` left.
        if found := self.in_the_way():
            raise Conflict(f"{found} in {self._data_dir}", hint="delete them first, or make the pool in a new data directory (--data-dir)")
        target = (file or self._data_dir / "pool.xfs").absolute()
        if target.exists():
            raise Conflict(f"{target} exists already", hint="name another with --file, or remove it if it is of no use")
        if not target.parent.is_dir():
            raise InvalidRequest(f"there is no folder {target.parent}", hint="make it first", field="file")
        size_bytes = size_bytes or default_size(target.parent)
        if size_bytes < MIN_GIB * (1 << 30):
            raise InvalidRequest(f"a storage pool has at least {MIN_GIB:g} GiB", hint="free some space, or say --size-gb", field="size_gb")
        identity = secrets.token_hex(16)
        temporary = target.with_name(f".{target.name}.new")
        try:
            self._make(temporary, size_bytes, identity)
            temporary.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DiskFull(f"{target} could not be written", hint="free space, or name another place with --file") from error
            raise HostUnfit(f"{target} could not be made ({error.strerror})", hint="name another place with --file") from error
        finally:
            temporary.unlink(missing_ok=True)
        beside = target.parent == self._data_dir.absolute()
        try:
            _sync(target.parent)
            self._write(Record(file=Path(target.name) if beside else target, id=identity))
        except BaseException:
            # Without its record it would only be in the way of the next try.
            if self.file is None:
                target.unlink(missing_ok=True)
            raise
        for name in _MOVED:
            shutil.rmtree(self._data_dir / name, ignore_errors=True)
        return target, size_bytes

    def _make(self, file: Path, size_bytes: int, identity: str) -> None:
        """The file, with a file system in it that was really seen to share blocks, and the mark."""
        file.unlink(missing_ok=True)
        with file.open("xb") as stream:
            os.fchmod(stream.fileno(), 0o600)
            os.truncate(stream.fileno(), size_bytes)
        command = ["mkfs.xfs", "-q", "-K", "-m", "reflink=1", str(file)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_MKFS_TIMEOUT_S, env={"PATH": _SBIN_PATH})
        except FileNotFoundError as error:
            raise HostUnfit("mkfs.xfs is missing", hint="install the package xfsprogs") from error
        except subprocess.SubprocessError as error:
            words = getattr(error, "stderr", None) or b""
            raise HostUnfit(
                f"no XFS could be made in {file}", hint="see the detail", detail=words.decode("utf-8", "replace").strip() or str(error)
            ) from error
        self._mount(file)
        try:
            if not space.shares_blocks(self.directory):
                raise HostUnfit("the new file system cannot share blocks", hint="use a newer kernel, or xfsprogs 5.1 or newer")
            (self.directory / _MARK).write_text(identity)
        finally:
            self.close()

    def _write(self, record: Record) -> None:
        with tempfile.NamedTemporaryFile(dir=self._data_dir, prefix=".pool.json.", delete=False) as stream:
            stream.write(record.model_dump_json().encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        Path(stream.name).replace(self._record)
        _sync(self._data_dir)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def default_size(folder: Path) -> int:
    """Bytes, whole gibibytes: a share of what is free there once a gibibyte was left to everything else."""
    return int((space.free_bytes(folder) - _KEEP_FREE_BYTES) * SHARE) >> 30 << 30


def _remedy(file: Path) -> str:
    return f"nothing was changed; bring {file} back, or look at it with `xfs_repair -n`; its data is in no other place"


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
