"""`pandastack process ...`: commands that outlive the terminal."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pandastack.cli import commands, console

if TYPE_CHECKING:
    from pandastack.sdk.processes import Process

app = console.group("Start processes in a sandbox, read their output, signal them.")

ProcessId = Annotated[str, typer.Argument(metavar="PROCESS", help="The id of a process.")]
STDIN_CHUNK_BYTES = 256 * 1024


@app.command()
def start(
    sandbox_id: console.SandboxId,
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="One word is a shell line; several are run without a shell.")
    ],
    timeout: commands.Timeout = None,
    cwd: commands.Cwd = None,
    env: commands.Env = None,
    user: commands.User = None,
    stdin: Annotated[bool, typer.Option("--stdin", "-i", help="Keep its standard input open for `process stdin`.")] = False,
    as_json: console.Json = False,
) -> None:
    """Start a command and return at once; prints its id."""
    with console.sandbox(sandbox_id) as sandbox:
        process = sandbox.processes.start(
            command[0] if len(command) == 1 else command,
            timeout_seconds=timeout, cwd=cwd, env=console.pairs(env, "--env"), user=user, stdin=stdin,
        )  # fmt: skip
    console.show(_plain(process), as_json, lambda: print(process.id))


@app.command("list")
def list_processes(sandbox_id: console.SandboxId, as_json: console.Json = False) -> None:
    """Processes that were started through the API, running or not."""
    with console.sandbox(sandbox_id) as sandbox:
        found = sandbox.processes.list()
    rows = (
        (item.id, item.pid, "running" if item.running else f"exit {item.exit_code}", item.user, item.started_at, item.command)
        for item in found
    )
    console.show(
        [_plain(item) for item in found], as_json, lambda: console.table(("ID", "PID", "STATE", "USER", "STARTED", "COMMAND"), rows)
    )


@app.command()
def logs(
    sandbox_id: console.SandboxId,
    process_id: ProcessId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends; the exit code is then that of the process.")] = False,
    as_json: console.Json = False,
) -> None:
    """What a process has written so far."""
    if follow and as_json:
        console.usage("--follow and --json do not go together")
    kept = {"stdout": bytearray(), "stderr": bytearray()}
    with console.sandbox(sandbox_id) as sandbox:
        process = sandbox.processes.get(process_id)
        if follow:
            with commands.ending_on_signals():
                output = process.output()
                for event in output:
                    console.write_event(event)
            raise typer.Exit(output.exit_code if output.exit_code is not None else 1)
        for channel, end in (("stdout", process.stdout_bytes), ("stderr", process.stderr_bytes)):
            offset = 0
            while offset < end:
                piece = process.read_output("stdout" if channel == "stdout" else "stderr", offset)
                if not piece.data:
                    break
                offset = piece.offset + len(piece.data)
                if as_json:
                    kept[channel] += piece.data
                else:
                    console.write_bytes(piece.data, to_stderr=channel == "stderr")
    if as_json:
        texts = {channel: data.decode("utf-8", "replace") for channel, data in kept.items()}
        console.emit_json({**_plain(process), **texts})


@app.command("signal")
def send_signal(
    sandbox_id: console.SandboxId,
    process_id: ProcessId,
    name: Annotated[str, typer.Argument(metavar="SIGNAL")] = "TERM",
    alone: Annotated[bool, typer.Option("--alone", help="Only the process itself, not what it started.")] = False,
    as_json: console.Json = False,
) -> None:
    """Send a signal (TERM, KILL, INT, HUP ...) to a process and everything it started."""
    with console.sandbox(sandbox_id) as sandbox:
        sandbox.processes.get(process_id).signal(name, tree=not alone)
    if as_json:
        console.emit_json({"process_id": process_id, "signal": name, "tree": not alone})


@app.command()
def stdin(
    sandbox_id: console.SandboxId,
    process_id: ProcessId,
    text: Annotated[str | None, typer.Argument(help="What to send; without it, standard input is sent and then closed.")] = None,
    close: Annotated[bool, typer.Option("--close", help="Close its standard input afterwards.")] = False,
    as_json: console.Json = False,
) -> None:
    """Write to the standard input of a process that was started with --stdin."""
    sent = 0
    with console.sandbox(sandbox_id) as sandbox:
        process = sandbox.processes.get(process_id)
        if text is not None:
            data = (text + "\n").encode("utf-8", "surrogateescape")
            process.write_stdin(data)
            sent = len(data)
        else:
            # What is there now, not a full buffer: a person may be typing.
            while data := os.read(sys.stdin.fileno(), STDIN_CHUNK_BYTES):
                process.write_stdin(data)
                sent += len(data)
        if close or text is None:
            process.close_stdin()
    if as_json:
        console.emit_json({"process_id": process_id, "bytes": sent, "closed": close or text is None})


def _plain(process: Process) -> dict[str, Any]:
    names = ("id", "pid", "command", "user", "running", "started_at", "ended_at", "exit_code", "reason", "stdout_bytes", "stderr_bytes")
    return {**{name: getattr(process, name) for name in names}, "signal": process.signal_name}
