"""The commands against the real control plane over a host in memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pandastack.cli.main import app
from pandastack.sdk.client import Client

from .conftest import Live


@pytest.fixture
def configured(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PANDASTACK_API", live.api_url)
    monkeypatch.setenv("PANDASTACK_API_KEY", live.api_key)


def call(*arguments: str, code: int = 0, input: bytes | None = None) -> Any:
    result = CliRunner().invoke(app, list(arguments), input=input)
    assert result.exit_code == code, f"{result.exit_code}: {result.output} {result.exception!r}"
    return result


def as_json(*arguments: str) -> Any:
    return json.loads(call(*arguments, "--json").stdout)


def program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "pandastack.cli", *arguments], capture_output=True, timeout=30, check=False, **options)


@pytest.fixture
def sandbox_id(configured: None, client: Client) -> Any:
    sandbox = client.sandboxes.create()
    yield sandbox.id
    client.sandboxes.delete(sandbox.id)


@pytest.mark.usefixtures("configured")
def test_a_sandbox_from_birth_to_death() -> None:
    sandbox_id = call("sandbox", "create", "-m", "who=me", "--ttl", "60").stdout.strip()
    assert as_json("sandbox", "get", sandbox_id)["metadata"] == {"who": "me"}
    assert [item["id"] for item in as_json("sandbox", "list", "-m", "who=me")] == [sandbox_id]
    assert sandbox_id in call("sandbox", "list").stdout
    assert sandbox_id in call("sb", "list").stdout
    assert as_json("sandbox", "set-ttl", sandbox_id, "90")["ttl_seconds"] == 90
    assert as_json("sandbox", "lifecycle", sandbox_id)["ttl_seconds"] == 90
    assert as_json("sandbox", "metrics", sandbox_id)["memory_limit_bytes"] > 0
    assert call("sandbox", "rm", sandbox_id).stdout.strip() == sandbox_id
    assert "no such sandbox" in call("sandbox", "get", sandbox_id, code=1).stderr
    assert "no such sandbox" in call("sandbox", "rm", sandbox_id, code=1).stderr


@pytest.mark.usefixtures("configured")
def test_isolation_is_asked_for_and_shown() -> None:
    own = call("sandbox", "create", "--isolation", "qemu").stdout.strip()
    plain = call("sandbox", "create").stdout.strip()
    shown = {line.split()[0]: line for line in call("sandbox", "list").stdout.splitlines()}
    assert ("qemu (tcg)" in shown[own], "microvm" in shown[own], "ISOLATION" in shown["ID"]) == (True, True, True)
    assert ("gvisor" in shown[plain], "(" in shown[plain]) == (True, False)
    facts = dict(line.split(maxsplit=1) for line in call("sandbox", "get", own).stdout.splitlines())
    assert [facts[name] for name in ("runtime", "isolation", "acceleration", "own_kernel")] == ["qemu", "microvm", "tcg", "True"]
    assert as_json("sandbox", "get", plain)["own_kernel"] is False
    call("sandbox", "rm", own, plain)
    kept = json.loads(call("run", "--isolation", "microvm", "--keep", "--json", "-l", "bash", "echo hi").stdout)["sandbox_id"]
    assert as_json("sandbox", "get", kept)["runtime"] == "qemu"
    call("sandbox", "rm", kept)
    assert "docker" in call("sandbox", "create", "--isolation", "docker", code=1).stderr
    assert "pandastack doctor" in call("run", "--isolation", "firecracker", "echo", code=1).stderr
    assert call("template", "bake", "base", "--isolation", "qemu").stdout == "base is ready for qemu\n"
    assert "firecracker" in call("template", "bake", "base", "--isolation", "firecracker", code=1).stderr


def test_use_of_a_sandbox_and_of_the_workspace(sandbox_id: str, client: Client) -> None:
    assert as_json("usage", sandbox_id)["memory_own_bytes"] > 0
    shown = call("usage", sandbox_id).stdout.splitlines()
    assert shown[0].split() == ["RUNNING", "OWN", "SHARED"]
    assert [line.split()[0] for line in shown[1:]] == ["memory", "disk", "stored"]
    client.sandboxes.get(sandbox_id).hibernate()
    snapshot_id = client.sandboxes.get(sandbox_id).snapshot()
    total = as_json("usage")
    assert total["stored_bytes"]["used"] == total["snapshot_bytes"] + total["hibernated_bytes"] > 0
    table = call("usage").stdout.splitlines()
    assert table[0].split() == ["USED", "LIMIT", "LEFT"]
    assert table[1].split()[2:] == ["none", "-"]
    facts = as_json("snapshot", "get", snapshot_id)
    assert facts["own_bytes"] + facts["shared_bytes"] == facts["size_bytes"]
    client.snapshots.delete(snapshot_id)
    assert "no such sandbox" in call("usage", "nothing", code=1).stderr


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The program that a command became instead of itself, and its arguments."""
    seen: list[str] = []

    def become(module: str, arguments: list[str]) -> None:
        seen.extend([module, *arguments])
        raise SystemExit(0)  # Like the real one, it does not return.

    monkeypatch.setattr("pandastack.cli.local.replace_with", become)
    return seen


