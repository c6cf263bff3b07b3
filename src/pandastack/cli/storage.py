"""`pandastack storage ...`: the disk of this machine. Like `cli.local`, it starts another program of the distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pandastack.cli import console, local

app = console.group("Look at this machine's storage, and make a pool whose files share blocks.")

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Where everything is kept.")]


@app.command()
def init(
    file: Annotated[Path | None, typer.Option(help="Where to make it (default: pool.xfs in the data directory).")] = None,
    size_gb: Annotated[float | None, typer.Option(min=0, help="GiB (default: three quarters of what is free).")] = None,
    data_dir: DataDir = None,
) -> None:
    """Make a storage pool, an XFS in a sparse file, and print its path. A pool that is there already stays as it is."""
    _become("init", {"--file": file, "--size-gb": size_gb, "--data-dir": data_dir})


@app.command()
def status(data_dir: DataDir = None, as_json: console.Json = False) -> None:
    """How much there is, what takes it, and whether copies share blocks. Exit code 1 where the pool cannot be used."""
    _become("status", {"--data-dir": data_dir}, *(["--json"] if as_json else []))


def _become(action: str, options: dict[str, object], *flags: str) -> None:
    local.require_server("pandastack.host")
    given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    local.replace_with("pandastack.host", ["storage", action, *given, *flags])
