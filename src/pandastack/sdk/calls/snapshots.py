"""Calls about snapshots."""

from __future__ import annotations

from typing import Any

from pandastack import errors
from pandastack.sdk.calls.call import Answer, Call, build, nothing, parse, reads, segment, validated
from pandastack.sdk.calls.sandboxes import idempotency_header, root
from pandastack.sdk.results import Snapshot
from pandastack.wire import snapshots as wire
from pandastack.wire.snapshots import SnapshotView

SNAPSHOT_READ_S = 600.0
"""The answer comes when every byte is on disk, which for much memory takes minutes."""

FIRST_LOOK_S = 0.2
LAST_LOOK_S = 2.0


def take(sandbox_id: str, idempotency_key: str | None) -> Call[str]:
    """It always carries a key, so that a lost answer can be asked for again without a second snapshot."""
    headers = idempotency_header(idempotency_key)
    return Call(build("POST", f"{root(sandbox_id)}/snapshots", headers=headers, read_s=SNAPSHOT_READ_S, safe_to_repeat=True), _read_id)


def list_snapshots(sandbox_id: str | None, automatic: bool) -> Call[list[Snapshot]]:
    return Call(build("GET", "/snapshots", {"sandbox_id": sandbox_id, "automatic": automatic or None}), _read_list)


def history(sandbox_id: str, limit: int | None) -> Call[list[Snapshot]]:
    return Call(build("GET", f"{root(sandbox_id)}/history", {"limit": limit}), _read_list)


def restore(sandbox_id: str, point: str, undo: bool) -> Call[wire.Restored]:
    """Not repeated after a lost answer: what happened in between would be lost."""
    body = validated(wire.RestoreRequest, point=point, undo=None if undo else False)
    return Call(build("POST", f"{root(sandbox_id)}/restore", body=body, read_s=SNAPSHOT_READ_S), reads(wire.Restored))


def get(snapshot_id: str) -> Call[Snapshot]:
    return Call(build("GET", f"/snapshots/{segment(snapshot_id)}"), lambda answer: _snapshot(answer.json()))


def delete(snapshot_id: str) -> Call[None]:
    return Call(build("DELETE", f"/snapshots/{segment(snapshot_id)}"), nothing)


def offload(snapshot_id: str) -> Call[Snapshot]:
    """Repeated after a lost answer: what is in the object store already is not sent again."""
    request = build("POST", f"/snapshots/{segment(snapshot_id)}/offload", read_s=SNAPSHOT_READ_S, safe_to_repeat=True)
    return Call(request, lambda answer: _snapshot(answer.json()))


def id_of(point: str | Snapshot) -> str:
    return point if isinstance(point, str) else point.id


def verified(snapshot: Snapshot) -> bool:
    """False while it is still to be tried. Raises SnapshotUnusable when a restore of it was tried and failed."""
    if snapshot.status == "failed":
        raise errors.SnapshotUnusable(
            f"snapshot {snapshot.id} can not be restored" + (f": {snapshot.status_reason}" if snapshot.status_reason else ""),
            hint="take another one; the server's log says more", reason="failed",
        )  # fmt: skip
    return snapshot.status == "verified"


def not_verified(snapshot: Snapshot, timeout_s: float) -> errors.SandboxTimeout:
    return errors.SandboxTimeout(f"timeout: snapshot {snapshot.id} is still {snapshot.status} after {timeout_s:g} s", hint="wait longer")


def _read_id(answer: Answer) -> str:
    data = answer.json()
    found = data.get("id") or data.get("snapshot_id") if isinstance(data, dict) else data
    if not isinstance(found, str) or not found:
        raise errors.ServerError("the answer of the API names no snapshot", hint="client and server may be of different versions")
    return found


def _read_list(answer: Answer) -> list[Snapshot]:
    data = answer.json()
    items = data.get("snapshots", data.get("points", data.get("items"))) if isinstance(data, dict) else data
    return [_snapshot(item) for item in items or []]


def _snapshot(data: Any) -> Snapshot:
    return Snapshot.from_wire(parse(SnapshotView, data))
