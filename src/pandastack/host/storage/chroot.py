"""Runs one command inside a root file system, with its own mounts. A program by itself: `python -I chroot.py ...`.

`build` starts it under `unshare --mount --pid --fork --kill-child`, so every mount made here lives in a namespace that
the kernel takes away with the last process: nothing can be left to unmount, even after SIGKILL. It uses the standard
library only, because it runs as root. A chroot is no wall against a hostile root; what runs in it as root is Debian's
own tools and package scripts (signed) and pip unpacking wheels. Code from PyPI runs in it as an unprivileged user.

    chroot.py ROOT run BUILD [--network] [--user UID] -- COMMAND...   BUILD, a folder, appears as /tmp/build;
                                                                      --network lends the host's resolver
    chroot.py ROOT remove -- PATTERN...                               delete what the absolute patterns match, links not followed
"""

from __future__ import annotations

# Plain calls instead of pathlib, so that nothing is imported late; /tmp here is the chroot's own.
# ruff: noqa: PTH102, PTH103, PTH108, PTH112, PTH113, PTH114, PTH207, S108
import ctypes
import glob
import os
import shutil
import sys

_BIND, _NOSUID, _NODEV, _NOEXEC = 4096, 2, 4, 8
_NO_NEW_PRIVS = 38  # PR_SET_NO_NEW_PRIVS
_libc = ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    # Following a link here would mount over a folder of the host (in this namespace only, but still).
    if os.path.islink(target):
        raise OSError(f"{target} is a link")
    arguments = [value.encode() if value is not None else None for value in (source, target, kind, data)]
    if _libc.mount(arguments[0], arguments[1], arguments[2], ctypes.c_ulong(flags), arguments[3]) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def _prepare(root: str, build: str, *, network: bool) -> None:
    _mount("proc", f"{root}/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    # Package scripts and pip leave files in these; in a tmpfs none of them ends up in the image.
    _mount("tmpfs", f"{root}/run", "tmpfs", _NOSUID | _NODEV, "mode=755")
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV, "mode=1777")
    os.makedirs(f"{root}/dev/shm", exist_ok=True)
    _mount("tmpfs", f"{root}/dev/shm", "tmpfs", _NOSUID | _NODEV, "mode=1777")
    os.mkdir(f"{root}/tmp/build")
    _mount(build, f"{root}/tmp/build", None, _BIND)
    resolver = f"{root}/etc/resolv.conf"
    if network and os.path.isfile(resolver) and os.path.isfile("/etc/resolv.conf"):
        _mount("/etc/resolv.conf", resolver, None, _BIND)


def _become(uid: int) -> None:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)


def _remove(patterns: list[str]) -> None:
    for pattern in patterns:
        for path in glob.glob(pattern, recursive=True, include_hidden=True):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=False)
            elif os.path.lexists(path):
                os.unlink(path)


def main(arguments: list[str]) -> None:
    root, action, *rest = arguments
    cut = rest.index("--")
    options, words = rest[:cut], rest[cut + 1 :]
    if action == "run":
        _prepare(root, options[0], network="--network" in options)
    os.chroot(root)
    os.chdir("/")
    # From here on an import would load code from the image into this process, so there must be none.
    sys.path.clear()
    if action == "remove":
        _remove(words)
        return
    os.umask(0o022)
    if "--user" in options:
        _become(int(options[options.index("--user") + 1]))
    _execute(words)


def _execute(words: list[str]) -> None:
    # os.execvpe would import a module to read PATH.
    for folder in os.environ["PATH"].split(":"):
        program = f"{folder}/{words[0]}"
        if os.access(program, os.X_OK):
            os.execve(program, words, os.environ)  # noqa: S606
    sys.exit(f"chroot: {words[0]} is not in the image")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as problem:
        sys.exit(f"chroot: {problem}")
