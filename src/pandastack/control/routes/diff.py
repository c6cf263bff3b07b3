"""`/v1/diff`: what differs between the files of two points."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from pandastack.control.hosts import closing
from pandastack.control.parts import Parts
from pandastack.control.routes import answers
from pandastack.control.routes.requests import Reader, absolute_path, parts, raw_query
from pandastack.wire.diff import DEFAULT_CHANGES, ChangeLimit, FileChange, FileDiff, HostChange

router = APIRouter(prefix="/v1", tags=["diff"])
Here = Annotated[Parts, Depends(parts)]
# Names in one listing: they are the sandbox's, and are all in memory at once.
MAX_TEXT = 32 << 20
Point = Annotated[str, Query(min_length=1, max_length=64, description="the id of a snapshot or a sandbox")]


def _below(request: Request, path: Annotated[str, Query(description="absolute; percent-encoded bytes")] = "/") -> bytes:
    return b"/" if raw_query(request, "path") is None else absolute_path(request, path)


@router.get("/diff", response_model=FileDiff, operation_id="diffFiles", responses={200: {"content": {"text/x-diff": {}}}})
async def diff(
    here: Here,
    caller: Reader,
    a: Point,
    b: Point,
    path: Annotated[bytes, Depends(_below)],
    format: Annotated[Literal["json", "patch"], Query(description="`patch` is what git writes, relative to `path`")] = "json",
    limit: Annotated[ChangeLimit, Query(description="changes in a listing")] = DEFAULT_CHANGES,
) -> Response:
    """What became of the files below `path` from `a` to `b`. No hibernated sandbox is woken; a running one is read while it runs."""
    found = here.diffs.changes(caller, a, b, path, patch=format == "patch")
    if format == "patch":
        async with AsyncExitStack() as undo:
            await undo.enter_async_context(closing(found))
            # What cannot be done is told by status while that is still possible.
            first = await anext(found, None)
            undo.pop_all()
        data = here.gateway.counted_out(_patch(first, found), at_most=None)
        return answers.ByteStream(here, caller, data, media_type="text/x-diff")
    changes: list[FileChange] = []
    text = 0
    async with closing(found):
        async for change, _patch_of_it in found:
            text += _length(change)
            if len(changes) == limit or text > MAX_TEXT:
                return answers.json(FileDiff(a=a, b=b, path=path.decode("utf-8", "replace"), changes=changes, truncated=True))
            changes.append(change)
    return answers.json(FileDiff(a=a, b=b, path=path.decode("utf-8", "replace"), changes=changes))


def _length(change: FileChange) -> int:
    """What it is made of, in characters, about."""
    sides = [side for side in (change.before, change.after) if side is not None]
    return len(change.path) + len(change.path_b64 or "") + sum(len(side.target or "") + len(side.target_b64 or "") for side in sides)


async def _patch(first: HostChange | None, rest: AsyncIterator[HostChange]) -> AsyncIterator[bytes]:
    async with closing(rest):
        if first is not None:
            if first.patch:
                yield first.patch
            async for change in rest:
                if change.patch:
                    yield change.patch
