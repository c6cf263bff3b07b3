"""The first schema: tenants, keys, sandboxes and their labels, idempotent creates."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
        sa.UniqueConstraint("name", name="uq_tenants_name"),
    )
    op.create_table(
        "tokens",
        sa.Column("prefix", sa.String(12), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("label", sa.String(128), nullable=False),
        sa.Column("scopes", sa.String(64), nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("expires_us", sa.BigInteger),
        sa.Column("last_used_us", sa.BigInteger),
        sa.PrimaryKeyConstraint("prefix", name="pk_tokens"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_tokens_tenants"),
    )
    op.create_index("ix_tokens_tenant_id", "tokens", ["tenant_id"])
    op.create_table(
        "sandboxes",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("host_id", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("status_reason", sa.String(256)),
        sa.Column("template", sa.String(64), nullable=False),
        sa.Column("template_actual", sa.String(64)),
        sa.Column("template_note", sa.Text),
        sa.Column("cpu", sa.Float, nullable=False),
        sa.Column("memory_mb", sa.Integer, nullable=False),
        sa.Column("disk_mb", sa.Integer, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("persistent", sa.Boolean, nullable=False),
        sa.Column("ttl_seconds", sa.Integer, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("failed_us", sa.BigInteger),
        sa.Column("boot_ms", sa.Integer),
        sa.Column("boot_mode", sa.String(32)),
        sa.Column("runtime", sa.String(32)),
        sa.Column("isolation", sa.String(128)),
        sa.PrimaryKeyConstraint("id", name="pk_sandboxes"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_sandboxes_tenants"),
    )
    op.create_index("ix_sandboxes_status", "sandboxes", ["status"])
    op.create_index("ix_sandboxes_tenant_newest", "sandboxes", ["tenant_id", "created_us", "id"])
    op.create_table(
        "sandbox_labels",
        sa.Column("sandbox_id", sa.String(36), nullable=False),
        sa.Column("key", sa.String(128), nullable=False),
        sa.Column("value", sa.String(1024), nullable=False),
        sa.PrimaryKeyConstraint("sandbox_id", "key", name="pk_sandbox_labels"),
        sa.ForeignKeyConstraint(["sandbox_id"], ["sandboxes.id"], name="fk_sandbox_labels_sandboxes", ondelete="CASCADE"),
    )
    op.create_table(
        "idempotent_creates",
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("request_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("sandbox_id", sa.String(36), nullable=False),
        sa.Column("response_status", sa.Integer),
        sa.Column("response_body", sa.LargeBinary),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "key", name="pk_idempotent_creates"),
        sa.UniqueConstraint("sandbox_id", name="uq_idempotent_creates_sandbox_id"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_idempotent_creates_tenants"),
    )
    op.create_index("ix_idempotent_creates_created_us", "idempotent_creates", ["created_us"])


def downgrade() -> None:
    raise NotImplementedError("restore the backup that was made before the upgrade")
