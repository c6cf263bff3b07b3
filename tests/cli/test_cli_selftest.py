"""`pandastack selftest fork`: every promise has a row, a broken one fails it, and nothing is left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pandastack.cli import fork_contract
from pandastack.cli.fork_contract import Clock
from pandastack.cli.main import app
from pandastack.sdk.testing import MemoryTransport, answer

from .fork_world import ForkWorld

WITNESS = Path(fork_contract.__file__).with_name("fork_witness.py")

Use = Callable[[ForkWorld], ForkWorld]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    def connect(world: ForkWorld) -> ForkWorld:
        monkeypatch.setattr("pandastack.sdk.client.transports.HttpTransport", lambda *_: MemoryTransport(world))
        return world

    monkeypatch.setenv("PANDASTACK_API", "http://localhost:1")
    monkeypatch.setenv("PANDASTACK_API_KEY", "key")
    return connect


def call(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["selftest", "fork", *arguments])
    assert result.exit_code == code, f"{result.exit_code}: {result.output} {result.exception!r}"
    return result


def test_a_good_fork_passes_every_check_and_leaves_nothing(use: Use) -> None:
    world = use(ForkWorld())
    report = json.loads(call("--json", "--children", "3").stdout)
    assert report["passed"]
    assert [check["name"] for check in report["checks"]] == list(fork_contract.RULES)
    assert all(check["passed"] and check["evidence"] for check in report["checks"])
    assert (len(report["children"]), report["kept"]) == (3, [])
    assert world.sandboxes == {}
    assert world.asked[1][2]["template"] == "base", "of those that are ready"
    # Nothing may come between the write and the fork.
    late = next(number for number, (_, _, body) in enumerate(world.asked) if "/files/late" in json.dumps(body))
    assert world.asked[late + 1][0] == "POST fork-tree"


def test_people_get_a_table(use: Use) -> None:
    use(ForkWorld())
    result = call()
    assert "CHECK" in result.stdout
    assert result.stdout.count(" pass ") == len(fork_contract.RULES)
    assert "forking s1 into 2" in result.stderr


@pytest.mark.parametrize("promise", fork_contract.RULES)
def test_a_broken_promise_fails_its_check_and_the_command(promise: str, use: Use) -> None:
    world = use(ForkWorld(promise))
    report = json.loads(call("--json", code=1).stdout)
    failed = {check["name"]: check["evidence"] for check in report["checks"] if not check["passed"]}
    assert promise in failed
    assert failed[promise]
    # A fork of a fork breaks with the fork, and a listener with the memory of its process; nothing else does.
    assert set(failed) <= {promise, "fork of a fork", *(["listener"] if promise == "memory is carried over" else [])}
    assert world.sandboxes == {}


def test_a_sandbox_of_the_user_is_tidied_up_and_stays(use: Use) -> None:
    world = use(ForkWorld())
    mine = world.make()["id"]
    call(mine)
    assert set(world.sandboxes) == {mine}
    assert world.ended == [mine]
    assert world.commands[-1].startswith("rm -rf /tmp/pandastack-selftest-")


def test_keep_leaves_the_sandboxes_and_names_them(use: Use) -> None:
    world = use(ForkWorld())
    result = call("--keep", "--json")
    report = json.loads(result.stdout)
    assert report["passed"]
    assert set(world.sandboxes) == set(report["kept"]) == {report["sandbox_id"], *report["children"]}
    assert all(one in result.stderr for one in report["kept"])
    assert "rm" not in [command.split()[0] for command in world.commands]


@pytest.mark.parametrize("keep", [[], ["--keep"]])
def test_an_error_half_way_leaves_nothing(keep: list[str], use: Use) -> None:
    world = use(ForkWorld())
    world.after["POST fork-tree"] = lambda: answer({"error": "it broke", "code": "runtime_failed"}, 500)
    assert "it broke" in call(*keep, code=1).stderr
    assert world.sandboxes == {}


def test_a_sandbox_without_python_is_told(use: Use) -> None:
    world = use(ForkWorld())
    world.has_python = False
    assert "python3" in call(code=1).stderr
    assert world.sandboxes == {}


@pytest.mark.parametrize("at", ["POST fork-tree", "POST exec", "POST processes"])
def test_ctrl_c_leaves_nothing(at: str, use: Use) -> None:
    world = use(ForkWorld())
    reached = threading.Event()

    def interrupt() -> None:
        del world.before[at]
        reached.set()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)

    world.before[at] = interrupt
    call(code=130)
    assert reached.is_set()
    assert world.sandboxes == {}


def test_ctrl_c_after_the_fork_leaves_nothing(use: Use) -> None:
    world = use(ForkWorld())
    real = world.execute

    def execute(sandbox: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        if "fork_parent_id" in sandbox:
            raise KeyboardInterrupt
        return real(sandbox, body)

    world.run = execute
    call(code=130)
    assert world.sandboxes == {}


def test_far_from_the_host_the_parent_is_the_clock(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANDASTACK_API", "https://api.example.com")
    world = use(ForkWorld())
    real = world.identity
    monkeypatch.setattr(world, "identity", lambda sandbox_id: {**real(sandbox_id), "ahead_s": 30.0})
    report = json.loads(call("--json").stdout)
    assert "from the parent" in next(check["evidence"] for check in report["checks"] if check["name"] == "clock")


def test_a_slow_answer_makes_a_clock_neither_right_nor_wrong() -> None:
    assert Clock(700, 100).least(None) == 600
    assert Clock(700, 300).least(None) == 400
    assert Clock(700, 10).least(Clock(690, 10)) == 0
    assert Clock(-700, 0).least(Clock(100, 0)) == 800


# The program that runs inside, here.


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    process = subprocess.Popen([sys.executable, str(WITNESS), "hold", str(tmp_path)], start_new_session=True)
    end = time.monotonic() + 10
    while not (tmp_path / "port").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    yield tmp_path
    # Its own end: it leaves when its folder does, and takes the process that waits with it.
    tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-gone"))
    assert process.wait(10) == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def witness(folder: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(WITNESS), arguments[0], str(folder), *arguments[1:]],
        capture_output=True, text=True, timeout=20, check=True, env={**os.environ, "PANDASTACK_SANDBOX_ID": "me"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_witness_sees_and_remembers(folder: Path) -> None:
    first = witness(folder, "probe")
    assert set(first["errors"]) <= {"machine_id"}
    assert first["listener"] == first["memory"]["secret"]
    assert len(first["waiting"]) == len(first["fresh"]) == 32
    assert first["sandbox_id"] == "me"
    assert first["memory"]["longest_gap_ms"] >= 10
    witness(folder, "tell", "value")
    second = witness(folder, "probe")
    assert second["memory"]["ticks"] > first["memory"]["ticks"]
    assert second["memory"]["secret"] == first["memory"]["secret"]
    assert (second["memory"]["value"], second["files"]) == ("value", {"value": "value"})
    assert second["waiting"] != first["waiting"]


def test_the_secret_of_the_witness_is_nowhere_on_disk(folder: Path) -> None:
    secret = witness(folder, "probe")["memory"]["secret"]
    assert not any(secret in path.read_text() for path in folder.rglob("*") if path.is_file())


def test_a_dead_witness_hides_no_other_look(tmp_path: Path) -> None:
    found = witness(tmp_path, "probe")
    assert {"waiting", "memory", "listener", "files"} <= set(found["errors"])
    assert found["fresh"]
    assert found["hostname"]
