"""`client.tokens`: API keys. A key is shown once, when it is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pandastack.sdk.calls import tokens as calls
from pandastack.sdk.results import Token

if TYPE_CHECKING:
    from pandastack.sdk.client import AsyncClient, Client


class Tokens:
    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> list[Token]:
        return self._client._call(calls.list_tokens())

    def create(self, name: str, expires_in_days: int | None = None, *, scopes: Sequence[str] | None = None) -> Token:
        """`scopes` are of "read", "write" and "admin"; left out, the new key may do what yours may."""
        return self._client._call(calls.create(name, expires_in_days, scopes))

    def revoke(self, prefix: str) -> None:
        """`prefix` is the beginning of the key, as `list` shows it. Raises TokenNotFound."""
        self._client._call(calls.revoke(prefix))


class AsyncTokens:
    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[Token]:
        return await self._client._call(calls.list_tokens())

    async def create(self, name: str, expires_in_days: int | None = None, *, scopes: Sequence[str] | None = None) -> Token:
        """`scopes` are of "read", "write" and "admin"; left out, the new key may do what yours may."""
        return await self._client._call(calls.create(name, expires_in_days, scopes))

    async def revoke(self, prefix: str) -> None:
        """`prefix` is the beginning of the key, as `list` shows it. Raises TokenNotFound."""
        await self._client._call(calls.revoke(prefix))
