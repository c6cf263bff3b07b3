"""Locks on what is made once and kept: across processes, and between two makers inside one.

Runs on a host, used by `images` and `roots`. Lock files stay: removing one while another process waits on it would let two
makers in.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

_POLL_S = 0.2


@contextlib.contextmanager
def attempt(path: Path) -> Iterator[bool]:
    """Whether the lock is ours for as long as the block lasts."""
    # Each open file has a lock of its own, so flock also keeps two makers in one process apart.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@contextlib.asynccontextmanager
async def held(path: Path, waiting: Callable[[], None] = lambda: None) -> AsyncIterator[None]:
    """Wait for the lock, however long its holder needs; `waiting` is called five times a second meanwhile."""
    while True:
        with attempt(path) as ours:
            if ours:
                yield
                return
        waiting()
        await asyncio.sleep(_POLL_S)
