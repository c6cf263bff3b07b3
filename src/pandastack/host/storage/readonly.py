"""Directories that sandboxes share are shown to them through read-only mounts of the host.

A runtime is asked for read-only mounts too, but that is not the boundary: gVisor of 2024 lets a guest truncate a file on a
bind mount that it was told to mount read-only. The host's kernel refuses such a write whatever the runtime thinks.
One mount per directory, below the run directory; made once, found again after a restart. Called by the conductor.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from pathlib import Path

from pandastack.errors import HostUnfit

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 32, 4096
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


class ReadOnly:
    """Read-only views of directories, as mounts below `root`. Calls are a few system calls each."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def view(self, source: Path) -> Path:
        """Where `source` can be seen and not changed. The same place each time. Raises HostUnfit where mounts are forbidden."""
        target = self._root / hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
        if _shows(target, source):
            return target
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._unmount(target)
        try:
            # Two steps, because the kernel ignores the flags of the first.
            _mount(source, target, _MS_BIND)
            _mount(source, target, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
        except OSError as error:
            self._unmount(target)
            raise HostUnfit(
                "a read-only mount of a template could not be made",
                hint="run as root on the host; in a container, run it privileged",
                detail=str(error),
            ) from error
        return target

    def withdraw(self) -> None:
        """Take every view away. Sandboxes that still use one keep what they hold open."""
        if self._root.is_dir():
            for target in self._root.iterdir():
                self._unmount(target)
                with contextlib.suppress(OSError):
                    target.rmdir()
            with contextlib.suppress(OSError):
                self._root.rmdir()

    @staticmethod
    def _unmount(target: Path) -> None:
        while _libc.umount2(os.fsencode(target), _MNT_DETACH) == 0:
            pass


def _mount(source: Path, target: Path, flags: int) -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(target), None, flags, None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


def _shows(target: Path, source: Path) -> bool:
    """True where `target` is this very directory, on a mount that is read-only."""
    try:
        return os.path.samestat(target.stat(), source.stat()) and bool(os.statvfs(target).f_flag & os.ST_RDONLY)
    except OSError:
        return False
