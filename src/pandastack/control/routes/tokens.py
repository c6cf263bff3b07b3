"""`/v1/me` and `/v1/me/tokens`: who am I, and API keys."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Response

from pandastack.control.parts import Parts
from pandastack.control.routes import answers
from pandastack.control.routes.requests import Body, Reader, Writer, parts
from pandastack.control.store.tokens import TokenRow
from pandastack.wire.tokens import Me, TokenCreate, TokenCreated, TokenList, TokenView

router = APIRouter(prefix="/v1/me", tags=["identity"])
Here = Annotated[Parts, Depends(parts)]


@router.get("", response_model=Me, operation_id="getMe")
async def me(caller: Reader) -> Response:
    role = "admin" if caller.may("admin") else "member"
    return answers.json(Me(user_id=caller.tenant, current_org=caller.tenant, orgs=[{"id": caller.tenant}], role=role))


@router.get("/tokens", response_model=TokenList, operation_id="listTokens")
async def list_all(here: Here, caller: Reader) -> Response:
    return answers.json(TokenList(items=[_view(row) for row in await here.keys.list(caller)]))


@router.post("/tokens", response_model=TokenCreated, operation_id="createToken")
async def create(here: Here, caller: Writer, body: Annotated[TokenCreate, Depends(Body(TokenCreate))]) -> Response:
    """The key is in this answer and can not be shown again."""
    key, row = await here.keys.create(caller, label=body.label, scopes=body.scopes, expires_in_days=body.expires_in_days)
    return answers.json(TokenCreated(token=key, **_view(row).model_dump()))


@router.delete("/tokens/{prefix}", status_code=204, operation_id="revokeToken")
async def revoke(here: Here, caller: Writer, prefix: str) -> Response:
    await here.keys.revoke(caller, prefix)
    return answers.empty()


def _view(row: TokenRow) -> TokenView:
    return TokenView(
        prefix=row.prefix,
        label=row.label,
        created_at=_time(row.created_us) or "",
        expires_at=_time(row.expires_us),
        last_used_at=_time(row.last_used_us),
        scopes=list(row.scopes),
    )


def _time(at_us: int | None) -> str | None:
    if at_us is None:
        return None
    return datetime.fromtimestamp(at_us / 1e6, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
