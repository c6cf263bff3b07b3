"""Runs the contract of microVMs on KVM in an outer machine, see `outer`. `scripts/test-nested` starts it.

The code that it ends with is that of pytest, 77 where this machine can run none, and 1 where the outer machine did not live through
it, or a test was skipped that may not be. An outer machine that hangs is tried once more, and that is said; a second one that hangs is a
failure.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import outer

from pandastack.errors import HostUnfit
from pandastack.host import app
from pandastack.host.storage.images import Images
from pandastack.host.storage.roots import Roots

LOGS = outer.PROJECT / ".cache" / "nested"
CONTRACT = tuple(f"tests/contracts/test_{name}.py" for name in ("runtime", "microvms", "lazy_machines"))
STATES = ("tests/contracts/states",)  # What a whole host does with them.
ATTEMPTS = 2
UNFIT = 77
# How many times slower a machine in the outer machine is than one on a CPU.
PATIENCE = 20


@dataclass(frozen=True)
class Form:
    """`deadline_s` is for each runtime; `expression` chooses tests as for pytest; `qemu` is QEMU's name in these modules."""

    deadline_s: float
    expression: str = ""
    modules: Sequence[str] = CONTRACT
    qemu: str = "qemu-kvm"

    def runtimes(self) -> list[str]:
        """Those whose contract is run: Firecracker's where there is one."""
        return [self.qemu, *(["firecracker-kvm"] if os.environ.get("PANDASTACK_FIRECRACKER") else [])]


FORMS = {
    "short": Form(420.0, "names_version or has_a_guest_that_answers or its_copies_are_others"),
    "complete": Form(5400.0),
    "states": Form(7200.0, modules=STATES, qemu="qemu"),
}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the report of pytest counts; `skipped` are reasons by test."""

    passed: int
    failed: int
    skipped: dict[str, str]


def summary(report: bytes) -> Summary:
    passed, failed, skipped = 0, 0, {}
    for case in ET.fromstring(report).iter("testcase"):  # noqa: S314 - pytest wrote it
        name = case.get("name", "")
        if (skip := case.find("skipped")) is not None:
            skipped[name] = skip.get("message", "")
        elif case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        else:
            passed += 1
    return Summary(passed=passed, failed=failed, skipped=skipped)


async def _prepared(cache: Path) -> outer.Parts:
    """What takes long inside is made here: the root of the image, and the compiled tests."""
    images = Images(cache / "images", [app.shipped_templates()])
    image = images.cached("base") or await images.ensure("base", lambda _: None)
    await Roots(_roots(cache)).ensure(image)
    return await outer.parts(cache)


def _roots(cache: Path) -> Path:
    return cache / "nested" / "roots"


def run(modules: Sequence[str], expression: str, *, deadline_s: float, cache: Path, output: Callable[[bytes], None]) -> tuple[int, str]:
    """The exit code, and a line that says what was seen. Raises HostUnfit where no outer machine can be made."""
    made = asyncio.run(_prepared(cache))
    # No other plugins: they are large, and each module that is imported costs much there.
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    argv = [sys.executable, "-m", "pytest", "-p", "anyio", "-p", "pytest_timeout", *modules]
    subprocess.run([*argv, "-q", "--collect-only"], cwd=outer.PROJECT, env=os.environ | plugins, check=True, capture_output=True)
    argv += ["-v", "-k", expression, "-o", "cache_dir=/tmp/cache", "--junitxml=/run/report.xml", "--durations=10"]
    environment = (
        outer.environment()
        | plugins
        | {
            "PYTHONDONTWRITEBYTECODE": "1",
            "PANDASTACK_TEST_CACHE": str(cache),
            "PANDASTACK_TEST_ROOTS": str(_roots(cache)),
            "PANDASTACK_TEST_PATIENCE": str(PATIENCE),
            "PANDASTACK_TEST_KVM": "required",
        }
    )
    LOGS.mkdir(parents=True, exist_ok=True)
    note = ""
    for attempt in range(1, ATTEMPTS + 1):
        result = outer.run(made, argv, environment, output=output, deadline_s=deadline_s)
        (LOGS / f"console-{attempt}.log").write_bytes(result.console)
        if result.code is not None:
            return _verdict(result, note)
        (LOGS / f"monitor-{attempt}.log").write_text(result.monitor)
        outer.say(f"the outer machine was lost in attempt {attempt} of {ATTEMPTS}: {result.why}; see {LOGS}")
        note = f"; this was attempt {attempt + 1}, because before it the outer machine was lost: {result.why}"
    return 1, f"failed: the outer machine was lost {ATTEMPTS} times, the last time because {result.why}"


def _verdict(result: outer.Run, note: str) -> tuple[int, str]:
    poked = f"; it was silent and poked {result.pokes} times" if result.pokes else ""
    times = f"in {result.took_s:.0f} s, {result.boot_s:.0f} of them to boot the outer machine{poked}{note}"
    if not result.report:
        return result.code or 1, f"failed: no test was run, the outer machine ended with code {result.code} {times}"
    (LOGS / "report.xml").write_bytes(result.report)
    seen = summary(result.report)
    counts = f"{seen.passed} passed, {seen.failed} failed, {len(seen.skipped)} skipped on nested KVM {times}"
    if result.code == 0 and seen.passed == 0:
        return 1, f"failed: no test passed; {counts}"
    return result.code or 0, counts


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/test-nested", description="Run the contract of microVMs on a nested KVM.")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--short", dest="form", action="store_const", const="short", help="a few tests, some minutes, instead of all")
    forms.add_argument("--states", dest="form", action="store_const", const="states", help="snapshots, forks and diffs of a whole host")
    parser.add_argument("-k", dest="expression", help="the tests to run, as for pytest")
    parser.add_argument("--deadline-s", type=float, help="for each of two attempts")
    options = parser.parse_args(arguments)
    form = FORMS[options.form or "complete"]
    names = " or ".join(form.runtimes())
    # So that what is under way is undone also then.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def output(piece: bytes) -> None:
        sys.stdout.buffer.write(piece)
        sys.stdout.flush()

    cache = Path(os.environ.get("PANDASTACK_TEST_CACHE", "/var/cache/pandastack"))
    expression = options.expression or form.expression
    expression = f"({names}) and ({expression})" if expression else names
    deadline_s = options.deadline_s or form.deadline_s * len(form.runtimes())
    try:
        code, line = run(form.modules, expression, deadline_s=deadline_s, cache=cache, output=output)
    except HostUnfit as error:
        outer.say(f"{error.message}; {error.hint}")
        return UNFIT
    outer.say(line)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
