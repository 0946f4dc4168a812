"""Redemptions and reversals as the API shows them. Contract: redemptions.md 2, 2.5 and 3.2."""

from typing import Annotated, Any
from uuid import UUID

from pydantic import Field

from api.models import Integer, ResponseModel, Timestamp, omittable
from domain import limits
from domain.clock import format_timestamp
from domain.money import format_amount
from domain.redemptions import Redemption, RedemptionStatus, Reversal

Quantity = Annotated[Integer, Field(ge=1, le=limits.REWARD_UNITS)]
"""How many units of an item."""


class RedemptionOut(ResponseModel):
    """A participant's spending, of an amount or on an item of the catalog."""

    id: UUID
    participant_id: UUID = Field(description="Who redeemed.")
    program_id: UUID
    asset_id: UUID = Field(description="The asset that was debited; for items the reward's.")
    amount: str = Field(description="What was debited in all; while PENDING, what is reserved.")
    description: str = Field(description="Also the journal entry's.")
    reward_id: UUID | None = omittable("The item, if it was one.")
    quantity: int | None = omittable("UNIT_BASED items only: how many units.")
    unit_cost: str | None = omittable("Items only: the price at the time (AMOUNT_BASED: the minimum).")
    reversed_amount: str = Field(description="What has been given back so far. The rest can still be reversed.")
    reversed_quantity: int | None = omittable("UNIT_BASED items only: how many units have been given back.")
    status: RedemptionStatus
    journal_entry_id: UUID = Field(description="The entry of the redemption; until it is confirmed, of the hold.")
    metadata: dict[str, Any] | None = omittable("As it was sent.")
    requested_amount: str | None = omittable("Two-step only: what was reserved.")
    requested_quantity: int | None = omittable("Two-step, UNIT_BASED items only: how many units were reserved.")
    expires_at: Timestamp | None = omittable("Two-step only: until when it can be confirmed.")
    confirmed_at: Timestamp | None = omittable("Two-step only: when it was confirmed.")
    canceled_at: Timestamp | None = omittable("Two-step only: when it was canceled.")
    created_at: Timestamp
    updated_at: Timestamp = Field(description="When it last changed.")


class ReversalOut(ResponseModel):
    """Value of a redemption that was given back."""

    id: UUID
    redemption_id: UUID
    amount: str = Field(description="What was given back.")
    quantity: int | None = omittable("UNIT_BASED items only: how many units.")
    reason: str
    journal_entry_id: UUID
    created_at: Timestamp


def present(redemption: Redemption) -> dict[str, Any]:
    """A `RedemptionOut`, ready for `respond_dict`."""
    scale = redemption.scale
    body: dict[str, Any] = {
        "id": redemption.id,
        "participant_id": redemption.participant_id,
        "program_id": redemption.program_id,
        "asset_id": redemption.asset_id,
        "amount": format_amount(redemption.amount, scale),
        "description": redemption.description,
        "reversed_amount": format_amount(redemption.reversed_amount, scale),
        "status": redemption.status,
        "journal_entry_id": redemption.journal_entry_id,
        "created_at": format_timestamp(redemption.created_at),
        "updated_at": format_timestamp(redemption.updated_at),
    }
    optional = {
        "reward_id": redemption.reward_id,
        "quantity": redemption.quantity,
        "unit_cost": redemption.unit_cost and format_amount(redemption.unit_cost, scale),
        "reversed_quantity": redemption.reversed_quantity,
        "metadata": redemption.metadata,
        "requested_amount": redemption.requested_amount and format_amount(redemption.requested_amount, scale),
        "requested_quantity": redemption.requested_quantity,
        "expires_at": redemption.expires_at and format_timestamp(redemption.expires_at),
        "confirmed_at": redemption.confirmed_at and format_timestamp(redemption.confirmed_at),
        "canceled_at": redemption.canceled_at and format_timestamp(redemption.canceled_at),
    }
    return body | {name: value for name, value in optional.items() if value is not None}


def present_reversal(reversal: Reversal) -> dict[str, Any]:
    """A `ReversalOut`, ready for `respond_dict`."""
    body: dict[str, Any] = {
        "id": reversal.id,
        "redemption_id": reversal.redemption_id,
        "amount": format_amount(reversal.amount, reversal.scale),
        "reason": reversal.reason,
        "journal_entry_id": reversal.journal_entry_id,
        "created_at": format_timestamp(reversal.created_at),
    }
    return body if reversal.quantity is None else {**body, "quantity": reversal.quantity}
