"""`pandastack host ...`: what this machine has for sandboxes. Like `cli.local`, it starts another program of the distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pandastack.cli import console, local

app = console.group("Install what runs sandboxes on this machine.")
install = console.group("Install a runtime into the cache directory.")
app.add_typer(install, name="install")


@install.command()
def firecracker(
    path: Annotated[Path | None, typer.Option(help="A Firecracker with its jailer beside it, or the folder of a release.")] = None,
    releases: Annotated[str | None, typer.Option(help="Another address of Firecracker's releases.")] = None,
) -> None:
    """Fetch a release of Firecracker, check and install it, and print where it is. Nothing of the system is changed."""
    local.require_server("pandastack.host")
    options = {"--path": path, "--releases": releases}
    given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    local.replace_with("pandastack.host", ["install", "firecracker", *given])
