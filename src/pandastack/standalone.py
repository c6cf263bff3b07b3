"""`pandastack up` and `down`: control and host in one process on one machine. The only module that knows both rooms.

It checks before it changes anything, opens the host, then the API, prints one line when it is ready, and leaves the
sandboxes running when it stops: the next start finds them again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog
import uvicorn

from pandastack.control import access, logs
from pandastack.control import app as control_app
from pandastack.control import server as control_server
from pandastack.control.settings import ControlSettings
from pandastack.errors import AuthError, Conflict, HostUnfit, PandastackError
from pandastack.host import app as host_app
from pandastack.host import doctor, lock
from pandastack.host.settings import HostSettings, read
from pandastack.host.storage import space
from pandastack.host.storage.pool import MIN_GIB, Pool, default_size

log = structlog.get_logger(__name__)


STOPS_WITHIN_S = 300.0  # Persistent sandboxes are saved first, for which control has a budget of its own.


def main(argv: list[str]) -> int:
    """Exit codes: 0 stopped as asked, 1 could not start or be stopped (one sentence on stderr), 2 wrong usage."""
    try:
        if argv[:1] == ["down"]:
            return _down(argv[1:])
        arguments = _parse(argv[1:] if argv[:1] == ["up"] else argv)
        return _run(_settings(arguments), arguments)
    except PandastackError as error:
        sys.stderr.write(f"pandastack: {error.message}\n")
        if error.hint:
            sys.stderr.write(f"  {error.hint}\n")
        return 1


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pandastack up", description="Run control plane and host on this machine.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback only)")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--slots", type=int)
    parser.add_argument(
        "--pool", action=argparse.BooleanOptionalAction, help="make a storage pool where files cannot share blocks, or never"
    )
    parser.add_argument("--ready-file", type=Path, help="write {api_url, token, pid} there when ready")
    return parser.parse_args(argv)


def _settings(arguments: argparse.Namespace) -> HostSettings:
    given = {name: value for name in ("data_dir", "cache_dir", "slots") if (value := getattr(arguments, name)) is not None}
    return read(**given)


def _run(settings: HostSettings, arguments: argparse.Namespace) -> int:
    logs.configure()
    if os.geteuid() != 0:
        raise HostUnfit("pandastack up must run as root: it makes namespaces, cgroups and mounts", hint="run it with sudo")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # A handful for each sandbox and each client.
    with lock.held(settings.data_dir), contextlib.closing(_listen(arguments.host, arguments.port)) as listener:
        _choose_storage(settings, arguments.pool)
        # uvloop is a little faster than asyncio for the copying that exec and files are made of.
        import uvloop

        return uvloop.run(_serve(settings, arguments, listener))


def _down(argv: list[str]) -> int:
    """Stop the server as SIGTERM does, and wait for its end. Raises HostUnfit, Conflict."""
    parser = argparse.ArgumentParser(prog="pandastack down", description="Stop the server on this machine.")
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args(argv)
    data_dir = arguments.data_dir or _last_data_dir() or read().data_dir
    pid = lock.holder(data_dir)
    if pid is None:
        sys.stdout.write(f"no pandastack runs on {data_dir}\n")
        return 0
    try:
        process = os.pidfd_open(pid)
        try:
            ended = lock.holder(data_dir) != pid  # Then the number may be another's by now.
            if not ended:
                signal.pidfd_send_signal(process, signal.SIGTERM)
                ended = bool(select.select([process], [], [], STOPS_WITHIN_S)[0])
        finally:
            os.close(process)
    except ProcessLookupError:
        ended = True
    except PermissionError as error:
        raise HostUnfit(f"the server on {data_dir} is another user's", hint="run it with sudo") from error
    if not ended:
        raise Conflict(
            f"the server on {data_dir} is still stopping after {STOPS_WITHIN_S:.0f} s", hint=f"look at its log, or kill process {pid}"
        )
    sys.stdout.write(
        f"pandastack on {data_dir} has stopped; persistent sandboxes are saved, others run on until the next `pandastack up`\n"
    )
    return 0


def _last_data_dir() -> Path | None:
    """That of the server which was started last, by this user."""
    try:
        return Path(json.loads((_config_dir() / "local.json").read_text())["data_dir"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _choose_storage(settings: HostSettings, wanted: bool | None) -> None:
    """Make a pool where blocks cannot be shared: when told to, or when somebody at a terminal says yes. A "no" is remembered."""
    pool = Pool(settings.data_dir)
    record = pool.record()
    decided = record is not None and (record.file is not None or wanted is None)
    if decided or space.shares_blocks(settings.data_dir) is not False:
        return
    if wanted is None:
        size = default_size(settings.data_dir)
        if pool.in_the_way() is not None or size < MIN_GIB * (1 << 30) or not (sys.stdin.isatty() and sys.stderr.isatty()):
            return  # The log of the host says that there is such a thing.
        _say(f"files in {settings.data_dir} cannot share blocks, so that copies take their full size.")
        asked = f"Make a pool for them, a sparse file of up to {size >> 30} GiB ({settings.data_dir / 'pool.xfs'})? [y/N] "
        sys.stderr.write(asked)
        sys.stderr.flush()
        wanted = sys.stdin.readline().strip().lower() in ("y", "yes")
    if not wanted:
        pool.decline()
        return
    file, size = pool.init()
    _say(f"made {file}, an XFS of {size >> 30} GiB that takes what is written to it")


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise HostUnfit(
            f"port {port} of {host} cannot be used ({error.strerror})", hint="name another with --port, or 0 for a free one"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """Tells when it accepts requests."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled by `_serve`, which also stops what is not HTTP."""
        yield


