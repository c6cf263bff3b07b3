"""Files in a sandbox: turns guest answers into the public shapes. Paths are bytes and mean something only in there."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, AsyncIterator

from pandastack.host.guest import Guest
from pandastack.wire.files import ChangeMode, FileEntry, FileEvent
from pandastack.wire.guest import FileStat, WatchEvent

_BATCH = 512
_EVENTS = {
    "create": "create",
    "modify": "modify",
    "attributes": "attrib",
    "delete": "delete",
    "move_from": "move",
    "move_to": "move",
}


async def read(guest: Guest, path: bytes, *, offset: int, length: int | None) -> tuple[FileEntry, AsyncIterator[bytes]]:
    stat, body = await guest.read_file(path, offset, length)
    return entry(stat, path), body


async def stat(guest: Guest, path: bytes) -> FileEntry:
    return entry(await guest.stat(path), path)


async def listing(guest: Guest, path: bytes) -> AsyncGenerator[list[FileEntry], None]:
    """Entries in batches; the guest's order."""
    batch: list[FileEntry] = []
    async for found in guest.list_dir(path, timeout_s=None):
        batch.append(entry(found, path.rstrip(b"/") + b"/" + found.name_bytes))
        if len(batch) >= _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


async def change_mode(guest: Guest, path: bytes, request: ChangeMode) -> None:
    mode = int(request.mode, 8) if request.mode is not None else None
    await guest.chmod(path, mode=mode, owner=request.owner, recursive=request.recursive)


async def watch(guest: Guest, path: bytes, *, recursive: bool) -> AsyncGenerator[list[FileEvent], None]:
    async with guest.watch(path, recursive=recursive) as batches:
        # An empty batch says that watching has begun: what changes from now on will be seen.
        yield []
        async for batch in batches:
            events = [_event(event) for event in batch.events]
            if batch.overflow:
                events.append(FileEvent(type="overflow", path=path.decode("utf-8", "replace")))
            yield events


def entry(found: FileStat, path: bytes) -> FileEntry:
    """`path` is the one that was asked for, or the directory's with this name behind it."""
    return FileEntry(
        name=found.name,
        name_b64=found.name_b64,
        path=path.decode("utf-8", "replace"),
        type=found.type,
        is_dir=found.type == "directory",
        size=found.size,
        mode=f"{found.mode:04o}",
        mtime=found.mtime_ns // 1_000_000_000,
        mtime_ns=found.mtime_ns,
        uid=found.uid,
        gid=found.gid,
        target=found.target,
    )


def _event(event: WatchEvent) -> FileEvent:
    exact = base64.b64encode(event.path_bytes).decode() if event.path_b64 is not None else None
    return FileEvent.model_validate({"type": _EVENTS[event.type], "path": event.path, "path_b64": exact})
