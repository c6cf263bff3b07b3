"""The user's own side of a transfer: reading what is uploaded, writing what is downloaded, in bounded memory."""

from __future__ import annotations

import asyncio
import io
import os
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from pandastack.sdk.calls.files import CHUNK_BYTES


class Readable(Protocol):
    """A file opened for reading bytes."""

    def read(self, size: int = -1, /) -> bytes: ...


Content = bytes | bytearray | memoryview | str | Readable | Iterable[bytes]
Chunks = Callable[[], Iterable[bytes]]


def is_whole(content: object) -> bool:
    return isinstance(content, (bytes, bytearray, memoryview, str))


def whole(content: object) -> bytes:
    return content.encode("utf-8", "surrogatepass") if isinstance(content, str) else bytes(cast(bytes, content))


def chunks_of(content: Readable | Iterable[bytes]) -> tuple[Chunks, int | None, bool]:
    """How to read it, how many bytes it has (None: unknown), and whether it can be read again from the same place."""
    if not hasattr(content, "read"):
        given = content
        return lambda: given, None, isinstance(content, (list, tuple))
    file = cast(BinaryIO, content)
    try:
        begin = file.tell()
        length = file.seek(0, io.SEEK_END) - begin
        file.seek(begin)
    except (OSError, AttributeError):
        return lambda: _pieces(file, None), None, False

    def again() -> Iterator[bytes]:
        file.seek(begin)
        return _pieces(file, length)

    return again, length, True


def chunks_of_path(path: str | os.PathLike[str]) -> tuple[Chunks, int | None]:
    """The same for a file on this machine. A pipe or a device has no length, and can be read only once."""
    with Path(path).open("rb") as file:
        length = os.fstat(file.fileno()).st_size if Path(path).is_file() else None

    def again() -> Iterator[bytes]:
        with Path(path).open("rb", buffering=0) as file:
            yield from _pieces(file, length)

    return again, length


def _pieces(file: Readable, length: int | None) -> Iterator[bytes]:
    """Exactly `length` bytes: what was announced is what must be sent, even where the file grows meanwhile."""
    left = length
    while left is None or left > 0:
        data = file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
        if not data:
            if left is not None:
                raise OSError("the file became shorter while it was being sent")
            return
        if isinstance(data, str):
            raise TypeError("the file must be opened for bytes ('rb')")
        if left is not None:
            left -= len(data)
        yield data


async def in_thread(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Read a blocking source without stopping the event loop."""
    iterator = iter(chunks)
    while (data := await asyncio.to_thread(next, iterator, None)) is not None:
        yield data


def async_chunks(content: object) -> tuple[Callable[[], AsyncIterable[bytes]], int | None, bool]:
    """As `chunks_of`; also takes an async iterable."""
    if hasattr(content, "__aiter__"):
        given = cast(AsyncIterable[bytes], content)
        return lambda: given, None, False
    chunks, length, repeatable = chunks_of(cast("Readable | Iterable[bytes]", content))
    return lambda: in_thread(chunks()), length, repeatable


@contextmanager
def replacing(path: str | os.PathLike[str], name: str) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` only when everything has arrived; before that nothing is changed.

    In a directory the file is called `name`. Devices and pipes are written directly.
    """
    target = Path(path)
    if target.is_dir():
        target /= Path(name).name
    if target.exists() and not target.is_file():
        with target.open("wb") as device:
            yield cast(BinaryIO, device)
        return
    target = target.resolve()
    partial = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
    file = partial.open("xb", buffering=CHUNK_BYTES)
    try:
        with file:
            yield file
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
