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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

from pandastack.errors import HostUnfit, PandastackError
from pandastack.sdk.client import Client
from pandastack.wire.host import HostInfo

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_SLOTS_TIMEOUT_S = 60.0
# The one that the bare tool is of; `auto` would be another where there is KVM.
_SETTINGS = {"PANDASTACK_RUNTIMES": "gvisor", "PANDASTACK_MIN_ISOLATION": "gvisor"}


@dataclass(frozen=True)
class Server:
    """A running server, and a client with the administrator's key."""

    pid: int
    url: str
    token: str
    client: Client

    def wait_for_slots(self) -> None:
        """Return when the pool is full, so that a measurement does not run beside its refill."""
        deadline = time.monotonic() + _SLOTS_TIMEOUT_S
        while time.monotonic() < deadline:
            answer = httpx2.get(f"{self.url}/v1/host", headers={"Authorization": f"Bearer {self.token}"}, timeout=10)
            host = HostInfo.model_validate_json(answer.raise_for_status().content)
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


@contextlib.contextmanager
def running(*, slots: int, template: str, blanks: int = 0) -> Iterator[Server]:
    """Start, make the template ready, hand out, stop. Raises HostUnfit when it does not start."""
    with tempfile.TemporaryDirectory(prefix="pandastack-bench-", dir="/var/tmp") as folder:
        work = Path(folder)
        ready = work / "ready.json"
        command = [sys.executable, "-m", "pandastack.standalone", "up", "--port", "0", "--data-dir", str(work / "data")]
        process = subprocess.Popen(
            [*command, "--slots", str(slots), "--ready-file", str(ready)],
            env={**os.environ, **_SETTINGS, "XDG_CONFIG_HOME": str(work / "config"), "PANDASTACK_BLANKS": str(blanks)},
            stdout=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + _START_TIMEOUT_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise HostUnfit("the server for the benchmark did not start", hint="run `pandastack doctor`")
                time.sleep(0.02)
            local = json.loads(ready.read_text())
            with Client(api_url=local["api_url"], api_key=local["token"]) as client:
                for _ in client.templates.bake(template):
                    pass
                try:
                    yield Server(process.pid, local["api_url"], local["token"], client)
                finally:
                    _clear(client)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


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
