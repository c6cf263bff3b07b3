"""Waiting for the work of a driver, to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any


async def to_the_end(work: Callable[..., None], *arguments: Any) -> None:
    """Run blocking work in a thread. When this is cancelled the thread is waited for: it must not make things after their undo."""
    await finished(asyncio.to_thread(work, *arguments))


async def finished(work: Coroutine[Any, Any, None]) -> None:
    """Wait until it is finished, also when this is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


class InThread:
    """An asynchronous context manager for the thread of `to_the_end`: it is entered and left in the loop that this was made in."""

    def __init__(self, manager: AbstractAsyncContextManager[Any]) -> None:
        self._manager = manager
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> None:
        asyncio.run_coroutine_threadsafe(self._enter(), self._loop).result()

    async def _enter(self) -> None:
        await self._manager.__aenter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._leave(kind, error, trace), self._loop).result()

    async def _leave(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._manager.__aexit__(kind, error, trace)
