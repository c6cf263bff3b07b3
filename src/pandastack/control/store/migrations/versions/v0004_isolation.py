"""Isolation: what runs the code of a sandbox, and whether it has a kernel of its own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sandboxes", sa.Column("acceleration", sa.String(16)))
    op.add_column("sandboxes", sa.Column("own_kernel", sa.Boolean, nullable=False, server_default=sa.false()))


def downgrade() -> None:
    raise NotImplementedError("restore the backup that was made before the upgrade")