async def _serve(settings: HostSettings, arguments: argparse.Namespace, listener: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    doctor.require(await doctor.preflight(settings))
    async with host_app.opened(settings, say=_say) as host:
        application = control_app.build(ControlSettings(database_path=settings.data_dir / "control.db"), host)
        server = _Server(control_server.config(application))
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="http")
        try:
            await _first(server.ready.wait(), stop.wait(), serving)
            if server.ready.is_set():
                await _announce(settings, arguments, listener, application, host.runtime_name)
                await _first(stop.wait(), serving)
        finally:
            server.should_exit = True
            await serving
        return 0 if stop.is_set() else 1


async def _first(*awaitables: Any) -> None:
    """Wait until one is done; the others are cancelled unless they are tasks, which their owner ends."""
    tasks = [item if isinstance(item, asyncio.Task) else asyncio.ensure_future(item) for item in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, given in zip(tasks, awaitables, strict=True):
            if not isinstance(given, asyncio.Task):
                task.cancel()


async def _announce(settings: HostSettings, arguments: argparse.Namespace, listener: socket.socket, application: Any, runtime: str) -> None:
    host, port = listener.getsockname()[:2]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host  # noqa: S104
    url = f"http://{shown}:{port}"
    token = await _local_key(settings.data_dir, application)
    local = {"api_url": url, "token": token, "pid": os.getpid(), "data_dir": str(settings.data_dir)}
    _write_private(_config_dir() / "local.json", local)
    if arguments.ready_file:
        _write_private(arguments.ready_file, local)
    sys.stdout.write(f"pandastack is ready at {url} (runtime {runtime}, data in {settings.data_dir})\n")
    sys.stdout.flush()


async def _local_key(data_dir: Path, application: Any) -> str:
    """The key of the local administrator: made once, kept where only root reads it, renewed when it was revoked."""
    file = data_dir / "local-key"
    parts = application.state.parts
    with contextlib.suppress(FileNotFoundError, AuthError):
        known = file.read_text().strip()
        await parts.keys.authenticate(known)
        return known
    key = await access.bootstrap(parts.store, label="local administrator")
    _write_private(file, key)
    return key


def _config_dir() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "pandastack"


def _write_private(path: Path, content: Any) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as stream:
        stream.write(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def _say(text: str) -> None:
    sys.stderr.write(f"pandastack: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
