"""Run code that an AI wrote, in isolated sandboxes: `from pandastack import Sandbox`.

Names are loaded when they are first used, so that `import pandastack` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandastack.errors import (
        APIConnectionError,
        AuthError,
        BadRequestError,
        CapacityError,
        CommandFailed,
        Conflict,
        ConnectionError,
        CreateCancelled,
        DiskFull,
        ExecInterrupted,
        ExploreError,
        FileConflict,
        FileNotFound,
        GuestError,
        GuestGone,
        GuestProtocolError,
        GuestTimeout,
        HookFailed,
        HostUnfit,
        IdempotencyConflict,
        InvalidRequest,
        IsolationTooWeak,
        NotFoundError,
        ObjectStoreUnavailable,
        PandastackError,
        PermissionDenied,
        ProcessNotFound,
        QuotaExceeded,
        RateLimited,
        RuntimeFailed,
        RuntimeUnavailable,
        SandboxNotFound,
        SandboxNotRunning,
        SandboxTimeout,
        ServerError,
        SnapshotNotFound,
        SnapshotUnusable,
        TemplateBuildError,
        TemplateError,
        TemplateNotFound,
        TemplateNotReady,
        TokenNotFound,
        TooLarge,
    )
    from pandastack.sdk.async_sandboxes import AsyncSandbox
    from pandastack.sdk.branches import BranchOutcome, Candidate, ExploreResult
    from pandastack.sdk.client import (
        AsyncClient,
        Client,
        get_default_async_client,
        get_default_client,
        set_default_async_client,
        set_default_client,
    )
    from pandastack.sdk.explore import async_explore, explore
    from pandastack.sdk.files import AsyncFilesystem, AsyncFileWatch, Filesystem, FileWatch
    from pandastack.sdk.processes import AsyncProcess, Process
    from pandastack.sdk.results import (
        BakeProgress,
        Checkpoints,
        ExecResult,
        FileChange,
        FileEvent,
        FileInfo,
        FileSide,
        FileWritten,
        Lifecycle,
        Me,
        OutputEvent,
        OutputSlice,
        Promoted,
        Quota,
        SandboxMetrics,
        SandboxUsage,
        Snapshot,
        Template,
        Token,
        WorkspaceUsage,
    )
    from pandastack.sdk.retry import CreateRetryEvent
    from pandastack.sdk.sandboxes import Sandbox
    from pandastack.sdk.streams import AsyncOutputStream, OutputStream

    __version__: str

_HOMES = {
    "errors": (
        "APIConnectionError AuthError BadRequestError CapacityError CommandFailed Conflict ConnectionError CreateCancelled DiskFull "
        "ExecInterrupted ExploreError FileConflict FileNotFound GuestError GuestGone GuestProtocolError GuestTimeout HookFailed "
        "HostUnfit IdempotencyConflict InvalidRequest IsolationTooWeak NotFoundError ObjectStoreUnavailable PandastackError "
        "PermissionDenied ProcessNotFound QuotaExceeded RateLimited RuntimeFailed RuntimeUnavailable SandboxNotFound SandboxNotRunning "
        "SandboxTimeout ServerError SnapshotNotFound SnapshotUnusable TemplateBuildError TemplateError TemplateNotFound "
        "TemplateNotReady TokenNotFound TooLarge"
    ),
    "sdk.client": ("AsyncClient Client get_default_async_client get_default_client set_default_async_client set_default_client"),
    "sdk.branches": "BranchOutcome Candidate ExploreResult",
    "sdk.explore": "async_explore explore",
    "sdk.files": "AsyncFileWatch AsyncFilesystem FileWatch Filesystem",
    "sdk.processes": "AsyncProcess Process",
    "sdk.results": (
        "BakeProgress Checkpoints ExecResult FileChange FileEvent FileInfo FileSide FileWritten Lifecycle Me OutputEvent OutputSlice "
        "Promoted Quota SandboxMetrics SandboxUsage Snapshot Template Token WorkspaceUsage"
    ),
    "sdk.retry": "CreateRetryEvent",
    "sdk.async_sandboxes": "AsyncSandbox",
    "sdk.sandboxes": "Sandbox",
    "sdk.streams": "AsyncOutputStream OutputStream",
}
_HOME_OF = {name: f"pandastack.{module}" for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "APIConnectionError",
    "AsyncClient",
    "AsyncFileWatch",
    "AsyncFilesystem",
    "AsyncOutputStream",
    "AsyncProcess",
    "AsyncSandbox",
    "AuthError",
    "BadRequestError",
    "BakeProgress",
    "BranchOutcome",
    "Candidate",
    "CapacityError",
    "Checkpoints",
    "Client",
    "CommandFailed",
    "Conflict",
    "ConnectionError",
    "CreateCancelled",
    "CreateRetryEvent",
    "DiskFull",
    "ExecInterrupted",
    "ExecResult",
    "ExploreError",
    "ExploreResult",
    "FileChange",
    "FileConflict",
    "FileEvent",
    "FileInfo",
    "FileNotFound",
    "FileSide",
    "FileWatch",
    "FileWritten",
    "Filesystem",
    "GuestError",
    "GuestGone",
    "GuestProtocolError",
    "GuestTimeout",
    "HookFailed",
    "HostUnfit",
    "IdempotencyConflict",
    "InvalidRequest",
    "IsolationTooWeak",
    "Lifecycle",
    "Me",
    "NotFoundError",
    "ObjectStoreUnavailable",
    "OutputEvent",
    "OutputSlice",
    "OutputStream",
    "PandastackError",
    "PermissionDenied",
    "Process",
    "ProcessNotFound",
    "Promoted",
    "Quota",
    "QuotaExceeded",
    "RateLimited",
    "RuntimeFailed",
    "RuntimeUnavailable",
    "Sandbox",
    "SandboxMetrics",
    "SandboxNotFound",
    "SandboxNotRunning",
    "SandboxTimeout",
    "SandboxUsage",
    "ServerError",
    "Snapshot",
    "SnapshotNotFound",
    "SnapshotUnusable",
    "Template",
    "TemplateBuildError",
    "TemplateError",
    "TemplateNotFound",
    "TemplateNotReady",
    "Token",
    "TokenNotFound",
    "TooLarge",
    "WorkspaceUsage",
    "__version__",
    "async_explore",
    "explore",
    "get_default_async_client",
    "get_default_client",
    "set_default_async_client",
    "set_default_client",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # By name, as below: this package must not import its own rooms, which all import it.
        value: Any = importlib.import_module("pandastack.sdk.config").version()
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module 'pandastack' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
