"""From nothing to code running in a sandbox, with the time of each step: what `make demo` runs.

It starts a server of its own on a free port with its own data directory, uses only the public SDK and CLI, and leaves
nothing behind. What is slow the first time (the template) is cached; a second run takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from pandastack import Client, PandastackError, Sandbox

TEMPLATE = "code-interpreter"
console = Console()
steps: list[tuple[str, float, str]] = []


@contextlib.contextmanager
def step(name: str) -> Iterator[list[str]]:
    """Times a step; what it appends is shown beside the time."""
    note: list[str] = []
    started = time.perf_counter()
    yield note
    steps.append((name, time.perf_counter() - started, " ".join(note)))


@contextlib.contextmanager
def server(work: Path) -> Iterator[dict[str, str]]:
    """A server of this demo's own; stopped, and its sandboxes deleted, in the end."""
    ready = work / "ready.json"
    # A configuration folder of its own: a server that you run must stay the one your SDK finds.
    environment = {**os.environ, "XDG_CONFIG_HOME": str(work / "config")}
    command = [sys.executable, "-m", "pandastack.standalone", "up", "--port", "0", "--data-dir", str(work / "data"), "--slots", "2"]
    process = subprocess.Popen([*command, "--ready-file", str(ready)], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not ready.exists():
            if process.poll() is not None:
                raise SystemExit("the server did not start; the line above says why")
            if time.monotonic() > deadline:
                raise SystemExit("the server was not ready within 300 s")
            time.sleep(0.02)
        yield json.loads(ready.read_text())
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def bake(client: Client) -> None:
    """Prepare the template; only the first time takes long, and then it says what it does."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"preparing template {TEMPLATE}", total=None)
        for event in client.templates.bake(TEMPLATE):
            progress.update(task, description=event.message, completed=event.done or 0, total=event.total)


def show(sandbox: Sandbox) -> None:
    with step("first command"):
        console.print(f"  $ uname -a\n  {sandbox.exec('uname -a', check=True).stdout.strip()}")
    with step("Python with numpy"):
        code = "import numpy as np; a = np.arange(12).reshape(3, 4); print('sum', a.sum(), 'mean', a.mean(), 'shape', a.shape)"
        result = sandbox.run_code(code)
        console.print(f"  {result.stdout.strip()}")
        if result.exit_code != 0:
            raise SystemExit(result.stderr)
    with step("live output of a command") as note:
        started = time.perf_counter()
        with sandbox.stream("for i in 1 2 3; do echo line $i; sleep 0.3; done") as lines:
            for event in lines:
                console.print(f"  {time.perf_counter() - started:4.1f} s  {event.text.strip()}")
        note.append(f"exit code {lines.exit_code}")
    with step("write and read a file"):
        content = os.urandom(1 << 20)
        sandbox.filesystem.write("/work/data.bin", content)
        if sandbox.filesystem.read("/work/data.bin") != content:
            raise SystemExit("the file came back different")
    with step("background process, then stop it") as note:
        process = sandbox.processes.start("while true; do date; sleep 0.1; done")
        time.sleep(0.3)
        process.kill()
        code = process.wait(timeout=10)
        note.append(f"exit code {code}")


def main() -> int:
    # Ended from outside, it must still take its server and sandbox with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="pandastack-demo-") as folder:
        with step("start a server") as note:
            running = contextlib.ExitStack()
            local = running.enter_context(server(Path(folder)))
            note.append(local["api_url"])
        with running, Client(api_url=local["api_url"], api_key=local["token"]) as client:
            with step(f"prepare template {TEMPLATE}"):
                bake(client)
            with step("create a sandbox") as note:
                sandbox = client.sandboxes.create(TEMPLATE)
                note.append(f"{sandbox.runtime}, {sandbox.memory_mb} MiB")
            try:
                show(sandbox)
            finally:
                with step("delete the sandbox"):
                    sandbox.kill()
    table = Table("step", "time", "", title="What each step took")
    for name, seconds, note in steps:
        table.add_row(name, f"{seconds * 1000:8.0f} ms" if seconds < 10 else f"{seconds:8.1f} s ", note)
    console.print(table)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PandastackError as error:
        console.print(f"[red]{error}[/red]")
        sys.exit(1)
