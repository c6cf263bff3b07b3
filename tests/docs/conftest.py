"""A real server for the programs of the documentation."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from system.servers import Server


@pytest.fixture(scope="session")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if os.geteuid() != 0:
        pytest.skip("sandboxes need root")
    server = Server(tmp_path_factory.mktemp("docs-server"), slots=2)
    server.start()
    server.bake("base", "code-interpreter")
    yield server
    server.end()
