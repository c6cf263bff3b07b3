"""The `pandastack` command against a real server: what a terminal and a script see."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import MakeSandbox
from .servers import Server

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(server: Server, tmp_path: Path) -> Run:
    """Runs `pandastack ...` with the configuration that `pandastack up` wrote for its user."""

    def run(*words: str, stdin: str = "", timeout: float = 120) -> subprocess.CompletedProcess[str]:
        environ = {name: value for name, value in server.environ.items() if name not in ("PANDASTACK_API", "PANDASTACK_API_KEY")}
        command = [sys.executable, "-m", "pandastack.cli", *words]
        return subprocess.run(command, env=environ, input=stdin, capture_output=True, text=True, timeout=timeout, check=False, cwd=tmp_path)

    return run


def test_run_takes_code_from_words_files_and_standard_input(cli: Run, tmp_path: Path) -> None:
    done = cli("run", "-", stdin="import numpy; print('sum', numpy.arange(4).sum())")
    assert (done.stdout, done.stderr, done.returncode) == ("sum 6\n", "", 0)
    (tmp_path / "script.sh").write_text("echo from $0; echo oops >&2; exit 9")
    done = cli("run", str(tmp_path / "script.sh"))
    assert (done.returncode, done.stderr) == (9, "oops\n")
    done = cli("run", "--json", "print('hello')")
    assert json.loads(done.stdout)["stdout"] == "hello\n"
    assert cli("run", "raise SystemExit(3)").returncode == 3
    assert cli("run", "--timeout", "1", "import time; time.sleep(100)").returncode == 124
    assert json.loads(cli("sandbox", "list", "--json").stdout) == []


def test_exit_codes_say_what_happened(cli: Run, make: MakeSandbox) -> None:
    sandbox = make()
    assert cli("sandbox", "exec", sandbox.id, "--", "exit 42").returncode == 42
    assert cli("sandbox", "exec", sandbox.id, "--", "kill -9 $$").returncode == 137
    assert cli("sandbox", "exec", sandbox.id, "--timeout", "1", "--", "sleep 100").returncode == 124
    assert cli("sandbox", "exec", sandbox.id, "-i", "--", "cat", stdin="typed").stdout == "typed"
    missing = cli("sandbox", "get", "00000000-0000-4000-8000-000000000000")
    assert missing.returncode == 1
    assert "Traceback" not in missing.stderr
    assert cli("sandbox", "create", "--no-such-option").returncode == 2


def test_json_is_json_everywhere(cli: Run) -> None:
    made = json.loads(cli("sandbox", "create", "-t", "base", "--ttl", "600", "-m", "story=cli", "--json").stdout)
    try:
        process = json.loads(cli("process", "start", made["id"], "--json", "--", "echo out").stdout)
        for line in (
            "sandbox list",
            "sandbox list -m story=cli",
            f"sandbox get {made['id']}",
            f"sandbox lifecycle {made['id']}",
            f"sandbox metrics {made['id']}",
            f"process list {made['id']}",
            f"fs ls {made['id']} /etc",
            f"fs stat {made['id']} /etc/passwd",
            "template list",
            "token list",
            "me",
        ):
            done = cli(*line.split(), "--json")
            assert done.returncode == 0, (line, done.stderr)
            json.loads(done.stdout)
        assert process["id"] in cli("process", "list", made["id"]).stdout
        assert cli("process", "logs", "-f", made["id"], process["id"]).stdout == "out\n"
    finally:
        assert cli("sandbox", "rm", made["id"]).returncode == 0
    assert cli("sandbox", "rm", made["id"]).returncode == 1


def test_files_go_up_and_come_down(cli: Run, make: MakeSandbox, tmp_path: Path) -> None:
    sandbox = make()
    content = os.urandom(3 << 20)
    (tmp_path / "up").write_bytes(content)
    assert cli("fs", "upload", sandbox.id, "up", "/var/folder/file").returncode == 0
    assert cli("fs", "download", sandbox.id, "/var/folder/file", "down").returncode == 0
    assert (tmp_path / "down").read_bytes() == content
    assert cli("fs", "write", sandbox.id, "/var/text", stdin="text\n").returncode == 0
    assert cli("fs", "read", sandbox.id, "/var/text").stdout == "text\n"
    assert cli("fs", "read", sandbox.id, "/var/missing").returncode == 1


def test_doctor_finds_a_runtime_that_works(cli: Run) -> None:
    done = cli("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    works = {runtime["name"]: runtime["acceleration"] for runtime in report["runtimes"] if runtime["works"]}
    assert "gvisor" in works
    assert report["auto"] == ("qemu" if works.get("qemu") == "kvm" else "gvisor")
    assert report["auto_reason"]
    assert {"cgroups", "disks", "runsc"} <= {check["name"] for check in report["checks"]}


def test_bench_compares_with_the_bare_tool(cli: Run, tmp_path: Path) -> None:
    done = cli("bench", "exec", "-n", "3", "--json", "rows.json", timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows = rows if isinstance(rows, list) else rows["rows"]
    wanted = {"benchmark", "case", "runtime", "n", "p50_ms", "p95_ms", "p99_ms", "bare_p50_ms", "ratio_p50"}
    timed = next(row for row in rows if row["case"] == "/bin/true")
    assert wanted <= timed.keys()
    assert (timed["benchmark"], timed["runtime"], timed["n"]) == ("exec", "gvisor", 3)
    assert 0 < timed["p50_ms"] <= timed["p95_ms"] <= timed["p99_ms"]
    assert timed["ratio_p50"] == pytest.approx(timed["p50_ms"] / timed["bare_p50_ms"], abs=0.01)
    assert next(row["value"] for row in rows if row["case"] == "200 in parallel: errors") == 0


def test_bench_saves_wakes_and_copies(cli: Run, tmp_path: Path) -> None:
    words = ("snapshot", "fork", "wake", "--state-mb", "0", "--children", "2", "-n", "1")
    done = cli("bench", *words, "--json", "rows.json", timeout=600)
    assert done.returncode == 0, done.stderr
    rows = {(row["benchmark"], row["case"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    compared = [
        ("snapshot", "0 MB: durable"),
        ("fork", "0 MB, 2 children: first answers"),
        ("fork", "0 MB, 2 children: all answer"),
        ("wake", "0 MB: all"),
    ]
    assert all(rows[key]["p50_ms"] > 0 and rows[key]["bare_p50_ms"] > 0 and rows[key]["ratio_p50"] > 0 for key in compared)
    assert rows["fork", "0 MB, 2 children: pause of the parent"]["p50_ms"] > 0
    assert rows["fork", "0 MB, 2 children: memory of each"]["unit"] == "MiB PSS"
    assert rows["snapshot", "0 MB: written"]["value"] > 1
    assert rows["snapshot", "0 MB: durable"]["note"]


@pytest.mark.timeout(600)
def test_bench_measures_microvms_against_qemu_by_hand(cli: Run, tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("qemu-system-x86_64") is None or shutil.which("mkfs.xfs") is None:
        pytest.skip("microVMs need root, qemu-system-x86 and xfsprogs")
    folders = set(Path("/var/tmp").glob("pandastack-ba*")) | set(Path("/var/tmp").glob("pandastack-bench*"))
    words = ("restore", "fork", "--runtime", "qemu", "--state-mb", "0", "--children", "1", "--blanks", "1", "-n", "2")
    done = cli("bench", *words, "--json", "rows.json", timeout=580)
    assert done.returncode == 0, done.stderr
    rows = {(row["benchmark"], row["case"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert {row["runtime"] for row in rows.values()} == {"qemu"}
    forked = rows["fork", "0 MB, 1 child: answers"]
    assert forked["ratio_p50"] == pytest.approx(forked["p50_ms"] / forked["bare_p50_ms"], abs=0.01)
    assert rows["restore", "device state"]["target"] == "ms <= 5"
    parts = [rows["restore", part]["p50_ms"] for part in ("disk cloned and given", "memory mapped", "device state")]
    assert all(ms > 0 for ms in parts)
    assert 1 < rows["restore", "memory written until the first result"]["value"] < 256
    estimate = rows.get(("restore", "create to first result with KVM (estimate, not measured)"))
    if estimate is not None:  # Where there is KVM it is measured.
        assert estimate["value"] > sum(parts)
    assert rows["fork", "0 MB, 1 child: memory of each: own"]["value"] > 4
    assert folders == set(Path("/var/tmp").glob("pandastack-ba*")) | set(Path("/var/tmp").glob("pandastack-bench*"))
    assert "pandastack-b" not in Path("/proc/self/mountinfo").read_text()


def test_bench_refuses_sizes_that_are_none(cli: Run) -> None:
    for words in (("--state-mb", "large"), ("--children", "0"), ("--children", "1,17"), ("--runtime", "none")):
        assert cli("bench", "fork", *words).returncode == 2
