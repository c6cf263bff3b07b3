"""Shared by all tests: the event loop, a host on the fake runtime, and the oracle that nothing was left behind."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from hosts import World
from pandastack.host.app import HostService

# So many tests may need a second try (`--reruns 1`) before the run fails.
SECOND_TRIES = 3

# How long an example takes says what else the machine does, and nothing of the code.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_configure() -> None:
    """Whoever starts the tests may ignore signals, as a shell does for what it puts in the background; programs would inherit that.

    Two are ignored by Python itself, which gives the default back to what it starts.
    """
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)


def _first_tries(config: pytest.Config) -> list[pytest.TestReport]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return [] if reporter is None else reporter.stats.get("rerun", [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A machine that is slow for a moment may fail a test, a product may not fail many."""
    if len(_first_tries(session.config)) > SECOND_TRIES:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Whatever failed at first is shown as any failure is: it is a defect to be found."""
    if tries := _first_tries(config):
        terminalreporter.section(f"{len(tries)} failed at the first try; more than {SECOND_TRIES} fail the run", red=True)
    for report in tries:
        terminalreporter.write_sep("-", f"{report.nodeid} ({report.when})")
        terminalreporter.line(report.longreprtext)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


def _descriptors() -> dict[str, str]:
    found = {}
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found[fd.name] = str(fd.readlink())
        except OSError:
            continue  # The one of this very listing.
    return found


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """After the test this process has the descriptors and threads of fakes that it had before, a moment given."""
    before = _descriptors()
    yield
    deadline = time.monotonic() + 5
    while True:
        more = {fd: what for fd, what in _descriptors().items() if fd not in before and "socket" in what}
        threads = [thread.name for thread in threading.enumerate() if thread.name == "fake guests"]
        if not more and not threads:
            return
        assert time.monotonic() < deadline, f"left behind: {more} {threads}"
        time.sleep(0.01)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """The folders and machines of an install on the fake runtime."""
    made = World(tmp_path)
    yield made
    made.clear()


@pytest.fixture
async def host(world: World) -> AsyncIterator[HostService]:
    """A running host on `world`, without a pool."""
    async with world.opened() as made:
        yield made
