"""How the commands speak: tables for people, JSON for programs, errors in one sentence on stderr.

Everything slow to import (the SDK, tables) is imported where it is used, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from pandastack.sdk.client import Client
    from pandastack.sdk.results import OutputEvent
    from pandastack.sdk.sandboxes import Sandbox

TIMED_OUT = 124
INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Metadata = Annotated[list[str] | None, typer.Option("--metadata", "-m", metavar="KEY=VALUE", help="May be repeated.")]
Isolation = Annotated[str, typer.Option(help="auto (the strongest that works there), microvm (a kernel of its own), gvisor, or qemu.")]
SandboxId = Annotated[str, typer.Argument(metavar="SANDBOX", help="The id of a sandbox.")]


class Group(TyperGroup):
    """Turns every expected error into a sentence and an exit code: 1, 124 (time limit), 130 (Ctrl-C); usage errors are 2."""

    def invoke(self, ctx: Any) -> Any:
        from pandastack import errors

        try:
            return super().invoke(ctx)
        except errors.SandboxTimeout as error:
            say_error(error.message, error.hint, error.request_id)
            raise typer.Exit(TIMED_OUT) from None
        except errors.PandastackError as error:
            say_error(error.message, error.hint, error.request_id)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            say_error(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), None)
        except UnicodeError as error:
            say_error(f"this is not UTF-8 text: {error}", None)
        raise typer.Exit(1)


def group(help: str) -> typer.Typer:
    # Plain help: the decorated one more than doubles the time that `--help` takes.
    return typer.Typer(
        cls=Group, help=help, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None
    )


@contextmanager
def client() -> Iterator[Client]:
    from pandastack.sdk.client import Client

    try:
        made = Client()
    except ValueError as error:
        fail(str(error))
    with made:
        yield made


@contextmanager
def sandbox(sandbox_id: str) -> Iterator[Sandbox]:
    """A client, and a handle on the sandbox."""
    with client() as made:
        yield handle(made, sandbox_id)


def handle(client: Client, sandbox_id: str) -> Sandbox:
    """A sandbox without asking for it first: the call that follows says whether it exists."""
    from pandastack.sdk.sandboxes import Sandbox
    from pandastack.wire.sandboxes import SandboxView

    return Sandbox(client, SandboxView(id=sandbox_id))


def say(text: str) -> None:
    """A remark for people; stdout stays clean for what was asked for."""
    print(clean(text), file=sys.stderr)


def say_error(message: str, hint: str | None, request_id: str | None = None) -> None:
    say(f"Error: {message.rstrip('.')}." + (f" [request {request_id}]" if request_id else ""))
    if hint:
        say(f"Hint: {hint.rstrip('.')}.")


def fail(message: str, hint: str | None = None, code: int = 1) -> NoReturn:
    say_error(message, hint)
    raise typer.Exit(code)


def usage(message: str) -> NoReturn:
    raise typer.BadParameter(message)


def clean(text: object) -> str:
    """Text that cannot command a terminal: names and messages may come from code that nobody trusts."""
    shown = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1] for character in shown)


def emit_json(data: object) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=True, default=str))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns. In a pipe they are as wide as they need to be, so that no id is ever cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        shown.add_row(*(Text("-" if cell in (None, "") else clean(cell).replace("\n", " ")) for cell in row))
    Console(width=None if sys.stdout.isatty() else 10_000, soft_wrap=not sys.stdout.isatty()).print(shown)


def facts(pairs: dict[str, object]) -> None:
    """One thing, a line per fact; empty ones are left out."""
    shown = {name: value for name, value in pairs.items() if value not in (None, "", [], {})}
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        text = ", ".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, dict) else clean(value)
        print(f"{name:<{width}}  {clean(text)}")


def show(data: object, as_json: bool, people: Callable[[], None]) -> None:
    if as_json:
        emit_json(data)
    else:
        people()


def each(ids: Sequence[str], action: Callable[[str], dict[str, Any]], undone: dict[str, Any], as_json: bool) -> None:
    """Do it with every id and print the ids where it was done; JSON has the facts that `action` gives, or `undone`.

    One that does not exist or does not allow it is told, and does not keep the others from it; the exit code is 1 then.
    """
    from pandastack import errors

    results: list[dict[str, Any]] = []
    done: list[str] = []
    for one in ids:
        try:
            results.append({"id": one, **action(one)})
            done.append(one)
        except (errors.NotFoundError, errors.Conflict) as error:
            say_error(f"{one}: {error.message}", error.hint)
            results.append({"id": one, **undone})
    show(results, as_json, lambda: print(*done, sep="\n", end="\n" * bool(done)))
    if len(done) < len(results):
        raise typer.Exit(1)


def write_event(event: OutputEvent) -> None:
    """A piece of a command's output on the stream it was written to; a gap before it is told on stderr."""
    if event.skipped:
        say(f"[... {event.skipped} bytes of {event.channel} are missing here ...]")
    write_bytes(event.data, to_stderr=event.channel == "stderr")


def write_bytes(data: bytes, *, to_stderr: bool = False) -> None:
    """Exactly these bytes, at once."""
    stream = sys.stderr if to_stderr else sys.stdout
    stream.buffer.write(data)
    stream.buffer.flush()


def pairs(values: list[str] | None, name: str) -> dict[str, str]:
    """`KEY=VALUE` options as a mapping."""
    found = {}
    for value in values or []:
        key, separator, text = value.partition("=")
        if not separator or not key:
            usage(f"{name} takes KEY=VALUE, not {value!r}")
        found[key] = text
    return found


def plain(thing: Any) -> Any:
    """A result of the SDK as JSON: models, frozen classes, lists of them. Bytes outside UTF-8 are shown as U+FFFD."""
    import dataclasses

    from pydantic import BaseModel

    if isinstance(thing, BaseModel):
        return thing.model_dump(mode="json")
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: plain(getattr(thing, field.name)) for field in dataclasses.fields(thing)}
    if isinstance(thing, (list, tuple)):
        return [plain(item) for item in thing]
    return thing.decode("utf-8", "replace") if isinstance(thing, bytes) else thing
