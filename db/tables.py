"""Every table of Scrip, as SQLModel classes: the source of the migrations and the rows of the resource queries.

Conventions (docs/decisions/0003-database.md):

- Every tenant table carries `organization_id`, begins every index with it, and is guarded by row-level security.
- Primary keys are `(organization_id, id)`, so that the policy's predicate and the key are one index condition.
- The hot tables (event, journal_entry, posting, redemption, the state tables) have no foreign keys: what they point to
  can never be deleted, as the application role has no DELETE on it.
"""

from datetime import datetime
from decimal import Decimal
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    DateTime,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    Numeric,
    SmallInteger,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSON, JSONB
from sqlmodel import Field, SQLModel

NAMING = {
    "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "ck": "%(table_name)s_%(constraint_name)s_check",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "pk": "%(table_name)s_pkey",
}
SQLModel.metadata.naming_convention = NAMING


def _instant(nullable: bool = False) -> Any:
    return Field(default=None, sa_type=DateTime(timezone=True), nullable=nullable)


def _text(nullable: bool = False, primary_key: bool = False) -> Any:
    return Field(default=None, sa_type=Text, nullable=nullable, primary_key=primary_key)


def _number(nullable: bool = False) -> Any:
    return Field(default=None, sa_type=Numeric, nullable=nullable)


def _big(nullable: bool = False) -> Any:
    return Field(default=None, sa_type=BigInteger, nullable=nullable)


def _of(table: str, *columns: str) -> ForeignKeyConstraint:
    """A foreign key within the tenant: it cannot point into another organization."""
    return ForeignKeyConstraint(["organization_id", *columns], [f"{table}.organization_id", f"{table}.id"])


class Organization(SQLModel, table=True):
    """A tenant. Managed by the command line only."""

    __tablename__: ClassVar[str] = "organization"

    id: UUID = Field(primary_key=True)
    name: str = _text()
    rate_per_second: int = Field(default=10_000)
    rate_burst: int = Field(default=20_000)
    created_at: datetime = _instant()


