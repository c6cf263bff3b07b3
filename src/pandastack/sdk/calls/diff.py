"""Calls about what differs between the files of two points."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from typing import Protocol

from pandastack import errors
from pandastack.sdk.calls.call import Answer, Call, PathLike, Query, build, parse
from pandastack.sdk.calls.files import encode
from pandastack.sdk.results import FileChange, FileSide, Snapshot
from pandastack.wire import diff as wire

DIFF_READ_S = 600.0
"""Saved states are restored for it, which for much memory takes a while."""


class HasId(Protocol):
    @property
    def id(self) -> str: ...


Point = str | HasId
"""A snapshot or a sandbox, or the id of one."""


def changes(a: Point, b: Point, path: PathLike) -> Call[list[FileChange]]:
    query: Query = {"a": _id(a), "b": _id(b), "path": encode(path), "limit": wire.MAX_CHANGES}
    return Call(build("GET", "/diff", query, read_s=DIFF_READ_S), _read)


def patch(a: Point, b: Point, path: PathLike) -> Call[bytes]:
    query: Query = {"a": _id(a), "b": _id(b), "path": encode(path), "format": "patch"}
    return Call(build("GET", "/diff", query, headers={"accept": "text/x-diff"}, read_s=DIFF_READ_S), lambda answer: answer.body)


def newest(snapshots: Sequence[Snapshot]) -> str:
    """The id of the first that can be restored."""
    for snapshot in snapshots:
        if snapshot.status != "failed":
            return snapshot.id
    raise errors.SnapshotNotFound("this sandbox has no snapshot to compare with", hint="take one first, or say what to compare with")


def _id(point: Point) -> str:
    return point if isinstance(point, str) else point.id


def _read(answer: Answer) -> list[FileChange]:
    found = parse(wire.FileDiff, answer.json())
    if found.truncated:
        raise errors.TooLarge(f"there are more than {wire.MAX_CHANGES} changes", hint="give a narrower path")
    return [
        FileChange(
            path=_exact(one.path, one.path_b64), kind=one.kind, before=_side(one.before), after=_side(one.after), omitted=one.omitted
        )
        for one in found.changes
    ]


def _side(side: wire.FileSide | None) -> FileSide | None:
    if side is None:
        return None
    target = _exact(side.target, side.target_b64) if side.target is not None else None
    return FileSide(type=side.type, size=side.size, mode=side.mode, uid=side.uid, gid=side.gid, target=target)


def _exact(text: str, encoded: str | None) -> str:
    return os.fsdecode(base64.b64decode(encoded)) if encoded is not None else text
