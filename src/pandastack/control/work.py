"""Owners for tasks: nothing in the control plane runs without one. Opened by the lifespan, used by every part.

Two kinds of work: a *loop* goes on until shutdown and survives its errors; a *job* was begun for somebody who may leave,
and is finished (or undone by itself) all the same.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, TypeVar

import structlog

from pandastack.control.meters import Meters
from pandastack.errors import PandastackError

log = structlog.get_logger(__name__)
T = TypeVar("T")

BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 30.0


class Turns:
    """One lock per key, kept only while somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    def busy(self, key: str) -> bool:
        return key in self._locks

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            _lock, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, users - 1)


class Crew:
    """Owns loops and jobs. Leaving it stops the loops at once and gives the jobs `grace_s` to finish."""

    def __init__(self, meters: Meters, *, grace_s: float) -> None:
        self._meters = meters
        self._grace_s = grace_s
        self._group = asyncio.TaskGroup()
        self._loops: set[asyncio.Task[None]] = set()
        self._jobs: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Crew:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._loops:
            task.cancel()
        if self._jobs:
            await asyncio.wait(self._jobs, timeout=self._grace_s)
        for task in self._jobs:
            task.cancel()
        await self._group.__aexit__(kind, error, trace)

    def loop(self, name: str, once: Callable[[], Awaitable[None]], *, pause_s: float, wake: asyncio.Event | None = None) -> None:
        """Call `once` for ever: `pause_s` apart, at once when `wake` is set, further and further apart while it fails."""

        async def forever() -> None:
            backoff_s = BACKOFF_FIRST_S
            while True:
                try:
                    await once()
                    backoff_s, wait_s = BACKOFF_FIRST_S, pause_s
                except Exception:
                    log.exception("loop.failed", loop=name)
                    self._meters.background_failures.labels(name).inc()
                    wait_s = backoff_s * random.uniform(0.5, 1.5)  # noqa: S311 - spreads retries, guards nothing
                    backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)
                if wake is None:
                    await asyncio.sleep(wait_s)
                else:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(wake.wait(), wait_s)
                    wake.clear()

        task = self._group.create_task(forever(), name=name)
        self._loops.add(task)
        task.add_done_callback(self._loops.discard)

    def start(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """Begin a job. Its outcome is in the future, which nobody has to wait for."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        async def job() -> None:
            try:
                result = await work
            except asyncio.CancelledError:
                future.cancel()
                raise
            except Exception as error:
                # Whoever asked may have left, so what is not the client's own mistake is told here.
                if not isinstance(error, PandastackError):
                    self._meters.background_failures.labels(name).inc()
                    log.exception("job.failed", job=name)
                elif error.http_status >= 500:
                    log.warning("job.refused", job=name, code=error.code, error=error.message)
                if not future.cancelled():
                    future.set_exception(error)
                    future.exception()  # Marks it as seen, or asyncio would report it a second time.
            else:
                if not future.cancelled():
                    future.set_result(result)

        task = self._group.create_task(job(), name=name)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        return future

    async def finish(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        """Do a job to its end even if the one who waits here is cancelled."""
        return await asyncio.shield(self.start(name, work))
