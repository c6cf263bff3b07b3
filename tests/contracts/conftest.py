"""Shared by the contract suites: where machines with images live."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts import sharing_blocks


@pytest.fixture(scope="session")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system on which copies share blocks."""
    with sharing_blocks(tmp_path_factory.mktemp("xfs") / "file") as folder:
        yield folder
