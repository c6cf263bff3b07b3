"""What an unused sandbox costs, and when it goes away by itself."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pandastack import errors
from pandastack.sdk.sandboxes import Sandbox

from .conftest import MakeSandbox
from .servers import Server, until


def is_frozen(sandbox: Sandbox) -> bool:
    stat = Path(f"/proc/{sandbox.metrics().pid}/stat").read_text()
    return stat.rsplit(")", 1)[1].split()[0] == "T"


def is_gone(server: Server, sandbox: Sandbox) -> bool:
    """Asks in every way that is no use of a sandbox."""
    answers = [server.http("GET", f"/v1/sandboxes/{sandbox.id}{path}").status_code for path in ("", "/lifecycle", "/metrics")]
    return 404 in answers or sandbox.id not in [item["id"] for item in server.http("GET", "/v1/sandboxes").json()]


def test_an_idle_sandbox_uses_no_cpu_and_answers_at_once(any_make: MakeSandbox) -> None:
    sandbox = any_make("code-interpreter")
    assert sandbox.run_code("x = 1; print(x)").stdout == "1\n"
    until(lambda: is_frozen(sandbox), "the idle sandbox is frozen")
    before = sandbox.metrics().host_cpu_seconds
    time.sleep(5)
    assert sandbox.metrics().host_cpu_seconds - before <= 0.005
    assert sandbox.exec("echo awake").stdout == "awake\n"
    assert not is_frozen(sandbox)
    assert sandbox.run_code("import numpy; print(numpy.ones(2).sum())").stdout == "2.0\n"
    # The guest's clock went on meanwhile.
    assert abs(float(sandbox.exec("date +%s.%N").stdout) - time.time()) < 5
    until(lambda: is_frozen(sandbox), "it is frozen again")


def test_a_sandbox_with_work_in_the_background_is_not_frozen(any_make: MakeSandbox) -> None:
    sandbox = any_make()
    counter = sandbox.processes.start("i=0; while true; do i=$((i+1)); echo $i; sleep 0.1; done")
    time.sleep(6)
    assert not is_frozen(sandbox)
    before = counter.refresh().stdout_bytes
    until(lambda: counter.refresh().stdout_bytes > before, "it goes on counting")
    assert sandbox.lifecycle()["idle_seconds"] == 0
    counter.kill()
    until(lambda: is_frozen(sandbox), "it is frozen once its work is over")


def test_a_daemon_that_a_command_left_behind_is_work_too(make: MakeSandbox) -> None:
    sandbox = make()
    sandbox.exec("setsid sh -c 'while true; do date +%s > /var/beat; sleep 0.2; done' > /dev/null 2>&1 &")
    time.sleep(6)
    assert not is_frozen(sandbox)
    assert sandbox.lifecycle()["idle_seconds"] == 0


def test_an_idle_sandbox_is_deleted_after_its_ttl(make: MakeSandbox, server: Server) -> None:
    sandbox = make(ttl_seconds=2)
    sandbox.exec("true")
    # Asking about it is no use of it.
    until(lambda: is_gone(server, sandbox), "it was deleted")
    with pytest.raises(errors.SandboxNotFound):
        sandbox.exec("true")


def test_a_ttl_does_not_end_a_sandbox_in_use(make: MakeSandbox, server: Server) -> None:
    busy, background, persistent, endless = (
        make(ttl_seconds=2),
        make(ttl_seconds=2),
        make(ttl_seconds=2, persistent=True),
        make(ttl_seconds=0),
    )
    background.processes.start("sleep 9")
    assert busy.exec("sleep 7; echo done", timeout_seconds=60).stdout == "done\n"
    for sandbox in (busy, background, persistent, endless):
        assert not is_gone(server, sandbox)
    until(lambda: is_gone(server, busy), "the first is deleted once its command has ended")
    until(lambda: is_gone(server, background), "the second is deleted once its process has ended")
    time.sleep(3)
    assert not is_gone(server, persistent)
    assert not is_gone(server, endless)
    persistent.set_persistent(False)
    persistent.wake()
    until(lambda: is_gone(server, persistent), "persistence can be taken back")
    endless.set_ttl(1)
    until(lambda: is_gone(server, endless), "a ttl can be set later")
