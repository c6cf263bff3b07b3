"""Processes for `FakeHost`: a few shell words, output in rings with offsets, and the pausing of a real pipe.

Words: `echo [-n] ...`, `printf TEXT`, `true`, `false`, `exit N`, `sleep N`, `cat [FILE]`, `pwd`, `yes | head -c N`,
`python3 -c 'print("...")'`; joined by `;`, `&&`; `>&2` after a command sends its output to stderr.
"""

from __future__ import annotations

import asyncio
import codecs
import re
import shlex
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal

from pandastack.errors import Conflict
from pandastack.wire.host import Output, OutputSlice, ProcessExit
from pandastack.wire.ids import ProcessId
from pandastack.wire.processes import Command, ProcessView

Channel = Literal["stdout", "stderr"]
RING_BYTES = 1 << 20
PIPE_BYTES = 64 << 10
BLOCK = b"y\n" * (32 << 10)
SIGNALS = {"HUP": 1, "INT": 2, "QUIT": 3, "KILL": 9, "USR1": 10, "USR2": 12, "TERM": 15}
_PRINT = re.compile(r"""print\((['"])(.*)\1\)""", re.S)


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class Ring:
    """The newest bytes of one output: `start` is the offset of the first that is kept, `end` that of the next to come."""

    def __init__(self) -> None:
        self.start = 0
        self.end = 0
        self._pieces: deque[tuple[int, bytes]] = deque()

    def add(self, data: bytes) -> None:
        self._pieces.append((self.end, data))
        self.end += len(data)
        while self.end - self.start > RING_BYTES and len(self._pieces) > 1:
            offset, oldest = self._pieces.popleft()
            self.start = offset + len(oldest)

    def after(self, offset: int) -> tuple[int, bytes]:
        """The piece that holds `offset` (or the oldest), from there to its end; empty at the end."""
        offset = max(offset, self.start)
        for begin, piece in self._pieces:
            if offset < begin + len(piece):
                return offset, piece if offset == begin else piece[offset - begin :]
        return self.end, b""

    def slice(self, offset: int, limit: int) -> tuple[int, bytes]:
        first, data = self.after(offset)
        parts, size = [data], len(data)
        while data and size < limit:
            _, data = self.after(first + size)
            parts.append(data)
            size += len(data)
        return first, b"".join(parts)[:limit]


class Pipe:
    """Standard input: at most `PIPE_BYTES` wait in it, then the writer waits."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._closed = False
        self._changed = asyncio.Condition()

    async def write(self, data: bytes) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._size < PIPE_BYTES or self._closed)
            if not self._closed:
                self._pieces.append(data)
                self._size += len(data)
            self._changed.notify_all()

    async def close(self) -> None:
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def read(self) -> bytes:
        """The next piece; empty at the end."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._pieces or self._closed)
            piece = self._pieces.popleft() if self._pieces else b""
            self._size -= len(piece)
            self._changed.notify_all()
            return piece


