"""Speaks to the control socket of a running runsc sandbox, without starting a runsc process.

A runsc process costs 15-20 ms of CPU before it does anything; a call here costs one. The protocol is private to
runsc (JSON in, JSON out, file descriptors beside it), so the driver tries it before a version is trusted. Two dialects are
known; a runsc that speaks neither is driven by its command line instead, which is slower and does the same.
Source: gVisor pkg/urpc, runsc/boot/controller.go, runsc/boot/network.go.

The methods block (a call is one round trip); the driver runs them in worker threads.
"""

from __future__ import annotations

import array
import base64
import contextlib
import ipaddress
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pandastack.errors import RuntimeFailed

Dialect = Literal["2024", "2026", "cli"]

CALL_TIMEOUT_S = 20.0
STATE_TIMEOUT_S = 600.0  # Saving or loading memory takes as long as the disk needs.

CHECKPOINT_FILES = ("checkpoint.img", "pages_meta.img", "pages.img")
_MAX_REPLY_BYTES = 8 << 20


def call(control_socket: Path, method: str, argument: Any = None, fds: Sequence[int] = (), *, timeout_s: float) -> Any:
    """One call on a connection of its own (the server is replaced inside Restore, so none is kept).

    Raises RuntimeFailed when runsc refuses, when the sandbox dies meanwhile, and after `timeout_s`.
    """
    request = json.dumps({"method": method, "arg": argument}).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            with _short_path(control_socket) as address:
                connection.connect(address)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            sent = connection.sendmsg([request], ancillary)
            if sent < len(request):
                connection.sendall(request[sent:])
            reply = _read_value(connection, time.monotonic() + timeout_s)
        except TimeoutError as error:
            raise RuntimeFailed(f"gVisor did not answer {method} within {timeout_s:g} s", method=method) from error
        except OSError as error:
            raise RuntimeFailed(f"the gVisor sandbox ended during {method}", method=method, detail=str(error)) from error
    if not reply.get("success"):
        raise RuntimeFailed(f"gVisor refused {method}", method=method, detail=str(reply.get("err"))[:2000])
    return reply.get("result")


def _read_value(connection: socket.socket, until: float) -> dict[str, Any]:
    """Read one JSON value; the stream has no framing, so it is complete when it parses."""
    data = b""
    while len(data) < _MAX_REPLY_BYTES:
        # The deadline is for the whole answer, not for each piece of it.
        connection.settimeout(max(0.001, until - time.monotonic()))
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionResetError("control socket closed")
        data += piece
        if not data.rstrip().endswith(b"}"):
            continue
        try:
            value = json.loads(data)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    raise ConnectionResetError("control socket answered without end")


@contextlib.contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """A name for a socket that fits the 107 bytes of sun_path, however deep the data directory lies."""
    if len(os.fsencode(path)) < 100:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class Control(Protocol):
    """What the driver asks of a sandbox that `runsc create` made."""

    def start(self) -> None: ...

    def restore(self, source: Path) -> None:
        """Load the state files of the directory `source`."""
        ...

    def checkpoint(self, into: Path, *, resume: bool) -> None:
        """Write the state files into the empty directory `into`."""
        ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class SocketControl:
    """Drives a sandbox over its control socket, in one of the known dialects."""

    def __init__(self, address: Path, container: str, dialect: Dialect) -> None:
        self._address = address
        self._container = container
        self._dialect = dialect

    def _call(self, method: str, argument: Any = None, fds: Sequence[int] = (), *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        call(self._address, method, argument, fds, timeout_s=timeout_s)

    def _set_loopback(self, *, restore: bool) -> None:
        """Give the sandbox its network stack, with a loopback interface only; needed once before start or restore."""
        if self._dialect == "2024":
            self._call("Network.CreateLinksAndRoutes", _loopback_only() | {"DisconnectOk": True})
        else:
            self._call("containerManager.SetNetworkArgs", _loopback_only() | {"IsRestore": restore})

    def start(self) -> None:
        self._set_loopback(restore=False)
        self._call("containerManager.StartRoot", self._container)

    def restore(self, source: Path) -> None:
        self._set_loopback(restore=True)
        argument: dict[str, Any] = {"HavePagesFile": True, "HaveDeviceFile": False}
        if self._dialect == "2026":
            # It goes on at once, and a page that it needs is read first; nothing is saved again before all of them are there.
            argument["Background"] = True
        with _opened(source, os.O_RDONLY | os.O_CLOEXEC) as fds:
            self._call("containerManager.Restore", argument, fds, timeout_s=STATE_TIMEOUT_S)

    def checkpoint(self, into: Path, *, resume: bool) -> None:
        # The files must not exist: a failed checkpoint leaves some that look right.
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        # `key` must be null: an empty string makes an image that does not restore.
        argument: dict[str, Any] = {"key": None, "metadata": {"compression": "none"}, "have_pages_file": True, "Resume": resume}
        # A heap that was only zeroed costs nothing; looking for zeros is cheaper than writing them.
        if self._dialect == "2024":
            argument["MemoryFileSaveOpts"] = {"ExcludeCommittedZeroPages": True}
        else:
            argument["app_mf_exclude_committed_zero_pages"] = True
        with _opened(into, flags) as fds:
            self._call("containerManager.Checkpoint", argument, fds, timeout_s=STATE_TIMEOUT_S)

    def pause(self) -> None:
        self._call("containerManager.Pause")

    def resume(self) -> None:
        self._call("containerManager.Resume")


def _loopback_only() -> dict[str, Any]:
    def network(cidr: str) -> dict[str, str]:
        net = ipaddress.ip_network(cidr)
        return {"IP": str(net.network_address), "Mask": base64.b64encode(net.netmask.packed).decode()}

    none = {"Route": {"Destination": {"IP": "", "Mask": None}, "Gateway": ""}, "Name": ""}
    loopback = {
        "Name": "lo",
        "Addresses": [{"Address": "127.0.0.1", "PrefixLen": 8}, {"Address": "::1", "PrefixLen": 128}],
        "Routes": [{"Destination": network("127.0.0.0/8"), "Gateway": ""}, {"Destination": network("::1/128"), "Gateway": ""}],
        "GVisorGRO": False,
    }
    return {
        "LoopbackLinks": [loopback],
        "FDBasedLinks": [],
        "XDPLinks": [],
        "Defaultv4Gateway": none,
        "Defaultv6Gateway": none,
    }


@contextlib.contextmanager
def _opened(directory: Path, flags: int) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        fds = []
        for name in CHECKPOINT_FILES:
            fd = os.open(directory / name, flags, 0o600)
            stack.callback(os.close, fd)
            fds.append(fd)
        yield fds