class ApiKey(SQLModel, table=True):
    """A credential of an organization; only the SHA-256 of the secret is stored. Contract: basics.md 3."""

    __tablename__: ClassVar[str] = "api_key"
    __table_args__ = (
        ForeignKeyConstraint(["organization_id"], ["organization.id"]),
        UniqueConstraint("key_hash"),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    name: str = _text()
    key_hash: bytes = Field(sa_type=LargeBinary)
    hint: str = _text()
    created_at: datetime = _instant()
    revoked_at: datetime | None = _instant(nullable=True)


class Program(SQLModel, table=True):
    """The container of rules, assets and participants, and the holder of a wallet. Contract: basics.md 5."""

    __tablename__: ClassVar[str] = "program"
    __table_args__ = (
        ForeignKeyConstraint(["organization_id"], ["organization.id"]),
        Index(None, "organization_id", "created_at", "id"),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    name: str = _text()
    description: str | None = _text(nullable=True)
    status: str = _text()
    on_unknown_participant: str = _text()
    redemption_target_type: str = _text()
    redemption_target_entity_id: UUID | None = Field(default=None)
    rules_version: int = _big()
    processing_paused: bool = Field(default=False)
    created_at: datetime = _instant()
    updated_at: datetime = _instant()
    deleted_at: datetime | None = _instant(nullable=True)


class Lane(SQLModel, table=True):
    """One row per program: until when a worker promises to look for its events without being woken."""

    __tablename__: ClassVar[str] = "lane"
    __table_args__ = (_of("program", "program_id"),)

    organization_id: UUID = Field(primary_key=True)
    program_id: UUID = Field(primary_key=True)
    drained_until: datetime | None = _instant(nullable=True)


class Asset(SQLModel, table=True):
    """A unit of value. Contract: basics.md 6."""

    __tablename__: ClassVar[str] = "asset"
    __table_args__ = (
        ForeignKeyConstraint(["organization_id"], ["organization.id"]),
        Index("asset_symbol_key", "organization_id", text("lower(symbol)"), unique=True),
        Index(None, "organization_id", "created_at", "id"),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    name: str = _text()
    symbol: str = _text()
    inventory_mode: str = _text()
    issuance_policy: str = _text()
    scale: int = Field(sa_type=SmallInteger)
    max_transaction_amount: Decimal | None = _number(nullable=True)
    status: str = _text()
    created_at: datetime = _instant()
    updated_at: datetime = _instant()
    deleted_at: datetime | None = _instant(nullable=True)


class ProgramAsset(SQLModel, table=True):
    """The link that lets a program use an asset. Contract: basics.md 5.10."""

    __tablename__: ClassVar[str] = "program_asset"
    __table_args__ = (
        _of("program", "program_id"),
        _of("asset", "asset_id"),
        Index(None, "organization_id", "asset_id"),
    )

    organization_id: UUID = Field(primary_key=True)
    program_id: UUID = Field(primary_key=True)
    asset_id: UUID = Field(primary_key=True)
    created_at: datetime = _instant()


class Participant(SQLModel, table=True):
    """An end user of the customer's system. Contract: holders.md 3."""

    __tablename__: ClassVar[str] = "participant"
    __table_args__ = (
        ForeignKeyConstraint(["organization_id"], ["organization.id"]),
        UniqueConstraint("organization_id", "external_id"),
        Index(None, "organization_id", "created_at", "id"),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    external_id: str = _text()
    status: str = _text()
    email: str | None = _text(nullable=True)
    phone: str | None = _text(nullable=True)
    first_name: str | None = _text(nullable=True)
    last_name: str | None = _text(nullable=True)
    display_name: str | None = _text(nullable=True)
    created_at: datetime = _instant()
    updated_at: datetime = _instant()


class ParticipantStatusChange(SQLModel, table=True):
    """A change of a participant's status, never changed itself: what it was at any instant can be told from these."""

    __tablename__: ClassVar[str] = "participant_status_change"

    organization_id: UUID = Field(primary_key=True)
    participant_id: UUID = Field(primary_key=True)
    changed_at: datetime = Field(sa_type=DateTime(timezone=True), primary_key=True)
    id: UUID = Field(primary_key=True)
    old_status: str = _text()
    new_status: str = _text()
    api_key_id: UUID | None = Field(default=None)


class Enrollment(SQLModel, table=True):
    """A participant's membership in a program, with a status of its own. Contract: holders.md 3.3."""

    __tablename__: ClassVar[str] = "enrollment"
    __table_args__ = (Index(None, "organization_id", "participant_id"),)

    organization_id: UUID = Field(primary_key=True)
    program_id: UUID = Field(primary_key=True)
    participant_id: UUID = Field(primary_key=True)
    status: str = _text()
    created_at: datetime = _instant()
    updated_at: datetime = _instant()


class Tag(SQLModel, table=True):
    """A flag on a participant, group or program, lower-case. Contract: holders.md 5.1."""

    __tablename__: ClassVar[str] = "tag"

    organization_id: UUID = Field(primary_key=True)
    entity_id: UUID = Field(primary_key=True)
    tag: str = _text(primary_key=True)
    created_at: datetime = _instant()


class Attribute(SQLModel, table=True):
    """A key-value string on a participant, group or program. Contract: holders.md 5.2."""

    __tablename__: ClassVar[str] = "attribute"

    organization_id: UUID = Field(primary_key=True)
    entity_id: UUID = Field(primary_key=True)
    key: str = _text(primary_key=True)
    value: str = _text()
    updated_at: datetime = _instant()


class Counter(SQLModel, table=True):
    """An exact number on a participant, group or program, with an optional reset window. Contract: holders.md 5.3.

    `reset_after` is the Go-style text as it was sent; `last_reset_at` is when the window began.
    """

    __tablename__: ClassVar[str] = "counter"

    organization_id: UUID = Field(primary_key=True)
    entity_id: UUID = Field(primary_key=True)
    key: str = _text(primary_key=True)
    value: Decimal = Field(sa_type=Numeric(38, 18))
    reset_after: str | None = _text(nullable=True)
    last_reset_at: datetime = _instant()


class StateHistory(SQLModel, table=True):
    """One change of a tag, attribute, counter or tier. Contract: holders.md 5.5."""

    __tablename__: ClassVar[str] = "state_history"

    organization_id: UUID = Field(primary_key=True)
    entity_id: UUID = Field(primary_key=True)
    changed_at: datetime = Field(sa_type=DateTime(timezone=True), primary_key=True)
    id: UUID = Field(primary_key=True)
    state_type: str = _text()
    key: str = _text()
    operation: str = _text()
    old_value: str | None = _text(nullable=True)
    new_value: str | None = _text(nullable=True)
    event_id: UUID | None = Field(default=None)
    rule_id: UUID | None = Field(default=None)
    api_key_id: UUID | None = Field(default=None)
    program_id: UUID | None = Field(default=None)


class Rule(SQLModel, table=True):
    """A CEL condition and its actions. Contract: rules-and-events.md 2. `rule_order` is the contract's `order`."""

    __tablename__: ClassVar[str] = "rule"
    __table_args__ = (
        _of("program", "program_id"),
        Index(
            "rule_active_order_key",
            "organization_id",
            "program_id",
            "rule_order",
            unique=True,
            postgresql_where=text("status = 'ACTIVE'"),
        ),
        Index(None, "organization_id", "program_id", "rule_order", "id"),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    program_id: UUID
    name: str = _text()
    description: str | None = _text(nullable=True)
    condition: str = _text()
    actions: list[dict[str, Any]] = Field(sa_column=Column(JSON, nullable=False))
    rule_order: int = _big()
    stop_after_match: bool
    active_from: datetime | None = _instant(nullable=True)
    active_to: datetime | None = _instant(nullable=True)
    status: str = _text()
    history_id: UUID
    created_at: datetime = _instant()
    updated_at: datetime = _instant()
    deleted_at: datetime | None = _instant(nullable=True)


class RuleHistory(SQLModel, table=True):
    """One version of a rule with its full snapshot. Contract: rules-and-events.md 2.5."""

    __tablename__: ClassVar[str] = "rule_history"
    __table_args__ = (
        _of("rule", "rule_id"),
        Index(None, "organization_id", "rule_id", "changed_at", "id"),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    rule_id: UUID
    program_id: UUID
    change_type: str = _text()
    changed_at: datetime = _instant()
    changed_by_api_key_id: UUID | None = Field(default=None)
    changes: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    snapshot: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))


class Event(SQLModel, table=True):
    """A signal that triggers rules, and its place in the queue. Contract: rules-and-events.md 7.

    `seq` is the order of acceptance. `due_at` is null for an event that may be processed at once and a time for one
    that waits. `attempts` counts charged attempts; `starts` counts how often a worker that was lost had begun it.
    """

    __tablename__: ClassVar[str] = "event"
    __table_args__ = (
        Index(
            "event_ready_idx",
            "organization_id",
            "program_id",
            "seq",
            postgresql_where=text("status in ('RECEIVED', 'PENDING') and due_at is null"),
        ),
        Index(
            "event_waiting_idx",
            "organization_id",
            "program_id",
            "due_at",
            "seq",
            postgresql_where=text("status in ('RECEIVED', 'PENDING') and due_at is not null"),
        ),
        Index(
            "event_failed_idx",
            "organization_id",
            "program_id",
            "created_at",
            "id",
            postgresql_where=text("status = 'FAILED'"),
        ),
        Index(
            "event_processed_idx",
            "organization_id",
            "program_id",
            "processed_at",
            "seq",
            postgresql_where=text("processed_at is not null"),
        ),
        Index(None, "organization_id", "created_at", "id"),
        Index(None, "organization_id", "program_id", "created_at", "id"),
        Index(None, "organization_id", "external_id", "created_at", "id"),
        Index(None, "organization_id", "participant_id", "created_at", "id"),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    program_id: UUID
    seq: int = _big()
    participant_id: UUID | None = Field(default=None)
    external_id: str | None = _text(nullable=True)
    recipient_id: UUID | None = Field(default=None)
    recipient_external_id: str | None = _text(nullable=True)
    idempotency_key: str = _text()
    payload_hash: bytes = Field(sa_type=LargeBinary)
    event_type: str = _text()
    event_data: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    event_timestamp: datetime = _instant()
    received_at: datetime = _instant()
    created_at: datetime = _instant()
    updated_at: datetime = _instant()
    processed_at: datetime | None = _instant(nullable=True)
    status: str = _text()
    error_message: str | None = _text(nullable=True)
    depth: int = Field(default=0, sa_type=SmallInteger)
    attempts: int = Field(default=0, sa_type=SmallInteger)
    starts: int = Field(default=0, sa_type=SmallInteger)
    due_at: datetime | None = _instant(nullable=True)
    evaluations: list[dict[str, Any]] | None = Field(default=None, sa_column=Column(JSON, nullable=True))
    matched_rule_ids: list[UUID] | None = Field(default=None, sa_column=Column(ARRAY(Uuid), nullable=True))
    api_key_id: UUID | None = Field(default=None)
    request_id: str | None = _text(nullable=True)


class Account(SQLModel, table=True):
    """A place where value lies: one entity, one asset, one bucket. Contract: holders.md 8.1.

    `entity_id` is null for the system accounts, of which an asset has three.
    """

    __tablename__: ClassVar[str] = "account"
    __table_args__ = (
        Index(
            "account_coordinates_key",
            "organization_id",
            "entity_id",
            "asset_id",
            "bucket",
            "entity_type",
            unique=True,
            postgresql_nulls_not_distinct=True,
        ),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    entity_type: str = _text()
    entity_id: UUID | None = Field(default=None)
    asset_id: UUID
    bucket: str = _text()


class JournalEntry(SQLModel, table=True):
    """One sealed operation of the ledger, never changed. Contract: holders.md 8, README.md "Hash chain"."""

    __tablename__: ClassVar[str] = "journal_entry"
    __table_args__ = (
        UniqueConstraint("organization_id", "sequence"),
        Index(None, "organization_id", "program_id", "sequence"),
        Index(
            "journal_entry_event_idx",
            "organization_id",
            "event_id",
            postgresql_where=text("event_id is not null"),
        ),
        Index(
            "journal_entry_rule_idx",
            "organization_id",
            "rule_id",
            "sequence",
            postgresql_where=text("rule_id is not null"),
        ),
        Index(
            "journal_entry_reference_idx",
            "organization_id",
            "reference_id",
            "sequence",
            postgresql_where=text("reference_id is not null"),
        ),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    sequence: int = _big()
    program_id: UUID
    action_type: str = _text()
    description: str | None = _text(nullable=True)
    event_id: UUID | None = Field(default=None)
    rule_id: UUID | None = Field(default=None)
    reference_id: str | None = _text(nullable=True)
    api_key_id: UUID | None = Field(default=None)
    request_id: str | None = _text(nullable=True)
    created_at: datetime = _instant()
    prev_hash: bytes = Field(sa_type=LargeBinary)
    entry_hash: bytes = Field(sa_type=LargeBinary)
    hash_version: int = Field(default=1, sa_type=SmallInteger)


class Posting(SQLModel, table=True):
    """One signed line of an entry. `version` and `balance` are its account's after it; null on system accounts."""

    __tablename__: ClassVar[str] = "posting"
    __table_args__ = (Index("posting_version_key", "organization_id", "account_id", text("version desc"), unique=True),)

    organization_id: UUID = Field(primary_key=True)
    entry_id: UUID = Field(primary_key=True)
    ordinal: int = Field(sa_type=SmallInteger, primary_key=True)
    id: UUID
    account_id: UUID
    asset_id: UUID
    amount: Decimal = _number()
    version: int | None = _big(nullable=True)
    balance: Decimal | None = _number(nullable=True)


class ChainHead(SQLModel, table=True):
    """The newest entry of an organization's hash chain; its row lock orders the ledger.

    `created_at` is the latest instant spoken for: that of the newest entry, or a later one as of which a report was
    given, so that no entry can come to lie before it (domain/ledger/moments.py).
    """

    __tablename__: ClassVar[str] = "chain_head"

    organization_id: UUID = Field(primary_key=True)
    sequence: int = _big()
    hash: bytes = Field(sa_type=LargeBinary)
    created_at: datetime = _instant()


class IdempotencyKey(SQLModel, table=True):
    """A consumed key, what was asked and what came of it. Contract: README.md "Idempotency"."""

    __tablename__: ClassVar[str] = "idempotency_key"

    organization_id: UUID = Field(primary_key=True)
    program_id: UUID = Field(primary_key=True)
    operation: str = _text(primary_key=True)
    key: str = _text(primary_key=True)
    payload_hash: bytes = Field(sa_type=LargeBinary)
    result: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    created_at: datetime = _instant()


class Group(SQLModel, table=True):
    """A set of participants with a wallet of its own. Contract: holders.md 4."""

    __tablename__: ClassVar[str] = "holder_group"
    __table_args__ = (
        ForeignKeyConstraint(["organization_id"], ["organization.id"]),
        Index(None, "organization_id", "created_at", "id"),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    name: str = _text()
    status: str = _text()
    created_at: datetime = _instant()
    updated_at: datetime = _instant()
    deleted_at: datetime | None = _instant(nullable=True)


class GroupMember(SQLModel, table=True):
    """A participant's membership in a group; a former one stays as LEFT. Contract: holders.md 4.1."""

    __tablename__: ClassVar[str] = "group_member"
    __table_args__ = (
        _of("holder_group", "group_id"),
        _of("participant", "participant_id"),
        Index(None, "organization_id", "participant_id"),
    )

    organization_id: UUID = Field(primary_key=True)
    group_id: UUID = Field(primary_key=True)
    participant_id: UUID = Field(primary_key=True)
    role: str = _text()
    status: str = _text()
    joined_at: datetime = _instant()
    left_at: datetime | None = _instant(nullable=True)
    changed_on_behalf_of: UUID | None = Field(default=None)


class Lot(SQLModel, table=True):
    """One credit of a LOT asset, or the part of one that was split off. Contract: holders.md 7.

    A projection of the ledger: `remaining` is `amount` plus the deltas of its `LotChange` rows, and it changes only in
    the transaction of the entry that explains it. `created_at` is the vintage, which a split keeps. `is_provisional`
    marks value that a CREDIT put into HELD; `hold_id` is the one hold that a HELD lot belongs to.
    """

    __tablename__: ClassVar[str] = "lot"
    __table_args__ = (
        Index(
            "lot_fifo_idx",
            "organization_id",
            "entity_id",
            "asset_id",
            "status",
            "created_at",
            "id",
            postgresql_where=text("remaining > 0"),
        ),
        Index(None, "organization_id", "entity_id", "asset_id", "created_at", "id"),
        Index(
            "lot_reference_idx",
            "organization_id",
            "entity_id",
            "asset_id",
            "reference_id",
            postgresql_where=text("reference_id is not null"),
        ),
        Index("lot_hold_idx", "organization_id", "hold_id", postgresql_where=text("hold_id is not null")),
        Index(
            "lot_expiry_idx",
            "organization_id",
            "expires_at",
            "id",
            postgresql_where=text("status = 'AVAILABLE' and remaining > 0"),
        ),
        Index("lot_maturity_idx", "organization_id", "matures_at", "id", postgresql_where=text("status = 'DEFERRED'")),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    entity_type: str = _text()
    entity_id: UUID
    asset_id: UUID
    program_id: UUID
    status: str = _text()
    amount: Decimal = _number()
    remaining: Decimal = _number()
    created_at: datetime = _instant()
    expires_at: datetime | None = _instant(nullable=True)
    matures_at: datetime | None = _instant(nullable=True)
    reference_id: str | None = _text(nullable=True)
    hold_id: UUID | None = Field(default=None)
    is_provisional: bool = Field(default=False)
    entry_id: UUID


class LotChange(SQLModel, table=True):
    """What one entry did to one lot after its creation: the change of `remaining`, and its status after it."""

    __tablename__: ClassVar[str] = "lot_change"
    __table_args__ = (Index(None, "organization_id", "lot_id"),)

    organization_id: UUID = Field(primary_key=True)
    entry_id: UUID = Field(primary_key=True)
    ordinal: int = Field(primary_key=True)
    lot_id: UUID
    delta: Decimal = _number()
    status: str = _text()


class Hold(SQLModel, table=True):
    """A reservation of value. Contract: holders.md 6.8. A projection like `Lot`, explained by `HoldChange` rows.

    `kind` is OWN for value moved from AVAILABLE, PROVISIONAL for a CREDIT into HELD, REDEMPTION for a pending one.
    `carrier` says who ends it at `expires_at`: WORKFLOW (its own) or PROGRAM (the program's HoldEnds).
    """

    __tablename__: ClassVar[str] = "hold"
    __table_args__ = (
        Index(None, "organization_id", "created_at", "id"),
        Index(None, "organization_id", "entity_id", "created_at", "id"),
        Index(None, "organization_id", "program_id", "created_at", "id"),
        Index(
            "hold_active_idx",
            "organization_id",
            "entity_id",
            "asset_id",
            "created_at",
            "id",
            postgresql_where=text("status = 'ACTIVE'"),
        ),
        Index(
            "hold_end_idx",
            "organization_id",
            "program_id",
            "carrier",
            "expires_at",
            "id",
            postgresql_where=text("status = 'ACTIVE' and expires_at is not null"),
        ),
        Index(
            "hold_reference_idx",
            "organization_id",
            "reference_id",
            "created_at",
            "id",
            postgresql_where=text("reference_id is not null"),
        ),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    entity_type: str = _text()
    entity_id: UUID
    program_id: UUID
    asset_id: UUID
    kind: str = _text()
    amount: Decimal = _number()
    remaining: Decimal = _number()
    status: str = _text()
    reference_id: str | None = _text(nullable=True)
    description: str | None = _text(nullable=True)
    expires_at: datetime | None = _instant(nullable=True)
    on_expiry: str | None = _text(nullable=True)
    carrier: str | None = _text(nullable=True)
    entry_id: UUID
    created_at: datetime = _instant()
    updated_at: datetime = _instant()


class HoldChange(SQLModel, table=True):
    """What one entry did to one hold after its creation: the change of `remaining`, and its status after it."""

    __tablename__: ClassVar[str] = "hold_change"
    __table_args__ = (Index(None, "organization_id", "hold_id"),)

    organization_id: UUID = Field(primary_key=True)
    entry_id: UUID = Field(primary_key=True)
    hold_id: UUID = Field(primary_key=True)
    delta: Decimal = _number()
    status: str = _text()


class SystemCheckpoint(SQLModel, table=True):
    """The sum of a system account's postings up to a sequence number of the chain, so that reading it stays cheap."""

    __tablename__: ClassVar[str] = "system_checkpoint"

    organization_id: UUID = Field(primary_key=True)
    account_id: UUID = Field(primary_key=True)
    sequence: int = Field(sa_type=BigInteger, primary_key=True)
    balance: Decimal = _number()
    created_at: datetime = _instant()


class LedgerVerification(SQLModel, table=True):
    """A check of the whole chain that runs, or ran, in the background. Contract: README.md "Small print"."""

    __tablename__: ClassVar[str] = "ledger_verification"
    __table_args__ = (Index(None, "organization_id", "started_at", "id"),)

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    status: str = _text()
    entries_checked: int = _big()
    head_sequence: int = _big()
    first_invalid_entry_id: UUID | None = Field(default=None)
    problem: str | None = _text(nullable=True)
    started_at: datetime = _instant()
    finished_at: datetime | None = _instant(nullable=True)


class RuleBudget(SQLModel, table=True):
    """What a rule may issue of an asset in a period, and what it has issued. Contract: rules-and-events.md 3.

    `consumed` and `next_reset_at` are as of the last write: once `next_reset_at` has passed, readers see 0 and a later
    instant. `starts_at` is where the intervals of an INTERVAL budget are counted from.
    """

    __tablename__: ClassVar[str] = "rule_budget"
    __table_args__ = (_of("rule", "rule_id"), _of("asset", "asset_id"))

    organization_id: UUID = Field(primary_key=True)
    rule_id: UUID = Field(primary_key=True)
    asset_id: UUID = Field(primary_key=True)
    maximum: Decimal = _number()
    schedule_type: str | None = _text(nullable=True)
    cron_expression: str | None = _text(nullable=True)
    interval: str | None = _text(nullable=True)
    starts_at: datetime = _instant()
    consumed: Decimal = _number()
    next_reset_at: datetime | None = _instant(nullable=True)


class Automation(SQLModel, table=True):
    """Something that makes events by itself. Contract: tiers-and-automations.md B; made by rules so far (B9).

    One event, rule and action index makes at most one. `depth` is what the events it makes carry. A fan-out works
    through the participants by id: `last_participant_id` is how far it has come.
    """

    __tablename__: ClassVar[str] = "automation"
    __table_args__ = (
        _of("program", "program_id"),
        UniqueConstraint("organization_id", "event_id", "rule_id", "action_index"),
        Index(
            "automation_due_idx",
            "organization_id",
            "program_id",
            "trigger_at",
            "id",
            postgresql_where=text("status = 'active' and trigger_type = 'one_time'"),
        ),
        Index(
            "automation_fan_out_idx",
            "organization_id",
            "program_id",
            "created_at",
            "id",
            postgresql_where=text("execution_status in ('pending', 'executing')"),
        ),
        Index(None, "organization_id", "program_id", "created_at", "id"),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    program_id: UUID
    name: str = _text()
    event_name: str = _text()
    scope: str = _text()
    trigger_type: str = _text()
    trigger_at: datetime = _instant()
    payload: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON, nullable=True))
    participant_id: UUID | None = Field(default=None)
    source: str = _text()
    status: str = _text()
    depth: int = Field(default=0, sa_type=SmallInteger)
    event_id: UUID | None = Field(default=None)
    rule_id: UUID | None = Field(default=None)
    action_index: int | None = Field(default=None, sa_type=SmallInteger, nullable=True)
    request_id: str | None = _text(nullable=True)
    processed_at: datetime | None = _instant(nullable=True)
    error_message: str | None = _text(nullable=True)
    execution_status: str | None = _text(nullable=True)
    execution_started_at: datetime | None = _instant(nullable=True)
    execution_completed_at: datetime | None = _instant(nullable=True)
    execution_error: str | None = _text(nullable=True)
    participants_total: int | None = _big(nullable=True)
    participants_processed: int | None = _big(nullable=True)
    last_participant_id: UUID | None = Field(default=None)
    created_at: datetime = _instant()
    updated_at: datetime = _instant()
    deleted_at: datetime | None = _instant(nullable=True)


class Simulation(SQLModel, table=True):
    """A draft rule set that is run against past events. Contract: README.md "Simulations".

    It goes through the events in the order of (processed_at, seq); `last_processed_at` and `last_seq` are how far it
    has come. `rules` is the rule set as it was when the simulation was made, `results` the figures so far.
    `sequence_before` is the newest journal entry before `starts_at`; null until it begins. `starts` counts how often a
    worker was lost over it since the last batch.
    """

    __tablename__: ClassVar[str] = "simulation"
    __table_args__ = (
        _of("program", "program_id"),
        Index(None, "organization_id", "program_id", "created_at", "id"),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    program_id: UUID
    status: str = _text()
    rules: list[dict[str, Any]] = Field(sa_column=Column(JSON, nullable=False))
    starts_at: datetime = _instant()
    ends_at: datetime = _instant()
    participant_filter: str | None = _text(nullable=True)
    basis: str = _text()
    events_total: int = _big()
    events_done: int = _big()
    last_processed_at: datetime | None = _instant(nullable=True)
    last_seq: int | None = _big(nullable=True)
    sequence_before: int | None = _big(nullable=True)
    starts: int = Field(default=0, sa_type=SmallInteger)
    results: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    error: str | None = _text(nullable=True)
    api_key_id: UUID | None = Field(default=None)
    created_at: datetime = _instant()
    updated_at: datetime = _instant()
    finished_at: datetime | None = _instant(nullable=True)


class SimulationHolder(SQLModel, table=True):
    """What a simulation has made of one participant, group or program so far: state, balances, lots and holds.

    `is_included` says of a participant with events whether the simulation's filter lets them be simulated; null without
    a filter. `state` is null of one who has no further part in it.
    """

    __tablename__: ClassVar[str] = "simulation_holder"
    __table_args__ = (_of("simulation", "simulation_id"),)

    organization_id: UUID = Field(primary_key=True)
    simulation_id: UUID = Field(primary_key=True)
    entity_id: UUID = Field(primary_key=True)
    is_included: bool | None = Field(default=None)
    state: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON, nullable=True))


class Reward(SQLModel, table=True):
    """An item of a program's catalog. Contract: redemptions.md 4. Its row lock guards the stock and who has had it."""

    __tablename__: ClassVar[str] = "reward"
    __table_args__ = (
        _of("program", "program_id"),
        _of("asset", "asset_id"),
        UniqueConstraint("organization_id", "program_id", "name"),
        Index(None, "organization_id", "program_id", "created_at", "id"),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    program_id: UUID
    name: str = _text()
    description: str | None = _text(nullable=True)
    category: str | None = _text(nullable=True)
    redemption_type: str = _text()
    asset_id: UUID
    unit_cost: Decimal = _number()
    status: str = _text()
    max_total: int | None = _big(nullable=True)
    max_per_participant: int | None = _big(nullable=True)
    available_from: datetime | None = _instant(nullable=True)
    available_until: datetime | None = _instant(nullable=True)
    # `metadata` is SQLAlchemy's own name on a mapped class.
    extra: dict[str, Any] | None = Field(default=None, sa_column=Column("metadata", JSON, nullable=True))
    requires_confirmation: bool = Field(default=False)
    eligibility: str | None = _text(nullable=True)
    redeemed_count: int = _big()
    created_at: datetime = _instant()
    updated_at: datetime = _instant()


class RewardUsage(SQLModel, table=True):
    """How many units of a reward a participant has, net of reversals. Guarded by the reward's row lock."""

    __tablename__: ClassVar[str] = "reward_usage"

    organization_id: UUID = Field(primary_key=True)
    reward_id: UUID = Field(primary_key=True)
    participant_id: UUID = Field(primary_key=True)
    quantity: int = _big()


class Redemption(SQLModel, table=True):
    """A participant's spending. Contract: redemptions.md 2 and 3. Its row changes under its participant's lock.

    The target is the one of the program when it was made; `target_entity_type` and `target_entity_id` only for a
    LEDGER_ENTITY, `target_lot_id` where that has lots. `requested_*` and `expires_at` only for two-step ones, whose
    hold has the redemption's id. `confirm_*` remember the key that a confirm was sent with.
    """

    __tablename__: ClassVar[str] = "redemption"
    __table_args__ = (
        Index(None, "organization_id", "participant_id", "created_at", "id"),
        Index(
            "redemption_reward_idx",
            "organization_id",
            "reward_id",
            "participant_id",
            "created_at",
            "id",
            postgresql_where=text("reward_id is not null"),
        ),
        Index(
            "redemption_pending_idx",
            "organization_id",
            "expires_at",
            "id",
            postgresql_where=text("status = 'PENDING'"),
        ),
        Index(
            "redemption_waiting_idx",
            "organization_id",
            "participant_id",
            "expires_at",
            "id",
            postgresql_where=text("status = 'PENDING'"),
        ),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    participant_id: UUID
    program_id: UUID
    asset_id: UUID
    amount: Decimal = _number()
    description: str = _text()
    reward_id: UUID | None = Field(default=None)
    quantity: int | None = _big(nullable=True)
    unit_cost: Decimal | None = _number(nullable=True)
    reversed_amount: Decimal = _number()
    reversed_quantity: int | None = _big(nullable=True)
    status: str = _text()
    journal_entry_id: UUID
    extra: dict[str, Any] | None = Field(default=None, sa_column=Column("metadata", JSON, nullable=True))
    target_type: str = _text()
    target_entity_type: str | None = _text(nullable=True)
    target_entity_id: UUID | None = Field(default=None)
    target_lot_id: UUID | None = Field(default=None)
    requested_amount: Decimal | None = _number(nullable=True)
    requested_quantity: int | None = _big(nullable=True)
    expires_at: datetime | None = _instant(nullable=True)
    confirmed_at: datetime | None = _instant(nullable=True)
    canceled_at: datetime | None = _instant(nullable=True)
    cancel_reason: str | None = _text(nullable=True)
    confirm_key: str | None = _text(nullable=True)
    confirm_hash: bytes | None = Field(default=None, sa_type=LargeBinary)
    idempotency_key: str | None = _text(nullable=True)
    api_key_id: UUID | None = Field(default=None)
    created_at: datetime = _instant()
    updated_at: datetime = _instant()


class RedemptionLot(SQLModel, table=True):
    """What a redemption took of one lot, in the order of taking, and what reversals have given back to it.

    While the redemption is pending `held_lot_id` is the HELD lot that the part lies in (the same as `lot_id` where the
    lot was taken whole).
    """

    __tablename__: ClassVar[str] = "redemption_lot"

    organization_id: UUID = Field(primary_key=True)
    redemption_id: UUID = Field(primary_key=True)
    ordinal: int = Field(primary_key=True)
    lot_id: UUID
    held_lot_id: UUID | None = Field(default=None)
    amount: Decimal = _number()
    refilled: Decimal = _number()


class RedemptionReversal(SQLModel, table=True):
    """Value of a redemption that was given back. Contract: redemptions.md 2.5."""

    __tablename__: ClassVar[str] = "redemption_reversal"
    __table_args__ = (Index(None, "organization_id", "redemption_id", "created_at", "id"),)

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    redemption_id: UUID
    amount: Decimal = _number()
    quantity: int | None = _big(nullable=True)
    reason: str = _text()
    journal_entry_id: UUID
    api_key_id: UUID | None = Field(default=None)
    created_at: datetime = _instant()


class Transfer(SQLModel, table=True):
    """Value moved from one holder to others, atomically. Contract: redemptions.md 5."""

    __tablename__: ClassVar[str] = "transfer"
    __table_args__ = (
        _of("program", "program_id"),
        Index(None, "organization_id", "created_at", "id"),
        Index(None, "organization_id", "program_id", "created_at", "id"),
        Index(None, "organization_id", "asset_id", "created_at", "id"),
        Index(None, "organization_id", "source_id", "created_at", "id"),
    )

    organization_id: UUID = Field(primary_key=True)
    id: UUID = Field(primary_key=True)
    program_id: UUID
    asset_id: UUID
    source_type: str = _text()
    source_id: UUID
    source_external_id: str | None = _text(nullable=True)
    total_amount: Decimal = _number()
    recipient_count: int = Field(sa_type=SmallInteger)
    description: str = _text()
    extra: dict[str, Any] | None = Field(default=None, sa_column=Column("metadata", JSON, nullable=True))
    journal_entry_id: UUID
    api_key_id: UUID | None = Field(default=None)
    created_at: datetime = _instant()


class TransferRecipient(SQLModel, table=True):
    """One row of a transfer's recipients, in request order. `created_at` is the transfer's, for the index of lists."""

    __tablename__: ClassVar[str] = "transfer_recipient"
    __table_args__ = (Index(None, "organization_id", "entity_id", "created_at", "transfer_id"),)

    organization_id: UUID = Field(primary_key=True)
    transfer_id: UUID = Field(primary_key=True)
    ordinal: int = Field(sa_type=SmallInteger, primary_key=True)
    entity_type: str = _text()
    entity_id: UUID
    external_id: str | None = _text(nullable=True)
    amount: Decimal = _number()
    created_at: datetime = _instant()
