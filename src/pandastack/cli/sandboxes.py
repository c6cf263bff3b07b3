"""`pandastack sandbox ...`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pandastack.cli import commands, console, history, states
from pandastack.wire.isolation import AUTO

if TYPE_CHECKING:
    from pandastack.sdk.sandboxes import Sandbox

app = console.group("Create, list, use and delete sandboxes.")
app.command("exec")(commands.execute)
app.command()(states.pause)
app.command()(states.resume)
app.command()(states.hibernate)
app.command()(states.wake)
app.command("keep-awake")(states.keep_awake)
app.command()(states.fork)
app.command("fork-tree")(states.fork_tree)
app.command()(states.promote)
app.command()(history.checkpoints)
app.command()(history.history)
app.command()(history.restore)


@app.command()
def create(
    template: Annotated[str, typer.Option("--template", "-t")] = "code-interpreter",
    ttl: Annotated[int | None, typer.Option(min=0, help="Delete it after so many idle seconds; 0: never.")] = None,
    persistent: Annotated[bool, typer.Option("--persistent", help="Never delete it for being idle.")] = False,
    metadata: console.Metadata = None,
    env: commands.Env = None,
    cpu: Annotated[float | None, typer.Option(help="Cores.")] = None,
    memory_mb: Annotated[int | None, typer.Option(help="MiB.")] = None,
    disk_mb: Annotated[int | None, typer.Option(help="MiB.")] = None,
    from_snapshot: Annotated[str | None, typer.Option(metavar="SNAPSHOT", help="Continue from this snapshot, memory included.")] = None,
    checkpoint_execs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Let it take a point after every n-th command (see `sandbox checkpoints`).")
    ] = None,
    isolation: console.Isolation = AUTO,
    as_json: console.Json = False,
) -> None:
    """Start a sandbox; prints its id."""
    with console.client() as client:
        sandbox = client.sandboxes.create(
            template, cpu, memory_mb, ttl, persistent, console.pairs(metadata, "--metadata"), from_snapshot,
            disk_mb=disk_mb, env=console.pairs(env, "--env"),
            checkpoints={"every_execs": checkpoint_execs} if checkpoint_execs else None, isolation=isolation,
        )  # fmt: skip
    if sandbox.template_note and not as_json:
        console.say(sandbox.template_note)
    console.show(sandbox.to_dict(), as_json, lambda: print(sandbox.id))


@app.command("list")
def list_sandboxes(
    status: Annotated[
        str | None, typer.Option(help="Only those that are creating, running, paused, hibernated, failed or deleting.")
    ] = None,
    metadata: console.Metadata = None,
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    as_json: console.Json = False,
) -> None:
    """The newest first."""
    with console.client() as client:
        found = client.sandboxes.list(status=status, metadata=console.pairs(metadata, "--metadata") or None, limit=limit)
    columns = ("ID", "TEMPLATE", "STATUS", "CPU", "MEMORY", "RUNTIME", "ISOLATION", "CREATED", "METADATA")
    console.show([sandbox.to_dict() for sandbox in found], as_json, lambda: console.table(columns, map(_row, found)))


def _row(sandbox: Sandbox) -> tuple[object, ...]:
    metadata = ",".join(f"{key}={value}" for key, value in sandbox.metadata.items())
    # `qemu (tcg)` is much less than `qemu (kvm)`, so it must be seen.
    runtime = f"{sandbox.runtime} ({sandbox.acceleration})" if sandbox.acceleration else sandbox.runtime
    return (
        sandbox.id, sandbox.template, sandbox.status, sandbox.cpu, f"{sandbox.memory_mb} MiB", runtime, sandbox.isolation,
        sandbox.created_at, metadata,
    )  # fmt: skip


@app.command()
def get(sandbox_id: console.SandboxId, as_json: console.Json = False) -> None:
    """Everything about one sandbox."""
    with console.client() as client:
        sandbox = client.sandboxes.get(sandbox_id)
    console.show(sandbox.to_dict(), as_json, lambda: console.facts(sandbox.to_dict()))


@app.command("rm")
def remove(
    sandbox_ids: Annotated[list[str], typer.Argument(metavar="SANDBOX...")],
    as_json: console.Json = False,
) -> None:
    """Delete sandboxes."""
    with console.client() as client:

        def delete(sandbox_id: str) -> dict[str, Any]:
            client.sandboxes.delete(sandbox_id)
            return {"deleted": True}

        console.each(sandbox_ids, delete, {"deleted": False}, as_json)


@app.command()
def lifecycle(sandbox_id: console.SandboxId, as_json: console.Json = False) -> None:
    """How long it has been idle and when it will be deleted for that."""
    with console.sandbox(sandbox_id) as sandbox:
        found = sandbox.lifecycle()
    console.show(found, as_json, lambda: console.facts(dict(found)))


@app.command("set-ttl")
def set_ttl(
    sandbox_id: console.SandboxId,
    seconds: Annotated[int, typer.Argument(min=0, help="Idle seconds; 0: never.")],
    as_json: console.Json = False,
) -> None:
    """Change after how many idle seconds it is deleted."""
    with console.sandbox(sandbox_id) as sandbox:
        found = sandbox.set_ttl(seconds)
    console.show(found, as_json, lambda: console.facts(dict(found)))


@app.command("set-persistent")
def set_persistent(
    sandbox_id: console.SandboxId,
    persistent: Annotated[bool, typer.Option("--on/--off")] = True,
    as_json: console.Json = False,
) -> None:
    """Protect it from being deleted for being idle, or end that."""
    with console.sandbox(sandbox_id) as sandbox:
        found = sandbox.set_persistent(persistent)
    console.show(found, as_json, lambda: console.facts(dict(found)))


@app.command()
def metrics(sandbox_id: console.SandboxId, as_json: console.Json = False) -> None:
    """What it costs its host."""
    with console.sandbox(sandbox_id) as sandbox:
        found = console.plain(sandbox.metrics())
    console.show(found, as_json, lambda: console.facts(found))