INIT = ("init", "--file", "/x/y", "--size-gb", "7.0", "--data-dir", "/d")


@pytest.mark.parametrize("arguments", [("init",), INIT, ("status", "--json")])
def test_storage_becomes_the_hosts_program(arguments: tuple[str, ...], started: list[str]) -> None:
    call("storage", *arguments)
    assert started == ["pandastack.host", "storage", *arguments]


@pytest.mark.parametrize("given", [(), ("--pool",), ("--no-pool",)])
def test_up_passes_on_whether_a_pool_is_wanted(given: tuple[str, ...], started: list[str]) -> None:
    call("up", *given)
    assert started == ["pandastack.standalone", "up", *given]


def test_exec_ends_with_the_code_of_the_command(sandbox_id: str) -> None:
    result = call("sandbox", "exec", sandbox_id, "--", "echo out; echo err >&2; exit 7", code=7)
    assert (result.stdout, result.stderr) == ("out\n", "err\n")
    assert call("sandbox", "exec", sandbox_id, "--", "echo", "a b", "$HOME").stdout == "a b $HOME\n"
    assert call("sandbox", "exec", sandbox_id, "-i", "--", "cat", input=b"\xff\x00").stdout_bytes == b"\xff\x00"
    assert "timeout" in call("sandbox", "exec", sandbox_id, "--timeout", "0.1", "--", "sleep 5", code=124).stderr
    found = json.loads(call("sandbox", "exec", sandbox_id, "--json", "--", "echo out; exit 3", code=3).stdout)
    assert (found["stdout"], found["exit_code"]) == ("out\n", 3)


@pytest.mark.usefixtures("configured")
def test_run_deletes_its_sandbox_unless_told_otherwise(client: Client, tmp_path: Path) -> None:
    before = len(client.sandboxes.list())
    script = tmp_path / "script.sh"
    script.write_text("echo from file; exit 6\n")
    assert call("run", str(script), code=6).stdout == "from file\n"
    assert call("run", "-", "-l", "bash", input=b"echo from stdin\n").stdout == "from stdin\n"
    assert json.loads(call("run", "echo x; exit 2", "-l", "bash", "--json", code=2).stdout)["stdout"] == "x\n"
    assert len(client.sandboxes.list()) == before
    kept = call("run", "--keep", "-l", "bash", "echo x").stderr.split()[-1]
    client.sandboxes.delete(kept)


