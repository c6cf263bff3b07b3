"""Starts a hypervisor's process, confined from its first instruction on, and holds what this process has of it. Of all drivers."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from pandastack.errors import RuntimeFailed

_LOG_BYTES = 16384
_SEAL_SHRINK, _SEAL_GROW = 0x2, 0x4
_REAP_S = 5.0
_BACKLOG = 4
_LOOK_S = 0.05

# Joins the cgroup before anything else runs, then becomes what it was told. `0` is the writer itself, in v1 and v2.
_JOIN = 'while [ "$1" != -- ]; do echo 0 >"$1" || exit 1; shift; done; shift; ulimit -c 0; exec "$@"'


class Process:
    """A hypervisor that was started, here or in an earlier life of this daemon. Close it; that does not end it.

    `name` is what people call it.
    """

    def __init__(self, name: str, pid: int, pidfd: int, *, child: subprocess.Popen[bytes] | None = None, log_fd: int | None = None) -> None:
        self.name = name
        self.pid = pid
        self.pidfd = pidfd
        self.started = start_ticks(pid)
        self._child = child
        self._log_fd = log_fd

    @classmethod
    def spawn(cls, name: str, argv: Sequence[str], fds: Sequence[int] = ()) -> Process:
        """`fds` keep their numbers. Raises RuntimeFailed."""
        # A memory file that cannot grow: whatever it says, or is made to say by its guest, 16 KiB of that are held.
        log_fd = os.memfd_create("hypervisor-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.truncate(log_fd, _LOG_BYTES)
            fcntl.fcntl(log_fd, fcntl.F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW)
            child = subprocess.Popen(
                argv,
                pass_fds=tuple(fds),
                stdin=subprocess.DEVNULL,
                stdout=log_fd,
                stderr=log_fd,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            os.close(log_fd)
            raise RuntimeFailed(f"{name} cannot be started", detail=str(error)) from error
        return cls(name, child.pid, os.pidfd_open(child.pid), child=child, log_fd=log_fd)

    @classmethod
    def found(cls, name: str, pid: int, started: int) -> Process | None:
        """The one with that pid, if it is still the one that was started then."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        if start_ticks(pid) != started or has_ended(pidfd):
            os.close(pidfd)
            return None
        return cls(name, pid, pidfd)

    @property
    def over(self) -> bool:
        return has_ended(self.pidfd)

    def said(self) -> str:
        """The first 16 KiB of what it wrote to stdout and stderr."""
        return "" if self._log_fd is None else os.pread(self._log_fd, _LOG_BYTES, 0).rstrip(b"\0").decode("utf-8", "replace")

    def last_words(self) -> str:
        """The last line of that."""
        lines = self.said().strip().splitlines()
        return lines[-1][:500] if lines else ""

    def halt(self) -> None:
        """It runs no instruction until `go_on`; nor does its guest."""
        self._send(signal.SIGSTOP)

    def go_on(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """It is gone when this returns. Raises RuntimeFailed when the kernel keeps it."""
        self._send(signal.SIGKILL)
        if not has_ended(self.pidfd, _REAP_S):
            raise RuntimeFailed(f"{self.name} does not die")
        self.reap()

    def reap(self) -> None:
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_REAP_S)

    def close(self) -> None:
        os.close(self.pidfd)
        if self._log_fd is not None:
            os.close(self._log_fd)
        if self._child is not None and self._child.returncode is None:
            # It lives on, for a later daemon, and is no child to be warned about.
            self._child.returncode = 0


def inside(joins: Collection[Path], argv: Sequence[str]) -> list[str]:
    """`argv`, to be run in the cgroups of the files `joins` and without core dumps."""
    return ["sh", "-c", _JOIN, "sh", *map(str, joins), "--", *argv]


def listening(path: Path) -> socket.socket:
    """A socket at `path` to which only this user can connect."""
    path.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before anybody can connect: the mode of the file is that of the socket.
        os.fchmod(made.fileno(), 0o600)
        made.bind(str(path))
        made.listen(_BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


def watch(process: Process, serial: socket.socket, ready: Callable[[str], bool], *, timeout_s: float) -> tuple[bool, str]:
    """Wait until `ready` says so, the process ends or the time is over; then whether it is ready, and the last that the console said.

    `ready` is asked some twenty times a second, with what the console said so far, and may raise.
    """
    console, ends, came = b"", time.monotonic() + timeout_s, False
    serial.settimeout(_LOOK_S)
    while not came and time.monotonic() < ends:
        over = process.over
        try:
            piece = serial.recv(65536)
        except TimeoutError:
            piece = b""
        except OSError:
            over = True
        if not piece and over:
            break
        console = (console + piece)[-_LOG_BYTES:]
        came = ready(console.decode("utf-8", "replace"))
    return came, console.decode("utf-8", "replace")


def start_ticks(pid: int) -> int:
    """When a process was started, in ticks since the host's boot; -1 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return -1


def has_ended(pidfd: int, timeout_s: float = 0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


async def ended(process: Process) -> None:
    """Wait until it has ended. Cancel it freely."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    # A duplicate, so that the original may be closed while somebody waits here.
    pidfd = os.dup(process.pidfd)
    loop.add_reader(pidfd, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
