"""The first tables: organizations, resources, state, events, the ledger.

Revision ID: 0001
Revises:
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ENSURE_APPLICATION_ROLE = """
do $$ begin
    if not exists (select from pg_roles where rolname = 'scrip_app') then
        create role scrip_app nologin;
    end if;
end $$
"""


def upgrade() -> None:
    op.execute(ENSURE_APPLICATION_ROLE)
    op.create_table(
        "account",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("entity_type", sa.Text(), nullable=False),
        sa.Column("entity_id", sa.Uuid(), nullable=True),
        sa.Column("asset_id", sa.Uuid(), nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("account_pkey")),
    )
    op.create_index(
        "account_coordinates_key",
        "account",
        ["organization_id", "entity_id", "asset_id", "bucket", "entity_type"],
        unique=True,
        postgresql_nulls_not_distinct=True,
    )
    op.create_table(
        "attribute",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("entity_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "entity_id", "key", name=op.f("attribute_pkey")),
    )
    op.create_table(
        "chain_head",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", name=op.f("chain_head_pkey")),
    )
    op.create_table(
        "counter",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("entity_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Numeric(precision=38, scale=18), nullable=False),
        sa.Column("reset_after", sa.Text(), nullable=True),
        sa.Column("last_reset_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "entity_id", "key", name=op.f("counter_pkey")),
    )
    op.create_table(
        "enrollment",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("participant_id", sa.Uuid(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "program_id", "participant_id", name=op.f("enrollment_pkey")),
    )
    op.create_index(
        op.f("enrollment_organization_id_participant_id_idx"),
        "enrollment",
        ["organization_id", "participant_id"],
        unique=False,
    )
    op.create_table(
        "event",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("participant_id", sa.Uuid(), nullable=True),
        sa.Column("external_id", sa.Text(), nullable=True),
        sa.Column("recipient_id", sa.Uuid(), nullable=True),
        sa.Column("recipient_external_id", sa.Text(), nullable=True),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("payload_hash", sa.LargeBinary(), nullable=False),
        sa.Column("event_type", sa.Text(), nullable=False),
        sa.Column("event_data", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("event_timestamp", sa.DateTime(timezone=True), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("processed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("depth", sa.SmallInteger(), nullable=False),
        sa.Column("attempts", sa.SmallInteger(), nullable=False),
        sa.Column("starts", sa.SmallInteger(), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("evaluations", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("matched_rule_ids", sa.ARRAY(sa.Uuid()), nullable=True),
        sa.Column("api_key_id", sa.Uuid(), nullable=True),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("event_pkey")),
    )
    op.create_index(
        "event_failed_idx",
        "event",
        ["organization_id", "program_id", "created_at", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'FAILED'"),
    )
    op.create_index(
        op.f("event_organization_id_created_at_id_idx"),
        "event",
        ["organization_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        op.f("event_organization_id_program_id_created_at_id_idx"),
        "event",
        ["organization_id", "program_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        op.f("event_organization_id_external_id_created_at_id_idx"),
        "event",
        ["organization_id", "external_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        op.f("event_organization_id_participant_id_created_at_id_idx"),
        "event",
        ["organization_id", "participant_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        "event_ready_idx",
        "event",
        ["organization_id", "program_id", "seq"],
        unique=False,
        postgresql_where=sa.text("status in ('RECEIVED', 'PENDING') and due_at is null"),
    )
    op.create_index(
        "event_waiting_idx",
        "event",
        ["organization_id", "program_id", "due_at", "seq"],
        unique=False,
        postgresql_where=sa.text("status in ('RECEIVED', 'PENDING') and due_at is not null"),
    )
    op.create_table(
        "idempotency_key",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("payload_hash", sa.LargeBinary(), nullable=False),
        sa.Column("result", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "program_id", "operation", "key", name=op.f("idempotency_key_pkey")),
    )
    op.create_table(
        "journal_entry",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("action_type", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("event_id", sa.Uuid(), nullable=True),
        sa.Column("rule_id", sa.Uuid(), nullable=True),
        sa.Column("reference_id", sa.Text(), nullable=True),
        sa.Column("api_key_id", sa.Uuid(), nullable=True),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("prev_hash", sa.LargeBinary(), nullable=False),
        sa.Column("entry_hash", sa.LargeBinary(), nullable=False),
        sa.Column("hash_version", sa.SmallInteger(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("journal_entry_pkey")),
        sa.UniqueConstraint("organization_id", "sequence", name=op.f("journal_entry_organization_id_sequence_key")),
    )
    op.create_index(
        "journal_entry_event_idx",
        "journal_entry",
        ["organization_id", "event_id"],
        unique=False,
        postgresql_where=sa.text("event_id is not null"),
    )
    op.create_index(
        op.f("journal_entry_organization_id_program_id_sequence_idx"),
        "journal_entry",
        ["organization_id", "program_id", "sequence"],
        unique=False,
    )
    op.create_index(
        "journal_entry_reference_idx",
        "journal_entry",
        ["organization_id", "reference_id", "sequence"],
        unique=False,
        postgresql_where=sa.text("reference_id is not null"),
    )
    op.create_index(
        "journal_entry_rule_idx",
        "journal_entry",
        ["organization_id", "rule_id", "sequence"],
        unique=False,
        postgresql_where=sa.text("rule_id is not null"),
    )
    op.create_table(
        "organization",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("rate_per_second", sa.Integer(), nullable=False),
        sa.Column("rate_burst", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("organization_pkey")),
    )
    op.create_table(
        "posting",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("entry_id", sa.Uuid(), nullable=False),
        sa.Column("ordinal", sa.SmallInteger(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("account_id", sa.Uuid(), nullable=False),
        sa.Column("asset_id", sa.Uuid(), nullable=False),
        sa.Column("amount", sa.Numeric(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=True),
        sa.Column("balance", sa.Numeric(), nullable=True),
        sa.PrimaryKeyConstraint("organization_id", "entry_id", "ordinal", name=op.f("posting_pkey")),
    )
    op.create_index(
        "posting_version_key",
        "posting",
        ["organization_id", "account_id", sa.literal_column("version desc")],
        unique=True,
    )
    op.create_table(
        "state_history",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("entity_id", sa.Uuid(), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("state_type", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("old_value", sa.Text(), nullable=True),
        sa.Column("new_value", sa.Text(), nullable=True),
        sa.Column("event_id", sa.Uuid(), nullable=True),
        sa.Column("rule_id", sa.Uuid(), nullable=True),
        sa.Column("api_key_id", sa.Uuid(), nullable=True),
        sa.Column("program_id", sa.Uuid(), nullable=True),
        sa.PrimaryKeyConstraint("organization_id", "entity_id", "changed_at", "id", name=op.f("state_history_pkey")),
    )
    op.create_table(
        "tag",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("entity_id", sa.Uuid(), nullable=False),
        sa.Column("tag", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "entity_id", "tag", name=op.f("tag_pkey")),
    )
    op.create_table(
        "api_key",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("key_hash", sa.LargeBinary(), nullable=False),
        sa.Column("hint", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["organization_id"], ["organization.id"], name=op.f("api_key_organization_id_fkey")),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("api_key_pkey")),
        sa.UniqueConstraint("key_hash", name=op.f("api_key_key_hash_key")),
    )
    op.create_table(
        "asset",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("symbol", sa.Text(), nullable=False),
        sa.Column("inventory_mode", sa.Text(), nullable=False),
        sa.Column("issuance_policy", sa.Text(), nullable=False),
        sa.Column("scale", sa.SmallInteger(), nullable=False),
        sa.Column("max_transaction_amount", sa.Numeric(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["organization_id"], ["organization.id"], name=op.f("asset_organization_id_fkey")),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("asset_pkey")),
    )
    op.create_index(
        op.f("asset_organization_id_created_at_id_idx"),
        "asset",
        ["organization_id", "created_at", "id"],
        unique=False,
    )
    op.create_index("asset_symbol_key", "asset", ["organization_id", sa.literal_column("lower(symbol)")], unique=True)
    op.create_table(
        "participant",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("external_id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("email", sa.Text(), nullable=True),
        sa.Column("phone", sa.Text(), nullable=True),
        sa.Column("first_name", sa.Text(), nullable=True),
        sa.Column("last_name", sa.Text(), nullable=True),
        sa.Column("display_name", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organization.id"], name=op.f("participant_organization_id_fkey")
        ),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("participant_pkey")),
        sa.UniqueConstraint("organization_id", "external_id", name=op.f("participant_organization_id_external_id_key")),
    )
    op.create_index(
        op.f("participant_organization_id_created_at_id_idx"),
        "participant",
        ["organization_id", "created_at", "id"],
        unique=False,
    )
    op.create_table(
        "program",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("on_unknown_participant", sa.Text(), nullable=False),
        sa.Column("redemption_target_type", sa.Text(), nullable=False),
        sa.Column("redemption_target_entity_id", sa.Uuid(), nullable=True),
        sa.Column("rules_version", sa.BigInteger(), nullable=False),
        sa.Column("processing_paused", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["organization_id"], ["organization.id"], name=op.f("program_organization_id_fkey")),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("program_pkey")),
    )
    op.create_index(
        op.f("program_organization_id_created_at_id_idx"),
        "program",
        ["organization_id", "created_at", "id"],
        unique=False,
    )
    op.create_table(
        "lane",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("drained_until", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id", "program_id"],
            ["program.organization_id", "program.id"],
            name=op.f("lane_organization_id_program_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("organization_id", "program_id", name=op.f("lane_pkey")),
    )
    op.create_table(
        "program_asset",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("asset_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id", "asset_id"],
            ["asset.organization_id", "asset.id"],
            name=op.f("program_asset_organization_id_asset_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["organization_id", "program_id"],
            ["program.organization_id", "program.id"],
            name=op.f("program_asset_organization_id_program_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("organization_id", "program_id", "asset_id", name=op.f("program_asset_pkey")),
    )
    op.create_index(
        op.f("program_asset_organization_id_asset_id_idx"),
        "program_asset",
        ["organization_id", "asset_id"],
        unique=False,
    )
    op.create_table(
        "rule",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("condition", sa.Text(), nullable=False),
        sa.Column("actions", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("rule_order", sa.BigInteger(), nullable=False),
        sa.Column("stop_after_match", sa.Boolean(), nullable=False),
        sa.Column("active_from", sa.DateTime(timezone=True), nullable=True),
        sa.Column("active_to", sa.DateTime(timezone=True), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("history_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id", "program_id"],
            ["program.organization_id", "program.id"],
            name=op.f("rule_organization_id_program_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("rule_pkey")),
    )
    op.create_index(
        "rule_active_order_key",
        "rule",
        ["organization_id", "program_id", "rule_order"],
        unique=True,
        postgresql_where=sa.text("status = 'ACTIVE'"),
    )
    op.create_index(
        op.f("rule_organization_id_program_id_rule_order_id_idx"),
        "rule",
        ["organization_id", "program_id", "rule_order", "id"],
        unique=False,
    )
    op.create_table(
        "rule_history",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("rule_id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("change_type", sa.Text(), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("changed_by_api_key_id", sa.Uuid(), nullable=True),
        sa.Column("changes", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("snapshot", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id", "rule_id"],
            ["rule.organization_id", "rule.id"],
            name=op.f("rule_history_organization_id_rule_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("rule_history_pkey")),
    )
    op.create_index(
        op.f("rule_history_organization_id_rule_id_changed_at_id_idx"),
        "rule_history",
        ["organization_id", "rule_id", "changed_at", "id"],
        unique=False,
    )
    guards = (Path(__file__).parents[1] / "sql" / "0001_guards.sql").read_text()
    op.get_bind().execution_options(no_parameters=True).exec_driver_sql(guards)


def downgrade() -> None:
    raise NotImplementedError("a ledger is never rolled back: restore a backup instead")