def test_files(sandbox_id: str, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes(b"\x00\xff" * 1000)
    call("fs", "upload", sandbox_id, str(tmp_path / "up"), "/tmp/x", "--mode", "0600")
    assert call("fs", "read", sandbox_id, "/tmp/x").stdout_bytes == b"\x00\xff" * 1000
    call("fs", "download", sandbox_id, "/tmp/x", str(tmp_path))
    assert (tmp_path / "x").read_bytes() == b"\x00\xff" * 1000
    assert as_json("fs", "stat", sandbox_id, "/tmp/x")["mode"] == "0600"
    call("fs", "write", sandbox_id, "/tmp/text", "--content", "hello")
    call("fs", "write", sandbox_id, "/tmp/text2", input=b"from stdin")
    assert call("fs", "read", sandbox_id, "/tmp/text2").stdout == "from stdin"
    call("fs", "mkdir", sandbox_id, "/tmp/d")
    call("fs", "mv", sandbox_id, "/tmp/text", "/tmp/d/t")
    call("fs", "chmod", sandbox_id, "0755", "/tmp/d/t")
    assert [entry["name"] for entry in as_json("fs", "ls", sandbox_id, "/tmp")] == ["d", "text2", "x"]
    assert "d/" in call("fs", "ls", sandbox_id, "/tmp").stdout
    call("fs", "rm", sandbox_id, "/tmp/d", code=1)
    call("fs", "rm", "-r", sandbox_id, "/tmp/d")
    result = call("fs", "read", sandbox_id, "/tmp/d", code=1)
    assert (result.stdout, result.stderr.count("Error: ")) == ("", 1)


def test_processes(sandbox_id: str) -> None:
    process_id = call("process", "start", sandbox_id, "--", "echo out; echo err >&2; exit 4").stdout.strip()
    result = call("process", "logs", "-f", sandbox_id, process_id, code=4)
    assert (result.stdout, result.stderr) == ("out\n", "err\n")
    assert as_json("process", "logs", sandbox_id, process_id)["stdout"] == "out\n"
    reader = call("process", "start", "--stdin", sandbox_id, "cat").stdout.strip()
    call("process", "stdin", "--close", sandbox_id, reader, "typed")
    assert call("process", "logs", "-f", sandbox_id, reader).stdout == "typed\n"
    sleeper = call("process", "start", sandbox_id, "sleep 60").stdout.strip()
    call("process", "signal", sandbox_id, sleeper, "KILL")
    call("process", "logs", "-f", sandbox_id, sleeper, code=137)
    assert len(as_json("process", "list", sandbox_id)) == 3
    assert "exit 137" in call("process", "list", sandbox_id).stdout


@pytest.mark.usefixtures("configured")
def test_templates_tokens_and_me() -> None:
    assert "base" in call("template", "list").stdout
    assert as_json("template", "get", "base")["state"] == "ready"
    assert "base is ready" in call("template", "bake", "base").stdout
    assert json.loads(call("template", "bake", "base", "--json").stdout.splitlines()[-1])["state"] == "ready"
    made = as_json("token", "create", "for tests", "--scope", "read")
    assert made["prefix"] in call("token", "list").stdout
    assert made["token"] not in call("token", "list", "--json").stdout
    call("token", "revoke", made["prefix"])
    assert as_json("me")["user_id"]
    assert as_json("version")["version"] in call("--version").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("sandbox", "set-ttl", "x", "soon"),
        ("nonsense",),
        ("run", "x", "-l", "perl"),
        ("run", "missing.py"),
        ("sandbox", "create", "-m", "novalue"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    call(*arguments, code=2)


def test_errors_are_a_sentence_and_a_hint_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    result = call("sandbox", "list", "--json", code=1)
    assert result.stdout == ""
    assert result.stderr.splitlines()[0] == "Error: no API key is configured."
    assert result.stderr.splitlines()[1].startswith("Hint: run `pandastack up`")
    monkeypatch.setenv("PANDASTACK_API", "http://127.0.0.1:9")
    monkeypatch.setenv("PANDASTACK_API_KEY", "k")
    assert "cannot reach the API" in call("me", code=1).stderr


def test_a_missing_server_part_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pandastack.cli.local.SERVER_MODULES", ("no_such_module_anywhere",))
    for command in (("up",), ("doctor",), ("bench", "--all")):
        assert 'pip install "pandastack[server]"' in call(*command, code=1).stderr


def test_doctor_shows_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    report = {
        "checks": [
            {"name": "root", "ok": True, "detail": "uid 0", "hint": None},
            {"name": "kvm", "ok": False, "detail": "none", "hint": "get [b]one[/b]"},
        ],
        "runtimes": [
            {"name": "gvisor", "works": True, "version": "1", "isolation": "gvisor", "hint": "not to be shown", "capabilities": {}},
            {"name": "qemu", "works": True, "version": "7", "isolation": "microvm", "acceleration": "tcg", "reason": "no KVM here"},
            {"name": "firecracker", "works": False, "isolation": "microvm", "acceleration": "kvm", "reason": "no KVM", "hint": "get one"},
        ],
        "auto": "gvisor",
        "auto_reason": "works",
    }
    done = subprocess.CompletedProcess([], 0, json.dumps(report).encode())
    monkeypatch.setattr("pandastack.cli.local.require_server", lambda module: None)
    monkeypatch.setattr("pandastack.cli.local.subprocess.run", lambda *_, **__: done)
    shown = call("doctor").stdout
    assert "get [b]one[/b]" in shown
    assert [line.split() for line in shown.splitlines() if line.startswith(("yes", "no "))] == [
        ["yes", "gvisor", "1", "gvisor", "-", "-", "-"],
        ["yes", "qemu", "7", "microvm", "tcg", "no", "KVM", "here", "-"],
        ["no", "firecracker", "-", "microvm", "-", "no", "KVM", "get", "one"],
    ]
    assert json.loads(call("doctor", "--json").stdout) == report
    done.stdout = json.dumps({**report, "auto": None}).encode()
    assert "chosen runtime: none" in call("doctor", code=1).stdout
    done.stdout = b"it broke"
    assert "no report" in call("doctor", code=1).stderr


def test_the_production_checklist_fails_as_its_program_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    done = subprocess.CompletedProcess([], 0, b'{"checks": [{"name": "swap", "ok": null, "detail": "one [i]disk[/i]", "hint": "swapoff"}]}')

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        asked.append(command)
        return done

    monkeypatch.setattr("pandastack.cli.local.require_server", lambda module: None)
    monkeypatch.setattr("pandastack.cli.local.subprocess.run", run)
    shown = call("doctor", "--security").stdout
    assert asked[0][-3:] == ["doctor", "--json", "--security"]
    assert "one [i]disk[/i]" in shown
    assert "swapoff" in shown
    assert "chosen runtime" not in shown
    done.returncode = 1
    assert "swapoff" in call("doctor", "--security", code=1).stdout


@pytest.mark.parametrize(
    ("script", "code", "said"), [("echo ready at 1; sleep 0.3", 0, "ready at 1"), ("echo no root >&2; exit 1", 1, "no root")]
)
def test_detach_waits_for_the_line_that_says_ready(
    script: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = tmp_path / "python"
    server.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n{script}\n')
    server.chmod(0o755)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("pandastack.cli.local.sys.executable", str(server))
    monkeypatch.setattr("pandastack.cli.local.require_server", lambda module: None)
    assert said in call("up", "--port", "0", "--slots", "3", "--detach", code=code).output
    assert (tmp_path / "arguments").read_text() == "-m pandastack.standalone up --port 0 --slots 3\n"


def test_a_local_file_that_is_missing_and_a_bad_setting_are_sentences(sandbox_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call("fs", "write", sandbox_id, "/tmp/x", "--content", "text")
    assert "nowhere" in call("fs", "download", sandbox_id, "/tmp/x", "/nowhere/x", code=1).stderr
    monkeypatch.setenv("PANDASTACK_MAX_CREATE_RETRY_SECONDS", "soon")
    assert "PANDASTACK_MAX_CREATE_RETRY_SECONDS must be" in call("me", code=1).stderr


def test_terminal_commands_in_names_are_made_harmless() -> None:
    from pandastack.cli import console

    assert console.clean("a\x1b[31mb\x07\udcff") == "a\\x1b[31mb\\x07\\udcff"


@pytest.mark.usefixtures("configured")
def test_as_a_program(live: Live) -> None:
    done = program("run", "-l", "bash", "echo out; exit 9")
    assert (done.returncode, done.stdout) == (9, b"out\n")
    done = program("--help")
    assert done.returncode == 0
    assert program("sandbox", "nonsense").returncode == 2


@pytest.mark.usefixtures("configured")
def test_a_reader_that_leaves_is_no_reason_to_complain() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m pandastack.cli run -l bash 'yes | head -c 3000000' | head -c 5"],
        capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    assert (len(done.stdout), done.stderr) == (5, b"")


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_sandbox(client: Client, number: signal.Signals) -> None:
    before = {sandbox.id for sandbox in client.sandboxes.list()}
    child = subprocess.Popen(
        [sys.executable, "-m", "pandastack.cli", "run", "-l", "bash", "echo started; sleep 60"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == b"started\n"
    child.send_signal(number)
    begun = time.monotonic()
    _, stderr = child.communicate(timeout=20)
    assert child.returncode == 130
    assert b"Traceback" not in stderr
    assert time.monotonic() - begun < 10
    assert {sandbox.id for sandbox in client.sandboxes.list()} == before
