"""`pandastack usage [SANDBOX]`: what a sandbox, or the whole workspace, takes of the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pandastack.cli import console

if TYPE_CHECKING:
    from pandastack.sdk.results import Quota


def usage(
    sandbox_id: Annotated[str | None, typer.Argument(metavar="[SANDBOX]", help="The id of a sandbox; else the whole workspace.")] = None,
    as_json: console.Json = False,
) -> None:
    """What is used, its own and shared with others, and what the quotas leave. Wakes nothing."""
    with console.client() as client:
        if sandbox_id is None:
            total = client.usage()
            rows = [("sandboxes", *_counted(total.sandboxes)), ("snapshots", *_counted(total.snapshots)), _stored(total.stored_bytes)]
            rows += [("  of snapshots", _mib(total.snapshot_bytes)), ("  hibernated", _mib(total.hibernated_bytes))]
            console.show(console.plain(total), as_json, lambda: console.table(("", "USED", "LIMIT", "LEFT"), map(_filled, rows)))
            return
        found = console.handle(client, sandbox_id).usage()
    own = ("memory", found.memory_own_bytes, found.memory_shared_bytes), ("disk", found.disk_own_bytes, found.disk_shared_bytes)
    parts = [*own, ("stored", found.stored_own_bytes, found.stored_shared_bytes)]
    rows_of_one = [(name, _mib(own_bytes), _mib(shared_bytes)) for name, own_bytes, shared_bytes in parts]
    console.show(console.plain(found), as_json, lambda: console.table((found.status.upper(), "OWN", "SHARED"), rows_of_one))


def _counted(quota: Quota) -> tuple[object, ...]:
    return quota.used, "none" if quota.limit is None else quota.limit, quota.left


def _stored(quota: Quota) -> tuple[object, ...]:
    limit, left = (None if size is None else _mib(size) for size in (quota.limit, quota.left))
    return "stored", _mib(quota.used), limit or "none", left


def _filled(row: tuple[object, ...]) -> tuple[object, ...]:
    return (*row, *[""] * (4 - len(row)))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
