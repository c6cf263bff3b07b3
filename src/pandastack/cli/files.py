"""`pandastack fs ...`: files in a sandbox."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pandastack.cli import commands, console

if TYPE_CHECKING:
    from pandastack.sdk.results import FileInfo

app = console.group("Read, write, move and watch files in a sandbox.")

RemotePath = Annotated[str, typer.Argument(metavar="PATH", help="An absolute path in the sandbox.")]
Mode = Annotated[str | None, typer.Option(help="Octal, such as 0755.")]


@app.command()
def read(
    sandbox_id: console.SandboxId,
    path: RemotePath,
    offset: Annotated[int | None, typer.Option(min=0)] = None,
    length: Annotated[int | None, typer.Option(min=1)] = None,
    as_json: console.Json = False,
) -> None:
    """Write a file to standard output, byte for byte (with --json as base64)."""
    with console.sandbox(sandbox_id) as sandbox:
        if as_json:
            import base64

            data = sandbox.filesystem.read(path, offset=offset, length=length)
            console.emit_json({"path": path, "bytes": len(data), "content_b64": base64.b64encode(data).decode()})
            return
        for piece in sandbox.filesystem.read_chunks(path, offset=offset, length=length):
            console.write_bytes(piece)


@app.command()
def write(
    sandbox_id: console.SandboxId,
    path: RemotePath,
    content: Annotated[str | None, typer.Option(help="The text; without it, standard input is written.")] = None,
    mode: Mode = None,
    as_json: console.Json = False,
) -> None:
    """Replace a file by text or by standard input, of any length."""
    with console.sandbox(sandbox_id) as sandbox:
        data = sys.stdin.buffer if content is None else content.encode("utf-8", "surrogateescape")
        written = sandbox.filesystem.write(path, data, mode=mode)
    console.show(written, as_json, lambda: console.say(f"{written['bytes']} bytes written"))


@app.command()
def upload(
    sandbox_id: console.SandboxId,
    local: Annotated[Path, typer.Argument(help="A file of this machine.", exists=True, dir_okay=False)],
    remote: RemotePath,
    mode: Mode = None,
    as_json: console.Json = False,
) -> None:
    """Send a file of any size into a sandbox."""
    with console.sandbox(sandbox_id) as sandbox:
        written = sandbox.filesystem.upload(local, remote + local.name if remote.endswith("/") else remote, mode=mode)
    console.show(written, as_json, lambda: console.say(f"{written['path']}: {written['bytes']} bytes"))


@app.command()
def download(
    sandbox_id: console.SandboxId,
    remote: RemotePath,
    local: Annotated[Path, typer.Argument(help="A file or directory of this machine.")] = Path(),
    as_json: console.Json = False,
) -> None:
    """Fetch a file of any size; it appears only when all of it has arrived."""
    with console.sandbox(sandbox_id) as sandbox:
        sandbox.filesystem.download(remote, local)
    target = local / Path(remote).name if local.is_dir() else local
    if as_json:
        console.emit_json({"path": str(target), "bytes": target.stat().st_size})


@app.command("ls")
def list_directory(sandbox_id: console.SandboxId, path: RemotePath = "/", as_json: console.Json = False) -> None:
    """The entries of a directory."""
    with console.sandbox(sandbox_id) as sandbox:
        found = sandbox.filesystem.listdir(path)
    console.show(console.plain(found), as_json, lambda: console.table(("MODE", "SIZE", "MODIFIED", "NAME"), map(_row, found)))


def _row(entry: FileInfo) -> tuple[object, ...]:
    name = entry.name + ("/" if entry.is_dir else f" -> {entry.target}" if entry.target else "")
    return entry.mode, entry.size, _when(entry), name


def _when(entry: FileInfo) -> str:
    return datetime.fromtimestamp(entry.mtime).astimezone().isoformat(" ", "seconds")


@app.command()
def stat(sandbox_id: console.SandboxId, path: RemotePath, as_json: console.Json = False) -> None:
    """Everything about one file."""
    with console.sandbox(sandbox_id) as sandbox:
        entry = sandbox.filesystem.stat(path)
    console.show(console.plain(entry), as_json, lambda: console.facts({**console.plain(entry), "mtime": _when(entry)}))


@app.command()
def mkdir(sandbox_id: console.SandboxId, path: RemotePath, mode: Mode = None, as_json: console.Json = False) -> None:
    """Make a directory and its parents."""
    with console.sandbox(sandbox_id) as sandbox:
        entry = sandbox.filesystem.mkdir(path, mode=mode)
    if as_json:
        console.emit_json(console.plain(entry))


@app.command("mv")
def move(
    sandbox_id: console.SandboxId,
    source: RemotePath,
    destination: RemotePath,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the destination.")] = False,
    as_json: console.Json = False,
) -> None:
    """Rename a file or directory."""
    with console.sandbox(sandbox_id) as sandbox:
        entry = sandbox.filesystem.move(source, destination, overwrite=force)
    if as_json:
        console.emit_json(console.plain(entry))


@app.command("rm")
def remove(
    sandbox_id: console.SandboxId,
    path: RemotePath,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Directories too, with everything in them.")] = False,
    as_json: console.Json = False,
) -> None:
    """Delete a file."""
    with console.sandbox(sandbox_id) as sandbox:
        sandbox.filesystem.remove(path, recursive=recursive)
    if as_json:
        console.emit_json({"path": path, "deleted": True})


@app.command()
def chmod(
    sandbox_id: console.SandboxId,
    mode: Annotated[str, typer.Argument(help="Octal, such as 0755.")],
    path: RemotePath,
    owner: Annotated[str | None, typer.Option(help="USER or USER:GROUP")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r")] = False,
    as_json: console.Json = False,
) -> None:
    """Change who may do what with a file."""
    with console.sandbox(sandbox_id) as sandbox:
        entry = sandbox.filesystem.chmod(path, mode, owner=owner, recursive=recursive)
    if as_json:
        console.emit_json(console.plain(entry))


@app.command()
def watch(
    sandbox_id: console.SandboxId,
    path: RemotePath,
    recursive: Annotated[bool, typer.Option("--recursive", "-r")] = False,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many changes.")] = None,
    as_json: console.Json = False,
) -> None:
    """Changes under a directory as they happen, one per line (JSON lines with --json); Ctrl-C ends it."""
    import json

    with (
        console.sandbox(sandbox_id) as sandbox,
        commands.ending_on_signals(),
        sandbox.filesystem.watch(path, recursive=recursive) as changes,
    ):
        for number, change in enumerate(changes, 1):
            line = json.dumps(console.plain(change)) if as_json else f"{change.type:<8} {console.clean(change.path)}"
            print(line, flush=True)
            if number == count:
                return
