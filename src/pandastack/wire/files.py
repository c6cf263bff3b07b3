"""Files as the public API shows them. Linux names are bytes: `name` is for people, `name_b64` is exact."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from pandastack.wire.processes import AbsolutePath
from pandastack.wire.sandboxes import Shape, View

FileType = Literal["file", "directory", "symlink", "other"]
FileMode = Annotated[str, StringConstraints(pattern=r"^[0-7]{3,4}$")]
Owner = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,32}(:[A-Za-z0-9_.-]{1,32})?$")]


class FileEntry(View):
    """One name in a directory. `mode` is octal text such as "0644"; `mtime` is whole seconds since 1970.

    `name_b64` is present only where the name is not valid UTF-8; `name` then shows U+FFFD in its place.
    `is_dir` is false for a link to a directory, so that a walk never leaves the tree it was given.
    """

    name: str
    path: str
    name_b64: str | None = None
    type: FileType = "file"
    is_dir: bool
    size: int
    mode: str
    mtime: int
    mtime_ns: int = 0
    uid: int = 0
    gid: int = 0
    target: str | None = None


class DirListing(View):
    """`truncated` is true where the directory has more entries than were asked for; go on with `after`."""

    path: str
    entries: list[FileEntry]
    truncated: bool = False


class FileWritten(View):
    path: str
    bytes: int


class MakeDir(Shape):
    path: AbsolutePath
    parents: bool = True
    mode: FileMode = "0755"


class MoveFile(Shape):
    source: AbsolutePath
    destination: AbsolutePath
    overwrite: bool = False


class ChangeMode(Shape):
    """At least one of `mode` and `owner` ("user" or "user:group", names or numbers)."""

    path: AbsolutePath
    mode: FileMode | None = None
    owner: Owner | None = None
    recursive: bool = False


class FileEvent(View):
    """One change seen by `GET .../fs/watch`; `overflow` means that some were lost: list again."""

    type: Literal["create", "modify", "delete", "move", "attrib", "overflow"]
    path: str
    path_b64: str | None = None


MAX_LISTING = 100_000
ListLimit = Annotated[int, Field(ge=1, le=MAX_LISTING)]
