"""`pandastack snapshot ...`: kept moments of sandboxes; `sandbox create --from-snapshot` continues from one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pandastack.cli import console

if TYPE_CHECKING:
    from pandastack.sdk.results import Snapshot

app = console.group("Keep moments of sandboxes, memory included, and list and delete them.")

SnapshotId = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="The id of a snapshot.")]


@app.command()
def create(
    sandbox_id: console.SandboxId,
    verified_within_s: Annotated[
        float | None, typer.Option("--wait-verified", min=0, metavar="SECONDS", help="Wait until a restore of it was tried.")
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Keep a sandbox as it is now; prints the id of the snapshot when all of it is on disk. The sandbox goes on."""
    with console.client() as client:
        snapshot_id = console.handle(client, sandbox_id).snapshot()
        if verified_within_s is not None:
            client.snapshots.wait_verified(snapshot_id, verified_within_s)
        shown = console.plain(client.snapshots.get(snapshot_id)) if as_json else None
    console.show(shown, as_json, lambda: print(snapshot_id))


@app.command("list")
def list_snapshots(
    sandbox_id: Annotated[str | None, typer.Option("--sandbox", metavar="SANDBOX", help="Only those of this sandbox.")] = None,
    as_json: console.Json = False,
) -> None:
    """The newest first."""
    with console.client() as client:
        found = client.snapshots.list(sandbox_id)
    columns = ("ID", "SANDBOX", "TEMPLATE", "STATUS", "SIZE", "CREATED")
    console.show(console.plain(found), as_json, lambda: console.table(columns, map(_row, found)))


def _row(snapshot: Snapshot) -> tuple[object, ...]:
    size = f"{snapshot.size_bytes / (1 << 20):.1f} MiB"
    return (snapshot.id, snapshot.sandbox_id, snapshot.template, snapshot.status, size, snapshot.created_at)


@app.command()
def get(snapshot_id: SnapshotId, as_json: console.Json = False) -> None:
    """Everything about one snapshot."""
    with console.client() as client:
        found = console.plain(client.snapshots.get(snapshot_id))
    console.show(found, as_json, lambda: console.facts(found))


@app.command()
def offload(snapshot_id: SnapshotId, as_json: console.Json = False) -> None:
    """Move a snapshot's memory and disk to the object store of the server. It can be used as before."""
    with console.client() as client:
        found = console.plain(client.snapshots.offload(snapshot_id))
    console.show(found, as_json, lambda: print(snapshot_id))


@app.command("rm")
def remove(snapshot_ids: Annotated[list[str], typer.Argument(metavar="SNAPSHOT...")], as_json: console.Json = False) -> None:
    """Delete snapshots. Sandboxes that were made from them live on."""
    with console.client() as client:

        def delete(snapshot_id: str) -> dict[str, Any]:
            client.snapshots.delete(snapshot_id)
            return {"deleted": True}

        console.each(snapshot_ids, delete, {"deleted": False}, as_json)
