"""Who is asking: API keys, scopes and tenants. Called by every route, and by `up` for the first key.

A key is `pds_`, 8 hex characters that name it, and 48 that are secret (192 random bits). The store holds its SHA-256: a
slow hash would add nothing to that much randomness and would let strangers burn our processor. Keys that were seen are
kept in memory under their hash, so a request costs no SQL; revoking takes them out before the answer is given. Streams
ask `is_live` as they go, so they end within seconds of their key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

from pandastack.control.store import Store
from pandastack.control.store.tokens import TokenRow
from pandastack.errors import AuthError, PermissionDenied, TokenNotFound
from pandastack.wire.ids import TenantId

DEFAULT_TENANT = "default"
CACHED_KEYS = 10_000
_KEY = re.compile(r"pds_[0-9a-f]{56}")
_PREFIX = re.compile(r"pds_[0-9a-f]{8}")
_RANK = {"read": 1, "write": 2, "admin": 3}


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The one behind a request. `rank` is the highest of the key's scopes: read < write < admin."""

    tenant: TenantId
    prefix: str
    scopes: tuple[str, ...]
    rank: int
    expires_us: int | None

    def may(self, scope: str) -> bool:
        return self.rank >= _RANK[scope]


def _caller(row: TokenRow) -> Caller:
    rank = max((_RANK.get(scope, 0) for scope in row.scopes), default=0)
    return Caller(tenant=row.tenant_id, prefix=row.prefix, scopes=row.scopes, rank=rank, expires_us=row.expires_us)


def _now_us() -> int:
    return time.time_ns() // 1000


class Keys:
    """The keys of all tenants. One per process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[bytes, Caller] = OrderedDict()
        self._revoked: set[str] = set()
        self._used_us: dict[str, int] = {}

    async def authenticate(self, key: str) -> Caller:
        """The caller a key stands for. Raises AuthError, with one text whatever is wrong with it."""
        if _KEY.fullmatch(key) is None:
            raise _unauthorized()
        digest = hashlib.sha256(key.encode("ascii")).digest()
        caller = self._known.get(digest)
        if caller is None:
            row = await self._store.tokens.by_prefix_of_any_tenant(key[:12])
            # An absent row is compared as well, with a hash nothing has, so that both answers take the same time.
            if not hmac.compare_digest(row.hash if row is not None else bytes(32), digest) or row is None:
                raise _unauthorized()
            caller = _caller(row)
            if self._live(caller):
                self._known[digest] = caller
                if len(self._known) > CACHED_KEYS:
                    self._known.popitem(last=False)
        if not self._live(caller):
            self._known.pop(digest, None)
            raise _unauthorized()
        self._used_us[caller.prefix] = _now_us()
        return caller

    def is_live(self, caller: Caller) -> bool:
        """False once the key was revoked or has expired; costs next to nothing."""
        return self._live(caller)

    def _live(self, caller: Caller) -> bool:
        # A revocation may happen while a lookup is under way; the set outlasts what that lookup found.
        if caller.prefix in self._revoked:
            return False
        return caller.expires_us is None or _now_us() < caller.expires_us

    async def create(self, caller: Caller, *, label: str, scopes: list[str] | None, expires_in_days: int | None) -> tuple[str, TokenRow]:
        """A new key for the caller's tenant: never more scopes, and never a longer life, than the key that asks."""
        wanted = tuple(sorted(set(scopes or caller.scopes), key=lambda scope: _RANK[scope]))
        if any(_RANK[scope] > caller.rank for scope in wanted):
            raise PermissionDenied("a key cannot make one with more scopes than it has", field="scopes")
        now_us = _now_us()
        ends = [caller.expires_us] if caller.expires_us is not None else []
        if expires_in_days is not None:
            ends.append(now_us + expires_in_days * 86_400_000_000)
        return await mint(self._store, caller.tenant, label=label, scopes=wanted, expires_us=min(ends, default=None))

    async def list(self, caller: Caller) -> list[TokenRow]:
        return await self._store.tokens.list(caller.tenant)

    async def revoke(self, caller: Caller, prefix: str) -> None:
        """Effective before this returns. A key may end itself and those that can do no more than it can."""
        row = await self._store.tokens.find(caller.tenant, prefix) if _PREFIX.fullmatch(prefix) else None
        if row is None:
            raise TokenNotFound("no such token")
        if _caller(row).rank > caller.rank:
            raise PermissionDenied("a key cannot revoke one with more scopes than it has")
        if not await self._store.tokens.delete(caller.tenant, prefix):
            raise TokenNotFound("no such token")
        self._revoked.add(prefix)
        for digest in [digest for digest, known in self._known.items() if known.prefix == prefix]:
            del self._known[digest]

    async def flush(self) -> None:
        """Write when keys were last used; called now and then, and at the end."""
        used, self._used_us = self._used_us, {}
        await self._store.tokens.touch_of_any_tenant(used)


def _unauthorized() -> AuthError:
    return AuthError("unauthorized", detail="give a valid API key as `Authorization: Bearer pds_...`")


async def mint(
    store: Store, tenant: TenantId, *, label: str, scopes: tuple[str, ...], expires_us: int | None = None
) -> tuple[str, TokenRow]:
    """Make and store a key; the key itself is in the first half of the answer and nowhere else."""
    key = f"pds_{secrets.token_hex(28)}"
    row = TokenRow(
        prefix=key[:12],
        tenant_id=tenant,
        hash=hashlib.sha256(key.encode("ascii")).digest(),
        label=label,
        scopes=scopes,
        created_us=_now_us(),
        expires_us=expires_us,
    )
    await store.tokens.insert(tenant, row)
    return key, row


async def bootstrap(
    store: Store, *, tenant_name: str = DEFAULT_TENANT, label: str = "first key", scopes: tuple[str, ...] = ("admin",)
) -> str:
    """A key for the tenant called `tenant_name`, which is made if need be. `up` calls this where it has no key yet."""
    tenant = await store.tenants.ensure(tenant_name)
    key, _row = await mint(store, tenant, label=label, scopes=scopes)
    return key
