"""runsc by its command line, as the bare tool of gVisor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pandastack.bench import runsc_sandboxes, runsc_states
from pandastack.bench.tool import BareState
from pandastack.bench.workloads import Workload
from pandastack.errors import HostUnfit


@contextlib.contextmanager
def tool(template: str) -> Iterator[Runsc]:
    """runsc as the bare tool for a template."""
    with runsc_sandboxes.work() as folder:
        yield Runsc(template, folder)


class Runsc:
    """See `tool.BareTool`."""

    def __init__(self, template: str, folder: Path) -> None:
        self._template, self._folder = template, folder
        self._found: runsc_sandboxes.Bare | None = None

    def find(self, acceleration: str | None) -> None:
        self._found = self._found or runsc_sandboxes.bare(self._template)

    @property
    def _bare(self) -> runsc_sandboxes.Bare:
        if self._found is None:
            raise HostUnfit("the bare tool was used before its image was there")
        return self._found

    def create_and_exec(self) -> float:
        with self._bare.sandbox(self._folder) as (name, prefix, took):
            return took + self._bare.exec_true(name, prefix)

    @contextlib.contextmanager
    def session(self) -> Iterator[Callable[[], float]]:
        with self._bare.sandbox(self._folder) as (name, prefix, _):
            yield lambda: self._bare.exec_true(name, prefix)

    @contextlib.contextmanager
    def holding(self, workload: Workload) -> Iterator[BareState]:
        with runsc_states.holding(self._bare, self._folder, workload) as state:
            yield state
