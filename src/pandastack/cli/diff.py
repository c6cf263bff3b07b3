"""`pandastack diff`: what became of the files of a sandbox between two points."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from pandastack.cli import console

if TYPE_CHECKING:
    from pandastack.sdk.results import FileChange

_LETTERS = {"added": "A", "removed": "D", "modified": "M", "metadata": "P", "type": "T"}


def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="The id of a snapshot or a sandbox.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The id of another one.")],
    path: Annotated[str, typer.Option("--path", metavar="PATH", help="Only what is below, or this one file.")] = "/",
    patch: Annotated[bool, typer.Option("--patch", help="Print a patch for `git apply`, relative to the path.")] = False,
    as_json: console.Json = False,
) -> None:
    """What became of the files from A to B: A(dded), D(eleted), M(odified), P(ermissions or owner), T(ype), sizes, path."""
    if patch and as_json:
        console.usage("--patch is no JSON")
    with console.client() as client:
        if patch:
            console.write_bytes(client.diff_patch(before, after, path=path))
            return
        found = client.diff(before, after, path=path)
    console.show(console.plain(found), as_json, lambda: console.table(("", "BEFORE", "AFTER", "PATH"), map(_row, found)))


def _row(change: FileChange) -> tuple[object, ...]:
    sizes = [None if side is None or side.type == "directory" else side.size for side in (change.before, change.after)]
    sides = [side for side in (change.after, change.before) if side is not None]
    # As the shell writes it, a directory ends with a slash; bytes outside UTF-8 are shown escaped.
    path = os.fsencode(change.path).decode("utf-8", "backslashreplace") + ("/" if sides[0].type == "directory" else "")
    return (_LETTERS[change.kind], *sizes, path)
