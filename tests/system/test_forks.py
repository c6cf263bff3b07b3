"""Forks of sandboxes at work: every copy goes on where its parent was, and the parent and its neighbours do not suffer for it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pandastack import errors
from pandastack.sdk.client import Client
from pandastack.sdk.processes import Process
from pandastack.sdk.sandboxes import Sandbox

from . import notes
from .conftest import TEMPLATES, MakeSandbox
from .servers import Server, until

HOOKS = "/etc/pandastack/hooks"


def test_the_selftest_passes_on_a_sandbox_of_the_server(any_server: Server, any_client: Client, any_make: MakeSandbox) -> None:
    sandbox = any_make()
    environ = {name: value for name, value in any_server.environ.items() if name not in ("PANDASTACK_API", "PANDASTACK_API_KEY")}
    command = [sys.executable, "-m", "pandastack.cli", "selftest", "fork", sandbox.id, "--json"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200, check=False)
    report = json.loads(done.stdout)
    assert [check for check in report["checks"] if not check["passed"]] == []
    assert (done.returncode, report["passed"], len(report["children"])) == (0, True, 2), done.stderr
    assert len(report["checks"]) >= 14
    assert [one.id for one in any_client.sandboxes.list()] == [sandbox.id]
    assert sandbox.exec("ls /tmp").stdout == ""


def said_after(process: Process, offset: int, wanted: str) -> str:
    """What a terminal showed from `offset` on, once `wanted` is in it."""

    def look() -> str:
        text = process.read_output("stdout", offset=offset).data.decode(errors="replace")
        return text if wanted in text else ""

    try:
        return until(look, f"{wanted!r} on the terminal", 30)
    except AssertionError:
        raise AssertionError((wanted, process.refresh(), process.read_output("stdout").data)) from None


def assert_continued(sandbox: Sandbox) -> None:
    """The program in the foreground of a terminal knows what it knew, the loop and the writer go on, no byte is missing."""
    shell = sandbox.processes.get("shell")
    shell.write_stdin("print('answer', number * 7)\n")
    assert "Stopped" not in said_after(shell, shell.stdout_bytes, "answer 42")
    assert "Stopped" not in shell.read_output("stdout").data.decode()
    assert sandbox.processes.get("loop").running
    before = sandbox.filesystem.stat("/var/numbers").size
    until(lambda: sandbox.filesystem.stat("/var/numbers").size > before, "the writer goes on")
    numbers = sandbox.filesystem.read_text("/var/numbers").split("\n")[:-1]
    assert numbers == [str(number) for number in range(len(numbers))]


def test_a_sandbox_at_work_goes_on_and_so_does_every_copy_of_it(any_make: MakeSandbox) -> None:
    parent = any_make()
    parent.processes.start("while :; do :; done", id="loop")
    parent.processes.start("i=0; while true; do echo $i >> /var/numbers; i=$((i+1)); sleep 0.005; done", id="writer")
    shell = parent.processes.start(["bash", "--norc", "-i"], id="shell", pty=(40, 120))
    shell.write_stdin("python3 -q\n")
    said_after(shell, 0, ">>> ")
    shell.write_stdin("number = 6\nprint('number', number)\n")
    said_after(shell, 0, "number 6")
    children = parent.fork(count=3)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(assert_continued, [parent, *children]))
        # A shell that was told that its job had stopped would have taken the terminal back from it.
        for sandbox in (parent, *children):
            shell = sandbox.processes.get("shell")
            shell.write_stdin("exit()\n")
            shell.write_stdin("echo back in $((40 + 2)) bash; jobs; exit 5\n")
            assert (shell.wait(60), "back in 42 bash" in shell.read_output("stdout").data.decode()) == (5, True)
    finally:
        for child in children:
            child.kill()


def test_sixteen_forks_at_once_beside_a_busy_neighbour(make: MakeSandbox, client: Client, server: Server) -> None:
    parent, neighbour = make(), make()
    notes.begin(parent)
    notes.add(parent, "before")
    over = threading.Event()
    answers: list[str] = []
    failures: list[BaseException] = []

    def load() -> None:
        try:
            while not over.is_set():
                answers.append(neighbour.exec(f"echo {len(answers)}").stdout)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    children: list[Sandbox] = []
    try:
        until(lambda: len(answers) > 5, "the neighbour works")
        children = server.client(max_create_retry_seconds=0, timeout=200).sandboxes.fork_tree(parent.id, 16)
        assert len({child.id for child in children}) == 16
        assert len({child.fork_tree_id for child in children}) == 1
        with ThreadPoolExecutor(4) as pool:
            heard = list(pool.map(lambda child: notes.add(child, child.id), children))
        assert heard == [["before", child.id] for child in children]
        assert notes.add(parent, "after") == ["before", "after"]
    except errors.CapacityError:
        # Also an answer, but then there must be none.
        assert {one.id for one in client.sandboxes.list()} == {parent.id, neighbour.id}
    finally:
        over.set()
        thread.join(60)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda child: child.kill(), children))
    assert failures == []
    assert answers == [f"{number}\n" for number in range(len(answers))]


def test_a_key_gives_the_same_copies(make: MakeSandbox, client: Client) -> None:
    parent = make()
    children = parent.fork(count=2, idempotency_key="fork-1")
    try:
        again = parent.fork(count=2, idempotency_key="fork-1")
        assert [child.id for child in again] == [child.id for child in children]
        assert len(client.sandboxes.list()) == 3
        with pytest.raises(errors.Conflict):
            parent.fork(count=3, idempotency_key="fork-1")
    finally:
        for child in children:
            child.kill()


def write_hook(sandbox: Sandbox, name: str, script: str) -> None:
    sandbox.filesystem.write(f"{HOOKS}/{name}", f"#!/bin/sh\n{script}\n", mode="0755")


def test_hooks_run_in_the_parent_before_and_in_every_copy_after(any_make: MakeSandbox) -> None:
    parent = any_make()
    write_hook(parent, "before-snapshot", 'echo "before $PANDASTACK_REASON" >> /var/hooks')
    write_hook(parent, "after-restore", 'echo "after $PANDASTACK_REASON $(hostname)" >> /var/hooks')
    children = parent.fork(count=2)
    try:
        assert parent.filesystem.read_text("/var/hooks") == "before fork\n"
        for child in children:
            assert child.filesystem.read_text("/var/hooks") == f"before fork\nafter restore {child.exec('hostname').stdout}"
    finally:
        for child in children:
            child.kill()


def test_a_hook_that_refuses_stops_a_fork_and_harms_nothing(any_make: MakeSandbox, any_server: Server) -> None:
    parent = any_make()
    notes.begin(parent)
    notes.add(parent, "before")
    write_hook(parent, "before-snapshot", "echo the database is busy >&2; exit 3")
    for verb in (parent.fork, parent.snapshot, parent.hibernate):
        with pytest.raises(errors.HookFailed, match="the database is busy") as caught:
            verb()
        assert caught.value.http_status >= 400
    assert parent.refresh().status == "running"
    assert notes.add(parent, "between") == ["before", "between"]
    parent.filesystem.remove(f"{HOOKS}/before-snapshot")
    write_hook(parent, "after-restore", "echo no network >&2; exit 1")
    with pytest.raises(errors.HookFailed, match="no network"):
        parent.fork(count=3)
    with any_server.client() as client:
        assert [one.id for one in client.sandboxes.list()] == [parent.id]
    prepared = (any_server.slots + any_server.blanks) * len(TEMPLATES)
    until(lambda: len(any_server.machines()) <= 1 + prepared, "the copies are gone")
    assert notes.add(parent, "after") == ["before", "between", "after"]
    write_hook(parent, "after-restore", "exit 0")
    parent.fork().kill()
