from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pandastack.control.store import migrations

from .world import World, copy_database, world


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The control plane is written for asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file that tests copy."""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    migrations.upgrade(path)
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Path:
    """A migrated file of this test's own."""
    return copy_database(empty_database, tmp_path / "control.db")


@pytest.fixture
async def w(database: Path) -> AsyncIterator[World]:
    """A running control plane on a FakeHost. Leaves no task behind."""
    before = asyncio.all_tasks()
    async with world(database) as made:
        yield made
    left = {task for task in asyncio.all_tasks() - before if not task.done() and "TestRunner" not in repr(task)}
    assert not left, left
