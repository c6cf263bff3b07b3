"""Calls about what is taken of the machine."""

from __future__ import annotations

from pandastack.sdk.calls.call import Call, build, reads
from pandastack.sdk.calls.sandboxes import root
from pandastack.wire.usage import SandboxUsage, WorkspaceUsage


def of_sandbox(sandbox_id: str) -> Call[SandboxUsage]:
    return Call(build("GET", f"{root(sandbox_id)}/usage"), reads(SandboxUsage))


def of_workspace() -> Call[WorkspaceUsage]:
    return Call(build("GET", "/usage"), reads(WorkspaceUsage))
