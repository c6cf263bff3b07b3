"""Speaks QMP with a running QEMU: JSON lines over a unix socket, with descriptors beside them.

A connection is made for each task and closed after it: QEMU serves one at a time, and one that stays open would collect events
that a guest can cause. What QEMU says is judged as the word of a stranger, because a guest may have broken into it.
The methods block (a call is one round trip, a fifth of a millisecond); the driver runs them in worker threads.
Source: QEMU docs/interop/qmp-spec.txt, qapi/. Why not the package qemu.qmp: ADR 12.
"""

from __future__ import annotations

import array
import contextlib
import json
import socket
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pandastack.errors import RuntimeFailed

CALL_TIMEOUT_S = 20.0
_MOST_LINE_BYTES = 1 << 20
_MOST_EVENTS = 1000


class Refused(RuntimeFailed):
    """QEMU understood a command and did not carry it out."""


class Gone(RuntimeFailed):
    """QEMU is over, or closed the connection."""


class TimedOut(RuntimeFailed):
    """QEMU is silent."""


class Connection:
    """A QMP session, ready for commands. Close it, or use `opened`."""

    def __init__(self, address: Path, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Raises RuntimeFailed when nobody listens there or nobody answers in time."""
        self._data = b""
        self._events: deque[dict[str, Any]] = deque(maxlen=_MOST_EVENTS)
        self._number = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            ends = time.monotonic() + timeout_s
            try:
                self._socket.settimeout(timeout_s)
                self._socket.connect(str(address))
            except OSError as error:
                raise Gone("QEMU is not there any more", detail=str(error)) from error
            if "QMP" not in self._line(ends, "its greeting"):
                raise RuntimeFailed("QEMU greeted with something else than QMP")
            self.call("qmp_capabilities", timeout_s=timeout_s)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def call(
        self, command: str, arguments: dict[str, Any] | None = None, *, fd: int | None = None, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        """Carry out one command; QEMU receives a copy of `fd` with it. Raises Refused, Gone or TimedOut."""
        self._number += 1
        request = {"execute": command, "id": self._number} | ({"arguments": arguments} if arguments else {})
        ends = time.monotonic() + timeout_s
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
        data = json.dumps(request).encode() + b"\n"
        try:
            self._socket.settimeout(timeout_s)
            sent = self._socket.sendmsg([data], ancillary)
            if sent < len(data):
                self._socket.sendall(data[sent:])
        except OSError as error:
            raise Gone(f"QEMU ended before {command}", detail=str(error)) from error
        while True:
            answer = self._line(ends, command)
            if "event" in answer:
                self._events.append(answer)
            elif answer.get("id") == self._number:
                break
        if "error" in answer:
            error_text = answer["error"].get("desc") if isinstance(answer["error"], dict) else answer["error"]
            raise Refused(f"QEMU refused {command}", detail=str(error_text)[:2000])
        return answer.get("return")

    def event(self, *names: str, until: float) -> dict[str, Any]:
        """The next event of these names, those that came during earlier calls included. `until` is of `time.monotonic`."""
        while True:
            while self._events:
                event = self._events.popleft()
                if event.get("event") in names:
                    return event
            line = self._line(until, f"event {names[0]}")
            if "event" in line:
                self._events.append(line)

    def event_within(self, *names: str, timeout_s: float) -> dict[str, Any] | None:
        """As `event`, but None when there is none in that time."""
        with contextlib.suppress(TimedOut):
            return self.event(*names, until=time.monotonic() + timeout_s)
        return None

    def _line(self, ends: float, what: str) -> dict[str, Any]:
        # Also where there is always something to read: a flood of events is no answer.
        if time.monotonic() > ends:
            raise TimedOut(f"QEMU did not answer {what} in time")
        while b"\n" not in self._data:
            if len(self._data) > _MOST_LINE_BYTES:
                raise RuntimeFailed("QEMU answered without end")
            try:
                self._socket.settimeout(max(0.001, ends - time.monotonic()))
                piece = self._socket.recv(65536)
            except TimeoutError as error:
                raise TimedOut(f"QEMU did not answer {what} in time") from error
            except OSError as error:
                raise Gone(f"QEMU ended during {what}", detail=str(error)) from error
            if not piece:
                raise Gone(f"QEMU ended during {what}")
            self._data += piece
        line, _, self._data = self._data.partition(b"\n")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RuntimeFailed("QEMU answered something that is not JSON") from error
        if not isinstance(value, dict):
            raise RuntimeFailed("QEMU answered something that is no object")
        return value


@contextlib.contextmanager
def opened(address: Path, *, timeout_s: float = CALL_TIMEOUT_S) -> Iterator[Connection]:
    connection = Connection(address, timeout_s=timeout_s)
    try:
        yield connection
    finally:
        connection.close()
