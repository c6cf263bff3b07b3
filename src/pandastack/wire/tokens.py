"""Who is asking, and API keys. A key is shown once, when it is made; only its hash is stored."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from pandastack.wire.sandboxes import Shape, View


class Me(View):
    user_id: str
    email: str | None = None
    current_org: str | None = None
    orgs: list[dict[str, Any]] = []
    auth_method: str = "api_key"
    role: str = "member"


class TokenCreate(Shape):
    """`scopes`: "read", "write" (includes read), "admin" (includes all, and other tenants' keys are still unseen)."""

    label: Annotated[str, StringConstraints(max_length=128)] = ""
    expires_in_days: Annotated[int, Field(ge=1, le=3650)] | None = None
    scopes: Annotated[list[Annotated[str, StringConstraints(pattern="^(read|write|admin)$")]], Field(min_length=1, max_length=3)] | None = (
        None
    )


class TokenView(View):
    prefix: str
    label: str
    created_at: str
    expires_at: str | None = None
    last_used_at: str | None = None
    scopes: list[str] = []


class TokenCreated(TokenView):
    """The only answer that ever holds the key."""

    token: str


class TokenList(View):
    items: list[TokenView]
