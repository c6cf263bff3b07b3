"""Saved memory as files that are not here yet: starts and watches the process that serves them, and says what became of a file.

Runs on a host; called by the conductor. Below `root`, for each life of the server:

    <instance>/mnt/<digest>   the file that an index describes, for whoever maps it
    <instance>/control        the server's socket; it outlives this daemon, as the machines do, and is found again by it

Machines that map a file end with its server: their memory is gone. So a server that is dead, or does not answer, is killed,
its mount removed, and all who were on it are told why. The next file starts a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from pandastack.errors import HostUnfit
from pandastack.host.storage import loops
from pandastack.host.storage.chunks import Index

log = structlog.get_logger(__name__)

START_TIMEOUT_S = 20.0
ANSWER_TIMEOUT_S = 10.0
LOOK_EVERY_S = 1.0
STOPPED = "server"
HURRY, PAGE = b"hurry ", b"page "
"""What the program is asked, beside its status: before the digest of a file that is about to be opened; before a user and the digest of
the file of which a machine wants its pages, with a socket to which it will connect. It has its own dependencies, and is not imported here.
"""
_READ_BYTES = 1 << 20  # The most that the kernel asks for at once.
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MAX_MESSAGE = 1 << 16
_LOG_BYTES = 64 << 20
# What libraries for object stores and proxies are configured with; nothing else of our environment is the server's business.
_PASSED_ON = ("AWS_", "GOOGLE_", "AZURE_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Status:
    """`failures` is by file and user: `missing`, `damaged`, or why the store did not give it; `failed` counts them.

    `fetched` counts the chunks that came from the store, `opened` the files that are open.
    """

    pid: int = 0
    failures: dict[tuple[str, int], str] = field(default_factory=dict)
    failed: int = 0
    fetched: int = 0
    opened: int = 0


class _Server:
    """One life of the server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mount = folder / "mnt"
        self.pidfd: int | None = None
        self.child: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes = b"status", fds: Sequence[int] = (), *, timeout_s: float | None = None) -> Status:
        """Raises OSError when it does not answer in time."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(ANSWER_TIMEOUT_S if timeout_s is None else timeout_s)
            connection.connect(str(self.folder / "control"))
            socket.send_fds(connection, [request], list(fds))
            answer = connection.recv(_MAX_MESSAGE)
        if not answer:
            raise ConnectionResetError("the server of lazy memory has ended")
        data = json.loads(answer)
        failures = {(str(digest), int(user)): str(why) for digest, user, why in data["failures"]}
        numbers = {name: int(data[name]) for name in ("pid", "failed", "fetched", "opened")}
        return Status(failures=failures, **numbers)

    def clear(self) -> None:
        """End it and remove what it has, whether it lives or not. Whoever maps a file of it gets SIGBUS from now on."""
        if self.pidfd is None:
            with contextlib.suppress(OSError, ValueError):
                pid, started = map(int, (self.folder / "pid").read_text().split())
                if _started(pid) == started:
                    self.pidfd = os.pidfd_open(pid)
        if self.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            os.close(self.pidfd)
            self.pidfd = None
        if self.child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(5.0)
            self.child = None
        loops.unmount_all(self.mount)
        shutil.rmtree(self.folder, ignore_errors=True)


class LazyMemory:
    """The server of this host. `indexes` is a folder for what it shows, `objects` and `cache` are as for `Objects` and `ChunkCache`."""

    def __init__(self, root: Path, indexes: Path, *, objects: str, cache: Path, cache_mb: int) -> None:
        self._root = root
        self._indexes = indexes
        self._objects, self._cache, self._cache_mb = objects, cache, cache_mb
        self._server: _Server | None = None
        self._starting = asyncio.Lock()

    # Files

    async def file(self, index: Index) -> Path:
        """The file of an index, to be mapped or read. Raises HostUnfit where this machine cannot show one."""
        await asyncio.to_thread(self._keep, index)
        async with self._starting:
            if self._server is None:
                self._server = await self._start()
            server = self._server
        file = server.mount / index.digest
        try:
            await asyncio.to_thread(server.ask, HURRY + index.digest.encode())
            # Asked only the first time: whether a close must wait for an answer. Nobody who maps a file should.
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await asyncio.to_thread(_open_and_close, file)
        except OSError as error:  # Also a TimeoutError.
            await self._lose(server)
            raise HostUnfit("saved memory cannot be shown before it is here", hint="try again", detail=str(error)) from error
        return file

    def page(self, file: Path, listener: socket.socket, user: int) -> None:
        """Serve the machine that will connect to `listener` with a userfaultfd, see `paging`. `file` is one that `file` answered.

        `user` is what its failures are told under, see `why`. Blocks. Raises HostUnfit.
        """
        server = self._server
        try:
            if server is None or not file.is_relative_to(server.mount):
                raise ConnectionResetError("the server of lazy memory has just ended")
            server.ask(PAGE + f"{user} {file.name}".encode(), [listener.fileno()])
        except OSError as error:
            raise HostUnfit("saved memory cannot be served", hint="try again", detail=str(error)) from error

    def _keep(self, index: Index) -> None:
        self._indexes.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = self._indexes / index.digest
        if not target.exists():
            temporary = target.with_suffix(f".{secrets.token_hex(4)}")
            temporary.write_bytes(index.encoded)
            temporary.replace(target)

    def forget_indexes(self, keep: Collection[str]) -> None:
        """Remove those that no state and no machine needs. Blocks briefly."""
        if self._indexes.is_dir():
            for path in self._indexes.iterdir():
                if path.name.split(".")[0] not in keep:
                    path.unlink(missing_ok=True)

    def shows(self, file: Path) -> bool:
        """Whether that is one of its files, of any life of the server."""
        return file.is_relative_to(self._root)

    async def why(self, file: Path, user: int) -> str | None:
        """Why that user could not read of a file: a word as in `Status`, or `server`. None while all is well."""
        server = self._server
        if server is None or not file.is_relative_to(server.mount):
            return STOPPED
        try:
            status = await asyncio.to_thread(server.ask)
        except OSError:
            await self._lose(server)
            return STOPPED
        return status.failures.get((file.name, user))

    async def failure(self, index: Index) -> str | None:
        """Why some machine could not read of that file, in words of `why`. None while all is well, or nobody knows."""
        try:
            failures = (await self.status()).failures
        except OSError:
            return STOPPED
        return next((why for (digest, _), why in failures.items() if digest == index.digest), None)

    async def status(self) -> Status:
        """Zeros where no server runs. Raises OSError."""
        server = self._server
        return Status() if server is None else await asyncio.to_thread(server.ask)

    # The server's life

    def recover(self) -> None:
        """Find the server of an earlier life of this daemon; remove dead ones. Blocks for at most `ANSWER_TIMEOUT_S` each."""
        if not self._root.is_dir():
            return
        for folder in sorted(self._root.iterdir()):
            server = _Server(folder)
            try:
                if self._server is not None:
                    raise ConnectionAbortedError("there is another one already")
                server.pidfd = os.pidfd_open(server.ask().pid)
                self._server = server
            except (OSError, ValueError):
                server.clear()

    async def run(self, lost: Callable[[], Awaitable[None]]) -> None:
        """Look after the server until cancelled. `lost` is called at the start, and when something failed: ask `why` of each machine."""
        failed = 0
        await lost()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            server = self._server
            if server is None:
                continue
            try:
                status = await asyncio.to_thread(server.ask)
            except OSError as error:
                log.error("the server of lazy memory is gone", error=str(error))
                await self._lose(server)
                await lost()
                failed = 0
                continue
            if status.failed != failed:
                failed = status.failed
                await lost()

    async def _lose(self, server: _Server) -> None:
        async with self._starting:
            if self._server is server:
                self._server = None
                await asyncio.to_thread(server.clear)

    def close(self, *, needed: bool) -> None:
        """Let go of the server, for a later life of this daemon where machines need it; else end it."""
        server, self._server = self._server, None
        if server is None:
            self._remove_root()
            return
        if needed:
            if server.pidfd is not None:
                os.close(server.pidfd)
            if server.child is not None:
                server.child.returncode = 0  # It lives on, and is no child to be warned about.
            return
        server.clear()
        self._remove_root()

    def _remove_root(self) -> None:
        with contextlib.suppress(OSError):
            self._root.rmdir()

    async def _start(self) -> _Server:
        server = _Server(self._root / secrets.token_hex(4))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.to_thread(self._spawn, server)
                await asyncio.to_thread(self._await, server)
        except BaseException as error:
            # First: what waits for an answer of it gets none otherwise.
            server.clear()
            if isinstance(error, TimeoutError):
                raise HostUnfit("saved memory cannot be shown before it is here", hint="try again on a less busy machine") from error
            raise
        return server

    def _spawn(self, server: _Server) -> None:
        server.mount.mkdir(mode=0o700, parents=True)
        try:
            fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostUnfit("this machine has no FUSE", hint="load the module: modprobe fuse", detail=str(error)) from error
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            _mount(fuse, server.mount)
            # No other user can connect to it, nor get as far as its folder.
            listener.bind(str(server.folder / "control"))
            listener.listen(16)
            with (server.folder / "log").open("wb") as said:
                server.child = subprocess.Popen(
                    self._command(fuse, listener.fileno()),
                    pass_fds=(fuse, listener.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    env=_environment(),
                    start_new_session=True,
                    cwd="/",
                )
            server.pidfd = os.pidfd_open(server.child.pid)
            (server.folder / "pid").write_text(f"{server.child.pid} {_started(server.child.pid)}")
        finally:
            # Ours must go: the kernel ends the connection when the last one who has it is gone, which must be the server.
            os.close(fuse)
            listener.close()

    def _command(self, fuse: int, listener: int) -> list[str]:
        confined = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"]
        limited = ["prlimit", f"--fsize={_LOG_BYTES}", "--core=0", "--"]
        program = [sys.executable, "-m", "pandastack.host.storage.lazy_server", "--fuse", str(fuse), "--listener", str(listener)]
        cache = ["--cache", str(self._cache), "--cache-mb", str(self._cache_mb)]
        return [*limited, *confined, *program, *cache, "--indexes", str(self._indexes), "--objects", self._objects]

    def _await(self, server: _Server) -> None:
        """Until it answers, and its file system too."""
        ends, error = time.monotonic() + START_TIMEOUT_S, ""
        child = server.child
        assert child is not None  # noqa: S101 - just started
        while time.monotonic() < ends and child.poll() is None:
            try:
                server.ask(timeout_s=1.0)
            except OSError as refused:
                error = str(refused)
                time.sleep(0.02)
                continue
            # This waits for the kernel's first question to be answered, or for the end of the server.
            with contextlib.suppress(OSError):
                device = server.mount.stat().st_dev
                with contextlib.suppress(OSError):
                    Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").write_text(str(_READ_BYTES >> 10))
                return
        words = (server.folder / "log").read_text(errors="replace").strip().splitlines()
        raise HostUnfit(
            "saved memory cannot be shown before it is here",
            hint="install libfuse3 (apt install libfuse3-3, or libfuse3-4)",
            detail=words[-1][:500] if words else error,
        )


def _open_and_close(file: Path) -> None:
    with file.open("rb"):
        return


def _mount(fuse: int, place: Path) -> None:
    """Each machine is a user of its own, so all may read; what keeps them from looking for files is the folder above."""
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={_READ_BYTES}"
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    if _libc.mount(b"pandastack-lazy", os.fsencode(place), b"fuse.pandastack", flags, options.encode()) != 0:
        code = ctypes.get_errno()
        raise HostUnfit("FUSE cannot be mounted on this machine", hint="run as root", detail=os.strerror(code))


def _environment() -> dict[str, str]:
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "FUSE_LIBRARY_NAME": "fuse3", **passed}


def _started(pid: int) -> int:
    """When a process was started, in ticks since the host's boot; -1 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return -1
