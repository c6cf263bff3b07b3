"""Programs that fetch packages: whoever is not waited for any more is dead, with those that it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from hosts import until
from pandastack.host import debian

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("known_after_s", [0, 1])
async def test_who_leaves_ends_also_what_the_program_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_after_s: float) -> None:
    """Also when it has begun, and is not known yet to whoever started it."""
    start = asyncio.create_subprocess_exec

    async def slowly(*words: Any, **options: Any) -> Any:
        process = await start(*words, **options)
        await asyncio.sleep(known_after_s)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slowly)
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $$ $! >{pids}.new; mv {pids}.new {pids}; wait"
    running = asyncio.create_task(debian.run(["sh", "-c", script], tmp_path, dict(os.environ), what="it", remedy="none"))
    await until(pids.exists)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert running.cancelled()
    for pid in pids.read_text().split():
        await until(lambda pid=pid: over(int(pid)))  # type: ignore[misc]


def over(pid: int) -> bool:
    """Gone, or for its new parent to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
