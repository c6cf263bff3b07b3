"""`pandastack bench`: the command line of the benchmarks."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from pandastack.bench import bare, benchmarks, figures, forks, states
from pandastack.bench.workloads import LARGE_STATE_MB
from pandastack.errors import PandastackError

NAMES = ("create", "exec", "files", "burst", "idle", "snapshot", "fork", "wake")
_STATES_MB = (0, 50, 300)
_CHILDREN = (1, 4, 8, 16)


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 measured (also when a promise was missed), 1 could not measure, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="pandastack bench",
        description="Measure this machine through the SDK over HTTP, against the bare tool in the same run.",
    )
    parser.add_argument("benchmark", nargs="*", choices=[*NAMES, []], help=f"which ones: {', '.join(NAMES)} (default: all)")
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
    parser.add_argument("--children", type=_numbers(1, 16), default=_CHILDREN, help="children of a fork (default: 1,4,8,16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args(argv)
    # Without a terminal nobody sets a width, and a narrow table is hard to read.
    console = Console(width=None if sys.stdout.isatty() else 160)
    progress = Console(stderr=True)
    # Ended from outside, it must still take its server and sandboxes with it.
    signal.signal(signal.SIGTERM, _end)
    bare.adopt_orphans()
    try:
        if os.geteuid() != 0:
            raise PandastackError("bench must run as root, because it drives runsc by hand to compare", hint="run it with sudo")
        with progress.status("starting") as status:
            rows = _measure(arguments, lambda text: status.update(text))
    except PandastackError as error:
        progress.print(f"[red]pandastack: {error}[/red]")
        return 1
    figures.show(rows, console)
    if arguments.json:
        figures.write(rows, arguments.json)
    return 0


def _measure(arguments: argparse.Namespace, say: benchmarks.Say) -> list[figures.Row]:
    template, n = arguments.template, arguments.samples
    wanted = arguments.benchmark or NAMES
    rows: list[figures.Row] = []
    if "create" in wanted:
        rows += benchmarks.create(template, n or 20, arguments.slots, arguments.blanks, say)
    if "exec" in wanted:
        rows += benchmarks.exec_(template, n or 100, say)
    if "files" in wanted:
        rows += benchmarks.files(template, arguments.size_mib, n or 3, say)
    if "burst" in wanted:
        rows += benchmarks.burst(template, arguments.burst, arguments.burst_slots, say)
    if "idle" in wanted:
        rows += benchmarks.idle(template, n or 10, say)
    sizes_mb = arguments.state_mb or [*_STATES_MB, *([LARGE_STATE_MB] if forks.fits(LARGE_STATE_MB, 1) else [])]
    if "snapshot" in wanted:
        rows += states.snapshot(template, sizes_mb, n, arguments.blanks, say)
    if "fork" in wanted:
        rows += forks.fork(template, sizes_mb, arguments.children, n, arguments.blanks, say)
    if "wake" in wanted:
        rows += states.wake(template, sizes_mb, n, arguments.blanks, say)
    return rows


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
