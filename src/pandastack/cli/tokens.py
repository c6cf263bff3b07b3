"""`pandastack token ...`: API keys."""

from __future__ import annotations

from typing import Annotated

import typer

from pandastack.cli import console

app = console.group("Create, list and revoke API keys.")


@app.command()
def create(
    label: Annotated[str, typer.Argument(help="What it is for.")],
    expires_in_days: Annotated[int | None, typer.Option(min=1)] = None,
    scope: Annotated[list[str] | None, typer.Option(help="read, write or admin; may be repeated (default: yours).")] = None,
    as_json: console.Json = False,
) -> None:
    """Make a key. It is printed once and never again."""
    with console.client() as client:
        token = client.tokens.create(label, expires_in_days, scopes=scope or None)
    console.show(console.plain(token), as_json, lambda: print(token.token))
    if not as_json:
        console.say("Keep this key: it cannot be shown again.")


@app.command("list")
def list_tokens(as_json: console.Json = False) -> None:
    """Keys by their beginnings; the keys themselves are not stored."""
    with console.client() as client:
        found = client.tokens.list()
    rows = ((token.prefix, token.label, ",".join(token.scopes), token.created_at, token.expires_at, token.last_used_at) for token in found)
    columns = ("PREFIX", "LABEL", "SCOPES", "CREATED", "EXPIRES", "LAST USED")
    data = [{key: value for key, value in console.plain(token).items() if key != "token"} for token in found]
    console.show(data, as_json, lambda: console.table(columns, rows))


@app.command()
def revoke(
    prefix: Annotated[str, typer.Argument(help="The beginning of the key, as `list` shows it.")], as_json: console.Json = False
) -> None:
    """End a key at once."""
    with console.client() as client:
        client.tokens.revoke(prefix)
    if as_json:
        console.emit_json({"prefix": prefix, "revoked": True})
