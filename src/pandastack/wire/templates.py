"""Templates as the public API shows them."""

from __future__ import annotations

from typing import Literal

from pandastack.wire.sandboxes import View

TemplateState = Literal["missing", "building", "built", "baking", "ready", "failed"]


class TemplateView(View):
    """A template. `state` says how far this machine is: only a `ready` one starts at full speed.

    Each runtime has states of its own: `state` and `error` are those of the runtime that `auto` means, `runtimes` has every one that works.

    `actual` and `note` differ from `name` and null where the name is served by another image (`ubuntu-24.04`
    without a reachable Ubuntu mirror is `base`).
    """

    name: str
    actual: str
    note: str | None = None
    label: str = ""
    description: str = ""
    category: str = ""
    base: str | None = None
    tools: list[str] = []
    cpu: float | int = 1
    memory_mb: int = 512
    disk_mb: int = 2048
    size_bytes: int = 0
    rootfs_path: str = ""
    is_global: bool = True
    workspace: str | None = None
    state: TemplateState = "missing"
    runtimes: dict[str, TemplateState] = {}
    error: str | None = None
    digest: str | None = None
    distribution: str | None = None
    meta: dict[str, str] = {}


class BakeProgress(View):
    """One event of `POST /v1/templates/{name}/bake` (SSE, event `progress`); the last is `done` or `error`.

    `done` and `total` count `unit`s; `total` is null where it cannot be known. `elapsed_s` counts from the request.
    """

    step: str
    message: str
    done: int | None = None
    total: int | None = None
    unit: str = ""
    elapsed_s: float = 0.0
