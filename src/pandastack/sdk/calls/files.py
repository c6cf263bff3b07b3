"""Calls about files. A path is text or bytes; text stands for the bytes that `os.fsencode` gives, so any name passes."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterable, Callable, Iterable
from typing import cast

from pandastack import errors
from pandastack.sdk.calls.call import Answer, Call, PathLike, Query, Request, build, nothing, parse, validated
from pandastack.sdk.calls.sandboxes import root
from pandastack.sdk.results import FileEvent, FileInfo, FileWritten
from pandastack.sdk.sse import ServerEvent
from pandastack.wire import files as wire

CHUNK_BYTES = 1 << 20
BULK_READ_S = 120.0
IDENTITY = {"accept": "application/octet-stream", "accept-encoding": "identity"}


def encode(path: PathLike) -> bytes:
    """The exact bytes of an absolute path."""
    data = os.fsencode(path)
    if not data.startswith(b"/") or b"\x00" in data:
        raise errors.InvalidRequest(f"the path {os.fsdecode(data)!r} is not absolute", field="path", hint="paths in a sandbox begin with /")
    return data


def _text(path: PathLike, field: str) -> str:
    """For calls whose paths travel in JSON, which carries UTF-8 only."""
    try:
        return encode(path).decode("utf-8")
    except UnicodeDecodeError:
        raise errors.InvalidRequest(
            "this call takes only paths that are valid UTF-8", field=field, hint="use a command: sandbox.exec(['mv', ...])"
        ) from None


def read(sandbox_id: str, path: PathLike, offset: int | None, length: int | None) -> Call[bytes]:
    return Call(open_read(sandbox_id, path, offset, length), lambda answer: answer.body)


def open_read(sandbox_id: str, path: PathLike, offset: int | None = None, length: int | None = None) -> Request:
    headers = dict(IDENTITY)
    if offset is not None or length is not None:
        begin = offset or 0
        if begin < 0 or (length is not None and length < 1):
            raise errors.InvalidRequest("offset must be 0 or more and length 1 or more", field="offset")
        headers["range"] = f"bytes={begin}-" + ("" if length is None else str(begin + length - 1))
    return build("GET", f"{root(sandbox_id)}/fs", {"path": encode(path)}, headers=headers, read_s=BULK_READ_S)


def is_past_end(error: errors.PandastackError) -> bool:
    """A range that begins at or after the end of the file: there is nothing there, as with a local file."""
    return error.http_status == 416


def write(sandbox_id: str, path: PathLike, content: bytes, mode: str | None, owner: str | None) -> Call[FileWritten]:
    query = {"path": encode(path), "mode": mode, "owner": owner}
    return Call(build("PUT", f"{root(sandbox_id)}/fs", query, content=content, read_s=BULK_READ_S), _read_written)


def write_chunks(
    sandbox_id: str,
    path: PathLike,
    chunks: Callable[[], Iterable[bytes] | AsyncIterable[bytes]],
    length: int | None,
    *,
    repeatable: bool,
    mode: str | None,
    owner: str | None,
) -> Call[FileWritten]:
    """`repeatable`: `chunks` begins at the same first byte each time it is called."""
    request = build(
        "PUT", f"{root(sandbox_id)}/fs", {"path": encode(path), "mode": mode, "owner": owner},
        chunks=chunks, length=length, content_type="application/octet-stream", read_s=BULK_READ_S, safe_to_repeat=repeatable,
    )  # fmt: skip
    return Call(request, _read_written)


def _read_written(answer: Answer) -> FileWritten:
    return cast(FileWritten, parse(wire.FileWritten, answer.json()).model_dump())


def remove(sandbox_id: str, path: PathLike, recursive: bool) -> Call[None]:
    return Call(build("DELETE", f"{root(sandbox_id)}/fs", {"path": encode(path), "recursive": recursive}), nothing)


def listdir(sandbox_id: str, path: PathLike, after: bytes | None) -> Call[tuple[list[FileInfo], bytes | None]]:
    """A part of a directory, and the name to go on after (None: that was all)."""
    request = build("GET", f"{root(sandbox_id)}/fs/dir", {"path": encode(path), "after": after})
    return Call(request, lambda answer: _read_listing(answer, os.fsdecode(path)))


def _read_listing(answer: Answer, parent: str) -> tuple[list[FileInfo], bytes | None]:
    data = answer.json()
    items = (data.get("entries") or []) if isinstance(data, dict) else []
    entries = [_info(item, parent) for item in items]
    more = bool(entries) and isinstance(data, dict) and bool(data.get("truncated"))
    return entries, os.fsencode(entries[-1].name) if more else None


def stat(sandbox_id: str, path: PathLike) -> Call[FileInfo]:
    request = build("GET", f"{root(sandbox_id)}/fs/stat", {"path": encode(path)})
    return Call(request, lambda answer: _info(answer.json(), None, os.fsdecode(path)))


def mkdir(sandbox_id: str, path: PathLike, parents: bool, mode: str | None) -> Call[FileInfo]:
    body = validated(wire.MakeDir, path=_text(path, "path"), parents=parents, mode=mode)
    return Call(build("POST", f"{root(sandbox_id)}/fs/mkdir", body=body, safe_to_repeat=parents), _read_info)


def move(sandbox_id: str, source: PathLike, destination: PathLike, overwrite: bool) -> Call[FileInfo]:
    body = validated(
        wire.MoveFile, source=_text(source, "source"), destination=_text(destination, "destination"), overwrite=True if overwrite else None
    )
    return Call(build("POST", f"{root(sandbox_id)}/fs/move", body=body), _read_info)


def chmod(sandbox_id: str, path: PathLike, mode: str | int | None, owner: str | None, recursive: bool) -> Call[FileInfo]:
    if mode is None and owner is None:
        raise errors.InvalidRequest("give mode, owner or both", field="mode")
    text = f"{mode:04o}" if isinstance(mode, int) else mode
    body = validated(wire.ChangeMode, path=_text(path, "path"), mode=text, owner=owner, recursive=True if recursive else None)
    return Call(build("POST", f"{root(sandbox_id)}/fs/chmod", body=body, safe_to_repeat=True), _read_info)


def watch(sandbox_id: str, path: PathLike, recursive: bool, read_s: float) -> Request:
    query: Query = {"path": encode(path), "recursive": recursive}
    return build("GET", f"{root(sandbox_id)}/fs/watch", query, headers={"accept": "text/event-stream"}, read_s=read_s)


def read_changes(event: ServerEvent) -> list[FileEvent]:
    data = event.json()
    if event.name == "error":
        raise errors.from_body(500, data)
    if event.name != "change":
        return []
    found = [parse(wire.FileEvent, item) for item in data.get("events") or []]
    return [FileEvent(change.type, _exact(change.path, change.path_b64)) for change in found]


def _read_info(answer: Answer) -> FileInfo:
    return _info(answer.json(), None)


def _exact(text: str, encoded: str | None) -> str:
    return os.fsdecode(base64.b64decode(encoded)) if encoded is not None else text


def _info(data: object, parent: str | None, path: str | None = None) -> FileInfo:
    """Older servers leave out `path` and `mtime_ns`; where a name is not UTF-8 only `name_b64` is exact."""
    given = dict(data) if isinstance(data, dict) else {}
    name = str(given.get("name") or "")
    for key, value in (("name", ""), ("path", ""), ("is_dir", False), ("size", 0), ("mode", ""), ("mtime", 0)):
        if given.get(key) is None:
            given[key] = value
    entry = parse(wire.FileEntry, given)
    name = _exact(entry.name, entry.name_b64) or (path or "").rstrip("/").rpartition("/")[2] or path or ""
    if path is None:
        exact = parent is not None and (entry.name_b64 is not None or not entry.path)
        path = f"{parent.rstrip('/')}/{name}" if parent is not None and exact else entry.path
    kind = entry.type if "type" in given else "directory" if entry.is_dir else "file"
    return FileInfo(
        name=name, path=path, is_dir=entry.is_dir, size=entry.size, mode=entry.mode, mtime=entry.mtime, type=kind,
        mtime_ns=entry.mtime_ns or entry.mtime * 1_000_000_000, uid=entry.uid, gid=entry.gid, target=entry.target,
    )  # fmt: skip
