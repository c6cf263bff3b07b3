"""Waiting for blocking work of a driver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


async def to_the_end(work: Callable[..., None], *arguments: Any) -> None:
    """Run blocking work in a thread. When this is cancelled the thread is waited for: it must not make things after their undo."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
