"""What each benchmark is handed: which runtime is measured, where its servers live, and what they are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pandastack.bench.promises import Promise, promise
from pandastack.bench.server import Place, Server
from pandastack.bench.tool import BareTool
from pandastack.bench.workloads import Workload

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    runtime: str
    template: str
    place: Place
    bare: BareTool
    say: Say
    cpu: float | None = None  # Of sandboxes with a state, ours and the bare ones; None: the template's.

    @contextlib.contextmanager
    def running(self, *, slots: int = 0, blanks: int = 0, environ: Mapping[str, str] | None = None) -> Iterator[Server]:
        """A server with the template ready, and the bare tool with it. `environ` goes over its environment."""
        with self.place.running(slots=slots, blanks=blanks, template=self.template, environ=environ or {}) as server:
            self.bare.find(server.acceleration)
            yield server

    def workload(self, state_mb: int, *, free_mb: int = Workload.free_mb) -> Workload:
        return Workload(state_mb, free_mb=free_mb, cpu=self.cpu)

    def promise(self, benchmark: str, of: str, *, if_: bool = True) -> Promise | None:
        return promise(self.runtime, benchmark, of) if if_ else None
