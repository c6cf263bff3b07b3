"""`pandastack selftest fork`: does a fork keep its promises, here and now? What they are is in `fork_contract.py`.

It uses a sandbox as any program does, and leaves nothing behind however it ends: neither sandboxes nor, in a sandbox that
was there before, its process and its folder.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from pandastack.cli import commands, console, fork_contract
from pandastack.cli.fork_contract import Clock, Fork, Seen

if TYPE_CHECKING:
    from pandastack.sdk.client import Client
    from pandastack.sdk.sandboxes import Sandbox

app = console.group("Check what this installation promises.")


@app.callback()
def root() -> None:
    """Check what this installation promises."""


TTL_S = 900
START_LIMIT_S = 20.0
PROBE_LIMIT_S = 30.0
CLOCK_LOOKS = 5
GOOD_ENOUGH_MS = 100.0
EARLY, LATE = "written and synced", "written just before"


@app.command()
def fork(
    sandbox_id: Annotated[str | None, typer.Argument(metavar="[SANDBOX]", help="Fork this one (default: a new one).")] = None,
    children: Annotated[int, typer.Option(min=1, max=14, help="How many copies to make.")] = 2,
    template: Annotated[str | None, typer.Option("--template", "-t", help="Of the new sandbox; it must have python3.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the sandboxes for a look at them; their ids are on stderr.")] = False,
    as_json: console.Json = False,
) -> None:
    """Fork a sandbox and check that memory, files and listeners are carried over and that every copy has its own identity.

    Exit code 0 only if every check passed. The sandbox needs /bin/sh and python3.
    """
    with (
        console.client() as client,
        commands.ending_on_signals(),
        _parent(client, sandbox_id, template, keep) as parent,
        _witness(parent, keep) as folder,
    ):
        if not as_json:
            console.say(f"forking {parent.id} into {children}")
        seen = _look(client, parent, folder, children, keep)
        checks = fork_contract.judged(seen)
    passed = all(check.passed for check in checks)
    report = {
        "sandbox_id": seen.parent.id,
        "children": [child.id for child in seen.children],
        "kept": [one.id for one in (seen.parent, *seen.children)] if keep else [],
        "passed": passed,
        "checks": [dataclasses.asdict(check) for check in checks],
    }
    rows = [(check.name, "pass" if check.passed else "FAIL", check.evidence) for check in checks]
    console.show(report, as_json, lambda: console.table(("CHECK", "RESULT", "EVIDENCE"), rows))
    if keep:
        console.say("kept: " + " ".join(one.id for one in (seen.parent, *seen.children)))
    if not passed:
        raise typer.Exit(1)


@contextmanager
def _parent(client: Client, sandbox_id: str | None, template: str | None, keep: bool) -> Iterator[Sandbox]:
    if sandbox_id is not None:
        yield client.sandboxes.get(sandbox_id)
        return
    if template is None:
        ready = [found.name for found in client.templates.list() if found.state == "ready"]
        template = next((name for name in ("code-interpreter", "base") if name in ready), "code-interpreter")
    asked = {"template": template, "metadata": {"selftest": "fork"}}
    with commands.temporary_sandbox(client, keep, TTL_S, **asked) as sandbox, _dropped_on_error(sandbox):
        yield sandbox


@contextmanager
def _dropped_on_error(sandbox: Sandbox) -> Iterator[None]:
    """Also one that was to be kept: it was to be kept with its copies, and those are gone then."""
    from pandastack.sdk import strays

    try:
        yield
    except BaseException:
        strays.reap([sandbox])
        raise


@contextmanager
def _witness(parent: Sandbox, keep: bool) -> Iterator[str]:
    """The program that is forked along, in a folder of its own; both are gone afterwards."""
    folder = f"/tmp/pandastack-selftest-{uuid.uuid4().hex[:12]}"  # noqa: S108 - a path in the sandbox
    source = Path(__file__).with_name("fork_witness.py").read_bytes()
    with ExitStack() as undo:
        parent.filesystem.mkdir(folder)
        undo.callback(_quietly, parent.exec, ["rm", "-rf", folder])
        parent.filesystem.write(f"{folder}/witness.py", source)
        process = parent.processes.start(["python3", f"{folder}/witness.py", "hold", folder])
        undo.callback(_quietly, process.kill)
        end = time.monotonic() + START_LIMIT_S
        while not parent.filesystem.exists(f"{folder}/port"):
            if not process.refresh().running or time.monotonic() > end:
                said = process.read_output("stderr").data.decode("utf-8", "replace").strip().splitlines()
                console.fail(
                    "the witness did not start in the sandbox" + (f": {said[-1]}" if said else ""),
                    hint="it needs python3; use a template that has it",
                )
            time.sleep(0.1)
        yield folder
        if keep:
            undo.pop_all()


def _quietly(undo: Any, *arguments: Any) -> None:
    """Tidying up after the answer is there: a sandbox that broke meanwhile is part of the answer already."""
    from pandastack import errors

    try:
        undo(*arguments)
    except errors.PandastackError as error:
        console.say_error(f"tidying up in the sandbox: {error.message}", error.hint)


def _look(client: Client, parent: Sandbox, folder: str, count: int, keep: bool) -> Fork:
    """Fork, look, fork a fork, tell each its value, look again, delete, look at the parent."""
    from pandastack.sdk import strays

    files = {"early": EARLY, "late": LATE}
    parent.exec(["sh", "-c", f"printf %s '{EARLY}' > {folder}/files/early; sync"], check=True)
    before = _probe(parent, folder)
    # No sync: a fork must carry over what is only in the page cache.
    parent.exec(["sh", "-c", f"printf %s '{LATE}' > {folder}/files/late"], check=True)
    with strays.forked(parent, count, {"selftest": "fork"}) as copies:
        seen = [Seen("parent", parent.id), *(Seen(f"child {number}", copy.id) for number, copy in enumerate(copies, 1))]
        found = Fork(before, files, seen[0], seen[1:])
        everyone = list(zip(seen, [parent, *copies], strict=True))
        for one, sandbox in everyone:
            one.first = _probe(sandbox, folder)
        for one, sandbox in everyone:
            one.clock = _clock(sandbox)
        if not _is_here(client.api_url):
            found.reference = seen[0].clock
        with _grandchild(copies[0], found) as grandchild:
            if grandchild is not None and found.grandchild is not None:
                everyone.append((found.grandchild, grandchild))
                found.grandchild.first = _probe(grandchild, folder)
            for one, sandbox in everyone:
                one.told = f"told-{one.id}"
                _told(sandbox, folder, one.told)
            for one, sandbox in everyone:
                one.second = _probe(sandbox, folder)
            leaving = ([] if keep else copies) + ([grandchild] if grandchild is not None else [])
            _delete(client, leaving, found)
        found.afterwards = _probe(parent, folder)
    return found


@contextmanager
def _grandchild(child: Sandbox, found: Fork) -> Iterator[Sandbox | None]:
    """A fork of a fork; that it can not be made is an answer too."""
    from pandastack import errors
    from pandastack.sdk import strays

    with ExitStack() as undo:
        made: Sandbox | None = None
        try:
            made = undo.enter_context(strays.forked(child, 1, {"selftest": "fork"}))[0]
            found.grandchild = Seen("grandchild", made.id)
        except errors.PandastackError as error:
            found.grandchild_failure = str(error)
        yield made


def _delete(client: Client, leaving: list[Sandbox], found: Fork) -> None:
    from pandastack import errors
    from pandastack.sdk import strays

    found.deleted = [sandbox.id for sandbox in leaving]
    failures = strays.reap(leaving)
    for sandbox in leaving:
        try:
            client.sandboxes.get(sandbox.id)
            found.not_gone.append(f"{sandbox.id} {failures.get(sandbox.id, '')}".strip())
        except errors.NotFoundError:
            pass


def _probe(sandbox: Sandbox, folder: str) -> dict[str, Any]:
    """What a fresh process sees; a sandbox that can not run one is told as an error of every look."""
    from pandastack import errors

    try:
        result = sandbox.exec(["python3", f"{folder}/witness.py", "probe", folder], timeout_seconds=PROBE_LIMIT_S)
        found: dict[str, Any] = json.loads(result.stdout)
        return found
    except errors.PandastackError as error:
        return {"errors": {"probe": str(error)}}
    except ValueError:
        said = result.stderr.strip().splitlines()
        return {"errors": {"probe": f"exit code {result.exit_code}" + (f": {said[-1]}" if said else "")}}


def _told(sandbox: Sandbox, folder: str, value: str) -> None:
    """Whether it arrived is seen by the next look."""
    from pandastack import errors

    try:
        sandbox.exec(["python3", f"{folder}/witness.py", "tell", folder, value], timeout_seconds=PROBE_LIMIT_S)
    except errors.PandastackError as error:
        console.say_error(f"{sandbox.id}: {error.message}", error.hint)


def _clock(sandbox: Sandbox) -> Clock | None:
    """The best of a few looks: the faster the answer, the less is unknown about when it was given."""
    from pandastack import errors

    best: Clock | None = None
    for _ in range(CLOCK_LOOKS):
        sent_s = time.time()
        try:
            result = sandbox.exec(["python3", "-S", "-c", "import time; print(time.time())"], timeout_seconds=PROBE_LIMIT_S)
            there_s, back_s = float(result.stdout), time.time()
        except (errors.PandastackError, ValueError):
            return None
        clock = Clock((there_s - (sent_s + back_s) / 2) * 1000, (back_s - sent_s) / 2 * 1000)
        if best is None or clock.error_ms < best.error_ms:
            best = clock
        if best.error_ms <= GOOD_ENOUGH_MS:
            break
    return best


def _is_here(api_url: str) -> bool:
    """Whether sandboxes run on this machine, so that its clock is that of their host."""
    host = urlsplit(api_url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
