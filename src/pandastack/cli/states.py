"""Commands of `pandastack sandbox` about a sandbox as a whole: stop and go on, keep it, copy it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pandastack.cli import console

if TYPE_CHECKING:
    from pandastack.sdk.sandboxes import Sandbox

SandboxIds = Annotated[list[str], typer.Argument(metavar="SANDBOX...")]
At = Annotated[str | None, typer.Option(metavar="POINT", help="What it was at this point of its history, instead of now.")]


def pause(sandbox_ids: SandboxIds, as_json: console.Json = False) -> None:
    """Stop everything inside at once; memory stays where it is."""
    _each(sandbox_ids, "pause", as_json)


def resume(sandbox_ids: SandboxIds, as_json: console.Json = False) -> None:
    """Go on after a pause."""
    _each(sandbox_ids, "resume", as_json)


def hibernate(sandbox_ids: SandboxIds, as_json: console.Json = False) -> None:
    """Write memory and files to disk and free the machine; the next request to it wakes it."""
    _each(sandbox_ids, "hibernate", as_json)


def wake(sandbox_ids: SandboxIds, as_json: console.Json = False) -> None:
    """Continue where it was hibernated."""
    _each(sandbox_ids, "wake", as_json)


def _each(sandbox_ids: list[str], verb: Literal["pause", "resume", "hibernate", "wake"], as_json: bool) -> None:
    with console.client() as client:

        def change(sandbox_id: str) -> dict[str, Any]:
            sandbox = console.handle(client, sandbox_id)
            getattr(sandbox, verb)()
            return {"status": sandbox.status}

        console.each(sandbox_ids, change, {"status": None}, as_json)


def keep_awake(
    sandbox_id: console.SandboxId,
    seconds: Annotated[int, typer.Argument(min=0, help="0 ends it.")],
    as_json: console.Json = False,
) -> None:
    """Neither hibernate nor delete it for being idle during the next seconds."""
    with console.sandbox(sandbox_id) as sandbox:
        found = sandbox.keep_awake(seconds)
    console.show(found, as_json, lambda: console.facts(dict(found)))


def fork(
    sandbox_id: console.SandboxId,
    count: Annotated[int | None, typer.Option("--count", "-n", min=1, max=16, help="Make so many (with --json: a list).")] = None,
    metadata: console.Metadata = None,
    at: At = None,
    as_json: console.Json = False,
) -> None:
    """Make a running copy, processes and memory included; prints its id."""
    with console.client() as client:
        children = client.sandboxes.fork(sandbox_id, console.pairs(metadata, "--metadata"), count=count or 1, at=at)
    if count is None:
        console.show(children[0].to_dict(), as_json, lambda: print(children[0].id))
    else:
        _show_children(children, as_json)


def fork_tree(
    sandbox_id: console.SandboxId,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=16)] = 2,
    metadata: console.Metadata = None,
    at: At = None,
    as_json: console.Json = False,
) -> None:
    """Make several running copies of the same moment; prints their ids."""
    with console.client() as client:
        _show_children(client.sandboxes.fork_tree(sandbox_id, count, console.pairs(metadata, "--metadata"), at=at), as_json)


def _show_children(children: list[Sandbox], as_json: bool) -> None:
    console.show([child.to_dict() for child in children], as_json, lambda: print(*(child.id for child in children), sep="\n"))


def promote(
    sandbox_id: console.SandboxId,
    cleanup_siblings: Annotated[bool, typer.Option("--cleanup-siblings", help="Delete the other copies of its tree.")] = False,
    tree_id: Annotated[str | None, typer.Option(help="The tree (default: that of the copy).")] = None,
    as_json: console.Json = False,
) -> None:
    """Make a copy a sandbox of its own. Exit code 1 if a sibling could not be deleted."""
    with console.sandbox(sandbox_id) as sandbox:
        found = sandbox.promote(cleanup_siblings=cleanup_siblings, tree_id=tree_id)
    console.show(found, as_json, lambda: console.facts({**found, "deleted": " ".join(found["deleted"])}))
    if found["failures"]:
        raise typer.Exit(1)
