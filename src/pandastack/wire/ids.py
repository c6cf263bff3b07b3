"""One type per kind of id, and how ids look. Ids are random and name things; they are never credentials."""

from __future__ import annotations

import re
import secrets
import uuid
from typing import NewType

SandboxId = NewType("SandboxId", str)
HostId = NewType("HostId", str)
TenantId = NewType("TenantId", str)
TokenId = NewType("TokenId", str)
ProcessId = NewType("ProcessId", str)
SnapshotId = NewType("SnapshotId", str)

UUID_PATTERN = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
PROCESS_ID_PATTERN = r"^[a-z0-9][a-z0-9-]{0,63}$"
_UUID = re.compile(UUID_PATTERN)


def new_sandbox_id() -> SandboxId:
    """A lower-case UUID with 122 random bits."""
    return SandboxId(str(uuid.uuid4()))


def new_snapshot_id() -> SnapshotId:
    """As a sandbox's id."""
    return SnapshotId(str(uuid.uuid4()))


def new_process_id() -> ProcessId:
    """16 hex characters."""
    return ProcessId(secrets.token_hex(8))


def is_uuid(text: str) -> bool:
    """True for the one canonical spelling only, so that no two layers can read one text as two ids."""
    return _UUID.fullmatch(text) is not None
