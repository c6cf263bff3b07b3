"""Server-sent events from bytes, piece by piece. A comment line carries nothing, but shows that the peer is alive."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pandastack import errors

MAX_EVENT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ServerEvent:
    name: str
    data: str

    def json(self) -> dict[str, Any]:
        """The data as an object; a bare text becomes `{"error": text}` in an error event and `{"data": text}` elsewhere."""
        try:
            value = json.loads(self.data)
        except ValueError:
            value = self.data
        return value if isinstance(value, dict) else {"error" if self.name == "error" else "data": value}


class Parser:
    """Feed it bytes as they arrive; each complete event comes out once, however the bytes were cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0

    def feed(self, data: bytes) -> list[ServerEvent]:
        # A carriage return at the end may be half of a line end that was cut; frames of ours never contain one.
        self._buffer += data.replace(b"\r\n", b"\n") if b"\r" in data else data
        events = []
        begin = 0
        while (end := self._buffer.find(b"\n\n", max(begin, self._searched))) >= 0:
            event = _parse(bytes(self._buffer[begin:end]))
            if event is not None:
                events.append(event)
            begin = end + 2
            self._searched = begin
        if begin:
            del self._buffer[:begin]
        self._searched = max(0, len(self._buffer) - 1)
        if len(self._buffer) > MAX_EVENT_BYTES:
            raise errors.ServerError("the API sent an event that never ends")
        return events


def _parse(frame: bytes) -> ServerEvent | None:
    name, data = "message", []
    for line in frame.decode("utf-8", "replace").split("\n"):
        line = line.removesuffix("\r")
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
    return ServerEvent(name, "\n".join(data)) if data else None
