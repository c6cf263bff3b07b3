"""Starting programs in a sandbox and following what they write. Used through `Guest`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pandastack.errors import GuestProtocolError, InvalidRequest
from pandastack.host.guest.stream import Stream
from pandastack.wire import guest as wire
from pandastack.wire.guest import Exit, Started

MAX_INLINE_STDIN_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """What to start: exactly one of `argv`, `shell` (a line for bash or sh) and `python` (code, by the warm interpreter).

    `stdin`: False for none, bytes (at most 64 KiB) given at once, or True to `write` it. `pty` is (rows, cols); its
    output comes on stdout. After `timeout_s` the whole tree is killed, reason "timeout". `kill_on_detach`: the tree
    ends when the stream of `run` is left early, and when the session is lost.
    """

    argv: Sequence[str] | None = None
    shell: str | None = None
    python: str | None = None
    id: str | None = None
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    stdin: bool | bytes = False
    pty: tuple[int, int] | None = None
    timeout_s: float | None = None
    output_limit_bytes: int | None = None
    kill_on_detach: bool = False

    def params(self) -> dict[str, Any]:
        """The JSON of process.start and process.run."""
        if isinstance(self.stdin, bytes) and len(self.stdin) > MAX_INLINE_STDIN_BYTES:
            raise InvalidRequest("stdin given at once is too large", limit_bytes=MAX_INLINE_STDIN_BYTES)
        params: dict[str, Any] = {
            "argv": list(self.argv) if self.argv is not None else None,
            "shell": self.shell,
            "warm": {"code": self.python} if self.python is not None else None,
            "id": self.id,
            "cwd": self.cwd,
            "env": dict(self.env) or None,
            "user": self.user,
            "stdin": True if self.stdin is True else None,
            "stdin_b64": base64.b64encode(self.stdin).decode() if isinstance(self.stdin, bytes) else None,
            "pty": {"rows": self.pty[0], "cols": self.pty[1]} if self.pty else None,
            # At least a millisecond: zero would mean no limit at all.
            "timeout_ms": max(1, round(self.timeout_s * 1000)) if self.timeout_s is not None else None,
            "output_limit_bytes": self.output_limit_bytes,
            "on_detach": "kill" if self.kill_on_detach else None,
        }
        return {name: value for name, value in params.items() if value is not None}


class Output(NamedTuple):
    """`channel` is 1 for stdout, 2 for stderr. A jump in `offset` is output that the ring no longer had."""

    channel: int
    offset: int
    data: bytes


class ProcessStream:
    """An attachment: iterate over its Output, then read `exit`. Leave it with `close` (or `async with`); that detaches.

    The process waits for a slow reader, at most a ring ahead of it. If the guest vanishes the iteration raises
    GuestGone: an end without `exit` does not exist.
    """

    def __init__(self, stream: Stream, started: Started) -> None:
        self._stream = stream
        self._exit: Exit | None = None
        self.started = started

    @property
    def id(self) -> str:
        return self.started.id

    @property
    def exit(self) -> Exit:
        """How the process ended; only after the last Output."""
        if self._exit is None:
            raise RuntimeError("the process has not ended, or its output was not read to the end")
        return self._exit

    def __aiter__(self) -> ProcessStream:
        return self

    async def __anext__(self) -> Output:
        data = await self._stream.receive()
        if data is None:
            if self._exit is None:
                self._exit = wire.parse(Exit, self._stream.end)
            raise StopAsyncIteration
        if data.channel == wire.Channel.BODY:
            raise GuestProtocolError("the guest sent a body as output")
        return Output(*data)

    async def wait(self) -> Exit:
        """Read and drop the rest of the output."""
        async for _ in self:
            pass
        return self.exit

    async def write(self, data: bytes) -> None:
        """Feed stdin; waits for the process to take it."""
        await self._stream.send(data)

    def end_input(self) -> None:
        self._stream.finish_sending()

    def close(self) -> None:
        self._stream.reset()

    async def __aenter__(self) -> ProcessStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
