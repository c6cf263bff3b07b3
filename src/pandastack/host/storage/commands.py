"""Starts the programs that make images and fetch packages, and never loses one: a deadline, and a process group that dies whole.

Runs on a host. Of a build's, output goes to a log file and, line by line, to whoever counts progress.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

_CHUNK_BYTES = 64 * 1024
_LINE_BYTES = 8 * 1024  # A line longer than this is cut; no tool used here writes one.
_LAST_LINES = 60
_TICK_S = 2.0
_REAP_S = 10.0


class CommandFailed(Exception):
    """A program ended badly. `exit_code` is None when it ran into its deadline; `lines` are its last words."""

    def __init__(self, program: str, exit_code: int | None, lines: Sequence[str]) -> None:
        super().__init__(f"{program} " + ("took too long" if exit_code is None else f"ended with code {exit_code}"))
        self.program = program
        self.exit_code = exit_code
        self.lines = list(lines)


@contextlib.asynccontextmanager
async def started(
    argv: Sequence[str], *, environment: Mapping[str, str], directory: Path | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program whose output, with its errors, the block reads. When the block ends the whole process group is dead.

    Raises OSError where it cannot be started.
    """
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *argv,
            cwd=directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
    )
    try:
        # To its end, also when this is cancelled: it runs, and starts others, before it is known here.
        yield await asyncio.shield(starting)
    finally:
        with contextlib.suppress(OSError):
            await _kill(await starting)


async def run(
    argv: Sequence[str | Path],
    *,
    log: Path,
    deadline_s: float,
    environment: Mapping[str, str],
    on_line: Callable[[str | None], None],
) -> None:
    """Run a program to its end. `on_line` gets each line of its output, and None every 2 s of silence.

    Raises CommandFailed. When this call is cancelled or fails, the whole process group is dead before it returns.
    """
    words = [os.fspath(word) for word in argv]
    with log.open("ab", buffering=0) as file:
        file.write(f"$ {' '.join(words)}\n".encode())
        last: deque[str] = deque(maxlen=_LAST_LINES)

        def line_read(line: str | None) -> None:
            if line:
                last.append(line)
            on_line(line)

        async with contextlib.AsyncExitStack() as running:
            try:
                process = await running.enter_async_context(started(words, environment=environment))
            except OSError as error:
                raise CommandFailed(words[0], 127, [str(error)]) from error
            try:
                async with asyncio.timeout(deadline_s):
                    await _copy(cast(asyncio.StreamReader, process.stdout), file.write, line_read)
                    code = await process.wait()
            except TimeoutError as error:
                raise CommandFailed(words[0], None, last) from error
        if code != 0:
            raise CommandFailed(words[0], code, last)


async def _copy(stream: asyncio.StreamReader, write: Callable[[bytes], object], on_line: Callable[[str | None], None]) -> None:
    rest = b""
    while True:
        try:
            async with asyncio.timeout(_TICK_S):
                chunk = await stream.read(_CHUNK_BYTES)
        except TimeoutError:
            on_line(None)
            continue
        if not chunk:
            break
        write(chunk)
        *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            on_line(line[:_LINE_BYTES].decode("utf-8", "replace"))
        rest = rest[-_LINE_BYTES:]
    if rest:
        on_line(rest.decode("utf-8", "replace"))


async def _kill(process: asyncio.subprocess.Process) -> None:
    # SIGKILL at once: all a build has made so far is thrown away, so no program needs time to tidy up. `unshare
    # --kill-child` passes it on to its process namespace, where dpkg's children may have left the group. A leader that
    # has ended took its namespace with it, and its number may already belong to someone else.
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_REAP_S):
            await process.wait()
