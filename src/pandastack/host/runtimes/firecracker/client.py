"""Speaks with a running Firecracker: HTTP over its API socket, a connection for each task.

What it says is judged as the word of a stranger, because a guest may have broken into it: each call has one deadline, whatever
comes in between, and reads a bounded answer. The calls block (a round trip is a fraction of a millisecond); the driver runs them in
worker threads. Source: Firecracker src/firecracker/swagger/firecracker.yaml. Why not httpx: ADR 14.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http
import http.client
import io
import json
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pandastack.errors import RuntimeFailed
from pandastack.host.runtimes.firecracker import sockets

CALL_TIMEOUT_S = 20.0
_MOST_ANSWER_BYTES = 1 << 20


class Refused(RuntimeFailed):
    """Firecracker understood a call and did not carry it out."""


class Gone(RuntimeFailed):
    """Firecracker is over, or closed the connection."""


class TimedOut(RuntimeFailed):
    """Firecracker is silent."""


class Body(Protocol):
    """One of the shapes below: their fields have the names that Firecracker gives them, and what is None is left out."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    vcpu_count: int
    mem_size_mib: int
    track_dirty_pages: bool


@dataclass(frozen=True, kw_only=True)
class BootSource:
    kernel_image_path: str
    initrd_path: str
    boot_args: str


@dataclass(frozen=True, kw_only=True)
class Drive:
    """`is_root_device` would make Firecracker add a root to the kernel's command line; our initramfs finds it itself."""

    drive_id: str
    path_on_host: str
    is_root_device: bool = False
    is_read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Vsock:
    guest_cid: int
    uds_path: str


@dataclass(frozen=True, kw_only=True)
class MemoryBackend:
    backend_path: str
    backend_type: Literal["File", "Uffd"] = "File"


@dataclass(frozen=True, kw_only=True)
class NetworkOverride:
    """Another TAP device on the host for an interface of the saved machine."""

    iface_id: str
    host_dev_name: str


@dataclass(frozen=True, kw_only=True)
class VsockOverride:
    uds_path: str


@dataclass(frozen=True, kw_only=True)
class SnapshotLoad:
    """`clock_realtime` is not used: where the state has no such time, it ends Firecracker. The guest's identity sets its clock."""

    snapshot_path: str
    mem_backend: MemoryBackend
    track_dirty_pages: bool
    resume_vm: bool = False
    network_overrides: Sequence[NetworkOverride] | None = None
    vsock_override: VsockOverride | None = None
    clock_realtime: bool | None = None


@dataclass(frozen=True, kw_only=True)
class SnapshotCreate:
    snapshot_type: Literal["Full", "Diff"]
    snapshot_path: str
    mem_file_path: str


class Api:
    """A connection to one API socket. Close it, or use `opened`."""

    def __init__(self, place: Path, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Raises Gone when nobody listens there."""
        try:
            self._socket = sockets.connect(place, timeout_s)
        except OSError as error:
            raise Gone("Firecracker is not there", detail=str(error)) from error

    def close(self) -> None:
        self._socket.close()

    # The calls, by what they do. All raise Refused, Gone or TimedOut.

    def state(self) -> str:
        """`Not started`, `Running` or `Paused`."""
        return str(self.call("GET", "/").get("state"))

    def configure(self, config: MachineConfig) -> None:
        self.call("PUT", "/machine-config", config)

    def boot_source(self, source: BootSource) -> None:
        self.call("PUT", "/boot-source", source)

    def drive(self, drive: Drive) -> None:
        self.call("PUT", f"/drives/{drive.drive_id}", drive)

    def look_at_drive(self, drive_id: str, path: str) -> None:
        """The file of a drive has another size, or is another one."""
        self.call("PATCH", f"/drives/{drive_id}", {"drive_id": drive_id, "path_on_host": path})

    def vsock(self, vsock: Vsock) -> None:
        self.call("PUT", "/vsock", vsock)

    def entropy(self) -> None:
        self.call("PUT", "/entropy", {})

    def start(self) -> None:
        self.call("PUT", "/actions", {"action_type": "InstanceStart"})

    def pause(self) -> None:
        self.call("PATCH", "/vm", {"state": "Paused"})

    def resume(self) -> None:
        self.call("PATCH", "/vm", {"state": "Resumed"})

    def save(self, snapshot: SnapshotCreate, *, timeout_s: float) -> None:
        self.call("PUT", "/snapshot/create", snapshot, timeout_s=timeout_s)

    def load(self, snapshot: SnapshotLoad, *, timeout_s: float) -> None:
        """A failure ends Firecracker."""
        self.call("PUT", "/snapshot/load", snapshot, timeout_s=timeout_s)

    def call(
        self, method: str, path: str, body: Body | dict[str, Any] | None = None, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> dict[str, Any]:
        """One request and its answer, an empty object where there is none."""
        ends = time.monotonic() + timeout_s
        what = f"{method} {path}"
        headers = {"Host": "localhost", "Accept": "application/json", "Content-Type": "application/json"}
        try:
            connection = _Connection(self._socket, ends)
            connection.request(method, path, None if body is None else json.dumps(plain(body)), headers)
            response = connection.getresponse()
            content = response.read(_MOST_ANSWER_BYTES + 1)
        except TimeoutError as error:
            raise TimedOut(f"Firecracker did not answer {what} in time") from error
        except (OSError, http.client.HTTPException) as error:
            raise Gone(f"Firecracker ended during {what}", detail=str(error) or type(error).__name__) from error
        if len(content) > _MOST_ANSWER_BYTES:
            raise RuntimeFailed("Firecracker answered without end")
        if not 200 <= response.status < 300:
            raise Refused(f"Firecracker refused {what}", detail=_fault(content))
        if response.status == http.HTTPStatus.NO_CONTENT:
            return {}
        if not content:
            raise Gone(f"Firecracker ended during {what}")
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RuntimeFailed("Firecracker answered something that is not JSON") from error
        if not isinstance(answer, dict):
            raise RuntimeFailed("Firecracker answered something that is no object")
        return answer


@contextlib.contextmanager
def opened(place: Path, *, timeout_s: float = CALL_TIMEOUT_S) -> Iterator[Api]:
    api = Api(place, timeout_s=timeout_s)
    try:
        yield api
    finally:
        api.close()


def plain(body: Body | dict[str, Any]) -> dict[str, Any]:
    """What is sent of a shape."""
    if isinstance(body, dict):
        return body
    return {name: value for name, value in dataclasses.asdict(body, dict_factory=_present).items() if value is not None}


def _present(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if value is not None}


def _fault(content: bytes) -> str:
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(content)
        if isinstance(answer, dict) and "fault_message" in answer:
            return str(answer["fault_message"])[:2000]
    return content[:2000].decode("utf-8", "replace")


class _Connection(http.client.HTTPConnection):
    """HTTP over a socket that is there already, with one deadline for all of a call."""

    def __init__(self, connected: socket.socket, ends: float) -> None:
        super().__init__("localhost")
        self.sock: Any = _Deadlined(connected, ends)


class _Deadlined:
    """What `http.client` uses of a socket."""

    def __init__(self, connected: socket.socket, ends: float) -> None:
        self._socket, self._ends = connected, ends

    def sendall(self, data: bytes) -> None:
        self._socket.settimeout(_left(self._ends))
        self._socket.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._socket, self._ends))

    def close(self) -> None:
        """It belongs to `Api`."""


class _Reader(io.RawIOBase):
    def __init__(self, connected: socket.socket, ends: float) -> None:
        self._socket, self._ends = connected, ends

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(_left(self._ends))
        return self._socket.recv_into(buffer)


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
