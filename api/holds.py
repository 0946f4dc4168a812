"""Hold records over HTTP. Contract: holders.md 6.8."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import Query
from pydantic import Field
from starlette.requests import Request

from api.balances import OperationOut, present_operation, tell_ended_holds
from api.models import (
    AmountText,
    Description,
    IdempotencyKey,
    ListOf,
    RequestModel,
    ResponseModel,
    Timestamp,
    omittable,
)
from api.queries import PageOf50, listed
from api.responses import JsonResponse
from api.route import ApiServices, Tx, make_router
from db.session import Transaction
from domain import holds
from domain.balances import OnExpiry
from domain.holds import HoldEnd, HoldFilter, HoldRecord
from domain.ledger.holds import HoldStatus
from domain.money import format_amount

router = make_router("Holds")


class HoldOut(ResponseModel):
    """A reservation of value."""

    hold_id: UUID
    participant_id: UUID | None = omittable("Whose value it is, unless it is a group's.")
    group_id: UUID | None = omittable("Whose value it is, unless it is a participant's.")
    program_id: UUID = Field(description="The program in whose context it was made.")
    asset_id: UUID
    amount: str = Field(description="What was held at first.")
    remaining: str = Field(description="What is still held.")
    status: HoldStatus = Field(description="ACTIVE while something remains; then how the last of it left.")
    reference_id: str | None = Field(description="Correlates the hold with what ends it.")
    description: str | None = Field(description="As it was given.")
    expires_at: Timestamp | None = Field(description="When what remains is released or forfeited by itself.")
    on_expiry: OnExpiry | None = Field(description="Which of the two; null without an end.")
    journal_entry_id: UUID = Field(description="The entry that made it.")
    created_at: Timestamp
    updated_at: Timestamp = Field(description="When something was last taken of it.")


class HoldEndBody(RequestModel):
    """How much of the hold to end."""

    description: Description
    amount: AmountText | None = Field(default=None, description="Omitted: all that remains.")
    idempotency_key: IdempotencyKey | None = None

    def request(self, operation: Literal["RELEASE", "FORFEIT"]) -> HoldEnd:
        """The same, for the domain."""
        return HoldEnd(
            operation=operation,
            description=self.description,
            amount=self.amount,
            idempotency_key=self.idempotency_key,
        )


@router.get("/holds", response_model=ListOf[HoldOut])
async def list_holds(
    tx: Tx,
    page: PageOf50,
    participant_id: Annotated[UUID | None, Query(description="Only holds of this participant.")] = None,
    group_id: Annotated[UUID | None, Query(description="Only holds of this group.")] = None,
    asset_id: Annotated[UUID | None, Query(description="Only holds of this asset.")] = None,
    program_id: Annotated[UUID | None, Query(description="Only holds of this program.")] = None,
    status: Annotated[HoldStatus | None, Query(description="Only this status.")] = None,
    reference_id: Annotated[str | None, Query(max_length=255, description="Only this reference.")] = None,
) -> ListOf[HoldOut]:
    """List holds, newest first."""
    wanted = HoldFilter(
        participant_id=participant_id,
        group_id=group_id,
        asset_id=asset_id,
        program_id=program_id,
        status=status,
        reference_id=reference_id,
    )
    return listed(await holds.find(tx, wanted, page), _present)


@router.get("/holds/{id}", response_model=HoldOut)
async def get_hold(tx: Tx, id: UUID) -> HoldOut:
    """Get one hold, ended or not."""
    return _present(await holds.get(tx, id))


@router.post("/holds/{id}/release", response_model=OperationOut)
async def release_hold(request: Request, tx: Tx, id: UUID, body: HoldEndBody) -> JsonResponse:
    """Bring what this hold reserves back to AVAILABLE."""
    return await _end(tx, request.app.state.services, id, body.request("RELEASE"))


@router.post("/holds/{id}/forfeit", response_model=OperationOut)
async def forfeit_hold(request: Request, tx: Tx, id: UUID, body: HoldEndBody) -> JsonResponse:
    """Take away for good what this hold reserves."""
    return await _end(tx, request.app.state.services, id, body.request("FORFEIT"))


async def _end(tx: Transaction, services: ApiServices, hold_id: UUID, request: HoldEnd) -> JsonResponse:
    hold, result = await holds.end(tx, hold_id, request)
    tell_ended_holds(tx, services, result)
    return present_operation(request.operation, hold.program_id, hold.asset_id, None, result)


def _present(record: HoldRecord) -> HoldOut:
    hold = record.hold
    return HoldOut.of(
        hold,
        hold_id=hold.id,
        participant_id=hold.entity_id if hold.entity_type == "PARTICIPANT" else None,
        group_id=hold.entity_id if hold.entity_type == "GROUP" else None,
        amount=format_amount(hold.amount, record.scale),
        remaining=format_amount(hold.remaining, record.scale),
        journal_entry_id=hold.entry_id,
    )
