"""`sandbox.filesystem`: files in a sandbox. Transfers run in bounded memory, names may be any bytes that Linux allows."""

from __future__ import annotations

import asyncio
import builtins
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterator
from typing import TYPE_CHECKING, Self

from pandastack import errors
from pandastack.sdk import local_files, sse
from pandastack.sdk.calls import files as calls
from pandastack.sdk.calls.call import PathLike
from pandastack.sdk.calls.processes import SILENCE_S
from pandastack.sdk.local_files import Content
from pandastack.sdk.results import FileEvent, FileInfo, FileWritten

if TYPE_CHECKING:
    from pandastack.sdk.client import AsyncClient, Client

LocalPath = str | os.PathLike[str]
RECONNECT_S = 60.0


class Filesystem:
    def __init__(self, client: Client, sandbox_id: str) -> None:
        self._client = client
        self._sandbox_id = sandbox_id

    def read(self, path: PathLike, *, offset: int | None = None, length: int | None = None) -> bytes:
        """The bytes of a file, or of a part of it. Raises FileNotFound (a FileNotFoundError)."""
        try:
            return self._client._call(calls.read(self._sandbox_id, path, offset, length))
        except errors.PandastackError as error:
            if calls.is_past_end(error):
                return b""
            raise

    def read_text(self, path: PathLike, encoding: str = "utf-8") -> str:
        return self.read(path).decode(encoding)

    def read_chunks(self, path: PathLike, *, offset: int | None = None, length: int | None = None) -> Generator[bytes]:
        """The same as `read`, piece by piece as it arrives, for files that should not be held in memory."""
        with self._client._open(calls.open_read(self._sandbox_id, path, offset, length)) as opened:
            yield from opened

    def write(self, path: PathLike, content: Content, *, mode: str | None = None, owner: str | None = None) -> FileWritten:
        """Replace a file. `content` is bytes, text, a file opened for bytes, or an iterable of bytes of any length.

        `mode` is octal text such as "0755"; `owner` is a user's name in the sandbox.
        """
        if local_files.is_whole(content):
            return self._client._call(calls.write(self._sandbox_id, path, local_files.whole(content), mode, owner))
        chunks, length, repeatable = local_files.chunks_of(content)  # type: ignore[arg-type]
        return self._client._call(calls.write_chunks(self._sandbox_id, path, chunks, length, repeatable=repeatable, mode=mode, owner=owner))

    def upload(self, local_path: LocalPath, remote_path: PathLike, *, mode: str | None = None, owner: str | None = None) -> FileWritten:
        """Send a file of this machine, of any size."""
        chunks, length = local_files.chunks_of_path(local_path)
        return self._client._call(
            calls.write_chunks(self._sandbox_id, remote_path, chunks, length, repeatable=length is not None, mode=mode, owner=owner)
        )

    def download(self, remote_path: PathLike, local_path: LocalPath) -> None:
        """Fetch a file of any size. The local file appears only when all of it has arrived."""
        with (
            self._client._open(calls.open_read(self._sandbox_id, remote_path)) as opened,
            local_files.replacing(local_path, os.fsdecode(remote_path)) as file,
        ):
            for data in opened:
                file.write(data)

    def listdir(self, path: PathLike = "/") -> list[FileInfo]:
        """Every entry of a directory, however many there are."""
        entries, after = self._client._call(calls.listdir(self._sandbox_id, path, None))
        while after is not None:
            more, after = self._client._call(calls.listdir(self._sandbox_id, path, after))
            entries += more
        return entries

    def stat(self, path: PathLike) -> FileInfo:
        """Raises FileNotFound (a FileNotFoundError)."""
        return self._client._call(calls.stat(self._sandbox_id, path))

    def exists(self, path: PathLike) -> bool:
        """False for a missing file only; a missing sandbox is an error."""
        try:
            self.stat(path)
        except errors.NotFoundError as error:
            if isinstance(error, errors.SandboxNotFound):
                raise
            return False
        return True

    def walk(self, path: PathLike = "/") -> Generator[tuple[str, list[FileInfo], list[FileInfo]]]:
        """(directory, directories, files), top down, as os.walk; links are not followed. What vanishes meanwhile is left out."""
        waiting = deque([os.fsdecode(path)])
        while waiting:
            folder = waiting.popleft()
            try:
                entries = self.listdir(folder)
            except errors.FileNotFound:
                if folder == os.fsdecode(path):
                    raise
                continue
            directories = [entry for entry in entries if entry.is_dir]
            yield folder, directories, [entry for entry in entries if not entry.is_dir]
            waiting.extendleft(entry.path for entry in reversed(directories))

    def mkdir(self, path: PathLike, *, parents: bool = True, mode: str | None = None) -> FileInfo:
        """With `parents` (the default) missing parents are made and an existing directory is fine."""
        return self._client._call(calls.mkdir(self._sandbox_id, path, parents, mode))

    def move(self, source: PathLike, destination: PathLike, *, overwrite: bool = False) -> FileInfo:
        """Rename. Raises FileConflict where the destination exists and `overwrite` is false."""
        return self._client._call(calls.move(self._sandbox_id, source, destination, overwrite))

    def remove(self, path: PathLike, *, recursive: bool = True) -> None:
        """Delete a file, or a directory with everything in it (only an empty one with `recursive=False`)."""
        self._client._call(calls.remove(self._sandbox_id, path, recursive))

    def chmod(self, path: PathLike, mode: str | int | None = None, *, owner: str | None = None, recursive: bool = False) -> FileInfo:
        """`mode` is octal text ("0644") or a number (0o644); `owner` is "user" or "user:group"."""
        return self._client._call(calls.chmod(self._sandbox_id, path, mode, owner, recursive))

    def watch(self, path: PathLike, *, recursive: bool = False) -> FileWatch:
        """Changes under a directory as they happen. Entering `with` returns once the watch is set."""
        return FileWatch(self._client, self._sandbox_id, path, recursive)


