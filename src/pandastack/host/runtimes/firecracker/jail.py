"""The jail of a Firecracker, as a folder of this host. What is in it is judged as the work of a stranger: a guest may have broken out.

    made by us, then by the jailer -> locked: before the first instruction of a guest -> tidied: when what was needed to get there is not

`command.Jail` says where it is. Calls are short file operations.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes import microvms
from pandastack.host.runtimes.firecracker import command
from pandastack.host.runtimes.microvms import DEVICES, DISK, MEMORY


def lock(root: Path) -> None:
    """From here on its Firecracker makes no file in there, and puts none in the place of another one."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())):
        if folder.name != command.SCRATCH:
            os.chown(folder, 0, 0, follow_symlinks=False)
            folder.chmod(0o755)


def tidy(root: Path) -> None:
    """Take away what a machine that runs does not need."""
    for path in root.iterdir():
        if path.name in ("dev", "run"):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (DISK, command.API, command.VSOCK, command.SCRATCH):
            path.unlink()


def open_disk(root: Path) -> int:
    """Its disk, which is root's, in a folder that is root's; anything else in this place is not. Raises RuntimeFailed, OSError."""
    fd = os.open(root / DISK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != 0:
        os.close(fd)
        raise RuntimeFailed("the machine's disk is not the one that it was given")
    return fd


def share(source: Path, name: Path, clone: Callable[[Path, Path], None]) -> None:
    """Another name for a file that is not written to any more, so that all who map it share its pages; else a copy."""
    source.chmod(0o444)  # Read by the users of machines, who come by it in their jails only.
    try:
        name.hardlink_to(source)
    except OSError:
        # On another file system, or too often.
        clone(source, name)
        name.chmod(0o444)


def listening(root: Path, name: str, user: int) -> socket.socket:
    """A socket in there to which only that user can connect. To be made before a guest runs."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before anybody can connect: the mode of the file is that of the socket.
        os.fchmod(made.fileno(), 0o600)
        # The path of a socket has at most 107 bytes.
        with microvms.held(os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
            made.bind(f"/proc/self/fd/{folder}/{name}")
        os.chown(root / name, user, user, follow_symlinks=False)
        made.listen(1)
    except BaseException:
        made.close()
        raise
    return made


def saved_file(pid: int, name: str) -> int:
    """A file that the Firecracker with that pid has saved, open for reading. What else it may have put there is refused."""
    fd = os.open(_scratch(pid) / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise RuntimeFailed("a file that Firecracker was to write is none", detail=name)
    return fd


def clear_saved(pid: int) -> None:
    for name in (MEMORY, DEVICES):
        with contextlib.suppress(OSError):  # Gone with the process, or never made.
            (_scratch(pid) / name).unlink(missing_ok=True)


def _scratch(pid: int) -> Path:
    """In its own mount namespace: nobody else sees it."""
    return Path(f"/proc/{pid}/root", command.SCRATCH)
