"""Keeps the stdio of sandboxes open while the host daemon is away, so that a restart finds them usable.

Two halves in one file. Run as a program (standard library only, started by the daemon in a session of its own) it holds
file descriptors by name and hands out copies over a unix socket; it ends, and removes its socket, when it holds
nothing and the daemon has gone. Imported, `Keeper` is the daemon's way to it. One small process per host, not per sandbox.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

_MAX_MESSAGE = 65536
_MAX_FDS = 4
_FIRST_CLIENT_S = 10.0


def serve(address: str) -> None:
    """The program: answer one request per packet until there is nothing left to keep."""
    held: dict[str, list[int]] = {}
    clients: set[socket.socket] = set()
    with contextlib.suppress(OSError):
        # Losing this process would lose every sandbox at the next restart, and it is tiny.
        Path("/proc/self/oom_score_adj").write_text("-900")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    Path(address).chmod(0o600)
    listener.listen(16)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    alone_until = time.monotonic() + _FIRST_CLIENT_S
    while held or clients or time.monotonic() < alone_until:
        for key, _ in selector.select(timeout=None if held or clients else _FIRST_CLIENT_S):
            if key.fileobj is listener:
                client, _ = listener.accept()
                clients.add(client)
                alone_until = 0.0
                selector.register(client, selectors.EVENT_READ)
                continue
            client = key.fileobj  # type: ignore[assignment]
            if not _answer(client, held):
                selector.unregister(client)
                clients.discard(client)
                client.close()
    Path(address).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        Path(address).parent.rmdir()


def _answer(client: socket.socket, held: dict[str, list[int]]) -> bool:
    """One request; False when the client has gone."""
    try:
        data, fds, _, _ = socket.recv_fds(client, _MAX_MESSAGE, _MAX_FDS)
    except OSError:
        return False
    if not data:
        return False
    try:
        request = json.loads(data)
        operation, name = request["op"], request.get("name", "")
    except (ValueError, TypeError, KeyError):
        # Whoever that is, it must not cost the sandboxes of everybody else.
        for fd in fds:
            os.close(fd)
        return False
    reply: dict[str, list[str]] = {}
    copies: list[int] = []
    if operation == "put":
        for fd in held.pop(name, []):
            os.close(fd)
        held[name] = list(fds)
    elif operation == "get":
        copies = held.get(name, [])
    elif operation == "drop":
        for fd in held.pop(name, []):
            os.close(fd)
    elif operation == "names":
        reply = {"names": sorted(held)}
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", copies))] if copies else []
    try:
        client.sendmsg([json.dumps(reply).encode()], ancillary)
    except OSError:
        return False
    return True


class Keeper:
    """The daemon's side. Calls block for well under a millisecond; the process is started when it is first needed."""

    def __init__(self, address: Path) -> None:
        self._address = address
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()

    def put(self, name: str, fds: list[int]) -> None:
        """Keep copies of `fds` under `name`, in place of any older ones. Raises OSError when there is no keeper to be had."""
        self._call({"op": "put", "name": name}, fds)

    def get(self, name: str) -> list[int]:
        """New copies of what is kept under `name` (the caller closes them), or an empty list."""
        return self._call({"op": "get", "name": name}, [])[1]

    def drop(self, name: str) -> None:
        """Forget `name`; fine when there is none."""
        self._call({"op": "drop", "name": name}, [])

    def retain(self, names: set[str]) -> None:
        """Forget everything but `names`."""
        for name in self._call({"op": "names"}, [])[0].get("names", []):
            if name not in names:
                self.drop(name)

    def close(self) -> None:
        """End the connection; the process goes on as long as it keeps something."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _call(self, request: dict[str, str], fds: list[int]) -> tuple[dict[str, list[str]], list[int]]:
        with self._lock:
            return self._call_locked(request, fds)

    def _call_locked(self, request: dict[str, str], fds: list[int]) -> tuple[dict[str, list[str]], list[int]]:
        for attempt in (1, 2, 3):
            connection = self._connect()
            try:
                socket.send_fds(connection, [json.dumps(request).encode()], fds)
                data, received, _, _ = socket.recv_fds(connection, _MAX_MESSAGE, _MAX_FDS)
                if not data:
                    raise ConnectionResetError("the descriptor keeper has ended")
                return json.loads(data), list(received)
            except OSError as error:
                self.close()
                if attempt == 3 or isinstance(error, TimeoutError):
                    raise
                # One that is just dying may still accept a connection.
                time.sleep(0.01)
        raise AssertionError("unreachable")

    def _connect(self) -> socket.socket:
        if self._connection is not None:
            return self._connection
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(5.0)
        try:
            connection.connect(str(self._address))
        except OSError:
            self._start()
            deadline = time.monotonic() + 5.0
            while True:
                try:
                    connection.connect(str(self._address))
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        connection.close()
                        raise
                    time.sleep(0.005)
        self._connection = connection
        return connection

    def _start(self) -> None:
        # A socket file that refuses connections belongs to a dead keeper.
        self._address.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._address.unlink(missing_ok=True)
        subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(self._address)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={},
        )


if __name__ == "__main__":
    serve(sys.argv[1])
