"""Servers for the system tests. Most share one; a test that kills or fills its server has one of its own.

Nothing here is faked. The images and baked states are kept in the cache directory (PANDASTACK_CACHE_DIR, else the default
one): on a fresh machine the first run makes them, which takes minutes. See docs/howto/testing.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pandastack.sdk.client import Client
from pandastack.sdk.sandboxes import Sandbox

from .servers import Server

TEMPLATES = ("base", "code-interpreter")
NEW_RUNSC = "PANDASTACK_TEST_RUNSC_NEW"

MakeServer = Callable[..., Server]
MakeSandbox = Callable[..., Sandbox]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.system)
        if item.get_closest_marker("timeout") is None:
            # The first test may have to wait for the templates of a fresh machine.
            item.add_marker(pytest.mark.timeout(2400))
        if os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="sandboxes need root"))


class _Shared:
    """One server per build of runsc, started when a test first asks for it."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self.servers: dict[str, Server] = {}

    def get(self, name: str, environ: dict[str, str]) -> Server:
        if name not in self.servers:
            server = self.servers[name] = Server(self._factory.mktemp(f"server-{name}"), slots=2, blanks=1, environ=environ)
            server.start()
            server.bake(*TEMPLATES)
        return self.servers[name]


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Shared]:
    shared = _Shared(tmp_path_factory)
    yield shared
    for server in shared.servers.values():
        server.end()


def _check(server: Server) -> None:
    """After a test on a shared server: it still answers, and has no machine but those of sandboxes and of its pool."""
    assert server.alive, server.said()
    with server.client() as client:
        left = client.sandboxes.list()
        for sandbox in left:
            sandbox.kill()
        kept = client.snapshots.list()
        for snapshot in kept:
            client.snapshots.delete(snapshot.id)
    assert (left, kept) == ([], []), "the test left sandboxes or snapshots behind"
    assert list((server.data / "captures").iterdir()) == []


@pytest.fixture
def server(_shared: _Shared) -> Iterator[Server]:
    """The shared server, over the runsc that the product picks itself."""
    server = _shared.get("default", {})
    yield server
    _check(server)


@pytest.fixture(params=["runsc-picked", "runsc-new"])
def any_server(request: pytest.FixtureRequest, _shared: _Shared) -> Iterator[Server]:
    """A shared server for each build of runsc: the one the product picks, and the one that PANDASTACK_TEST_RUNSC_NEW names."""
    environ: dict[str, str] = {}
    if request.param == "runsc-new":
        binary = os.environ.get(NEW_RUNSC)
        if not binary:
            pytest.skip(f"{NEW_RUNSC} does not name a second runsc")
        environ["PANDASTACK_RUNSC"] = binary
    server = _shared.get("default" if not environ else "new", environ)
    yield server
    _check(server)


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(api_url=server.url, api_key=server.token) as client:
        yield client


def _maker(client: Client) -> Iterator[MakeSandbox]:
    made: list[Sandbox] = []

    def make(template: str = "base", **options: Any) -> Sandbox:
        made.append(client.sandboxes.create(template, **options))
        return made[-1]

    yield make
    left = {sandbox.id for sandbox in client.sandboxes.list()}
    for sandbox in made:
        if sandbox.id in left:
            sandbox.kill()


@pytest.fixture
def make(client: Client) -> Iterator[MakeSandbox]:
    """Creates sandboxes on the shared server; they are deleted after the test."""
    yield from _maker(client)


@pytest.fixture
def any_client(any_server: Server) -> Iterator[Client]:
    with Client(api_url=any_server.url, api_key=any_server.token) as client:
        yield client


@pytest.fixture
def any_make(any_client: Client) -> Iterator[MakeSandbox]:
    """As `make`, once for each build of runsc."""
    yield from _maker(any_client)


@pytest.fixture
def own_server(tmp_path: Path, _shared: _Shared) -> Iterator[MakeServer]:
    """Makes servers of the test's own; after the test nothing of them may be left.

    They are started, unless `start=False`, and live in a folder of the test, unless `work` names another.
    """
    # With the shared one first, the templates are in the cache.
    _shared.get("default", {})
    made: list[Server] = []

    def make_server(*, start: bool = True, work: Path | None = None, **options: Any) -> Server:
        server = Server(work or tmp_path / f"own{len(made)}", **options)
        made.append(server)
        if start:
            server.start()
            # Every test may rely on it; a state from the cache is ready at once.
            server.bake("base")
        return server

    yield make_server
    for server in made:
        server.end()