class FileWatch(Iterator[FileEvent]):
    """An endless iterator of FileEvent. After a break of the connection it goes on, with one `overflow` event first."""

    def __init__(self, client: Client, sandbox_id: str, path: PathLike, recursive: bool) -> None:
        self._client = client
        self._request = calls.watch(sandbox_id, path, recursive, SILENCE_S)
        self._breaks = _Breaks(os.fsdecode(path))
        self._began = False
        self._events = self._run()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> FileEvent:
        self._began = True
        for event in self._events:
            if event is not None:
                return event
        raise StopIteration

    def _run(self) -> Generator[FileEvent | None]:
        while True:
            failure: errors.PandastackError | None = None
            try:
                with self._client._open(self._request) as opened:
                    yield self._breaks.opened()
                    parser = sse.Parser()
                    for data in opened:
                        for event in parser.feed(data):
                            yield from self._breaks.read(event)
            except errors.PandastackError as error:
                failure = error
            time.sleep(self._breaks.after(failure, time.monotonic()))

    def close(self) -> None:
        self._events.close()

    def __enter__(self) -> Self:
        if not self._began:
            self._began = True
            next(self._events, None)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncFilesystem:
    def __init__(self, client: AsyncClient, sandbox_id: str) -> None:
        self._client = client
        self._sandbox_id = sandbox_id

    async def read(self, path: PathLike, *, offset: int | None = None, length: int | None = None) -> bytes:
        """The bytes of a file, or of a part of it. Raises FileNotFound (a FileNotFoundError)."""
        try:
            return await self._client._call(calls.read(self._sandbox_id, path, offset, length))
        except errors.PandastackError as error:
            if calls.is_past_end(error):
                return b""
            raise

    async def read_text(self, path: PathLike, encoding: str = "utf-8") -> str:
        return (await self.read(path)).decode(encoding)

    async def read_chunks(self, path: PathLike, *, offset: int | None = None, length: int | None = None) -> AsyncGenerator[bytes]:
        """The same as `read`, piece by piece as it arrives, for files that should not be held in memory."""
        async with self._client._open(calls.open_read(self._sandbox_id, path, offset, length)) as opened:
            async for data in opened:
                yield data

    async def write(
        self, path: PathLike, content: Content | AsyncIterable[bytes], *, mode: str | None = None, owner: str | None = None
    ) -> FileWritten:
        """As Filesystem.write; `content` may also be an async iterable of bytes."""
        if local_files.is_whole(content):
            return await self._client._call(calls.write(self._sandbox_id, path, local_files.whole(content), mode, owner))
        chunks, length, repeatable = local_files.async_chunks(content)
        return await self._client._call(
            calls.write_chunks(self._sandbox_id, path, chunks, length, repeatable=repeatable, mode=mode, owner=owner)
        )

    async def upload(
        self, local_path: LocalPath, remote_path: PathLike, *, mode: str | None = None, owner: str | None = None
    ) -> FileWritten:
        """Send a file of this machine, of any size."""
        chunks, length = await asyncio.to_thread(local_files.chunks_of_path, local_path)
        call = calls.write_chunks(
            self._sandbox_id, remote_path, lambda: local_files.in_thread(chunks()), length,
            repeatable=length is not None, mode=mode, owner=owner,
        )  # fmt: skip
        return await self._client._call(call)

    async def download(self, remote_path: PathLike, local_path: LocalPath) -> None:
        """Fetch a file of any size. The local file appears only when all of it has arrived."""
        async with self._client._open(calls.open_read(self._sandbox_id, remote_path)) as opened:
            with local_files.replacing(local_path, os.fsdecode(remote_path)) as file:
                waiting: builtins.list[bytes] = []
                size = 0
                async for data in opened:
                    waiting.append(data)
                    size += len(data)
                    # A thread per network read would cost more than the write itself.
                    if size >= calls.CHUNK_BYTES:
                        await asyncio.to_thread(file.writelines, waiting)
                        waiting, size = [], 0
                await asyncio.to_thread(file.writelines, waiting)

    async def listdir(self, path: PathLike = "/") -> list[FileInfo]:
        """Every entry of a directory, however many there are."""
        entries, after = await self._client._call(calls.listdir(self._sandbox_id, path, None))
        while after is not None:
            more, after = await self._client._call(calls.listdir(self._sandbox_id, path, after))
            entries += more
        return entries

    async def stat(self, path: PathLike) -> FileInfo:
        """Raises FileNotFound (a FileNotFoundError)."""
        return await self._client._call(calls.stat(self._sandbox_id, path))

    async def exists(self, path: PathLike) -> bool:
        """False for a missing file only; a missing sandbox is an error."""
        try:
            await self.stat(path)
        except errors.NotFoundError as error:
            if isinstance(error, errors.SandboxNotFound):
                raise
            return False
        return True

    async def walk(self, path: PathLike = "/") -> AsyncGenerator[tuple[str, list[FileInfo], list[FileInfo]]]:
        """(directory, directories, files), top down, as os.walk; links are not followed. What vanishes meanwhile is left out."""
        waiting = deque([os.fsdecode(path)])
        while waiting:
            folder = waiting.popleft()
            try:
                entries = await self.listdir(folder)
            except errors.FileNotFound:
                if folder == os.fsdecode(path):
                    raise
                continue
            directories = [entry for entry in entries if entry.is_dir]
            yield folder, directories, [entry for entry in entries if not entry.is_dir]
            waiting.extendleft(entry.path for entry in reversed(directories))

    async def mkdir(self, path: PathLike, *, parents: bool = True, mode: str | None = None) -> FileInfo:
        """With `parents` (the default) missing parents are made and an existing directory is fine."""
        return await self._client._call(calls.mkdir(self._sandbox_id, path, parents, mode))

    async def move(self, source: PathLike, destination: PathLike, *, overwrite: bool = False) -> FileInfo:
        """Rename. Raises FileConflict where the destination exists and `overwrite` is false."""
        return await self._client._call(calls.move(self._sandbox_id, source, destination, overwrite))

    async def remove(self, path: PathLike, *, recursive: bool = True) -> None:
        """Delete a file, or a directory with everything in it (only an empty one with `recursive=False`)."""
        await self._client._call(calls.remove(self._sandbox_id, path, recursive))

    async def chmod(self, path: PathLike, mode: str | int | None = None, *, owner: str | None = None, recursive: bool = False) -> FileInfo:
        """`mode` is octal text ("0644") or a number (0o644); `owner` is "user" or "user:group"."""
        return await self._client._call(calls.chmod(self._sandbox_id, path, mode, owner, recursive))

    def watch(self, path: PathLike, *, recursive: bool = False) -> AsyncFileWatch:
        """Changes under a directory as they happen. Entering `async with` returns once the watch is set."""
        return AsyncFileWatch(self._client, self._sandbox_id, path, recursive)


