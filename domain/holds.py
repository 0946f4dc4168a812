"""Hold records: reading them, and ending one by its id. Contract: holders.md 6.8."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from sqlmodel import col, select

from db.session import Transaction
from db.tables import Asset, Hold
from domain import balances
from domain.balances import Holder, OperationRequest, OperationResult
from domain.errors import bad_field, not_found
from domain.ledger.holds import HoldStatus
from domain.pagination import Page, PageRequest, paginate


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldFilter:
    """Which holds to list; None means any. Everything combines with AND."""

    participant_id: UUID | None = None
    group_id: UUID | None = None
    asset_id: UUID | None = None
    program_id: UUID | None = None
    status: HoldStatus | None = None
    reference_id: str | None = None


@dataclass(frozen=True, slots=True)
class HoldRecord:
    """A hold with the decimals of its asset."""

    hold: Hold
    scale: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldEnd:
    """A release or forfeit of one hold; `amount` is the decimal text as it was sent, None for all that remains."""

    operation: Literal["RELEASE", "FORFEIT"]
    description: str
    amount: str | None = None
    idempotency_key: str | None = None


async def find(tx: Transaction, wanted: HoldFilter, page: PageRequest) -> Page[HoldRecord]:
    """A page of holds, newest first. Raises Refusal `bad_request` when both a participant and a group are named."""
    if wanted.participant_id is not None and wanted.group_id is not None:
        raise bad_field("group_id", "must not be sent together with participant_id", expected="absent")
    statement = select(Hold).where(Hold.organization_id == tx.organization_id)
    for entity_type, entity_id in (("PARTICIPANT", wanted.participant_id), ("GROUP", wanted.group_id)):
        if entity_id is not None:
            statement = statement.where(Hold.entity_type == entity_type, Hold.entity_id == entity_id)
    for name in ("asset_id", "program_id", "status", "reference_id"):
        value = getattr(wanted, name)
        if value is not None:
            statement = statement.where(getattr(Hold, name) == value)
    found = await paginate(tx, statement, keys=(col(Hold.created_at), col(Hold.id)), page=page)
    scales = await _scales(tx, {hold.asset_id for hold in found.items})
    return Page([HoldRecord(hold, scales[hold.asset_id]) for hold in found.items], found.next_cursor)


async def get(tx: Transaction, hold_id: UUID) -> HoldRecord:
    """One hold, ended or not. Raises Refusal `not_found`."""
    hold = await tx.first(select(Hold).where(Hold.organization_id == tx.organization_id, Hold.id == hold_id))
    if hold is None:
        raise not_found("hold")
    scales = await _scales(tx, {hold.asset_id})
    return HoldRecord(hold, scales[hold.asset_id])


async def end(tx: Transaction, hold_id: UUID, request: HoldEnd) -> tuple[Hold, OperationResult]:
    """Release or forfeit one hold or a part of it; the hold as it was before, and what moved.

    Ends by sealing its entry with the commit, as `balances.operate` does. Raises Refusal: `not_found`,
    `hold_not_active`, `conflict` (the hold of a pending redemption), `insufficient_balance` (more than remains), and
    those of `balances.operate`.
    """
    hold = (await get(tx, hold_id)).hold
    operation = OperationRequest(
        operation=request.operation,
        program_id=hold.program_id,
        asset_id=hold.asset_id,
        description=request.description,
        amount=request.amount,
        bucket="HELD",
        hold_id=hold_id,
        idempotency_key=request.idempotency_key,
    )
    return hold, await balances.operate(tx, holder_of(hold), operation)


def holder_of(hold: Hold) -> Holder:
    """Whose value the hold reserves."""
    return Holder("GROUP" if hold.entity_type == "GROUP" else "PARTICIPANT", hold.entity_id)


async def _scales(tx: Transaction, asset_ids: Collection[UUID]) -> dict[UUID, int]:
    if not asset_ids:
        return {}
    assets = select(Asset).where(Asset.organization_id == tx.organization_id, col(Asset.id).in_(asset_ids))
    return {asset.id: asset.scale for asset in await tx.all(assets)}
