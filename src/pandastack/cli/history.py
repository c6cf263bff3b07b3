"""Commands of `pandastack sandbox` about its past: the points it takes by itself, what there are, and the way back to one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pandastack.cli import console

if TYPE_CHECKING:
    from pandastack.sdk.results import Lifecycle, Snapshot


def checkpoints(
    sandbox_id: console.SandboxId,
    every_execs: Annotated[int | None, typer.Option(min=1, metavar="N", help="After every n-th command.")] = None,
    every_seconds: Annotated[
        int | None, typer.Option(min=5, metavar="N", help="Every so many seconds in which something happened.")
    ] = None,
    keep: Annotated[int | None, typer.Option(min=1, max=500, help="Keep at most so many (default 20).")] = None,
    max_mb: Annotated[int | None, typer.Option(min=1, help="Of together at most so many MiB (default 4096).")] = None,
    off: Annotated[bool, typer.Option("--off", help="Take none from now on; those there are stay.")] = False,
    as_json: console.Json = False,
) -> None:
    """Let it take points by itself; without an option, show what is set and why the last try failed, if it did."""
    with console.sandbox(sandbox_id) as sandbox:
        if off or any(value is not None for value in (every_execs, every_seconds, keep, max_mb)):
            found = sandbox.checkpoints(every_execs=every_execs, every_seconds=every_seconds, keep=keep, max_mb=max_mb, off=off)
        else:
            found = sandbox.lifecycle()
    _show(found, as_json)


def _show(found: Lifecycle, as_json: bool) -> None:
    policy = found.get("checkpoints")
    console.show(policy, as_json, lambda: console.facts(dict(policy)) if policy else print("off"))


def history(
    sandbox_id: console.SandboxId,
    limit: Annotated[int | None, typer.Option(min=1, max=1000, help="At most so many.")] = None,
    as_json: console.Json = False,
) -> None:
    """The points of its past, the newest first: snapshots you took, and those it took by itself."""
    with console.sandbox(sandbox_id) as sandbox:
        found = sandbox.history(limit)
    columns = ("POINT", "CAUSE", "STATUS", "SIZE", "CREATED", "LABEL")
    console.show(console.plain(found), as_json, lambda: console.table(columns, map(_row, found)))


def _row(point: Snapshot) -> tuple[object, ...]:
    return (point.id, point.cause, point.status, f"{point.size_bytes / (1 << 20):.1f} MiB", point.created_at, point.label)


def restore(
    sandbox_id: console.SandboxId,
    point: Annotated[str, typer.Argument(metavar="POINT", help="One of `sandbox history`.")],
    undo: Annotated[bool, typer.Option("--undo/--no-undo", help="Save what it is now first.")] = True,
    as_json: console.Json = False,
) -> None:
    """Make memory, processes and files those of the point; prints the point that undoes it. A failed sandbox comes back."""
    with console.sandbox(sandbox_id) as sandbox:
        undo_point = sandbox.restore(point, undo=undo)
        shown = {**sandbox.to_dict(), "undo_point": undo_point}
    console.show(shown, as_json, lambda: print(undo_point) if undo_point else None)
