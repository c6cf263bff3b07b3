"""State: snapshots, where a sandbox came from, until when it is kept awake; and keys that stand for several sandboxes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "snapshots",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("host_id", sa.String(64), nullable=False),
        sa.Column("sandbox_id", sa.String(36), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("status_reason", sa.String(256)),
        sa.Column("template", sa.String(64), nullable=False),
        sa.Column("template_actual", sa.String(64)),
        sa.Column("runtime", sa.String(32)),
        sa.Column("cpu", sa.Float, nullable=False),
        sa.Column("memory_mb", sa.Integer, nullable=False),
        sa.Column("disk_mb", sa.Integer, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_snapshots"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_snapshots_tenants"),
    )
    op.create_index("ix_snapshots_status", "snapshots", ["status"])
    op.create_index("ix_snapshots_tenant_newest", "snapshots", ["tenant_id", "created_us", "id"])
    op.add_column("sandboxes", sa.Column("from_snapshot", sa.String(36)))
    op.add_column("sandboxes", sa.Column("fork_parent_id", sa.String(36)))
    op.add_column("sandboxes", sa.Column("fork_tree_id", sa.String(36)))
    op.add_column("sandboxes", sa.Column("keep_awake_us", sa.BigInteger))
    op.create_index("ix_sandboxes_fork_tree_id", "sandboxes", ["fork_tree_id"])
    op.create_table(
        "idempotent_sandboxes",
        sa.Column("sandbox_id", sa.String(36), nullable=False),
        sa.Column("tenant_id", sa.String(64), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.PrimaryKeyConstraint("sandbox_id", name="pk_idempotent_sandboxes"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "key"],
            ["idempotent_creates.tenant_id", "idempotent_creates.key"],
            name="fk_idempotent_sandboxes_idempotent_creates",
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_idempotent_sandboxes_key", "idempotent_sandboxes", ["tenant_id", "key"])
    # A sandbox that is gone frees nothing any more, so only those that are there are carried over.
    op.execute(
        "INSERT INTO idempotent_sandboxes (sandbox_id, tenant_id, key) "
        "SELECT c.sandbox_id, c.tenant_id, c.key FROM idempotent_creates AS c JOIN sandboxes AS s ON s.id = c.sandbox_id"
    )
    with op.batch_alter_table("idempotent_creates") as table:
        table.drop_constraint("uq_idempotent_creates_sandbox_id", type_="unique")
        table.drop_column("sandbox_id")


def downgrade() -> None:
    raise NotImplementedError("restore the backup that was made before the upgrade")
