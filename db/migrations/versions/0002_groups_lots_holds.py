"""Groups, lots, holds, checkpoints, verifications

Revision ID: 0002
Revises: 0001
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "hold",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("entity_type", sa.Text(), nullable=False),
        sa.Column("entity_id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("asset_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("amount", sa.Numeric(), nullable=False),
        sa.Column("remaining", sa.Numeric(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("reference_id", sa.Text(), nullable=True),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("on_expiry", sa.Text(), nullable=True),
        sa.Column("carrier", sa.Text(), nullable=True),
        sa.Column("entry_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("hold_pkey")),
    )
    op.create_index(
        op.f("hold_organization_id_entity_id_created_at_id_idx"),
        "hold",
        ["organization_id", "entity_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        "hold_active_idx",
        "hold",
        ["organization_id", "entity_id", "asset_id", "created_at", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'ACTIVE'"),
    )
    op.create_index(
        "hold_end_idx",
        "hold",
        ["organization_id", "program_id", "carrier", "expires_at", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'ACTIVE' and expires_at is not null"),
    )
    op.create_index(
        op.f("hold_organization_id_created_at_id_idx"), "hold", ["organization_id", "created_at", "id"], unique=False
    )
    op.create_index(
        "hold_reference_idx",
        "hold",
        ["organization_id", "reference_id", "created_at", "id"],
        unique=False,
        postgresql_where=sa.text("reference_id is not null"),
    )
    op.create_table(
        "hold_change",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("entry_id", sa.Uuid(), nullable=False),
        sa.Column("hold_id", sa.Uuid(), nullable=False),
        sa.Column("delta", sa.Numeric(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "entry_id", "hold_id", name=op.f("hold_change_pkey")),
    )
    op.create_index(
        op.f("hold_change_organization_id_hold_id_idx"), "hold_change", ["organization_id", "hold_id"], unique=False
    )
    op.create_table(
        "ledger_verification",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("entries_checked", sa.BigInteger(), nullable=False),
        sa.Column("head_sequence", sa.BigInteger(), nullable=False),
        sa.Column("first_invalid_entry_id", sa.Uuid(), nullable=True),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("ledger_verification_pkey")),
    )
    op.create_index(
        op.f("ledger_verification_organization_id_started_at_id_idx"),
        "ledger_verification",
        ["organization_id", "started_at", "id"],
        unique=False,
    )
    op.create_table(
        "lot",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("entity_type", sa.Text(), nullable=False),
        sa.Column("entity_id", sa.Uuid(), nullable=False),
        sa.Column("asset_id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("amount", sa.Numeric(), nullable=False),
        sa.Column("remaining", sa.Numeric(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("matures_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reference_id", sa.Text(), nullable=True),
        sa.Column("hold_id", sa.Uuid(), nullable=True),
        sa.Column("is_provisional", sa.Boolean(), nullable=False),
        sa.Column("entry_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("lot_pkey")),
    )
    op.create_index(
        "lot_expiry_idx",
        "lot",
        ["organization_id", "expires_at", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'AVAILABLE' and remaining > 0"),
    )
    op.create_index(
        "lot_fifo_idx",
        "lot",
        ["organization_id", "entity_id", "asset_id", "status", "created_at", "id"],
        unique=False,
        postgresql_where=sa.text("remaining > 0"),
    )
    op.create_index(
        "lot_hold_idx",
        "lot",
        ["organization_id", "hold_id"],
        unique=False,
        postgresql_where=sa.text("hold_id is not null"),
    )
    op.create_index(
        "lot_maturity_idx",
        "lot",
        ["organization_id", "matures_at", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'DEFERRED'"),
    )
    op.create_index(
        op.f("lot_organization_id_entity_id_asset_id_created_at_id_idx"),
        "lot",
        ["organization_id", "entity_id", "asset_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        "lot_reference_idx",
        "lot",
        ["organization_id", "entity_id", "asset_id", "reference_id"],
        unique=False,
        postgresql_where=sa.text("reference_id is not null"),
    )
    op.create_table(
        "lot_change",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("entry_id", sa.Uuid(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("lot_id", sa.Uuid(), nullable=False),
        sa.Column("delta", sa.Numeric(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "entry_id", "ordinal", name=op.f("lot_change_pkey")),
    )
    op.create_index(
        op.f("lot_change_organization_id_lot_id_idx"), "lot_change", ["organization_id", "lot_id"], unique=False
    )
    op.create_table(
        "system_checkpoint",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("account_id", sa.Uuid(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("balance", sa.Numeric(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "account_id", "sequence", name=op.f("system_checkpoint_pkey")),
    )
    op.create_table(
        "holder_group",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organization.id"], name=op.f("holder_group_organization_id_fkey")
        ),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("holder_group_pkey")),
    )
    op.create_index(
        op.f("holder_group_organization_id_created_at_id_idx"),
        "holder_group",
        ["organization_id", "created_at", "id"],
        unique=False,
    )
    op.create_table(
        "group_member",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("group_id", sa.Uuid(), nullable=False),
        sa.Column("participant_id", sa.Uuid(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("joined_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("left_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("changed_on_behalf_of", sa.Uuid(), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id", "group_id"],
            ["holder_group.organization_id", "holder_group.id"],
            name=op.f("group_member_organization_id_group_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["organization_id", "participant_id"],
            ["participant.organization_id", "participant.id"],
            name=op.f("group_member_organization_id_participant_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("organization_id", "group_id", "participant_id", name=op.f("group_member_pkey")),
    )
    op.create_index(
        op.f("group_member_organization_id_participant_id_idx"),
        "group_member",
        ["organization_id", "participant_id"],
        unique=False,
    )
    guards = (Path(__file__).parents[1] / "sql" / "0002_guards.sql").read_text()
    op.get_bind().execution_options(no_parameters=True).exec_driver_sql(guards)


def downgrade() -> None:
    raise NotImplementedError("a ledger is never rolled back: restore a backup instead")