class _Exit(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


class FakeProcess:
    """A process: begin it with `start`, end it with `kill`; its owner awaits `task`."""

    def __init__(self, process_id: ProcessId, pid: int, command: Command, read_file: Callable[[bytes], bytes | None]) -> None:
        self.id = process_id
        self.pid = pid
        self.command = command
        self.pipe = Pipe()
        self.ended: ProcessExit | None = None
        self.task: asyncio.Task[None]
        self._read_file = read_file
        self._rings: dict[Channel, Ring] = {"stdout": Ring(), "stderr": Ring()}
        self._readers: list[dict[Channel, int]] = []
        self._changed = asyncio.Condition()
        self._began = time.monotonic()
        self._started_at = now()
        self._ended_at: str | None = None
        self._killed_by: str | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self._run(), name=f"fake process {self.id}")

    def view(self) -> ProcessView:
        out, err = self._rings["stdout"], self._rings["stderr"]
        return ProcessView(
            id=self.id,
            pid=self.pid,
            command=self._text(),
            user=self.command.user or "root",
            running=self.ended is None,
            started_at=self._started_at,
            ended_at=self._ended_at,
            exit_code=self.ended.exit_code if self.ended else None,
            signal=self.ended.signal if self.ended else None,
            reason=self.ended.reason if self.ended else None,
            stdout_start=out.start,
            stdout_bytes=out.end,
            stderr_start=err.start,
            stderr_bytes=err.end,
        )

    def kill(self, signal: str) -> None:
        if self.ended is not None:
            raise Conflict("the process has ended")
        if signal in SIGNALS:
            self._killed_by = signal
            # A task that has not taken its first step would be gone without a trace; one that has, ends in `_run`.
            asyncio.get_running_loop().call_soon(self.task.cancel)

    def slice(self, channel: Channel, offset: int, limit: int) -> OutputSlice:
        first, data = self._rings[channel].slice(offset, limit)
        return OutputSlice(offset=first, data=data, end=self._rings[channel].end, running=self.ended is None)

    async def follow(self, stdout_offset: int, stderr_offset: int) -> AsyncIterator[Output | ProcessExit]:
        with self._reading({"stdout": stdout_offset, "stderr": stderr_offset}) as position:
            while True:
                waiting = True
                for channel, ring in self._rings.items():
                    offset, data = ring.after(position[channel])
                    if data:
                        waiting = False
                        yield Output(channel, offset, data)
                        # Only when the reader comes back has it taken the piece.
                        async with self._changed:
                            position[channel] = offset + len(data)
                            self._changed.notify_all()
                if waiting:
                    if self.ended is not None:
                        yield self.ended
                        return
                    async with self._changed:
                        await self._changed.wait_for(lambda: self.ended is not None or self._has_more(position))

    def _has_more(self, position: dict[Channel, int]) -> bool:
        return any(ring.end > position[channel] for channel, ring in self._rings.items())

    @contextmanager
    def _reading(self, position: dict[Channel, int]) -> Iterator[dict[Channel, int]]:
        self._readers.append(position)
        try:
            yield position
        finally:
            self._readers.remove(position)
            self._nudge = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _write(self, channel: Channel, data: bytes) -> None:
        """Waits while a reader is a ring behind, as a full pipe would; without readers the oldest bytes are dropped."""
        ring = self._rings[channel]
        async with self._changed:
            await self._changed.wait_for(lambda: all(ring.end + len(data) - position[channel] <= RING_BYTES for position in self._readers))
            ring.add(data)
            self._changed.notify_all()
        await asyncio.sleep(0)

    def _text(self) -> str:
        return self.command.cmd or (shlex.join(self.command.argv) if self.command.argv else "") or self.command.code or ""

    async def _run(self) -> None:
        reason: Literal["exited", "signaled", "timeout", "killed"] = "exited"
        code, signal = 0, None
        try:
            async with asyncio.timeout(self.command.timeout_seconds) as limit:
                code = await self._script()
        except TimeoutError:
            code, signal, reason = 137, "KILL", "timeout"
        except asyncio.CancelledError:
            if limit.expired():
                raise
            signal = self._killed_by or "KILL"
            code, reason = 128 + SIGNALS[signal], "killed" if signal == "KILL" else "signaled"
        self._ended_at = now()
        self.ended = ProcessExit(
            exit_code=code,
            signal=signal,
            reason=reason,
            stdout_bytes=self._rings["stdout"].end,
            stderr_bytes=self._rings["stderr"].end,
            duration_ms=round((time.monotonic() - self._began) * 1000),
        )
        await self.pipe.close()
        await self._tell()

    async def _script(self) -> int:
        if self.command.code is not None:
            words = ["python3", "-c", self.command.code]
        elif self.command.argv is not None:
            words = list(self.command.argv)
        else:
            lexer = shlex.shlex(self.command.cmd or "", posix=True, punctuation_chars=";&|<>")
            lexer.whitespace_split = True
            try:
                words = list(lexer)
            except ValueError:
                await self._write("stderr", b"sh: syntax error: unterminated quoted string\n")
                return 2
        code = 0
        try:
            one: list[str] = []
            for word in [*words, ";"]:
                if word in (";", "&&"):
                    code = await self._one(one) if one else code
                    one = []
                    if word == "&&" and code != 0:
                        return code
                else:
                    one.append(word)
        except _Exit as end:
            return end.code
        return code

    async def _one(self, words: list[str]) -> int:
        channel: Channel = "stdout"
        if ">&" in words and words[-1] == "2":
            at = words.index(">&")
            words, channel = words[:at], "stderr"
        match words:
            case ["true"]:
                return 0
            case ["false"]:
                return 1
            case ["exit", *rest]:
                raise _Exit(int(rest[0]) if rest else 0)
            case ["sleep", seconds]:
                await asyncio.sleep(float(seconds))
            case ["echo", "-n", *rest]:
                await self._write(channel, " ".join(rest).encode())
            case ["echo", *rest]:
                await self._write(channel, (" ".join(rest) + "\n").encode())
            case ["printf", text, *_]:
                raw, _size = codecs.escape_decode(text.encode())
                await self._write(channel, raw)
            case ["pwd"]:
                await self._write(channel, (self.command.cwd or "/root").encode() + b"\n")
            case ["env"]:
                await self._write(channel, "".join(f"{key}={value}\n" for key, value in self.command.env.items()).encode())
            case ["cat"]:
                while piece := await self.pipe.read():
                    await self._write(channel, piece)
            case ["cat", path]:
                data = self._read_file(path.encode())
                if data is None:
                    await self._write("stderr", f"cat: {path}: No such file or directory\n".encode())
                    return 1
                if data:
                    await self._write(channel, data)
            case ["yes", "|", "head", "-c", size]:
                left = int(size)
                while left > 0:
                    await self._write(channel, BLOCK[:left])
                    left -= len(BLOCK)
            case ["python3", "-c", code]:
                printed = _PRINT.search(code)
                if printed:
                    await self._write(channel, printed[2].encode() + b"\n")
            case _:
                await self._write("stderr", f"sh: {words[0][:100]}: not found\n".encode())
                return 127
        return 0
