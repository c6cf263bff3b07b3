"""Calls about who is asking, and about API keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from pandastack.sdk.calls.call import Answer, Call, build, items_of, nothing, parse, segment, validated
from pandastack.sdk.results import Me, Token
from pandastack.wire import tokens as wire


def me() -> Call[Me]:
    return Call(build("GET", "/me"), lambda answer: cast(Me, parse(wire.Me, answer.json()).model_dump()))


def list_tokens() -> Call[list[Token]]:
    return Call(build("GET", "/me/tokens"), lambda answer: [_token(parse(wire.TokenView, item)) for item in items_of(answer)])


def create(name: str, expires_in_days: int | None, scopes: Sequence[str] | None) -> Call[Token]:
    body = validated(wire.TokenCreate, label=name, expires_in_days=expires_in_days, scopes=list(scopes) if scopes else None)
    return Call(build("POST", "/me/tokens", body=body), _read_created)


def revoke(prefix: str) -> Call[None]:
    return Call(build("DELETE", f"/me/tokens/{segment(prefix)}"), nothing)


def _read_created(answer: Answer) -> Token:
    created = parse(wire.TokenCreated, answer.json())
    return _token(created, created.token)


def _token(view: Any, token: str | None = None) -> Token:
    return Token(
        prefix=view.prefix, name=view.label, token=token, created_at=view.created_at,
        expires_at=view.expires_at, last_used_at=view.last_used_at, scopes=tuple(view.scopes),
    )  # fmt: skip
