"""`.../fs`: the files of a sandbox. Paths are bytes here and mean something only inside the sandbox."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic_core import to_json

from pandastack.control.gateway import sse
from pandastack.control.hosts import closing
from pandastack.control.parts import Parts
from pandastack.control.routes import answers
from pandastack.control.routes.requests import Body, FilePath, Reader, Writer, changing, parts, pieces_of, raw_query
from pandastack.errors import PandastackError
from pandastack.wire.files import (
    MAX_LISTING,
    ChangeMode,
    DirListing,
    FileEntry,
    FileEvent,
    FileMode,
    FileWritten,
    ListLimit,
    MakeDir,
    MoveFile,
    Owner,
)

router = APIRouter(prefix="/v1/sandboxes/{sandbox_id}/fs", tags=["files"])
Here = Annotated[Parts, Depends(parts)]
# A suffix (`bytes=-5`) is the third form. Several ranges are not offered: the whole file is a correct answer to them.
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})|bytes=-(\d{1,18})")


@router.get(
    "", response_class=answers.ByteStream, status_code=200, operation_id="readFile", responses={206: {"description": "A part of the file"}}
)
async def read(here: Here, caller: Reader, sandbox_id: str, path: FilePath, request: Request) -> Response:
    """The file's bytes; `Range: bytes=a-b` for a part."""
    row = await here.states.running(caller, sandbox_id)
    wanted = _RANGE.fullmatch(request.headers.get("range", ""))
    offset, length = 0, None
    if wanted is not None:
        if wanted[3] is not None:
            async with here.gateway.deadline():
                size = (await here.host.stat_file(row.id, path)).size
            offset, length = max(0, size - int(wanted[3])), int(wanted[3])
        else:
            offset = int(wanted[1])
            length = int(wanted[2]) - offset + 1 if wanted[2] else None
            if length is not None and length <= 0:
                wanted, offset, length = None, 0, None
    async with here.gateway.deadline():
        entry, data = await here.host.read_file(row.id, path, offset=offset, length=length)
    headers = {"accept-ranges": "bytes"}
    if wanted is not None:
        if offset >= entry.size or length == 0:
            async with closing(data):
                return Response(status_code=416, headers={"content-range": f"bytes */{entry.size}", **headers})
        left = entry.size - offset if length is None else min(length, entry.size - offset)
        headers |= {"content-length": str(left), "content-range": f"bytes {offset}-{offset + left - 1}/{entry.size}"}
        return answers.ByteStream(here, caller, here.gateway.counted_out(data, at_most=left), status=206, headers=headers)
    # A size of 0 may also be a file in /proc, which has content all the same: it is sent without a length.
    if entry.size > 0 and entry.type == "file":
        headers["content-length"] = str(entry.size)
        return answers.ByteStream(here, caller, here.gateway.counted_out(data, at_most=entry.size), headers=headers)
    return answers.ByteStream(here, caller, here.gateway.counted_out(data, at_most=None), headers=headers)


@router.head("", operation_id="headFile")
async def head(here: Here, caller: Reader, sandbox_id: str, path: FilePath) -> Response:
    row = await here.states.running(caller, sandbox_id)
    async with here.gateway.deadline():
        entry = await here.host.stat_file(row.id, path)
    headers = {"content-length": str(entry.size), "accept-ranges": "bytes"}
    return Response(headers=headers, media_type="application/octet-stream")


@router.put("", response_model=FileWritten, operation_id="writeFile", openapi_extra={"x-raw-body": True})
async def write(
    here: Here,
    caller: Writer,
    sandbox_id: str,
    path: FilePath,
    request: Request,
    mode: Annotated[FileMode | None, Query()] = None,
    owner: Annotated[Owner | None, Query()] = None,
) -> Response:
    """The raw body, of any size, becomes the file; readers see the old one or the new one, never a part."""
    row = await changing(here, caller, sandbox_id)
    data = here.gateway.counted_in(pieces_of(request, stalled_s=here.settings.stalled_client_s))
    size = await here.host.write_file(row.id, path, data, mode=int(mode, 8) if mode is not None else None, owner=owner)
    return answers.json(FileWritten(path=_text(path), bytes=size))


@router.delete("", status_code=204, operation_id="deleteFile")
async def delete(here: Here, caller: Writer, sandbox_id: str, path: FilePath, recursive: bool = True) -> Response:
    row = await changing(here, caller, sandbox_id)
    async with here.gateway.deadline():
        await here.host.remove_file(row.id, path, recursive=recursive)
    return answers.empty()


