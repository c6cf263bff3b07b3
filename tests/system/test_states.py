"""Paused, hibernated, woken: what a sandbox keeps, what the host gets back, and when it happens by itself."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from pandastack.sdk.client import Client
from pandastack.sdk.sandboxes import Sandbox

from . import notes
from .conftest import MakeSandbox, MakeServer
from .servers import Server, until


def wakes(server: Server) -> int:
    """How often a sandbox was brought back, as the server counts it."""
    found = re.search(r'^pandastack_wakes_total\{outcome="ok"\} (\S+)$', server.http("GET", "/metrics").text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def assert_given_back(server: Server, machine: str) -> None:
    """Nothing of a machine runs, and no memory is charged for it."""
    until(lambda: not [item for item in server.left() if machine in item], "the machine is gone")


def test_what_was_hibernated_comes_back_as_it_was(own_server: MakeServer) -> None:
    server = own_server()
    paused = server.client().sandboxes.create("base")
    notes.begin(paused)
    (other,) = server.machines()
    sandbox = server.client().sandboxes.create("base", persistent=True)
    notes.begin(sandbox)
    restarts: dict[int, Callable[[], None]] = {1: server.stop, 3: server.kill}
    for number in range(5):
        assert notes.add(sandbox, f"memory-{number}") == [f"memory-{before}" for before in range(number + 1)]
        sandbox.exec(f"echo disk-{number} >> /var/disk", check=True)
        (machine,) = server.machines() - {other}
        sandbox.hibernate()
        assert (sandbox.status, sandbox.refresh().status_reason) == ("hibernated", "request")
        assert_given_back(server, machine)
        if number in restarts:
            paused.pause()
            restarts[number]()
            server.start()
            sandbox, paused = (server.client().sandboxes.get(one.id) for one in (sandbox, paused))
            assert (sandbox.status, sandbox.status_reason) == ("hibernated", "request")
            assert (paused.status, paused.status_reason) == ("paused", "request")
            assert len(notes.add(paused, f"after-{number}")) == len([one for one in restarts if one <= number])
        # Looking at it is no use of it.
        assert {one.id: one.status for one in server.client().sandboxes.list()} == {paused.id: "running", sandbox.id: "hibernated"}
        assert sandbox.lifecycle()["status"] == "hibernated"
        server.http("GET", f"/v1/sandboxes/{sandbox.id}/metrics")
        assert (sandbox.refresh().status, server.machines()) == ("hibernated", {other})
        if number % 2:
            sandbox.wake()
            sandbox.wake()
        assert sandbox.filesystem.read_text("/var/disk") == "".join(f"disk-{before}\n" for before in range(number + 1))
        assert (sandbox.refresh().status, sandbox.boot_mode) == ("running", "wake")
    assert notes.add(sandbox, "last")[-2:] == ["memory-4", "last"]
    # Time went on meanwhile.
    assert abs(float(sandbox.exec("date +%s.%N").stdout) - time.time()) < 5


def test_ten_threads_wake_it_once(any_make: MakeSandbox, any_server: Server) -> None:
    sandbox = any_make(persistent=True)
    notes.begin(sandbox)
    sandbox.hibernate()
    before = wakes(any_server)
    with ThreadPoolExecutor(10) as pool:
        said = list(pool.map(lambda number: sandbox.exec(f"echo {number}").stdout, range(10)))
    assert said == [f"{number}\n" for number in range(10)]
    assert (sandbox.refresh().status, sandbox.boot_mode) == ("running", "wake")
    assert wakes(any_server) == before + 1
    assert notes.add(sandbox, "word") == ["word"]


def test_a_paused_sandbox_uses_no_cpu_until_a_request_resumes_it(any_make: MakeSandbox) -> None:
    sandbox = any_make()
    counter = sandbox.processes.start("i=0; while true; do i=$((i+1)); echo $i; sleep 0.05; done", id="counter")
    sandbox.processes.start("while :; do :; done", id="loop")
    until(lambda: counter.refresh().stdout_bytes > 20, "it counts")
    sandbox.pause()
    assert (sandbox.status, sandbox.status_reason) == ("paused", "request")
    before = sandbox.metrics()
    assert before.host_rss_bytes > 0
    time.sleep(2)
    assert sandbox.metrics().host_cpu_seconds - before.host_cpu_seconds <= 0.005
    assert sandbox.refresh().status == "paused"
    sandbox.resume()
    assert sandbox.status == "running"
    seen = counter.refresh().stdout_bytes
    until(lambda: counter.refresh().stdout_bytes > seen, "it goes on counting")
    sandbox.pause()
    assert sandbox.exec("echo awake").stdout == "awake\n"
    assert sandbox.refresh().status == "running"
    numbers = counter.read_output().data.decode().split("\n")[:-1]
    assert numbers == [str(number + 1) for number in range(len(numbers))]


def listed(client: Client) -> dict[str, Sandbox]:
    """Without any use of them."""
    return {sandbox.id: sandbox for sandbox in client.sandboxes.list()}


def test_an_idle_sandbox_is_hibernated_if_it_is_persistent_and_deleted_if_not(make: MakeSandbox, client: Client) -> None:
    # Each is held off as soon as it is there, so that a slow machine does not make it idle before.
    kept = make(ttl_seconds=3, persistent=True)
    kept.keep_awake(600)
    working = make(ttl_seconds=3, persistent=True)
    working.processes.start("sleep 1000", id="work")
    persistent, passing = (make(ttl_seconds=3, persistent=keeps) for keeps in (True, False))
    persistent.exec("echo kept > /var/kept")
    until(lambda: listed(client)[persistent.id].status == "hibernated", "the persistent one is hibernated")
    until(lambda: passing.id not in listed(client), "the other one is deleted")
    assert listed(client)[persistent.id].status_reason == "idle"
    assert persistent.lifecycle()["status"] == "hibernated"
    time.sleep(5)
    assert (listed(client)[working.id].status, listed(client)[kept.id].status) == ("running", "running")
    life = working.lifecycle()
    assert (life["idle_seconds"], life["idle_reason"]) == (0, "processes run inside"), life
    life = kept.lifecycle()
    assert life["idle_seconds"] > 2, life
    assert life["keep_awake_until"] is not None
    assert 500 < (datetime.fromisoformat(life["keep_awake_until"]) - datetime.now(UTC)).total_seconds() <= 600
    # What held them off ends.
    kept.keep_awake(0)
    working.processes.get("work").kill()
    until(lambda: listed(client)[kept.id].status == "hibernated", "it is hibernated once nobody keeps it awake")
    until(lambda: listed(client)[working.id].status == "hibernated", "it is hibernated once its work is over")
    assert persistent.exec("cat /var/kept").stdout == "kept\n"
    until(lambda: listed(client)[persistent.id].status == "hibernated", "and again")
