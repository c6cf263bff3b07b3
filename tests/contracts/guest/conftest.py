"""Fixtures of the guest's contract: the daemon of this tree, running in both ways, and sessions with it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from pandastack.host.guest import Guest

from .daemons import Daemon, running

SOURCE = Path(__file__).parents[3] / "guest"


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The daemon of this tree: from the environment, else built, else the installed wheel's."""
    if named := os.environ.get("PANDASTACK_GUEST_BINARY"):
        return Path(named)
    if go := shutil.which("go"):
        target = tmp_path_factory.mktemp("guest") / "pandastack-guest"
        settings = os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOPROXY": "off"}
        subprocess.run([go, "build", "-o", str(target), "."], cwd=SOURCE, env=settings, check=True)
        return target
    installed = pytest.importorskip("pandastack_guest", reason="no guest binary: no Go toolchain and no pandastack-guest wheel")
    return Path(installed.path())


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One at a time, also where tests run side by side: a daemon that is no PID 1 finds its trees among all processes, by their names."""
    with (tmp_path_factory.getbasetemp().parent / "guest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(params=["process", "pid1"])
def daemon(binary: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemon]:
    with running(binary, request.param, tmp_path) as daemon:
        yield daemon


@pytest.fixture
def plain(binary: Path, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that is not PID 1, for promises that do not depend on it."""
    with running(binary, "process", tmp_path) as daemon:
        yield daemon


@pytest.fixture
async def guest(daemon: Daemon) -> AsyncIterator[Guest]:
    guest = await daemon.open()
    yield guest
    await guest.close()


@pytest.fixture
async def one(plain: Daemon) -> AsyncIterator[Guest]:
    guest = await plain.open()
    yield guest
    await guest.close()
