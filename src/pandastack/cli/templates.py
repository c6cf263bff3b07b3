"""`pandastack template ...`: the images that sandboxes start from."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from pandastack.cli import console
from pandastack.wire.isolation import AUTO

if TYPE_CHECKING:
    from pandastack.sdk.results import BakeProgress

app = console.group("List templates and make them ready.")

Name = Annotated[str, typer.Argument(metavar="TEMPLATE")]


@app.command("list")
def list_templates(as_json: console.Json = False) -> None:
    """Templates and how far this server is with them: only a ready one starts at full speed."""
    with console.client() as client:
        found = client.templates.list()
    rows = ((item.name, item.state, item.label or item.description, item.cpu, f"{item.memory_mb} MiB", item.note) for item in found)
    columns = ("NAME", "STATE", "DESCRIPTION", "CPU", "MEMORY", "NOTE")
    console.show(console.plain(found), as_json, lambda: console.table(columns, rows))


@app.command()
def get(name: Name, as_json: console.Json = False) -> None:
    """Everything about one template."""
    with console.client() as client:
        found = console.plain(client.templates.get(name))
    console.show(found, as_json, lambda: console.facts(found))


@app.command()
def bake(name: Name, isolation: console.Isolation = AUTO, as_json: console.Json = False) -> None:
    """Make a template ready; shows how far it is (JSON lines with --json)."""
    with console.client() as client:
        steps = client.templates.bake(name, isolation)
        if as_json:
            for step in steps:
                print(json.dumps(console.plain(step)), flush=True)
        elif sys.stderr.isatty():
            _bars(steps)
        else:
            for step in steps:
                console.say(f"{step.step}: {step.message}")
        template = client.templates.get(name)
    # The stream ended well, so it is ready where it was asked for; `state` is that of the runtime that `auto` means.
    state = template.state if isolation == AUTO else "ready"
    if as_json:
        print(json.dumps({"step": "done", "name": template.name, "state": state}), flush=True)
    else:
        print(f"{console.clean(template.name)} is {state}" + (f" for {console.clean(isolation)}" if isolation != AUTO else ""))


def _bars(steps: Iterator[BakeProgress]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}
        for step in steps:
            if step.step not in tasks:
                for other in tasks.values():
                    bars.update(other, total=1, completed=1)
                tasks[step.step] = bars.add_task("", total=None, count="")
            count = "" if step.done is None else f"{step.done}/{step.total} {step.unit}" if step.total else f"{step.done} {step.unit}"
            text = escape(console.clean(f"{step.step}: {step.message}"))
            bars.update(tasks[step.step], description=text, total=step.total, completed=step.done or 0, count=escape(console.clean(count)))