@router.get("/dir", response_model=DirListing, operation_id="listDirectory")
async def list_dir(
    here: Here,
    caller: Reader,
    sandbox_id: str,
    path: FilePath,
    request: Request,
    limit: Annotated[ListLimit, Query()] = MAX_LISTING,
    after: Annotated[str | None, Query(description="the last name seen; percent-encoded bytes")] = None,
) -> Response:
    """Entries sorted by the bytes of their names."""
    row = await here.states.running(caller, sandbox_id)
    last = raw_query(request, "after") if after is not None else None
    found, more = await _smallest(here.host.list_dir(row.id, path), limit, last)
    # Written by hand, because a hundred thousand entries are held as JSON already and not as objects.
    body = b'{"path":%b,"entries":[%b],"truncated":%b}' % (
        to_json(_text(path)),
        b",".join(entry for _name, entry in found),
        b"true" if more else b"false",
    )
    return answers.raw_json(body, 200)


async def _smallest(batches: AsyncIterator[list[FileEntry]], limit: int, after: bytes | None) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The first `limit` entries by name that come after `after`, each as (name, JSON), and whether there are more."""
    found: list[tuple[bytes, bytes]] = []
    more = False
    async with closing(batches):
        async for batch in batches:
            for entry in batch:
                name = base64.b64decode(entry.name_b64) if entry.name_b64 else entry.name.encode()
                if after is None or name > after:
                    found.append((name, entry.model_dump_json().encode()))
            if len(found) > 2 * limit + 1024:
                found.sort()
                more = True
                del found[limit:]
    found.sort()
    more = more or len(found) > limit
    return found[:limit], more


@router.get("/stat", response_model=FileEntry, operation_id="statFile")
async def stat(here: Here, caller: Reader, sandbox_id: str, path: FilePath) -> Response:
    row = await here.states.running(caller, sandbox_id)
    async with here.gateway.deadline():
        return answers.json(await here.host.stat_file(row.id, path))


@router.post("/mkdir", status_code=201, response_model=FileEntry, operation_id="makeDirectory")
async def make_dir(here: Here, caller: Writer, sandbox_id: str, body: Annotated[MakeDir, Depends(Body(MakeDir))]) -> Response:
    row = await changing(here, caller, sandbox_id)
    async with here.gateway.deadline():
        await here.host.make_dir(row.id, body.path.encode(), parents=body.parents, mode=int(body.mode, 8))
        return answers.json(await here.host.stat_file(row.id, body.path.encode()), 201)


@router.post("/move", response_model=FileEntry, operation_id="moveFile")
async def move(here: Here, caller: Writer, sandbox_id: str, body: Annotated[MoveFile, Depends(Body(MoveFile))]) -> Response:
    row = await changing(here, caller, sandbox_id)
    async with here.gateway.deadline():
        await here.host.move_file(row.id, body.source.encode(), body.destination.encode(), overwrite=body.overwrite)
        return answers.json(await here.host.stat_file(row.id, body.destination.encode()))


@router.post("/chmod", response_model=FileEntry, operation_id="changeMode")
async def change_mode(here: Here, caller: Writer, sandbox_id: str, body: Annotated[ChangeMode, Depends(Body(ChangeMode))]) -> Response:
    row = await changing(here, caller, sandbox_id)
    async with here.gateway.deadline():
        await here.host.change_mode(row.id, body.path.encode(), body)
        return answers.json(await here.host.stat_file(row.id, body.path.encode()))


@router.get("/watch", response_class=answers.EventStream, status_code=200, operation_id="watchFiles")
async def watch(here: Here, caller: Reader, sandbox_id: str, path: FilePath, recursive: bool = False) -> Response:
    """Events `change` with `{"events": [...]}` until the client leaves."""
    row = await here.states.running(caller, sandbox_id)
    async with here.gateway.deadline():
        # A missing path is told by status while that is still possible.
        await here.host.stat_file(row.id, path)
    return answers.EventStream(here, caller, _changes(here.host.watch_files(row.id, path, recursive=recursive)))


async def _changes(batches: AsyncIterator[list[FileEvent]]) -> AsyncIterator[bytes]:
    async with closing(batches):
        try:
            async for batch in batches:
                yield sse("change", {"events": batch}) if batch else b": watching\n\n"
        except PandastackError as error:
            yield sse("error", error.body())


def _text(path: bytes) -> str:
    return path.decode("utf-8", "replace")
