"""Calls about forks: what is sent, and the many shapes in which servers have answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pandastack import errors
from pandastack.sdk.calls.call import Answer, Call, build, parse, validated
from pandastack.sdk.calls.sandboxes import idempotency_header, root
from pandastack.sdk.results import Promoted
from pandastack.wire import snapshots as wire
from pandastack.wire.sandboxes import SandboxView

FORK_READ_S = 180.0
"""The answer comes when the parent's memory is written and every child has answered: longer than other requests take."""


def fork(
    sandbox_id: str, metadata: Mapping[str, str] | None, count: int | None, idempotency_key: str | None, at: str | None = None
) -> Call[list[SandboxView]]:
    body = validated(wire.ForkRequest, metadata=dict(metadata) if metadata else None, count=count, at=at)
    return _forking(sandbox_id, "fork", body, idempotency_key)


def fork_tree(
    sandbox_id: str, count: int, metadata: Mapping[str, str] | None, idempotency_key: str | None, at: str | None = None
) -> Call[list[SandboxView]]:
    body = validated(wire.ForkTreeRequest, count=count, metadata=dict(metadata) if metadata else None, at=at)
    return _forking(sandbox_id, "fork-tree", body, idempotency_key)


def _forking(sandbox_id: str, verb: str, body: wire.ForkRequest | wire.ForkTreeRequest, key: str | None) -> Call[list[SandboxView]]:
    """A fork makes sandboxes, so it is repeated and cancelled exactly as a create is."""
    request = build(
        "POST", f"{root(sandbox_id)}/{verb}", body=body, headers=idempotency_header(key), is_create=True, read_s=FORK_READ_S
    )  # fmt: skip
    return Call(request, lambda answer: _children(answer, sandbox_id))


def promote(sandbox_id: str, cleanup_siblings: bool, tree_id: str | None) -> Call[Promoted]:
    body = validated(wire.PromoteRequest, cleanup_siblings=cleanup_siblings, tree_id=tree_id)
    # Twice is once: the second time there is no sibling left to delete. Deleting takes as long as there are siblings.
    request = build("POST", f"{root(sandbox_id)}/promote", body=body, safe_to_repeat=True, read_s=FORK_READ_S)
    return Call(request, lambda answer: _read_promoted(answer, sandbox_id, tree_id))


def _children(answer: Answer, parent_id: str) -> list[SandboxView]:
    """Every child in order, from `children`, `sandbox`, `items`, `sandboxes`, a bare array or a bare sandbox."""
    data = answer.json()
    tree_id = data.get("tree_id") if isinstance(data, dict) else None
    children = [_child(item, parent_id, tree_id if isinstance(tree_id, str) else None) for item in _items(data)]
    if not children:
        raise errors.ServerError("the answer of the API names no child", hint="client and server may be of different versions")
    return children


def _items(data: Any) -> list[Any]:
    if isinstance(data, list):
        return data
    if not isinstance(data, dict):
        return [data] if isinstance(data, str) and data else []
    first = data.get("sandbox")
    for name in ("children", "items", "sandboxes"):
        found = data.get(name)
        if isinstance(found, list) and found:
            # Where children are only ids, `sandbox` says more about the first of them.
            return [first if isinstance(first, dict) and item == first.get("id") else item for item in found]
    if isinstance(first, dict):
        return [first]
    return [data] if data.get("id") else []


def _child(item: Any, parent_id: str, tree_id: str | None) -> SandboxView:
    """A child that knows where it comes from: older servers say so in the metadata, or only once for all children."""
    data = dict(item) if isinstance(item, dict) else {"id": item}
    metadata = {"fork_parent_id": parent_id, **(data.get("metadata") or {})}
    data["metadata"] = metadata
    data["status"] = data.get("status") or "running"
    data["fork_parent_id"] = data.get("fork_parent_id") or metadata["fork_parent_id"]
    data["fork_tree_id"] = data.get("fork_tree_id") or tree_id or metadata.get("fork_tree_id")
    return parse(SandboxView, data)


def _read_promoted(answer: Answer, sandbox_id: str, tree_id: str | None) -> Promoted:
    data = answer.json() if answer.body else {}
    whole = {"winner": sandbox_id, "tree_id": tree_id, **(data if isinstance(data, dict) else {})}
    # An empty list may come as null.
    whole["deleted"], whole["failures"] = whole.get("deleted") or [], whole.get("failures") or {}
    return cast(Promoted, parse(wire.Promoted, whole).model_dump())
