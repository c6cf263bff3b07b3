"""A server in this process for the commands: the real control plane over a host in memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pandastack.sdk import client as clients
from pandastack.sdk.client import Client


class Live(NamedTuple):
    api_url: str
    api_key: str


@pytest.fixture(autouse=True)
def _own_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test may find the configuration, or the default client, of whoever runs it."""
    for name in ("PANDASTACK_API", "PANDASTACK_API_KEY", "PANDASTACK_MAX_CREATE_RETRY_SECONDS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    clients.set_default_client(None)
    yield
    clients.set_default_client(None)


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Address and key of a running API; skipped where the server part is not installed."""
    pytest.importorskip("fastapi")
    uvicorn = pytest.importorskip("uvicorn")
    from pandastack.control import access, app, server
    from pandastack.control.fake_host import FakeHost
    from pandastack.control.settings import ControlSettings

    class Host(FakeHost):
        """Runs Bash code as the shell line that it is; the host in memory knows shell words only."""

        def run(self, sandbox_id: Any, request: Any, process_id: Any) -> Any:
            if request.code is not None and request.language == "bash":
                request = request.model_copy(update={"cmd": request.code, "code": None})
            return super().run(sandbox_id, request, process_id)

    host = Host()
    host.runtimes.offer("gvisor", "gvisor")
    host.runtimes.offer("qemu", "microvm", acceleration="tcg")
    application = app.build(ControlSettings(database_path=tmp_path_factory.mktemp("control") / "control.db"), host)
    running = uvicorn.Server(server.config(application, host="127.0.0.1", port=0))
    ready = threading.Event()
    found: list[Live] = []

    async def serve() -> None:
        serving = asyncio.create_task(running.serve())
        while not running.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        found.append(Live(f"http://127.0.0.1:{port}", await access.bootstrap(application.state.parts.store, label="tests")))
        ready.set()
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(20), "the server did not start"
    yield found[0]
    running.should_exit = True
    thread.join(20)


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(live.api_url, live.api_key) as made:
        yield made


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
