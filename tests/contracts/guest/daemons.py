"""Real daemons for these tests: as an ordinary process, and as PID 1 of its own namespaces. And what is asked of them again and again."""

# Looking at /proc or a directory of three names does not block a loop.
# ruff: noqa: ASYNC110

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pandastack.host.guest import Guest, ProcessSpec, ProcessStream
from pandastack.wire import guest as wire

MIB = 1 << 20
WARM = "/run/pandastack"
COUNTING = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.002; done"


@dataclass
class Descriptors:
    read_fd: int
    write_fd: int
    fresh: bool = True


@dataclass
class Daemon:
    """A running daemon and our end of its stdio."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    port: int

    async def open(self, *, fresh: bool = True) -> Guest:
        descriptor = os.dup(self.socket.fileno())
        return await Guest.open(Descriptors(descriptor, descriptor, fresh), timeout_s=10)

    async def connect(self, token: str | None = None) -> Guest:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        descriptor = connection.detach()
        return await Guest.open(Descriptors(descriptor, descriptor), token=token, timeout_s=10)

    @property
    def pid(self) -> int:
        """Of the daemon itself: under `unshare` it is the child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        is_unshare = Path(f"/proc/{self.process.pid}/comm").read_text().strip() == "unshare"
        return int(children[0]) if is_unshare else self.process.pid

    def warm_folders(self) -> list[Path]:
        return list(Path(f"/proc/{self.pid}/root{WARM}").glob("warm-*"))

    def rss_mib(self) -> float:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmHWM")


@contextlib.contextmanager
def running(binary: Path, kind: str, tmp_path: Path) -> Iterator[Daemon]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(binary), "-listen", f"127.0.0.1:{port}", "-hooks", str(tmp_path / "hooks")]
    # Where warm interpreters have their sockets: one that is killed leaves them behind, and others run beside it.
    private = f"mkdir -p {WARM} && mount -t tmpfs warm {WARM} && "
    if kind == "process" and os.geteuid() == 0:
        command = ["unshare", "-m", "sh", "-c", f'{private} exec "$@"', "sh", *command]
    elif kind == "pid1":
        if os.geteuid() != 0:
            pytest.skip("PID 1 of its own namespaces needs root")
        # Its own copies of what identity writes; without SYS_TIME, for a test must not set this machine's clock.
        script = private + 'for f in hostname hosts machine-id; do cp /etc/$f "$0/$f" 2>/dev/null || : > "$0/$f"; '
        script += 'touch /etc/$f; mount --bind "$0/$f" /etc/$f; done; exec setpriv --bounding-set=-sys_time "$@"'
        command = ["unshare", "-p", "-f", "-m", "-u", "--mount-proc", "--kill-child", "sh", "-c", script, str(tmp_path), *command]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), start_new_session=True)
        theirs.close()
        try:
            yield Daemon(process, ours, port)
        finally:
            process.kill()
            process.wait(timeout=10)


async def collect(stream: ProcessStream) -> tuple[bytes, bytes, wire.Exit]:
    out, err = bytearray(), bytearray()
    async for piece in stream:
        target = out if piece.channel == wire.Channel.STDOUT else err
        assert piece.offset == len(target)
        target += piece.data
    return bytes(out), bytes(err), stream.exit


async def run(guest: Guest, **spec: object) -> tuple[bytes, bytes, wire.Exit]:
    return await collect(await guest.run(ProcessSpec(**spec)))  # type: ignore[arg-type]


async def pieces(data: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def until(condition: object, timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.02)


def below(pid: int) -> dict[int, str]:
    """The states of all threads of a process's descendants, seen from outside."""
    parents, states = {}, {}
    # Not by a pattern: that stops, and says nothing, at the first folder that it may not look into.
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(process.name)] = int(_stat(process)[1])
    for found in parents:
        above = found
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and found != pid:
            with contextlib.suppress(OSError):
                for thread in Path(f"/proc/{found}/task").iterdir():
                    with contextlib.suppress(OSError):
                        states[int(thread.name)] = _stat(thread)[0]
    return states


def _stat(task: Path) -> list[str]:
    """From the state on."""
    return (task / "stat").read_text().rpartition(")")[2].split()


class Follower:
    """Collects a process's stdout in the background."""

    def __init__(self, stream: ProcessStream) -> None:
        self.stream, self.seen = stream, bytearray()
        self.task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for piece in self.stream:
            assert piece.offset == len(self.seen)
            self.seen += piece.data

    async def shows(self, text: bytes, after: int = 0) -> None:
        try:
            await until(lambda: text in self.seen[after:])
        except TimeoutError:
            pytest.fail(f"no {text!r} in {bytes(self.seen)!r}")


async def become(
    guest: Guest, *, hook_timeout_s: float = 10.0, late_s: float = 0.0, env: dict[str, str] | None = None
) -> wire.IdentityReport:
    who = {"sandbox_id": "s", "hostname": "box-2", "entropy": os.urandom(64), "token": "new", "env": env or {}, "machine_id": "0" * 32}
    return await guest.identity(unix_ns=time.time_ns() - round(late_s * 1e9), hook_timeout_s=hook_timeout_s, **who)  # type: ignore[arg-type]
