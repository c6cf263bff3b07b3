"""What is known about a sandbox on this side of the wire: the same for the blocking and for the async one."""

from __future__ import annotations

from typing import Any, ClassVar

from pandastack.sdk.calls import processes as process_calls
from pandastack.sdk.calls.processes import Cmd
from pandastack.sdk.cursor import Cursor
from pandastack.wire.sandboxes import SandboxView

DEFAULT_TEMPLATE = "code-interpreter"


class Facts:
    """What the API last said about a sandbox (`refresh` asks again)."""

    default_template: ClassVar[str] = DEFAULT_TEMPLATE

    id: str
    template: str
    template_actual: str | None
    template_note: str | None
    status: str
    status_reason: str | None
    cpu: float | int
    memory_mb: int
    disk_mb: int | None
    metadata: dict[str, str]
    persistent: bool
    ttl_seconds: int | None
    created_at: str | None
    boot_ms: int | None
    boot_mode: str | None
    runtime: str | None
    isolation: str | None
    acceleration: str | None
    own_kernel: bool
    host_id: str | None
    fork_parent_id: str | None
    fork_tree_id: str | None
    from_snapshot: str | None
    guest_ip: str | None

    def _take(self, view: SandboxView) -> None:
        for name in FACTS:
            setattr(self, name, getattr(view, name))
        self.created_at = None if view.created_at is None else str(view.created_at)

    def _is_now(self, status: str) -> None:
        """What `refresh` would say after a change of state that was asked for."""
        self.status = status
        self.status_reason = "request" if status in ("paused", "hibernated") else None

    def to_dict(self) -> dict[str, Any]:
        """Everything the API said, as plain values."""
        return {name: getattr(self, name) for name in FACTS}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(id={self.id!r}, template={self.template!r}, status={self.status!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def _stream_cursor(self, cmd: Cmd | None, **options: Any) -> Cursor:
        body = process_calls.exec_request(cmd, **options)
        return Cursor(self.id, first=process_calls.exec_stream(self.id, body), command=process_calls.shown(cmd, options.get("code")))


FACTS = tuple(name for name in Facts.__annotations__ if name != "default_template")
