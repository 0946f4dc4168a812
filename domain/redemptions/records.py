"""What redemptions and reversals are, how they are asked for, how their rows are read. Contract: redemptions.md 2."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

from db.session import Transaction
from domain.errors import Problem, Refusal, not_found
from domain.money import format_amount

RedemptionStatus = Literal["PENDING", "COMPLETED", "PARTIALLY_REVERSED", "FULLY_REVERSED", "CANCELED", "EXPIRED"]
TargetType = Literal["SYSTEM_REDEMPTION", "SYSTEM_BREAKAGE", "LEDGER_ENTITY"]
TargetEntity = Literal["PARTICIPANT", "GROUP", "PROGRAM"]

SHORTEST_EXPIRY = timedelta(minutes=1)
LONGEST_EXPIRY = timedelta(days=30)
DEFAULT_EXPIRY = timedelta(days=1)
"""How long a pending redemption may, must and does wait for its confirm. Contract: redemptions.md 3.1."""

# In the order of the fields of `Redemption`; what its asset says about it comes last.
_COLUMNS = """
r.id, r.participant_id, r.program_id, r.asset_id, r.amount, r.description, r.reward_id, r.quantity, r.unit_cost,
r.reversed_amount, r.reversed_quantity, r.status, r.journal_entry_id, r.metadata, r.target_type, r.target_entity_type,
r.target_entity_id, r.target_lot_id, r.requested_amount, r.requested_quantity, r.expires_at, r.confirmed_at,
r.canceled_at, r.cancel_reason, r.confirm_key, r.confirm_hash, r.idempotency_key, r.api_key_id, r.created_at,
r.updated_at, a.scale, a.inventory_mode = 'LOT', a.status
"""

SELECT = f"""
select {_COLUMNS} from redemption r
join asset a on a.organization_id = r.organization_id and a.id = r.asset_id
where r.organization_id = %(organization_id)s
"""
"""Reads rows for `Redemption(*row)`; conditions on `r` follow with `and`."""


@dataclass(frozen=True, slots=True)
class CapturedTarget:
    """Where a redemption's value goes, for good, whatever the program's target is later. Contract: redemptions.md 2.8.

    The entity only for a LEDGER_ENTITY, its lot only where that has lots.
    """

    type: TargetType
    entity_type: TargetEntity | None = None
    entity_id: UUID | None = None
    lot_id: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RedemptionRequest:
    """A redemption to make: of an amount (`asset_id`) or of a catalog item (`reward_id`). `amount` is the text as sent.

    `expires_in` belongs to two-step ones only; None means DEFAULT_EXPIRY there.
    """

    participant_id: UUID
    program_id: UUID
    asset_id: UUID | None = None
    reward_id: UUID | None = None
    amount: str | None = None
    quantity: int | None = None
    description: str | None = None
    metadata: dict[str, Any] | None = None
    requires_confirmation: bool = False
    expires_in: timedelta | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmRequest:
    """What to take of what a pending redemption reserves; neither amount nor quantity: all of it."""

    amount: str | None = None
    quantity: int | None = None
    idempotency_key: str | None = None


@dataclass(slots=True)
class Redemption:
    """A redemption as it is now, with what its asset says about it. Fields as in `db.tables.Redemption`."""

    id: UUID
    participant_id: UUID
    program_id: UUID
    asset_id: UUID
    amount: Decimal
    description: str
    reward_id: UUID | None
    quantity: int | None
    unit_cost: Decimal | None
    reversed_amount: Decimal
    reversed_quantity: int | None
    status: RedemptionStatus
    journal_entry_id: UUID
    metadata: dict[str, Any] | None
    target_type: TargetType
    target_entity_type: TargetEntity | None
    target_entity_id: UUID | None
    target_lot_id: UUID | None
    requested_amount: Decimal | None
    requested_quantity: int | None
    expires_at: datetime | None
    confirmed_at: datetime | None
    canceled_at: datetime | None
    cancel_reason: str | None
    confirm_key: str | None
    confirm_hash: bytes | None
    idempotency_key: str | None
    api_key_id: UUID | None
    created_at: datetime
    updated_at: datetime
    scale: int
    has_lots: bool
    asset_status: str

    @property
    def is_two_step(self) -> bool:
        """Whether it was, or is, to be confirmed."""
        return self.requested_amount is not None

    @property
    def is_counted(self) -> bool:
        """Whether it counts in units of a reward (UNIT_BASED) rather than in amounts."""
        return self.quantity is not None

    @property
    def target(self) -> CapturedTarget:
        """Where its value goes, or went."""
        return CapturedTarget(self.target_type, self.target_entity_type, self.target_entity_id, self.target_lot_id)

    def is_overdue(self, now: datetime) -> bool:
        """Whether it waits for a confirm although its time is over."""
        return self.status == "PENDING" and self.expires_at is not None and self.expires_at <= now


@dataclass(frozen=True, slots=True)
class Created:
    """A redemption, and whether it had been made before with the same key; then it is as it is now."""

    redemption: Redemption
    replayed: bool


@dataclass(frozen=True, slots=True)
class Reversal:
    """Value of a redemption that was given back. Contract: redemptions.md 2.5."""

    id: UUID
    redemption_id: UUID
    amount: Decimal
    quantity: int | None
    reason: str
    journal_entry_id: UUID
    created_at: datetime
    scale: int


def require_minimum(amount: Decimal, minimum: Decimal, scale: int) -> None:
    """Refuse less than what an AMOUNT_BASED reward takes at least. Raises Refusal `amount_below_minimum`."""
    if amount >= minimum:
        return
    expected = f"at least {format_amount(minimum, scale)}"
    message = f"the reward takes {expected}"
    problem = Problem("amount", message, expected=expected, received=format_amount(amount, scale))
    raise Refusal("amount_below_minimum", message, [problem])


async def fetch(tx: Transaction, redemption_id: UUID) -> Redemption:
    """The redemption as it is stored. Raises Refusal `not_found`."""
    found = await look_up(tx, redemption_id)
    if found is None:
        raise not_found("redemption")
    return found


async def look_up(tx: Transaction, redemption_id: UUID) -> Redemption | None:
    """The redemption as it is stored; None where there is none."""
    params = {"organization_id": tx.organization_id, "id": redemption_id}
    row = await (await tx.execute(f"{SELECT} and r.id = %(id)s", params)).fetchone()
    return None if row is None else Redemption(*row)
