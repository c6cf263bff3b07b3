"""Commands about this machine: `up`, `down`, `setup`, `doctor`, `bench`. They start other programs of the distribution, and import none."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pandastack.cli import console

# One module per extra is enough to know: they are installed together.
SERVER_MODULES = ("fastapi", "uvicorn", "sqlalchemy")
INSTALL = 'install it with: pip install "pandastack[server]"'
READY_WITHIN_S = 120.0


def require_server(module: str) -> None:
    missing = [name for name in (*SERVER_MODULES, module) if not _exists(name)]
    if missing:
        console.fail(f"this needs the server part of PandaStack, which is not installed (no {missing[0]})", INSTALL)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def replace_with(module: str, arguments: list[str]) -> None:
    """Become that program: signals, output and exit code are then its own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606


def up(
    port: Annotated[int | None, typer.Option(min=0, max=65535)] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on (default: this machine only).")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where everything is kept.")] = None,
    slots: Annotated[int | None, typer.Option(min=0, help="How many sandboxes to keep ready.")] = None,
    pool: Annotated[
        bool | None, typer.Option("--pool/--no-pool", help="Make a storage pool where files cannot share blocks, or never ask for one.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when it is ready and leave it running.")] = False,
) -> None:
    """Start PandaStack on this machine."""
    require_server("pandastack.standalone")
    options = {"--port": port, "--host": host, "--data-dir": data_dir, "--slots": slots}
    arguments = ["up", *(text for name, value in options.items() if value is not None for text in (name, str(value)))]
    arguments += [] if pool is None else ["--pool" if pool else "--no-pool"]
    if not detach:
        replace_with("pandastack.standalone", arguments)
    _detach(arguments)


def _detach(arguments: list[str]) -> None:
    """Start it apart from this terminal and wait for the line that says it is ready."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "pandastack"
    state.mkdir(parents=True, exist_ok=True)
    # Files and not a pipe: the server goes on writing when nobody reads any more.
    ready, log = state / "up.out", state / "up.log"
    with ready.open("wb") as first, log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "pandastack.standalone", *arguments],
            stdin=subprocess.DEVNULL, stdout=first, stderr=output, start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + READY_WITHIN_S
    while child.poll() is None and time.monotonic() < end:
        if b"\n" in (line := ready.read_bytes()):
            print(console.clean(line.decode("utf-8", "replace").rstrip("\n")))
            console.say(f"process {child.pid}, log {log}; stop it with `pandastack down`")
            return
        time.sleep(0.05)
    if child.poll() is None:
        console.fail(f"the server was not ready within {READY_WITHIN_S:.0f} s and goes on starting (process {child.pid})", f"look at {log}")
    words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    console.fail("the server did not start" + (f": {words[-1]}" if words else ""), f"look at {log}")


def down(data_dir: Annotated[Path | None, typer.Option(help="Which server (default: the one started last).")] = None) -> None:
    """Stop PandaStack on this machine. Persistent sandboxes are saved, others run on; the next `up` has them all again."""
    require_server("pandastack.standalone")
    replace_with("pandastack.standalone", ["down", *([] if data_dir is None else ["--data-dir", str(data_dir)])])


def setup(update: Annotated[bool, typer.Option("--update", help="Also fetch a newer guest kernel; the next `up` has it.")] = False) -> None:
    """Fetch what this machine needs and does not have, such as runsc, into PandaStack's own folder."""
    require_server("pandastack.host")
    replace_with("pandastack.host", ["setup", *(["--update"] if update else [])])


def doctor(
    as_json: console.Json = False,
    security: Annotated[bool, typer.Option("--security", help="The checklist for running strangers' code, instead.")] = False,
) -> None:
    """What this machine can run, and what to change. Exit code 1 where it cannot run sandboxes, or the checklist fails."""
    require_server("pandastack.host")
    begun = time.monotonic()
    command = [sys.executable, "-m", "pandastack.host", "doctor", "--json", *(["--security"] if security else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
        runs = bool(report["checks"]) and (done.returncode == 0 if security else report["auto"] is not None)
    except (ValueError, KeyError, TypeError):
        console.fail(f"the check of this machine ended with exit code {done.returncode} and no report")
    console.show(report, as_json, lambda: _show_checks(report) if security else _show_report(report, time.monotonic() - begun))
    if not runs:
        raise typer.Exit(1)


def _show_checks(report: dict[str, Any]) -> None:
    words = {True: "ok", False: "no", None: "?"}
    checks = [
        (check["name"], words.get(check["ok"], "?"), check.get("detail"), None if check["ok"] else check.get("hint"))
        for check in report["checks"]
    ]
    console.table(("CHECK", "STATE", "DETAIL", "WHAT TO DO"), checks)


def _show_report(report: dict[str, Any], seconds: float) -> None:
    _show_checks(report)
    runtimes = [
        (
            "yes" if item["works"] else "no", item["name"], item.get("version"), item.get("isolation"),
            item.get("acceleration") if item["works"] else None, item.get("reason"), None if item["works"] else item.get("hint"),
        )
        for item in report.get("runtimes", [])
    ]  # fmt: skip
    print()
    console.table(("WORKS", "RUNTIME", "VERSION", "ISOLATION", "ACCELERATION", "REASON", "WHAT TO DO"), runtimes)
    print()
    chosen = report["auto"] or "none"
    print(f"chosen runtime: {console.clean(chosen)} ({console.clean(report.get('auto_reason', ''))}); checked in {seconds:.1f} s")


def bench(ctx: typer.Context) -> None:
    """Measure this installation; `pandastack bench --help` lists the measurements."""
    require_server("pandastack.bench")
    replace_with("pandastack.bench", list(ctx.args))
