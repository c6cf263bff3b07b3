"""Real servers for tests: start, stop, kill -9, start again; and the oracle that says what such a server left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from pandastack.host.settings import HostSettings
from pandastack.sdk.client import Client

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 90.0
# A template that is not in the cache is built from packages first.
BAKE_TIMEOUT_S = 1800.0
RUN_DIR = Path("/run/pandastack")

Found = TypeVar("Found")


def until(check: Callable[[], Found], what: str, timeout_s: float = 60.0, every_s: float = 0.05) -> Found:
    """The first true answer of `check`; fails with `what` when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what} (last answer: {found!r})"
        time.sleep(every_s)


class Server:
    """One `pandastack up` on a data directory of its own. After the first start its port stays the same."""

    def __init__(self, work: Path, *, slots: int = 0, blanks: int = 0, environ: Mapping[str, str] | None = None) -> None:
        self.work = work
        self.data = work / "data"
        self.log = work / "log"
        self.slots, self.blanks = slots, blanks
        # Without compiled modules a start takes seconds of CPU, and these tests start servers dozens of times.
        compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache_dir() / "test-pycache")}
        own = {"XDG_CONFIG_HOME": str(work / "config"), "PANDASTACK_BLANKS": str(blanks)}
        self.environ = {**os.environ, **compiled, **own, **(environ or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.url = self.token = ""
        self._clients: list[Client] = []

    def command(self, *more: str) -> list[str]:
        module = [sys.executable, "-m", "pandastack.standalone", "up"]
        return [*module, "--data-dir", str(self.data), "--slots", str(self.slots), "--port", str(self.port), *more]

    def start(self) -> None:
        assert self.process is None or self.process.poll() is not None
        ready = self.work / "ready.json"
        ready.unlink(missing_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command("--ready-file", str(ready)), env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready.exists():
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.said()}"
            assert time.monotonic() < deadline, f"the server was not ready in time:\n{self.said()}"
            time.sleep(0.02)
        known = json.loads(ready.read_text())
        self.url, self.token = known["api_url"], known["token"]
        self.port = int(self.url.rsplit(":", 1)[1])

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-6000:] if self.log.exists() else ""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def client(self, **options: Any) -> Client:
        """A client with the administrator's key; closed with the server."""
        made = Client(api_url=self.url, api_key=self.token, **options)
        self._clients.append(made)
        return made

    def http(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """A request as any other client would send it."""
        headers = {"Authorization": f"Bearer {self.token}", **options.pop("headers", {})}
        return httpx2.request(method, self.url + path, headers=headers, timeout=options.pop("timeout", 60), **options)

    def bake(self, *templates: str) -> None:
        with self.client() as client:
            for template in templates:
                for _ in client.templates.bake(template):
                    pass

    def stop(self) -> None:
        """As an operator stops it: sandboxes go on running."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server did not stop in time:\n{self.said()}") from None
        assert code == 0, f"the server stopped with {code}:\n{self.said()}"

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Delete every sandbox and snapshot, stop, and fail where anything is left."""
        for client in self._clients:
            client.close()
        if self.process is None:
            return
        if not self.alive:
            self.start()
        with Client(api_url=self.url, api_key=self.token) as client:
            for sandbox in client.sandboxes.list():
                with contextlib.suppress(Exception):
                    sandbox.kill()
            for snapshot in client.snapshots.list():
                client.snapshots.delete(snapshot.id)
            assert (client.sandboxes.list(), client.snapshots.list()) == ([], [])
        self.stop()
        self.assert_nothing_left()

    # The oracle

    @property
    def install(self) -> str:
        return (self.data / "install-id").read_text().strip()

    def left(self) -> list[str]:
        """Everything in the kernel and on disk that belongs to this server's install but for its records."""
        found: list[str] = []
        marks = [str(self.data)]
        if (self.data / "install-id").exists():
            group = f"pandastack-{self.install}"
            marks.append(str(RUN_DIR / self.install))
            for mount in _cgroup_mounts():
                # Not by glob, which fails where one is removed while it looks.
                found += [f"cgroup {top}/{name}" for top, names, _ in os.walk(mount) for name in names if name.startswith(group)]
            if (RUN_DIR / self.install).exists():
                found += [f"file {path}" for path in [RUN_DIR / self.install, *(RUN_DIR / self.install).rglob("*")]]
        found += [f"process {pid}: {line}" for pid, line in _commands() if any(mark in line for mark in marks)]
        found += [f"mount {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if any(mark in line for mark in marks)]
        for path in Path("/sys/block").glob("loop*/loop/backing_file"):
            with contextlib.suppress(OSError):
                if marks[0] in path.read_text():
                    found.append(f"loop device {path.parts[3]}: {path.read_text().strip()}")
        for folder in ("machines", "machines-qemu", "disks", "disks-qemu", "ledger", "captures", "snapshots", "snapshots/.new"):
            if (self.data / folder).exists():
                found += [f"file {path}" for path in (self.data / folder).iterdir() if path.name not in ("empty", ".new")]
        return found

    def assert_nothing_left(self) -> None:
        deadline = time.monotonic() + 15
        while (found := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not found, "left behind:\n" + "\n".join(found) + "\n" + self.said()

    def machines(self) -> set[str]:
        """The machines that exist on disk: those of sandboxes, and prepared ones."""
        return {path.name for path in (self.data / "machines").iterdir()}


def _cgroup_mounts() -> Iterator[Path]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.split(" ", 1)[0] in ("cgroup", "cgroup2"):
            yield Path(left.split()[4])


def _commands() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            pid = int(path.parts[2])
            # Threads of our own process, and of the tool that started it, name the folder too.
            if pid != os.getpid():
                yield pid, path.read_bytes().replace(b"\0", b" ").decode(errors="replace")


def cache_dir() -> Path:
    """Where images and baked states are kept between runs."""
    return HostSettings().cache_dir


def peak_of(pid: int) -> int:
    """The most memory a process had since `forget_peak`, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")


def forget_peak(pid: int) -> int:
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_of(pid)
