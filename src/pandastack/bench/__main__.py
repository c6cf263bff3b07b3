"""`pandastack bench`: the command line of the benchmarks."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pandastack.bench import bare_qemu, bare_runsc, benchmarks, figures, forks, lazy, restores, runsc_sandboxes, server, states
from pandastack.bench.setting import Say, Setting
from pandastack.bench.tool import BareTool
from pandastack.bench.workloads import LARGE_STATE_MB
from pandastack.errors import PandastackError

TOOLS: dict[str, Callable[[str], AbstractContextManager[BareTool]]] = {"gvisor": bare_runsc.tool, "qemu": bare_qemu.tool}
_STATES_MB = (0, 50, 300)
_CHILDREN = (1, 4, 8, 16)


@dataclass(frozen=True)
class _Benchmark:
    """`runtimes` is empty where it is for all of them."""

    measure: Callable[[Setting, argparse.Namespace], list[figures.Row]]
    runtimes: Sequence[str] = ()

    def of(self, runtime: str) -> bool:
        return not self.runtimes or runtime in self.runtimes


# To add one: a function that takes a Setting and returns rows, its line here, its promises in `promises`, and docs/reference/benchmarks.md.
BENCHMARKS = {
    "create": _Benchmark(lambda setting, given: benchmarks.create(setting, given.samples or 20, given.slots, given.blanks)),
    "restore": _Benchmark(lambda setting, given: restores.restore(setting, given.samples or 20, given.blanks), ("qemu",)),
    "exec": _Benchmark(lambda setting, given: benchmarks.exec_(setting, given.samples or 100)),
    "files": _Benchmark(lambda setting, given: benchmarks.files(setting, given.size_mib, given.samples or 3)),
    "burst": _Benchmark(lambda setting, given: benchmarks.burst(setting, given.burst, given.burst_slots)),
    "idle": _Benchmark(lambda setting, given: benchmarks.idle(setting, given.samples or 10)),
    "snapshot": _Benchmark(lambda setting, given: states.snapshot(setting, _sizes(setting, given), given.samples, given.blanks)),
    "fork": _Benchmark(lambda setting, given: forks.fork(setting, _sizes(setting, given), given.children, given.samples, given.blanks)),
    "lazy": _Benchmark(lambda setting, given: lazy.lazy(setting, max(given.state_mb or [50]), given.samples or 3), ("qemu",)),
    "wake": _Benchmark(lambda setting, given: states.wake(setting, _sizes(setting, given), given.samples, given.blanks)),
}


# A microVM has whole CPUs, and what is measured here is one program: a second one would only be in the way of other machines.
_CPUS = {"qemu": 1.0}


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 measured (also when a promise was missed), 1 could not measure, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="pandastack bench",
        description="Measure this machine through the SDK over HTTP, against the bare tool in the same run.",
    )
    names = [*BENCHMARKS]
    parser.add_argument("benchmark", nargs="*", choices=[*names, []], help=f"which ones: {', '.join(names)} (default: all of the runtime)")
    parser.add_argument("--runtime", choices=[*TOOLS], default="gvisor", help="which runtime is measured (default: gvisor)")
    parser.add_argument("--template", default="base")
    parser.add_argument(
        "-n", "--samples", type=int, help="samples of each case (default: 20 creates, 100 execs, 3 large files, 5 states, 2 of 1000 MB)"
    )
    parser.add_argument("--slots", type=int, default=4, help="prepared machines for `create` (default: 4)")
    parser.add_argument("--blanks", type=int, default=4, help="blank machines for `create`, `snapshot`, `fork` and `wake` (default: 4)")
    parser.add_argument("--burst", type=int, default=30, help="creates at once (default: 30)")
    parser.add_argument("--burst-slots", type=int, default=32, help="prepared machines for `burst` (default: 32)")
    parser.add_argument("--size-mib", type=int, default=1024, help="size of the large file (default: 1024)")
    parser.add_argument(
        "--state-mb", type=_numbers(0, 1 << 20), help="sizes of the states to save (default: 0,50,300, and 1000 if it fits)"
    )
    parser.add_argument(
        "--cpu",
        type=float,
        help="CPUs of each sandbox with a state, the bare tool's too (default: 1 of a microVM, else the template's)",
    )
    parser.add_argument("--children", type=_numbers(1, 16), default=_CHILDREN, help="children of a fork (default: 1,4,8,16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args(argv)
    for name in arguments.benchmark:
        if not BENCHMARKS[name].of(arguments.runtime):
            parser.error(f"{name} is of {', '.join(BENCHMARKS[name].runtimes)} only")
    # Without a terminal nobody sets a width, and a narrow table is hard to read.
    console = Console(width=None if sys.stdout.isatty() else 160)
    progress = Console(stderr=True)
    # Ended from outside, it must still take its server and sandboxes with it.
    signal.signal(signal.SIGTERM, _end)
    runsc_sandboxes.adopt_orphans()
    try:
        if os.geteuid() != 0:
            raise PandastackError("bench must run as root, because it drives the bare tool by hand to compare", hint="run it with sudo")
        with progress.status("starting") as status:
            rows = _measure(arguments, lambda text: status.update(text))
    except PandastackError as error:
        progress.print(f"[red]pandastack: {error}[/red]")
        return 1
    figures.show(rows, console)
    if arguments.json:
        figures.write(rows, arguments.json)
    return 0


def _measure(arguments: argparse.Namespace, say: Say) -> list[figures.Row]:
    runtime, rows = arguments.runtime, []
    with server.place(runtime) as place, TOOLS[runtime](arguments.template) as bare:
        setting = Setting(runtime, arguments.template, place, bare, say, cpu=arguments.cpu or _CPUS.get(runtime))
        for name in BENCHMARKS:
            if name in (arguments.benchmark or BENCHMARKS) and BENCHMARKS[name].of(runtime):
                rows += BENCHMARKS[name].measure(setting, arguments)
    return rows


def _sizes(setting: Setting, arguments: argparse.Namespace) -> Sequence[int]:
    large = [LARGE_STATE_MB] if forks.fits(setting.runtime, LARGE_STATE_MB, 1) else []
    return arguments.state_mb or [*_STATES_MB, *large]


def _numbers(least: int, most: int) -> Callable[[str], list[int]]:
    """Reads `0,50`: each once, in order."""

    def read(text: str) -> list[int]:
        try:
            found = sorted({int(word) for word in text.split(",")})
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is no list of numbers like {least},8") from None
        if found[0] < least or found[-1] > most:
            raise argparse.ArgumentTypeError(f"each must be between {least} and {most}")
        return found

    return read


def _end(*_: object) -> None:
    # Whoever says it twice must not break off the cleaning up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


if __name__ == "__main__":
    sys.exit(main())
