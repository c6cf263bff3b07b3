"""The least that one must say to the guest daemon by hand: begin a session and run a program. One call at a time; blocks.

`guest/PROTOCOL.md` has the frames. No identity is given, so a copy that is spoken with in this way has the names, the clock and the
random numbers of its original: that work is ours, and it is part of our figures.
"""

from __future__ import annotations

import secrets
import socket
from pathlib import Path
from typing import Any

from pandastack.errors import HostUnfit
from pandastack.wire import guest as wire
from pandastack.wire.guest import Frame, Kind

_TIMEOUT_S = 60.0
_ENDS = (Kind.END, Kind.ERROR, Kind.RESET)


class GuestSession:
    """A session over the socket of a virtio-serial port where nobody's is under way. Close it."""

    def __init__(self, address: Path) -> None:
        """Raises HostUnfit when the daemon does not greet."""
        self._tag, nonce = secrets.randbelow(2**32 - 1) + 1, secrets.token_hex(16)
        self._decoder = wire.FrameDecoder(self._tag, nonce)
        self._frames: list[Frame] = []
        self._stream = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_TIMEOUT_S)
            self._socket.connect(str(address))
            self._socket.sendall(wire.hello(self._tag, nonce))
            while self._decoder.greeting is None:
                self._read()
        except OSError as error:
            self._socket.close()
            raise HostUnfit("the daemon in the bare machine does not greet") from error
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> GuestSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, *argv: str) -> int:
        """Run a program to its end; its exit code, as shells show it. Its output is not looked at: it shall have little."""
        frame = self._call("process.run", {"argv": list(argv)})
        return wire.parse(wire.Exit, frame.payload).code if frame.kind == Kind.END else -1

    def start(self, *argv: str) -> None:
        """Start a program that runs on. Raises HostUnfit."""
        if self._call("process.start", {"argv": list(argv)}).kind != Kind.REPLY:
            raise HostUnfit(f"{argv[0]} did not start in the bare machine")

    def ping(self) -> None:
        """The shortest round trip: a call that the daemon does not know, and refuses."""
        if self._call("bench.ping", {}).kind != Kind.ERROR:
            raise HostUnfit("the daemon in the bare machine knows a call that there is not")

    def _call(self, method: str, params: dict[str, Any]) -> Frame:
        """The frame that ends the call."""
        self._stream += 1
        body = wire.encode_json({"method": method, "params": params})
        try:
            self._socket.sendall(b"".join(wire.encode(Kind.CALL, self._stream, body, self._tag, flags=wire.FLAG_LAST)))
            while True:
                while self._frames:
                    frame = self._frames.pop(0)
                    last = frame.kind == Kind.REPLY and frame.flags & wire.FLAG_LAST
                    if frame.stream == self._stream and (last or frame.kind in _ENDS):
                        return frame
                self._read()
        except OSError as error:
            raise HostUnfit(f"the daemon in the bare machine does not answer {method}") from error

    def _read(self) -> None:
        count = self._socket.recv_into(self._decoder.space())
        if not count:
            raise HostUnfit("the daemon in the bare machine went away")
        self._frames += self._decoder.filled(count)
