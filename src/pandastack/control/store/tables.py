"""The tables, in SQL that SQLite and Postgres both speak. Changing one needs a migration beside it.

Times are whole microseconds since 1970 (`*_us`): they order a list without ties and have no time zone.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    false,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("created_us", BigInteger, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("prefix", String(12), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False, index=True),
    Column("hash", LargeBinary(32), nullable=False),
    Column("label", String(128), nullable=False),
    Column("scopes", String(64), nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger),
    Column("last_used_us", BigInteger),
)

sandboxes = Table(
    "sandboxes",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("host_id", String(64), nullable=False),
    Column("status", String(16), nullable=False, index=True),
    Column("status_reason", String(256)),
    Column("template", String(64), nullable=False),
    Column("template_actual", String(64)),
    Column("template_note", Text),
    Column("cpu", Float, nullable=False),
    Column("memory_mb", Integer, nullable=False),
    Column("disk_mb", Integer, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("persistent", Boolean, nullable=False),
    Column("ttl_seconds", Integer, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("failed_us", BigInteger),
    Column("boot_ms", Integer),
    Column("boot_mode", String(32)),
    Column("runtime", String(32)),
    Column("isolation", String(128)),
    Column("acceleration", String(16)),
    Column("own_kernel", Boolean, nullable=False, server_default=false()),
    # Where it came from. No foreign keys: the snapshot and the parent may be gone while it lives on.
    Column("from_snapshot", String(36)),
    Column("fork_parent_id", String(36)),
    Column("fork_tree_id", String(36), index=True),
    Column("keep_awake_us", BigInteger),
    # A `wire.sandboxes.Checkpoints`; null where it takes none by itself. The error is that of the last try, if that failed.
    Column("checkpoints", JSON(none_as_null=True)),
    Column("checkpoint_error", String(512)),
    Index("ix_sandboxes_tenant_newest", "tenant_id", "created_us", "id"),
)

# The metadata a second time, one row per pair, so that a filtered list is an index search on both databases.
labels = Table(
    "sandbox_labels",
    metadata,
    Column("sandbox_id", ForeignKey("sandboxes.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(128), primary_key=True),
    Column("value", String(1024), nullable=False),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("host_id", String(64), nullable=False),
    # No foreign key: a snapshot that was asked for outlives its sandbox.
    Column("sandbox_id", String(36), nullable=False, index=True),
    Column("status", String(16), nullable=False, index=True),
    Column("status_reason", String(256)),
    Column("template", String(64), nullable=False),
    Column("template_actual", String(64)),
    Column("runtime", String(32)),
    Column("cpu", Float, nullable=False),
    Column("memory_mb", Integer, nullable=False),
    Column("disk_mb", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("cause", String(16), nullable=False, server_default="request"),
    Column("label", String(256), nullable=False, server_default=""),
    Index("ix_snapshots_tenant_newest", "tenant_id", "created_us", "id"),
)

creates = Table(
    "idempotent_creates",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("request_hash", LargeBinary(32), nullable=False),
    # Null while the create is in progress; a start that finds such a row undoes the create and frees the key.
    Column("response_status", Integer),
    Column("response_body", LargeBinary),
    Column("created_us", BigInteger, nullable=False, index=True),
)

# What a key stands for: the sandbox of a create, every child of a fork, or (by its own id) a snapshot. Rows leave with it (no
# foreign key, because an answer outlives it); the last one to leave frees a key that has no answer yet.
created = Table(
    "idempotent_sandboxes",
    metadata,
    Column("sandbox_id", String(36), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("key", String(255), nullable=False),
    ForeignKeyConstraint(["tenant_id", "key"], ["idempotent_creates.tenant_id", "idempotent_creates.key"], ondelete="CASCADE"),
    Index("ix_idempotent_sandboxes_key", "tenant_id", "key"),
)
