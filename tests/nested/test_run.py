"""What the runner makes of an outer machine that was lost, of one that ran no test, and of a report; with machines that are none."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import outer
import pytest
import run

REPORT = b"""<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="no"/></testcase>
<testcase name="c"><error message="no"/></testcase><testcase name="d"><skipped message="why"/></testcase></testsuite></testsuites>"""


def test_a_report_is_counted() -> None:
    assert run.summary(REPORT) == run.Summary(passed=1, failed=2, skipped={"d": "why"})


@pytest.mark.parametrize(
    ("result", "code", "said"),
    [
        (outer.Run(code=1, report=REPORT), 1, "1 passed, 2 failed, 1 skipped"),
        (outer.Run(code=0, report=b'<testsuite><testcase name="a"/></testsuite>'), 0, "1 passed, 0 failed, 0 skipped"),
        (outer.Run(code=0, report=b'<testsuite><testcase name="a"><skipped/></testcase></testsuite>'), 1, "no test passed"),
        (outer.Run(code=0, report=b"<testsuite/>"), 1, "no test passed"),
        (outer.Run(code=0), 1, "no test was run"),
        (outer.Run(code=91), 91, "no test was run"),
    ],
)
def test_a_run_without_a_test_that_passed_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: outer.Run, code: int, said: str
) -> None:
    monkeypatch.setattr(run, "LOGS", tmp_path)
    ended_with, line = run._verdict(result, "")
    assert ended_with == code
    assert said in line


@pytest.fixture
def attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[outer.Run]:
    """The outcomes of outer machines, first to last, instead of machines."""
    outcomes: list[outer.Run] = []

    async def prepared(_: Path) -> None:
        return None

    monkeypatch.setattr(run, "LOGS", tmp_path)
    monkeypatch.setattr(run, "_prepared", prepared)
    monkeypatch.setattr(outer, "run", lambda *_, **__: outcomes.pop(0))
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: None)
    return outcomes


def test_a_lost_machine_is_tried_once_more_and_that_is_said(attempts: list[outer.Run], tmp_path: Path) -> None:
    good = outer.Run(code=0, report=b'<testsuite><testcase name="a"/></testsuite>')
    attempts += [outer.Run(why="it gave no sign of life", monitor="registers"), good]
    code, line = run.run(["tests"], "all", deadline_s=1, cache=tmp_path, output=lambda _: None)
    assert code == 0
    assert "attempt 2" in line
    assert "no sign of life" in line
    assert (tmp_path / "monitor-1.log").read_text() == "registers"


def test_a_second_lost_machine_is_a_failure(attempts: list[outer.Run], tmp_path: Path) -> None:
    attempts += [outer.Run(why="one"), outer.Run(why="two"), outer.Run(code=0)]
    code, line = run.run(["tests"], "all", deadline_s=1, cache=tmp_path, output=lambda _: None)
    assert (code, attempts) == (1, [outer.Run(code=0)])
    assert "failed" in line
    assert "two" in line


def test_a_failed_test_is_no_reason_to_try_again(attempts: list[outer.Run], tmp_path: Path) -> None:
    attempts += [outer.Run(code=1, report=REPORT), outer.Run(code=0)]
    assert run.run(["tests"], "all", deadline_s=1, cache=tmp_path, output=lambda _: None)[0] == 1
    assert len(attempts) == 1


class TestFollow:
    """A program in the place of QEMU; it speaks as the outer machine does."""

    def follow(self, monkeypatch: pytest.MonkeyPatch, program: str, *, deadline_s: float = 20) -> tuple[outer.Run, bytes]:
        channels, fds = {}, {}
        theirs = []
        for name in ("console", "lines", "report", "monitor"):
            here, there = socket.socketpair()
            channels[name], fds[name] = here, there.fileno()
            theirs.append(there)
        result, said = outer.Run(), bytearray()
        for name, fd in fds.items():
            program = program.replace(f"{{{name}}}", str(fd))
        code = f"import os, time\ndef say(x): os.write({fds['lines']}, x)\n{program}"
        process = subprocess.Popen([sys.executable, "-c", code], pass_fds=tuple(fds.values()))
        for one in theirs:
            one.close()
        try:
            outer._follow(process, channels, "@T", result, said.extend, time.monotonic(), deadline_s)
        finally:
            process.kill()
            process.wait()
            for one in channels.values():
                one.close()
        return result, bytes(said)

    def test_what_is_said_comes_out_and_what_is_for_the_harness_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        program = "say(b'@T up 3.1\\none\\ntw'); say(b'o\\n@T beat 4\\nhalf@T exit 7\\n'); os.write({report}, b'<x/>')"
        result, said = self.follow(monkeypatch, program)
        assert (result.code, result.why, result.beats, result.report) == (7, "", 1, b"<x/>")
        assert result.boot_s > 0
        assert said == b"one\ntwo\nhalf"

    def test_one_that_ends_without_a_word_is_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result, _ = self.follow(monkeypatch, "os.write({console}, b'Kernel panic')")
        assert result.code is None
        assert "Kernel panic" in result.why

    def test_one_that_is_silent_is_lost_although_its_console_speaks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(outer, "SILENT_S", 1.0)
        program = "say(b'@T up 1\\n')\nwhile True: os.write({console}, b'x'); say(b'output\\n'); time.sleep(0.1)"
        result, _ = self.follow(monkeypatch, program)
        assert result.code is None
        assert "no sign of life" in result.why

    def test_one_that_sleeps_is_poked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(outer, "POKE_S", 0.5)
        result, said = self.follow(monkeypatch, "say(b'@T up 1\\n'); os.read({lines}, 1); say(b'@T beat 1\\n@T exit 0\\n')")
        assert (result.code, result.pokes, result.beats, said) == (0, 1, 1, b"")

    def test_one_that_goes_on_and_on_is_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        result, _ = self.follow(monkeypatch, "while True: say(b'@T beat 1\\n'); time.sleep(0.1)", deadline_s=1.5)
        assert result.code is None
        assert "not finished" in result.why
