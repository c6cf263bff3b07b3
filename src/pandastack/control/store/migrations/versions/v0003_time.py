"""Time: why a snapshot was taken and of what it is the end, the checkpoints that a sandbox takes by itself."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("snapshots", sa.Column("cause", sa.String(16), nullable=False, server_default="request"))
    op.add_column("snapshots", sa.Column("label", sa.String(256), nullable=False, server_default=""))
    op.create_index("ix_snapshots_sandbox_id", "snapshots", ["sandbox_id"])
    op.add_column("sandboxes", sa.Column("checkpoints", sa.JSON))
    op.add_column("sandboxes", sa.Column("checkpoint_error", sa.String(512)))


def downgrade() -> None:
    raise NotImplementedError("restore the backup that was made before the upgrade")
