"""Shows a file of this host to a process that has a root of its own, by a mount in its namespace alone.

A file on another file system can get no second name in a jail, and a copy would have to read all of it. Source: open_tree(2),
move_mount(2), setns(2); Linux 5.2.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pandastack.host.runtimes import microvms

# asm/unistd.h (the same on every processor), linux/mount.h, linux/fcntl.h, linux/sched.h
_OPEN_TREE, _MOVE_MOUNT = 428, 429
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 0x1, 0x4
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW = -100, 0x100
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000

_libc = ctypes.CDLL(None, use_errno=True)


def attach(source: Path, pid: int, name: str) -> None:
    """`source` is what that process finds as `name` in its root, where a file is already, until that file is removed. Raises OSError."""
    tree = _call(_OPEN_TREE, _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_SYMLINK_NOFOLLOW)
    with (
        microvms.held(tree),
        microvms.held(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)) as namespace,
        # A thread of its own, that ends there: whoever is in that namespace does not come back.
        ThreadPoolExecutor(1) as thread,
    ):
        thread.submit(_move, tree, namespace, os.fsencode(f"/{name}")).result()


def _move(tree: int, namespace: int, place: bytes) -> None:
    # All threads of a process share their root and folder, and one that shares them may not change its namespace.
    _checked(_libc.unshare(_CLONE_FS))
    _checked(_libc.setns(namespace, _CLONE_NEWNS))
    _call(_MOVE_MOUNT, tree, b"", _AT_FDCWD, place, _MOVE_MOUNT_F_EMPTY_PATH)


def _call(number: int, *arguments: int | bytes) -> int:
    return _checked(_libc.syscall(ctypes.c_long(number), *arguments))


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
