"""Everything the host asks of a sandbox, as typed methods over one session.

Each method takes `timeout_s` for the guest's answer (None: no limit) and raises GuestTimeout after it. Paths are
`str | bytes` with the meaning of `os.fsencode`. What the guest refuses is raised as in `stream.from_guest`.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping, Sequence
from typing import Any

from pandastack.errors import GuestProtocolError, PandastackError
from pandastack.host.guest.connection import ByteStream, GuestConnection, deadline
from pandastack.host.guest.processes import ProcessSpec, ProcessStream
from pandastack.host.guest.stream import Stream
from pandastack.wire import guest as wire
from pandastack.wire.guest import (
    Exit,
    FileStat,
    Health,
    IdentityReport,
    OutputSlice,
    Port,
    ProcessEntry,
    Resources,
    Sealed,
    Started,
    WatchBatch,
)

ANSWER_TIMEOUT_S = 30.0
HOOK_TIMEOUT_S = 10.0  # The guest's own default; it takes at most 120.
Path = str | bytes


class Guest:
    """A session with one sandbox. Open with `open`, end with `close`; any number of tasks may use it at once."""

    def __init__(self, connection: GuestConnection) -> None:
        self.connection = connection

    @classmethod
    async def open(cls, channel: ByteStream, *, token: str | None = None, timeout_s: float = ANSWER_TIMEOUT_S) -> Guest:
        """Start a session on a channel, which it owns from here on. Raises GuestTimeout, GuestGone, GuestProtocolError."""
        return cls(await GuestConnection.open(channel, token=token, timeout_s=timeout_s))

    async def close(self) -> None:
        """End the session. Processes in the sandbox run on. Idempotent."""
        await self.connection.close()

    @property
    def closed(self) -> bool:
        return self.connection.closed

    async def ended(self) -> PandastackError:
        """Wait for the end of the session, and say why."""
        return await self.connection.ended()

    # Processes.

    async def run(self, spec: ProcessSpec, *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> ProcessStream:
        """Start a program and follow it. `timeout_s` is for the start; the program's own limit is in the spec."""
        return await self._follow("process.run", spec.params(), data=spec.stdin is True, timeout_s=timeout_s)

    async def start(self, spec: ProcessSpec, *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> Started:
        """Start a program and leave it."""
        return await self.connection.request("process.start", spec.params(), Started, timeout_s=timeout_s)

    async def attach(
        self,
        process_id: str,
        *,
        stdout_offset: int | None = None,
        stderr_offset: int | None = None,
        timeout_s: float | None = ANSWER_TIMEOUT_S,
    ) -> ProcessStream:
        """Follow a process from these offsets on; None: from the oldest byte kept. Works after its end, too."""
        params = _given(id=process_id, stdout_offset=stdout_offset, stderr_offset=stderr_offset)
        return await self._follow("process.attach", params, data=False, timeout_s=timeout_s)

    async def write_stdin(
        self,
        process_id: str,
        data: bytes | AsyncIterable[bytes],
        *,
        close: bool = False,
        timeout_s: float | None = ANSWER_TIMEOUT_S,
    ) -> int:
        """Feed stdin and return the number of bytes; `close` ends it. Waits for the process to take them."""
        params = {"id": process_id, "keep_open": not close}
        async with deadline(timeout_s), self.connection.call("process.stdin", params, data=True) as stream:
            return wire.parse(wire.Bytes, await _upload(stream, data)).bytes

    async def signal(self, process_id: str, signal: int, *, tree: bool = True, timeout_s: float | None = ANSWER_TIMEOUT_S) -> int:
        """Signal the tree, or only the main process; returns how many got it. SIGKILL returns when the tree is gone."""
        params = {"id": process_id, "signal": int(signal), "tree": tree}
        return (await self.connection.request("process.signal", params, wire.Sent, timeout_s=timeout_s)).sent

    async def wait(self, process_id: str, *, timeout_s: float | None = None) -> Exit:
        """Wait for the end of a process without reading its output."""
        return await self.connection.request("process.wait", {"id": process_id}, Exit, timeout_s=timeout_s)

    async def list_processes(self, *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> list[ProcessEntry]:
        """Running processes and the last finished ones, in the order they were started."""
        found: list[ProcessEntry] = []
        async with deadline(timeout_s), self.connection.call("process.list", {}) as stream:
            await stream.reply()
            async for line in stream.lines():
                found.extend(wire.parse(wire.ProcessBatch, line).processes)
        return found

    async def resize(self, process_id: str, rows: int, cols: int, *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> None:
        params = {"id": process_id, "rows": rows, "cols": cols}
        await self.connection.request("process.resize", params, wire.Empty, timeout_s=timeout_s)

    async def output(
        self,
        process_id: str,
        channel: int,
        offset: int,
        limit_bytes: int = 128 << 10,
        *,
        timeout_s: float | None = ANSWER_TIMEOUT_S,
    ) -> OutputSlice:
        """A slice (at most 128 KiB) of what is kept of stdout (1) or stderr (2)."""
        params = {"id": process_id, "stream": channel, "offset": offset, "limit": limit_bytes}
        return await self.connection.request("process.output", params, OutputSlice, timeout_s=timeout_s)

    # Files.

    async def read_file(
        self,
        path: Path,
        offset: int = 0,
        length: int | None = None,
        *,
        timeout_s: float | None = ANSWER_TIMEOUT_S,
    ) -> tuple[FileStat, AsyncIterator[bytes]]:
        """What the file is, and its bytes. Iterate to the end or `aclose` the iterator, else the call stays open."""
        params = _given(**_path(path), offset=offset, length=length)
        stream = self.connection.start("file.read", params)
        try:
            async with deadline(timeout_s):
                stat = wire.parse(FileStat, await stream.reply())
        except BaseException:
            stream.reset()
            raise
        return stat, _Body(stream)

    async def write_file(
        self,
        path: Path,
        data: bytes | AsyncIterable[bytes],
        *,
        mode: int | None = None,
        owner: str | None = None,
        parents: bool = True,
        size: int | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Replace a file as a whole; returns its size. Readers never see half of it, and an abort leaves the old one."""
        params = _given(**_path(path), mode=mode, owner=owner, parents=parents, size=size)
        async with deadline(timeout_s), self.connection.call("file.write", params, data=True) as stream:
            return wire.parse(wire.Bytes, await _upload(stream, data)).bytes

    async def stat(self, path: Path, *, follow: bool = True, timeout_s: float | None = ANSWER_TIMEOUT_S) -> FileStat:
        params = {**_path(path), "follow": follow}
        return await self.connection.request("file.stat", params, FileStat, timeout_s=timeout_s)

    async def list_dir(self, path: Path, *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> AsyncIterator[FileStat]:
        """The entries of a directory in its own order, links not followed; `timeout_s` is for the whole listing."""
        async with deadline(timeout_s), self.connection.call("file.list", _path(path)) as stream:
            await stream.reply()
            async for line in stream.lines():
                for entry in wire.parse(wire.FileBatch, line).entries:
                    yield entry

    async def scan(self, path: Path, limit: int, *, timeout_s: float = ANSWER_TIMEOUT_S) -> AsyncGenerator[wire.Scanned, None]:
        """A tree in the order of its paths' parts, from its root on, links not followed, other file systems left out.

        `timeout_s` is for each part of the answer. Raises TooLarge where there are more entries than `limit`, GuestProtocolError
        where they do not come in order. Works while the guest is sealed.
        """
        last: list[bytes] | None = None
        async with self.connection.call("file.scan", {**_path(path), "limit": limit}) as stream:
            async with deadline(timeout_s):
                await stream.reply()
            count, lines = 0, stream.lines()
            while (line := await _next(lines, timeout_s)) is not None:
                for entry in wire.parse(wire.ScanBatch, line).entries:
                    parts = _parts(entry.path_bytes)
                    if (count := count + 1) > limit or (parts != [] if last is None else parts <= last):
                        raise GuestProtocolError("the guest sent a tree that is none")
                    last = parts
                    yield entry
            if wire.parse(wire.Counted, stream.end).count != count:
                raise GuestProtocolError("the guest sent a tree that is not whole")

    async def digests(self, paths: Sequence[bytes], *, timeout_s: float = ANSWER_TIMEOUT_S) -> list[str | None]:
        """SHA-256 of the content of files (at most 1000), in order; None for what is no file. `timeout_s` is for a hundred of them."""
        found: list[str | None] = []
        params = {"paths_b64": [base64.b64encode(path).decode() for path in paths]}
        async with self.connection.call("file.digests", params) as stream:
            async with deadline(timeout_s):
                await stream.reply()
            lines = stream.lines()
            while (line := await _next(lines, timeout_s)) is not None:
                found.extend(wire.parse(wire.DigestBatch, line).digests)
                if len(found) > len(paths):
                    break
        if len(found) != len(paths):
            raise GuestProtocolError("the guest sent another number of digests")
        return found

    async def mkdir(self, path: Path, *, parents: bool = True, mode: int = 0o755, timeout_s: float | None = ANSWER_TIMEOUT_S) -> bool:
        """True if it was created; with `parents` an existing directory is no error."""
        params = {**_path(path), "parents": parents, "mode": mode}
        return (await self.connection.request("file.mkdir", params, wire.Created, timeout_s=timeout_s)).created

    async def move(self, source: Path, destination: Path, *, overwrite: bool = False, timeout_s: float | None = ANSWER_TIMEOUT_S) -> None:
        params = {**_path(source, "from"), **_path(destination, "to"), "overwrite": overwrite}
        await self.connection.request("file.move", params, wire.Empty, timeout_s=timeout_s)

    async def remove(self, path: Path, *, recursive: bool = False, timeout_s: float | None = ANSWER_TIMEOUT_S) -> None:
        params = {**_path(path), "recursive": recursive}
        await self.connection.request("file.remove", params, wire.Empty, timeout_s=timeout_s)

    async def chmod(
        self,
        path: Path,
        *,
        mode: int | None = None,
        owner: str | None = None,
        recursive: bool = False,
        timeout_s: float | None = ANSWER_TIMEOUT_S,
    ) -> None:
        """`owner` is "user" or "user:group", names or numbers."""
        params = _given(**_path(path), mode=mode, owner=owner, recursive=recursive)
        await self.connection.request("file.chmod", params, wire.Empty, timeout_s=timeout_s)

    @contextlib.asynccontextmanager
    async def watch(
        self, path: Path, *, recursive: bool = False, timeout_s: float | None = ANSWER_TIMEOUT_S
    ) -> AsyncIterator[AsyncIterator[WatchBatch]]:
        """Inside the block changes are being watched; iterate over batches. The iteration ends when the path is gone."""
        params = {**_path(path), "recursive": recursive}
        async with self.connection.call("file.watch", params, data=True) as stream:
            async with deadline(timeout_s):
                await stream.reply()
            yield _batches(stream)

    # The machine.

    async def identity(
        self,
        *,
        sandbox_id: str,
        hostname: str,
        unix_ns: int,
        entropy: bytes,
        token: str,
        env: Mapping[str, str],
        machine_id: str,
        hook_timeout_s: float = HOOK_TIMEOUT_S,
        timeout_s: float | None = ANSWER_TIMEOUT_S,
    ) -> IdentityReport:
        """Make this machine itself, run its hook after-restore, and unseal it and what was frozen; `entropy` is 64 bytes.

        A failed step is in the report, not raised: a sealed machine then stays sealed. `timeout_s` is beside the hook's time.
        """
        params = {
            "sandbox_id": sandbox_id,
            "hostname": hostname,
            "unix_ns": unix_ns,
            "entropy_b64": base64.b64encode(entropy).decode(),
            "token": token,
            "env": dict(env),
            "machine_id": machine_id,
            "hook_timeout_ms": _milliseconds(hook_timeout_s),
        }
        return await self.connection.request("machine.identity", params, IdentityReport, timeout_s=_longer(timeout_s, hook_timeout_s))

    async def rehearse(
        self, *, hostname: str, unix_ns: int, entropy: bytes, machine_id: str, timeout_s: float | None = ANSWER_TIMEOUT_S
    ) -> IdentityReport:
        """The steps of an identity that the kernel and the file system do, and the daemon's own file run as a command.

        Only while it is sealed, and stays so. What it sets, the identity sets again.
        """
        params = {
            "hostname": hostname,
            "unix_ns": unix_ns,
            "entropy_b64": base64.b64encode(entropy).decode(),
            "machine_id": machine_id,
        }
        return await self.connection.request("machine.rehearse", params, IdentityReport, timeout_s=timeout_s)

    async def seal(
        self,
        freeze: bool = False,
        *,
        reason: str = "snapshot",
        hook_timeout_s: float = HOOK_TIMEOUT_S,
        timeout_s: float | None = ANSWER_TIMEOUT_S,
    ) -> Sealed:
        """Run the hook before-snapshot, then refuse work until the next identity or `unseal`.

        With `freeze` every process is stopped, and calls wait instead of being refused. `reason` (bake, snapshot, fork,
        hibernate) is told to the hook; `timeout_s` is beside the hook's time. All or nothing: raises HookFailed, or GuestError
        (`guest_code` is `not_frozen`), with everything running as before.
        """
        params = {"freeze": freeze, "reason": reason, "hook_timeout_ms": _milliseconds(hook_timeout_s)}
        return await self.connection.request("machine.seal", params, Sealed, timeout_s=_longer(timeout_s, hook_timeout_s))

    async def unseal(self, *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> int:
        """Take a seal back, without a new identity; returns how many frozen processes were continued. Idempotent."""
        return (await self.connection.request("machine.unseal", {}, wire.Continued, timeout_s=timeout_s)).continued

    async def health(self, *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> Health:
        return await self.connection.request("machine.health", {}, Health, timeout_s=timeout_s)

    async def resources(self, *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> Resources:
        return await self.connection.request("machine.resources", {}, Resources, timeout_s=timeout_s)

    async def ports(self, *, timeout_s: float | None = ANSWER_TIMEOUT_S) -> list[Port]:
        """Listening TCP sockets, without the daemon's own."""
        return (await self.connection.request("machine.ports", {}, wire.Ports, timeout_s=timeout_s)).ports

    async def warm(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, ready_timeout_s: float = 60.0) -> Started:
        """Start a baked process and wait for its line `ready`; ["pandastack:python", module...] is the warm interpreter."""
        params = {"argv": list(argv), "env": dict(env or {}), "ready_timeout_ms": round(ready_timeout_s * 1000)}
        return await self.connection.request("machine.warm", params, Started, timeout_s=ready_timeout_s + 5)

    async def _follow(self, method: str, params: Mapping[str, Any], *, data: bool, timeout_s: float | None) -> ProcessStream:
        stream = self.connection.start(method, params, data=data)
        try:
            async with deadline(timeout_s):
                return ProcessStream(stream, wire.parse(Started, await stream.reply()))
        except BaseException:
            stream.reset()
            raise


class _Body:
    """The bytes of a file, with `aclose` for a reader that has seen enough."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        try:
            data = await self._stream.receive()
        except BaseException:
            self._stream.reset()
            raise
        if data is None:
            wire.parse(wire.Bytes, self._stream.end)  # An end without a result is no end of file.
            raise StopAsyncIteration
        if data.channel != wire.Channel.BODY:
            raise GuestProtocolError("the guest sent output as a body")
        return data.data

    async def aclose(self) -> None:
        self._stream.reset()


async def _next(lines: AsyncIterator[bytes], timeout_s: float) -> bytes | None:
    async with deadline(timeout_s):
        return await anext(lines, None)


def _parts(path: bytes) -> list[bytes]:
    """The names of a relative path. Raises GuestProtocolError for one that could lead out of its tree."""
    parts = path.split(b"/") if path else []
    if b"\0" in path or any(part in (b"", b".", b"..") for part in parts):
        raise GuestProtocolError("the guest sent a path that is none")
    return parts


async def _batches(stream: Stream) -> AsyncIterator[WatchBatch]:
    async for line in stream.lines():
        yield wire.parse(WatchBatch, line)


async def _upload(stream: Stream, data: bytes | AsyncIterable[bytes]) -> bytes:
    if isinstance(data, bytes):
        await stream.send(data)
    else:
        async for piece in data:
            await stream.send(piece)
            if stream.complete:
                break  # Refused half way: the answer says why.
    stream.finish_sending()
    return await stream.answer()


def _path(path: Path, name: str = "path") -> dict[str, str]:
    raw = os.fsencode(path)
    try:
        return {name: raw.decode()}
    except UnicodeDecodeError:
        return {f"{name}_b64": base64.b64encode(raw).decode()}


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _longer(timeout_s: float | None, by_s: float) -> float | None:
    return None if timeout_s is None else timeout_s + by_s


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
