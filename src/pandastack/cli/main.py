"""The `pandastack` command; read this first. Every group of commands is a file with the name of its noun."""

from __future__ import annotations

from typing import Annotated

import typer

from pandastack.cli import (
    commands,
    console,
    diff,
    files,
    host,
    local,
    processes,
    sandboxes,
    selftest,
    snapshots,
    storage,
    templates,
    tokens,
    usage,
)

app = console.group("Run code in isolated sandboxes on your own machines.")

app.command()(local.up)
app.command()(local.down)
app.command()(local.setup)
app.command()(local.doctor)
app.command()(commands.run)
app.command()(diff.diff)
app.add_typer(sandboxes.app, name="sandbox")
app.add_typer(sandboxes.app, name="sb", hidden=True)
app.add_typer(snapshots.app, name="snapshot")
app.add_typer(processes.app, name="process")
app.add_typer(files.app, name="fs")
app.add_typer(templates.app, name="template")
app.add_typer(tokens.app, name="token")
app.add_typer(storage.app, name="storage")
app.add_typer(host.app, name="host")
app.add_typer(selftest.app, name="selftest")
app.command()(usage.usage)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)(local.bench)


@app.command()
def me(as_json: console.Json = False) -> None:
    """Who your key belongs to."""
    with console.client() as client:
        found = client.me()
    console.show(found, as_json, lambda: console.facts(dict(found)))


@app.command()
def version(as_json: console.Json = False) -> None:
    """The version of this program."""
    from pandastack.sdk import config

    console.show({"version": config.version()}, as_json, lambda: print(config.version()))


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=lambda value: _version(value))
    ] = False,
) -> None:
    """Run code in isolated sandboxes on your own machines."""


def _version(wanted: bool) -> None:
    if wanted:
        version(False)
        raise typer.Exit


if __name__ == "__main__":
    app()
