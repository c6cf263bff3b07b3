"""Calls about sandboxes: what is sent, how answers are read."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, cast

from pandastack import errors
from pandastack.sdk.calls.call import Answer, Call, build, items_of, nothing, parse, reads, segment, validated
from pandastack.sdk.results import Lifecycle
from pandastack.wire import sandboxes as wire
from pandastack.wire.isolation import AUTO
from pandastack.wire.sandboxes import SandboxMetrics, SandboxView

PAGE = 100

HIBERNATE_READ_S = 600.0
"""All of its memory is written to disk, or read from it, before the answer comes."""


def root(sandbox_id: str) -> str:
    return f"/sandboxes/{segment(sandbox_id)}"


def create(
    *,
    template: str | None,
    ttl_seconds: int | None,
    persistent: bool,
    metadata: Mapping[str, str] | None,
    env: Mapping[str, str] | None,
    cpu: float | None,
    memory_mb: int | None,
    disk_mb: int | None,
    from_snapshot: str | None,
    volumes: Sequence[Mapping[str, Any]] | None,
    checkpoints: Mapping[str, int] | None,
    isolation: str,
    idempotency_key: str | None,
) -> Call[SandboxView]:
    """A create always carries a key, so that a lost answer can be asked for again without a second sandbox."""
    body = validated(
        wire.SandboxCreate,
        template=template,
        ttl_seconds=ttl_seconds,
        persistent=True if persistent else None,
        metadata=dict(metadata) if metadata else None,
        env=dict(env) if env else None,
        cpu=cpu,
        memory_mb=memory_mb,
        disk_mb=disk_mb,
        from_snapshot=from_snapshot,
        volumes=[dict(volume) for volume in volumes] if volumes else None,
        checkpoints=dict(checkpoints) if checkpoints else None,
        # Left out where it changes nothing: older servers do not know it.
        isolation=isolation if isolation != AUTO else None,
    )
    headers = idempotency_header(idempotency_key)
    return Call(build("POST", "/sandboxes", body=body, headers=headers, is_create=True), reads(SandboxView))


def idempotency_header(key: str | None) -> dict[str, str]:
    """The given key, or one of its own for this call."""
    key = key if key is not None else uuid.uuid4().hex
    if not 1 <= len(key) <= 255 or not all("!" <= character <= "~" for character in key):
        raise errors.InvalidRequest("idempotency_key must be 1 to 255 visible ASCII characters", field="idempotency_key")
    return {"idempotency-key": key}


def page(
    status: str | None, metadata: Mapping[str, str] | None, limit: int | None, cursor: str | None
) -> Call[tuple[list[SandboxView], str | None]]:
    """A page and the cursor of the next one (None: that was the last). Without `limit` everything comes at once."""
    if limit is not None and limit < 1:
        raise errors.InvalidRequest("limit must be 1 or more", field="limit")
    request = build("GET", "/sandboxes", {"status": status, "limit": limit, "cursor": cursor})
    pairs = [f"{key}={value}" for key, value in (metadata or {}).items()]
    if pairs:
        # Repeated, so it does not fit a mapping.
        more = "&".join(build("GET", "", {"metadata": pair}).path[1:] for pair in pairs)
        request = build("GET", f"{request.path}{'&' if '?' in request.path else '?'}{more}")
    return Call(request, _read_page)


def _read_page(answer: Answer) -> tuple[list[SandboxView], str | None]:
    data = answer.json()
    cursor = data.get("next_cursor") if isinstance(data, dict) else None
    return [parse(SandboxView, item) for item in items_of(answer)], cursor if isinstance(cursor, str) and cursor else None


def get(sandbox_id: str) -> Call[SandboxView]:
    return Call(build("GET", root(sandbox_id)), reads(SandboxView))


def delete(sandbox_id: str) -> Call[None]:
    return Call(build("DELETE", root(sandbox_id)), nothing)


def lifecycle(sandbox_id: str) -> Call[Lifecycle]:
    return Call(build("GET", f"{root(sandbox_id)}/lifecycle"), _read_lifecycle)


def set_lifecycle(
    sandbox_id: str, ttl_seconds: int | None = None, persistent: bool | None = None, keep_awake_seconds: int | None = None
) -> Call[Lifecycle]:
    body = validated(wire.LifecyclePatch, ttl_seconds=ttl_seconds, persistent=persistent, keep_awake_seconds=keep_awake_seconds)
    return Call(build("PATCH", f"{root(sandbox_id)}/lifecycle", body=body, safe_to_repeat=True), _read_lifecycle)


def set_checkpoints(
    sandbox_id: str, every_execs: int | None, every_seconds: int | None, keep: int | None, max_mb: int | None, off: bool
) -> Call[Lifecycle]:
    given = {"every_execs": every_execs, "every_seconds": every_seconds, "keep": keep, "max_mb": max_mb}
    if off and any(value is not None for value in given.values()):
        raise errors.InvalidRequest("give off=True alone", field="off")
    policy: Any = "off" if off else validated(wire.Checkpoints, **given).model_dump(exclude_unset=True)
    body = validated(wire.LifecyclePatch, checkpoints=policy)
    return Call(build("PATCH", f"{root(sandbox_id)}/lifecycle", body=body, safe_to_repeat=True), _read_lifecycle)


def _read_lifecycle(answer: Answer) -> Lifecycle:
    return cast(Lifecycle, parse(wire.Lifecycle, answer.json()).model_dump())


def pause(sandbox_id: str) -> Call[None]:
    return Call(build("POST", f"{root(sandbox_id)}/pause", safe_to_repeat=True), nothing)


def resume(sandbox_id: str) -> Call[None]:
    return Call(build("POST", f"{root(sandbox_id)}/resume", safe_to_repeat=True), nothing)


def hibernate(sandbox_id: str) -> Call[str]:
    return _to_state(sandbox_id, "hibernate", "hibernated")


def wake(sandbox_id: str) -> Call[str]:
    return _to_state(sandbox_id, "wake", "running")


def _to_state(sandbox_id: str, verb: str, status: str) -> Call[str]:
    """They name the state to reach and not a step, as pause and resume do: sending one twice is the same as once."""
    request = build("POST", f"{root(sandbox_id)}/{verb}", safe_to_repeat=True, read_s=HIBERNATE_READ_S)
    return Call(request, lambda answer: _read_status(answer, status))


def _read_status(answer: Answer, reached: str) -> str:
    data = answer.json() if answer.body else None
    said = data.get("status") if isinstance(data, dict) else None
    return said if isinstance(said, str) and said else reached


def metrics(sandbox_id: str) -> Call[SandboxMetrics]:
    return Call(build("GET", f"{root(sandbox_id)}/metrics"), reads(SandboxMetrics))
