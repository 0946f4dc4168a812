"""Rule budgets, automations, simulations, rewards, redemptions, transfers

Revision ID: 0003
Revises: 0002
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "participant_status_change",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("participant_id", sa.Uuid(), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("old_status", sa.Text(), nullable=False),
        sa.Column("new_status", sa.Text(), nullable=False),
        sa.Column("api_key_id", sa.Uuid(), nullable=True),
        sa.PrimaryKeyConstraint(
            "organization_id", "participant_id", "changed_at", "id", name=op.f("participant_status_change_pkey")
        ),
    )
    op.create_table(
        "redemption_lot",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("redemption_id", sa.Uuid(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("lot_id", sa.Uuid(), nullable=False),
        sa.Column("held_lot_id", sa.Uuid(), nullable=True),
        sa.Column("amount", sa.Numeric(), nullable=False),
        sa.Column("refilled", sa.Numeric(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "redemption_id", "ordinal", name=op.f("redemption_lot_pkey")),
    )
    op.create_table(
        "reward_usage",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("reward_id", sa.Uuid(), nullable=False),
        sa.Column("participant_id", sa.Uuid(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "reward_id", "participant_id", name=op.f("reward_usage_pkey")),
    )
    op.create_table(
        "transfer_recipient",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("transfer_id", sa.Uuid(), nullable=False),
        sa.Column("ordinal", sa.SmallInteger(), nullable=False),
        sa.Column("entity_type", sa.Text(), nullable=False),
        sa.Column("entity_id", sa.Uuid(), nullable=False),
        sa.Column("external_id", sa.Text(), nullable=True),
        sa.Column("amount", sa.Numeric(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "transfer_id", "ordinal", name=op.f("transfer_recipient_pkey")),
    )
    op.create_index(
        op.f("transfer_recipient_organization_id_entity_id_created_at_transfer_id_idx"),
        "transfer_recipient",
        ["organization_id", "entity_id", "created_at", "transfer_id"],
        unique=False,
    )
    op.create_table(
        "automation",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("event_name", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("trigger_type", sa.Text(), nullable=False),
        sa.Column("trigger_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("payload", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("participant_id", sa.Uuid(), nullable=True),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("depth", sa.SmallInteger(), nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=True),
        sa.Column("rule_id", sa.Uuid(), nullable=True),
        sa.Column("action_index", sa.SmallInteger(), nullable=True),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("processed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("execution_status", sa.Text(), nullable=True),
        sa.Column("execution_started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("execution_completed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("execution_error", sa.Text(), nullable=True),
        sa.Column("participants_total", sa.BigInteger(), nullable=True),
        sa.Column("participants_processed", sa.BigInteger(), nullable=True),
        sa.Column("last_participant_id", sa.Uuid(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id", "program_id"],
            ["program.organization_id", "program.id"],
            name=op.f("automation_organization_id_program_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("automation_pkey")),
        sa.UniqueConstraint(
            "organization_id",
            "event_id",
            "rule_id",
            "action_index",
            name=op.f("automation_organization_id_event_id_rule_id_action_index_key"),
        ),
    )
    op.create_index(
        "automation_due_idx",
        "automation",
        ["organization_id", "program_id", "trigger_at", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'active' and trigger_type = 'one_time'"),
    )
    op.create_index(
        "automation_fan_out_idx",
        "automation",
        ["organization_id", "program_id", "created_at", "id"],
        unique=False,
        postgresql_where=sa.text("execution_status in ('pending', 'executing')"),
    )
    op.create_index(
        op.f("automation_organization_id_program_id_created_at_id_idx"),
        "automation",
        ["organization_id", "program_id", "created_at", "id"],
        unique=False,
    )
    op.create_table(
        "redemption",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("participant_id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("asset_id", sa.Uuid(), nullable=False),
        sa.Column("amount", sa.Numeric(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("reward_id", sa.Uuid(), nullable=True),
        sa.Column("quantity", sa.BigInteger(), nullable=True),
        sa.Column("unit_cost", sa.Numeric(), nullable=True),
        sa.Column("reversed_amount", sa.Numeric(), nullable=False),
        sa.Column("reversed_quantity", sa.BigInteger(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("journal_entry_id", sa.Uuid(), nullable=False),
        sa.Column("metadata", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("target_type", sa.Text(), nullable=False),
        sa.Column("target_entity_type", sa.Text(), nullable=True),
        sa.Column("target_entity_id", sa.Uuid(), nullable=True),
        sa.Column("target_lot_id", sa.Uuid(), nullable=True),
        sa.Column("requested_amount", sa.Numeric(), nullable=True),
        sa.Column("requested_quantity", sa.BigInteger(), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("confirmed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("canceled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_reason", sa.Text(), nullable=True),
        sa.Column("confirm_key", sa.Text(), nullable=True),
        sa.Column("confirm_hash", sa.LargeBinary(), nullable=True),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("api_key_id", sa.Uuid(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("redemption_pkey")),
    )
    op.create_index(
        op.f("redemption_organization_id_participant_id_created_at_id_idx"),
        "redemption",
        ["organization_id", "participant_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        "redemption_pending_idx",
        "redemption",
        ["organization_id", "expires_at", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'PENDING'"),
    )
    op.create_index(
        "redemption_waiting_idx",
        "redemption",
        ["organization_id", "participant_id", "expires_at", "id"],
        unique=False,
        postgresql_where=sa.text("status = 'PENDING'"),
    )
    op.create_index(
        "redemption_reward_idx",
        "redemption",
        ["organization_id", "reward_id", "participant_id", "created_at", "id"],
        unique=False,
        postgresql_where=sa.text("reward_id is not null"),
    )
    op.create_table(
        "reward",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("category", sa.Text(), nullable=True),
        sa.Column("redemption_type", sa.Text(), nullable=False),
        sa.Column("asset_id", sa.Uuid(), nullable=False),
        sa.Column("unit_cost", sa.Numeric(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("max_total", sa.BigInteger(), nullable=True),
        sa.Column("max_per_participant", sa.BigInteger(), nullable=True),
        sa.Column("available_from", sa.DateTime(timezone=True), nullable=True),
        sa.Column("available_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("metadata", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("requires_confirmation", sa.Boolean(), nullable=False),
        sa.Column("eligibility", sa.Text(), nullable=True),
        sa.Column("redeemed_count", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id", "asset_id"],
            ["asset.organization_id", "asset.id"],
            name=op.f("reward_organization_id_asset_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["organization_id", "program_id"],
            ["program.organization_id", "program.id"],
            name=op.f("reward_organization_id_program_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("reward_pkey")),
        sa.UniqueConstraint(
            "organization_id", "program_id", "name", name=op.f("reward_organization_id_program_id_name_key")
        ),
    )
    op.create_index(
        op.f("reward_organization_id_program_id_created_at_id_idx"),
        "reward",
        ["organization_id", "program_id", "created_at", "id"],
        unique=False,
    )
    op.create_table(
        "simulation",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("rules", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("starts_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("participant_filter", sa.Text(), nullable=True),
        sa.Column("basis", sa.Text(), nullable=False),
        sa.Column("events_total", sa.BigInteger(), nullable=False),
        sa.Column("events_done", sa.BigInteger(), nullable=False),
        sa.Column("last_processed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_seq", sa.BigInteger(), nullable=True),
        sa.Column("sequence_before", sa.BigInteger(), nullable=True),
        sa.Column("starts", sa.SmallInteger(), nullable=False),
        sa.Column("results", postgresql.JSON(astext_type=sa.Text()), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("api_key_id", sa.Uuid(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id", "program_id"],
            ["program.organization_id", "program.id"],
            name=op.f("simulation_organization_id_program_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("simulation_pkey")),
    )
    op.create_index(
        op.f("simulation_organization_id_program_id_created_at_id_idx"),
        "simulation",
        ["organization_id", "program_id", "created_at", "id"],
        unique=False,
    )
    op.create_table(
        "transfer",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("program_id", sa.Uuid(), nullable=False),
        sa.Column("asset_id", sa.Uuid(), nullable=False),
        sa.Column("source_type", sa.Text(), nullable=False),
        sa.Column("source_id", sa.Uuid(), nullable=False),
        sa.Column("source_external_id", sa.Text(), nullable=True),
        sa.Column("total_amount", sa.Numeric(), nullable=False),
        sa.Column("recipient_count", sa.SmallInteger(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("metadata", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.Column("journal_entry_id", sa.Uuid(), nullable=False),
        sa.Column("api_key_id", sa.Uuid(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id", "program_id"],
            ["program.organization_id", "program.id"],
            name=op.f("transfer_organization_id_program_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("transfer_pkey")),
    )
    op.create_index(
        op.f("transfer_organization_id_created_at_id_idx"),
        "transfer",
        ["organization_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        op.f("transfer_organization_id_asset_id_created_at_id_idx"),
        "transfer",
        ["organization_id", "asset_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        op.f("transfer_organization_id_program_id_created_at_id_idx"),
        "transfer",
        ["organization_id", "program_id", "created_at", "id"],
        unique=False,
    )
    op.create_index(
        op.f("transfer_organization_id_source_id_created_at_id_idx"),
        "transfer",
        ["organization_id", "source_id", "created_at", "id"],
        unique=False,
    )
    op.create_table(
        "redemption_reversal",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("redemption_id", sa.Uuid(), nullable=False),
        sa.Column("amount", sa.Numeric(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("journal_entry_id", sa.Uuid(), nullable=False),
        sa.Column("api_key_id", sa.Uuid(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", "id", name=op.f("redemption_reversal_pkey")),
    )
    op.create_index(
        op.f("redemption_reversal_organization_id_redemption_id_created_at_id_idx"),
        "redemption_reversal",
        ["organization_id", "redemption_id", "created_at", "id"],
        unique=False,
    )
    op.create_table(
        "rule_budget",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("rule_id", sa.Uuid(), nullable=False),
        sa.Column("asset_id", sa.Uuid(), nullable=False),
        sa.Column("maximum", sa.Numeric(), nullable=False),
        sa.Column("schedule_type", sa.Text(), nullable=True),
        sa.Column("cron_expression", sa.Text(), nullable=True),
        sa.Column("interval", sa.Text(), nullable=True),
        sa.Column("starts_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("consumed", sa.Numeric(), nullable=False),
        sa.Column("next_reset_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id", "asset_id"],
            ["asset.organization_id", "asset.id"],
            name=op.f("rule_budget_organization_id_asset_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["organization_id", "rule_id"],
            ["rule.organization_id", "rule.id"],
            name=op.f("rule_budget_organization_id_rule_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("organization_id", "rule_id", "asset_id", name=op.f("rule_budget_pkey")),
    )
    op.create_table(
        "simulation_holder",
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("simulation_id", sa.Uuid(), nullable=False),
        sa.Column("entity_id", sa.Uuid(), nullable=False),
        sa.Column("is_included", sa.Boolean(), nullable=True),
        sa.Column("state", postgresql.JSON(astext_type=sa.Text()), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id", "simulation_id"],
            ["simulation.organization_id", "simulation.id"],
            name=op.f("simulation_holder_organization_id_simulation_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("organization_id", "simulation_id", "entity_id", name=op.f("simulation_holder_pkey")),
    )
    op.create_index(
        "event_processed_idx",
        "event",
        ["organization_id", "program_id", "processed_at", "seq"],
        unique=False,
        postgresql_where=sa.text("processed_at is not null"),
    )
    op.create_index(
        op.f("hold_organization_id_program_id_created_at_id_idx"),
        "hold",
        ["organization_id", "program_id", "created_at", "id"],
        unique=False,
    )
    guards = (Path(__file__).parents[1] / "sql" / "0003_guards.sql").read_text()
    op.get_bind().execution_options(no_parameters=True).exec_driver_sql(guards)


def downgrade() -> None:
    raise NotImplementedError("a ledger is never rolled back: restore a backup instead")
