"""Templates on demand: a create may ask for one that this machine has not made yet. One bake per template and isolation runs at
a time, owned by the control plane, whoever asked for it and however soon they left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from pandastack.control.hosts import Host, closing
from pandastack.control.work import Crew
from pandastack.errors import ServerError, TemplateNotReady
from pandastack.wire.templates import BakeProgress

RETRY_AFTER_S = 5.0


class _Bake:
    """One bake: what it said last, and how it ended. `changed` is replaced by a new event at each change."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.progress: BakeProgress | None = None
        self.ended = False
        self.error: Exception | None = None
        self.changed = asyncio.Event()

    def tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def how_far(self) -> str:
        elapsed_s = time.monotonic() - self.began
        if self.progress is None:
            return f"started {elapsed_s:.0f} s ago"
        step = self.progress
        share = f", {step.done} of {step.total} {step.unit}".rstrip() if step.done is not None and step.total else ""
        return f"{step.message or step.step}{share}, {elapsed_s:.0f} s so far"


class Bakes:
    """The bakes under way on one host."""

    def __init__(self, host: Host, crew: Crew) -> None:
        self._host = host
        self._crew = crew
        self._running: dict[tuple[str, str], _Bake] = {}

    async def ensure(self, template: str, isolation: str, *, wait_s: float) -> None:
        """Start the bake if none runs, and wait for it. Raises TemplateNotReady after `wait_s`, or what the bake raised."""
        bake = self._start(template, isolation)
        try:
            async with asyncio.timeout(wait_s):
                while not bake.ended:
                    await bake.changed.wait()
        except TimeoutError:
            raise TemplateNotReady(
                f"template {template!r} is still being made: {bake.how_far()}",
                hint="ask again; nothing was created",
                retry_after_s=RETRY_AFTER_S,
            ) from None
        if bake.error is not None:
            raise bake.error

    async def follow(self, template: str, isolation: str) -> AsyncIterator[BakeProgress]:
        """Start the bake if none runs, and report its progress until it ends; raises what it raised."""
        bake = self._start(template, isolation)
        seen: BakeProgress | None = None
        while True:
            changed = bake.changed
            if bake.progress is not None and bake.progress is not seen:
                # A reader that is slower than the bake sees the newest state, not a backlog.
                seen = bake.progress
                yield seen
            elif bake.ended:
                break
            else:
                await changed.wait()
        if bake.error is not None:
            raise bake.error

    def _start(self, template: str, isolation: str) -> _Bake:
        bake = self._running.get((template, isolation))
        if bake is None:
            bake = self._running[template, isolation] = _Bake()
            self._crew.start("bake", self._run(template, isolation, bake))
        return bake

    async def _run(self, template: str, isolation: str, bake: _Bake) -> None:
        try:
            async with closing(self._host.bake(template, isolation)) as steps:
                async for step in steps:
                    bake.progress = step
                    bake.tell()
        except asyncio.CancelledError:
            bake.error = ServerError("the server is shutting down")
            raise
        except Exception as error:
            bake.error = error
            raise
        finally:
            bake.ended = True
            del self._running[template, isolation]
            bake.tell()
