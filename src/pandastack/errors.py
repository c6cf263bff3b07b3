"""Every error a user of PandaStack may catch, and every error that crosses a room.

    PandastackError
    ├── AuthError                     401  no key, or a key that is not valid
    ├── NotFoundError                 404
    │   ├── SandboxNotFound                another tenant's sandbox looks exactly like an unknown one
    │   ├── SnapshotNotFound
    │   ├── TemplateNotFound
    │   ├── ProcessNotFound
    │   ├── TokenNotFound
    │   └── FileNotFound                   also a FileNotFoundError
    ├── BadRequestError               400
    │   ├── InvalidRequest                 a field is wrong; `field` names it
    │   ├── PermissionDenied          403
    │   │   └── IsolationTooWeak               the server asks for more isolation than that; `minimum`
    │   ├── Conflict                  409
    │   │   ├── IdempotencyConflict        the key was used with another body
    │   │   ├── SandboxNotRunning          paused, failed, or going away; `status` says which
    │   │   ├── SnapshotUnusable           damaged, unfinished, or of another runtime; `reason` says which
    │   │   └── FileConflict               exists, not empty, a directory where a file is needed
    │   ├── TooLarge                  413
    │   ├── QuotaExceeded             403
    │   └── RateLimited               429
    ├── ServerError                   500
    │   ├── CapacityError             503  the machine is full; nothing was created; `retry_after_s`
    │   ├── TemplateNotReady          503  being built or baked; nothing was created
    │   ├── DiskFull                  507  nothing was created or written
    │   ├── ObjectStoreUnavailable    503  what is kept in the object store cannot be had just now; nothing was lost
    │   ├── HostUnfit                 503  this machine cannot do it; the hint says what to change
    │   │   └── RuntimeUnavailable             `runtime` is known, and does not work on this machine (any more)
    │   ├── TemplateError             500
    │   │   └── TemplateBuildError
    │   ├── RuntimeFailed             500  the runtime (gVisor, QEMU ...) did not do what it must
    │   └── GuestError                502  the daemon in the sandbox
    │       ├── GuestProtocolError         it broke the protocol; the sandbox is not trusted any more
    │       ├── GuestTimeout               it did not answer before the deadline
    │       ├── GuestGone                  the stream to it ended
    │       └── HookFailed                 a hook of the template failed or took too long; the message has its last words
    ├── SandboxTimeout                504  a command ran longer than its limit; also a TimeoutError
    ├── ConnectionError                    no answer from the API (alias APIConnectionError)
    ├── ExecInterrupted                    a stream ended without an exit code; unknown is not success
    ├── CommandFailed                      check=True and the exit code was not 0
    └── CreateCancelled                    the caller cancelled while waiting for capacity
    ExploreError                           not a PandastackError: the candidates failed, not the platform

On the server a class carries its HTTP status and a `code`; routes render `body()` as their last act, and the SDK
finds the class again by that code (`from_body`). Texts are fit for strangers: details go to the log, not here.
"""

from __future__ import annotations

import builtins
from typing import Any, ClassVar