class AsyncFileWatch(AsyncIterator[FileEvent]):
    """As FileWatch."""

    def __init__(self, client: AsyncClient, sandbox_id: str, path: PathLike, recursive: bool) -> None:
        self._client = client
        self._request = calls.watch(sandbox_id, path, recursive, SILENCE_S)
        self._breaks = _Breaks(os.fsdecode(path))
        self._began = False
        self._events = self._run()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> FileEvent:
        self._began = True
        async for event in self._events:
            if event is not None:
                return event
        raise StopAsyncIteration

    async def _run(self) -> AsyncGenerator[FileEvent | None]:
        while True:
            failure: errors.PandastackError | None = None
            try:
                async with self._client._open(self._request) as opened:
                    yield self._breaks.opened()
                    parser = sse.Parser()
                    async for data in opened:
                        for event in parser.feed(data):
                            for change in self._breaks.read(event):
                                yield change
            except errors.PandastackError as error:
                failure = error
            await asyncio.sleep(self._breaks.after(failure, time.monotonic()))

    async def close(self) -> None:
        await self._events.aclose()

    async def __aenter__(self) -> Self:
        if not self._began:
            self._began = True
            await anext(self._events, None)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Breaks:
    """What to do when a watch breaks: set it again, and say that changes may have been missed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._openings = 0
        self._failures = 0
        self._since: float | None = None
        self._final: errors.PandastackError | None = None

    def opened(self) -> FileEvent | None:
        self._openings += 1
        return FileEvent("overflow", self._path) if self._openings > 1 else None

    def read(self, event: sse.ServerEvent) -> builtins.list[FileEvent]:
        self._failures, self._since = 0, None
        try:
            return calls.read_changes(event)
        except errors.PandastackError as error:
            self._final = error
            raise

    def after(self, failure: errors.PandastackError | None, now: float) -> float:
        """Seconds to wait; raises when the watch cannot be set (again)."""
        self._since = now if self._since is None else self._since
        temporary = failure is None or isinstance(failure, (errors.ConnectionError, errors.ServerError))
        if failure is not None and (not temporary or failure is self._final or self._openings == 0 or now - self._since > RECONNECT_S):
            raise failure
        self._failures += 1
        return min(2.0, 0.05 * 2.0 ** min(self._failures, 6))
