"""A control plane on a FakeHost, with two tenants, for one test. Streams that need a socket use `served`."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI

from pandastack.control import access, server
from pandastack.control.app import build
from pandastack.control.fake_host import FakeHost
from pandastack.control.parts import Parts
from pandastack.control.settings import ControlSettings


@dataclass
class World:
    """`ours` and `theirs` are clients with admin keys of two tenants; `anyone` has no key."""

    app: FastAPI
    host: FakeHost
    parts: Parts
    ours: httpx2.AsyncClient
    theirs: httpx2.AsyncClient
    anyone: httpx2.AsyncClient
    key: str

    async def sandbox(self, **body: Any) -> str:
        """A running sandbox of ours; its id."""
        answer = await self.ours.post("/v1/sandboxes", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    async def status(self, sandbox: str) -> tuple[str, str | None]:
        """What one of our sandboxes says it is, and why."""
        body = (await self.ours.get(f"/v1/sandboxes/{sandbox}")).json()
        return body["status"], body["status_reason"]

    def client(self, key: str | None) -> httpx2.AsyncClient:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=self.app, raise_app_exceptions=False), base_url="http://api.test", headers=headers
        )

    async def key_with(self, *scopes: str, tenant: str = access.DEFAULT_TENANT) -> str:
        return await access.bootstrap(self.parts.store, tenant_name=tenant, label="test", scopes=scopes)


def settings_for(path: Path, **changes: Any) -> ControlSettings:
    values: dict[str, Any] = {"database_path": path, "template_wait_s": 0.2, "event_wait_s": 0.05, "expiry_interval_s": 0.02} | changes
    return ControlSettings(**values)


@asynccontextmanager
async def world(path: Path, host: FakeHost | None = None, **changes: Any) -> AsyncIterator[World]:
    """Started, and stopped at the end; a second one on the same path and host is a restart."""
    fake = host or FakeHost()
    app = build(settings_for(path, **changes), fake)
    async with app.router.lifespan_context(app):
        parts: Parts = app.state.parts
        key = await access.bootstrap(parts.store)
        made = World(app, fake, parts, None, None, None, key)  # type: ignore[arg-type]
        made.ours = made.client(key)
        made.theirs = made.client(await access.bootstrap(parts.store, tenant_name="other"))
        made.anyone = made.client(None)
        async with made.ours, made.theirs, made.anyone:
            yield made
    if host is None:
        await fake.aclose()


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[int]:
    """The application behind a real uvicorn on loopback, its lifespan being run by somebody else; yields the port."""
    running = uvicorn.Server(server.config(app, host="127.0.0.1", port=0, loop="none", lifespan="off"))
    task = asyncio.create_task(running.serve(), name="uvicorn")
    try:
        await until(lambda: running.started)
        yield int(running.servers[0].sockets[0].getsockname()[1])
    finally:
        running.should_exit = running.force_exit = True
        await task


async def until(condition: Callable[[], object], *, within_s: float = 5.0) -> None:
    """Waits on what a test is about, not for a time."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - the things that change here have no event
            await asyncio.sleep(0.002)


async def eventually(check: Callable[[], Awaitable[Any]], *, within_s: float = 5.0) -> Any:
    """What `check` returns once it is true; waits on the condition, not for a time."""
    async with asyncio.timeout(within_s):
        while True:
            found = await check()
            if found:
                return found
            await asyncio.sleep(0.005)


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events as existing clients split them: on exactly two line feeds."""
    found = []
    for frame in text.split("\n\n"):
        lines = [line for line in frame.split("\n") if line and not line.startswith(":")]
        if lines:
            fields = dict(line.split(": ", 1) for line in lines)
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def copy_database(template: Path, target: Path) -> Path:
    """Migrating takes longer than most tests, so it is done once."""
    shutil.copy(template, target)
    return target
