"""A server of the benchmark's own, so that its pool size is known and nobody else's sandboxes are in the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2

from pandastack.errors import HostUnfit, PandastackError, RuntimeUnavailable
from pandastack.host.storage import loops, space
from pandastack.host.storage.pool import Pool, default_size
from pandastack.sdk.client import Client
from pandastack.wire.host import HostInfo

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_SLOTS_TIMEOUT_S = 180.0
_TRIED_TIMEOUT_S = 300.0  # A runtime is tried while the server runs already; the first time it fetches a kernel.
_MOST_POOL_BYTES = 64 << 30  # Of a sparse file.


@dataclass(frozen=True)
class Server:
    """A running server, and a client with the administrator's key. `root` is below what saved states and machines are."""

    pid: int
    url: str
    token: str
    client: Client
    data: Path
    root: Path
    acceleration: str | None = None

    def info(self) -> HostInfo:
        return _info(self.url, self.token)

    def wait_for_slots(self) -> None:
        """Return when the pool is full, so that a measurement does not run beside its refill."""
        deadline = time.monotonic() + _SLOTS_TIMEOUT_S
        while time.monotonic() < deadline:
            host = self.info()
            if host.slots_ready >= host.slots_wanted > 0:
                return
            time.sleep(0.02)
        raise HostUnfit("the pool of prepared machines did not fill", hint="look at the server's log")

    def memory_peak_bytes(self) -> int:
        """The most memory the server had since `forget_peak`."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
        return 0

    def forget_peak(self) -> int:
        """Start a new peak, and return what the server has now."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return self.memory_peak_bytes()


@dataclass(frozen=True)
class Place:
    """Where the servers of one run keep their data, one after the other: what is baked is baked once. `root` as in Server."""

    runtime: str
    folder: Path
    root: Path

    @contextlib.contextmanager
    def running(self, *, slots: int, template: str, blanks: int = 0, environ: Mapping[str, str] | None = None) -> Iterator[Server]:
        """Start, make the template ready, hand out, stop. Raises HostUnfit when it does not start."""
        ready = self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        data = self.folder / "data"
        command = [sys.executable, "-m", "pandastack.standalone", "up", "--port", "0", "--data-dir", str(data)]
        # Only the runtime under measure: `auto` would be another where there is a stronger one.
        own = {"PANDASTACK_RUNTIMES": self.runtime, "PANDASTACK_MIN_ISOLATION": "none", "PANDASTACK_BLANKS": str(blanks)}
        process = subprocess.Popen(
            [*command, "--slots", str(slots), "--ready-file", str(ready)],
            env={**os.environ, **own, "XDG_CONFIG_HOME": str(self.folder / "config"), **(environ or {})},
            stdout=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + _START_TIMEOUT_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise HostUnfit("the server for the benchmark did not start", hint="run `pandastack doctor`")
                time.sleep(0.02)
            local = json.loads(ready.read_text())
            url, token = local["api_url"], local["token"]
            with Client(api_url=url, api_key=token) as client:
                _bake(client, template, self.runtime)
                found = next(one for one in _info(url, token).runtimes if one.name == self.runtime)
                try:
                    yield Server(process.pid, url, token, client, data, self.root, found.acceleration)
                finally:
                    _clear(client)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def place(runtime: str) -> Iterator[Place]:
    """A new one, gone afterwards. That of a runtime whose machines are copies of files is where copies share blocks."""
    with tempfile.TemporaryDirectory(prefix="pandastack-bench-", dir="/var/tmp") as folder:
        data = Path(folder) / "data"
        data.mkdir(mode=0o700)
        if runtime == "gvisor":
            yield Place(runtime, Path(folder), data)
        else:
            with pool(data) as root:
                yield Place(runtime, Path(folder), root)


@contextlib.contextmanager
def pool(data: Path) -> Iterator[Path]:
    """Where in a data directory copies of files share blocks: itself, or a pool in it. It is mounted meanwhile."""
    made = Pool(data)
    if not space.shares_blocks(data):
        made.init(size_bytes=min(_MOST_POOL_BYTES, default_size(data)))
    try:
        made.open()
        yield made.root
    finally:
        # Also where somebody who was killed still uses it: what is in it is of no worth any more.
        loops.unmount_all(made.directory)


def _info(url: str, token: str) -> HostInfo:
    answer = httpx2.get(f"{url}/v1/host", headers={"Authorization": f"Bearer {token}"}, timeout=10)
    return HostInfo.model_validate_json(answer.raise_for_status().content)


def _bake(client: Client, template: str, runtime: str) -> None:
    deadline = time.monotonic() + _TRIED_TIMEOUT_S
    while True:
        try:
            for _ in client.templates.bake(template, runtime):
                pass
            return
        except RuntimeUnavailable as error:
            # It is being tried, if it says when to ask again.
            if error.retry_after_s is None or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _clear(client: Client) -> None:
    """Delete every sandbox, also those of a fork that is still under way.

    A server that stops leaves its sandboxes running; nobody would find these again.
    """
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while left := client.sandboxes.list():
        for sandbox in left:
            # Another of the same fork may have taken it along; what was refused is tried again.
            with contextlib.suppress(PandastackError):
                sandbox.kill()
        if time.monotonic() > deadline:
            raise HostUnfit("the sandboxes of the benchmark could not be deleted", hint="look at the server's log")