class PandastackError(Exception):
    """Base of all errors. `message` is one sentence; `hint` says what to do; `fields` are extra facts."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(
        self,
        message: str = "",
        *,
        hint: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
        http_status: int | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.http_status = http_status if http_status is not None else self.status
        self.fields = fields

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are no attribute: `error.status_reason`, `error.field` and the like.
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(name)

    def body(self) -> dict[str, Any]:
        """The flat JSON object that clients of every age can read: `error` is a string, the rest are siblings."""
        body: dict[str, Any] = {**self.fields, "error": self.message, "code": self.code}
        if self.hint:
            body["hint"] = self.hint
        if self.request_id:
            body["request_id"] = self.request_id
        if self.retry_after_s is not None:
            body["retry_after_s"] = self.retry_after_s
        return body


class AuthError(PandastackError):
    code = "unauthorized"
    status = 401


class NotFoundError(PandastackError):
    code = "not_found"
    status = 404


class SandboxNotFound(NotFoundError):
    code = "sandbox_not_found"


class SnapshotNotFound(NotFoundError):
    code = "snapshot_not_found"


class TemplateNotFound(NotFoundError):
    code = "template_not_found"


class ProcessNotFound(NotFoundError):
    code = "process_not_found"


class TokenNotFound(NotFoundError):
    code = "token_not_found"


class FileNotFound(NotFoundError, builtins.FileNotFoundError):
    code = "file_not_found"


class BadRequestError(PandastackError):
    code = "bad_request"
    status = 400


class InvalidRequest(BadRequestError):
    """A value is out of range or of the wrong shape; `field` is its dotted name."""

    code = "invalid_request"


class PermissionDenied(BadRequestError):
    code = "permission_denied"
    status = 403


class IsolationTooWeak(PermissionDenied):
    """`minimum` is what this server asks for (PANDASTACK_MIN_ISOLATION), `runtime` what would have been used."""

    code = "isolation_too_weak"


class Conflict(BadRequestError):
    code = "conflict"
    status = 409


class IdempotencyConflict(Conflict):
    code = "idempotency_conflict"


class SandboxNotRunning(Conflict):
    """`sandbox_status` and `status_reason` say what it is instead."""

    code = "sandbox_not_running"


class SnapshotUnusable(Conflict):
    """`reason` is `missing`, `truncated`, `damaged`, `foreign`, `runtime`, `unfinished` or `failed`."""

    code = "snapshot_unusable"


class FileConflict(Conflict):
    code = "file_conflict"


class TooLarge(BadRequestError):
    code = "too_large"
    status = 413


class QuotaExceeded(BadRequestError):
    code = "quota_exceeded"
    status = 403


class RateLimited(BadRequestError):
    code = "rate_limited"
    status = 429


class ServerError(PandastackError):
    code = "internal"
    status = 500


class CapacityError(ServerError):
    code = "no_capacity"
    status = 503


class TemplateNotReady(ServerError):
    code = "template_not_ready"
    status = 503


class DiskFull(ServerError):
    code = "disk_full"
    status = 507


class ObjectStoreUnavailable(ServerError):
    """`reason` is `timeout`, `refused` or `unreachable`."""

    code = "object_store_unavailable"
    status = 503


class HostUnfit(ServerError):
    code = "host_unfit"
    status = 503


class RuntimeUnavailable(HostUnfit):
    """What `runtime` names does not work on this machine, not any more, or not yet (`retry_after_s`). Nothing was lost."""

    code = "runtime_unavailable"


class TemplateError(ServerError):
    code = "template_error"


class TemplateBuildError(TemplateError):
    code = "template_build_failed"


class RuntimeFailed(ServerError):
    code = "runtime_failed"


class GuestError(ServerError):
    code = "guest_error"
    status = 502


class GuestProtocolError(GuestError):
    code = "guest_protocol"


class GuestTimeout(GuestError):
    # Clients read "timeout" in a 5xx as "the command ran too long", which this is not: texts say "no answer".
    code = "guest_no_answer"


class GuestGone(GuestError):
    code = "guest_gone"


class HookFailed(GuestError):
    """Of `before-snapshot`: nothing was saved and all runs on. Of `after-restore`: the sandbox was not handed out."""

    code = "hook_failed"


class SandboxTimeout(PandastackError, builtins.TimeoutError):
    """The message must contain the word "timeout": existing clients recognise it by that."""

    code = "exec_timeout"
    status = 504


class ConnectionError(PandastackError, builtins.ConnectionError):
    code = "connection"
    status = 0


APIConnectionError = ConnectionError


class ExecInterrupted(PandastackError):
    """`stdout` and `stderr` hold what had arrived; `process_id` lets you attach again."""

    code = "exec_interrupted"
    status = 502


class CommandFailed(PandastackError):
    """`exit_code`, `stdout` and `stderr` are those of the command."""

    code = "command_failed"
    status = 0


class CreateCancelled(PandastackError):
    code = "create_cancelled"
    status = 0


class ExploreError(Exception):
    """No candidate of an exploration succeeded."""


def _classes(base: type[PandastackError]) -> dict[str, type[PandastackError]]:
    found = {base.code: base}
    for child in base.__subclasses__():
        # A room may refine an error for itself: under the code of the error it refines, that one is what crosses rooms.
        found = _classes(child) | found
    return found


def from_body(status: int, body: Any, *, request_id: str | None = None, retry_after_s: float | None = None) -> PandastackError:
    """Build the error an API answer describes: by its `code` when known, else by its HTTP status.

    `body` is the decoded JSON (any shape) or the text of the answer; never raises.
    """
    data: dict[str, Any] = dict(body) if isinstance(body, dict) else {}
    text = next((data[key] for key in ("error", "message", "detail") if isinstance(data.get(key), str)), None)
    message = text if text is not None else (body if isinstance(body, str) and body else f"HTTP {status}")
    by_code = _classes(PandastackError).get(str(data.get("code")))
    if by_code is None:
        by_code = (
            AuthError if status == 401 else NotFoundError if status == 404 else BadRequestError if 400 <= status < 500 else ServerError
        )
    known = ("error", "message", "detail", "code", "hint", "request_id", "retry_after_s", "http_status")
    fields = {key: value for key, value in data.items() if key not in known and isinstance(key, str)}
    hint = data.get("hint")
    wait = data.get("retry_after_s")
    return by_code(
        message,
        hint=hint if isinstance(hint, str) else None,
        request_id=request_id or (data.get("request_id") if isinstance(data.get("request_id"), str) else None),
        retry_after_s=retry_after_s if retry_after_s is not None else (float(wait) if isinstance(wait, (int, float)) else None),
        http_status=status,
        **fields,
    )
