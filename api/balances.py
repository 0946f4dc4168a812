"""Balance operations on participants and groups over HTTP. Contract: holders.md 4.3 and 6."""

from datetime import timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

from api.afterwards import Afterwards, in_time, look, patience_of, wait_of
from api.models import (
    AmountText,
    Boolean,
    Description,
    IdempotencyKey,
    ReferenceId,
    RequestModel,
    ResponseModel,
    Timestamp,
    omittable,
)
from api.responses import JsonResponse, respond_dict
from api.route import ApiServices, Tx, make_router
from db.session import Transaction
from domain import balances, timed_holds
from domain.balances import (
    LOT_IDS_PER_CALL,
    AdjustRequest,
    AdjustResult,
    AdjustType,
    Holder,
    HolderBalance,
    OnExpiry,
    Operation,
    OperationRequest,
    OperationResult,
)
from domain.durations import MAX_TEXT_LENGTH, parse_duration
from domain.errors import Refusal
from domain.ledger.movements import HolderType
from domain.money import format_amount
from domain.timed_holds import Reservation

router = make_router("Balances")

AdjustBucket = Literal["AVAILABLE", "HELD"]


def _read_duration(value: Any) -> timedelta:
    if not isinstance(value, str):
        raise PydanticCustomError("duration", "must be a duration such as 24h", {"expected": "duration"})
    try:
        return parse_duration(value)
    except ValueError as error:
        raise PydanticCustomError("duration", "{message}", {"message": str(error), "expected": "duration"}) from None


Duration = Annotated[timedelta, BeforeValidator(_read_duration, json_schema_input_type=str)]
"""A duration in Go's syntax."""

LotIds = Annotated[list[UUID], Field(min_length=1, max_length=LOT_IDS_PER_CALL)]


class Adjust(RequestModel):
    """A credit or debit by hand."""

    program_id: UUID = Field(description="The program in whose context it happens.")
    asset_id: UUID = Field(description="An asset that is linked to the program.")
    type: AdjustType = Field(description="CREDIT adds, DEBIT takes away.")
    amount: AmountText
    description: Description
    bucket: AdjustBucket = Field(
        default="AVAILABLE",
        description="The bucket that changes. A CREDIT into HELD is provisional until released, settled or voided.",
    )
    allow_negative: Boolean = Field(
        default=False, description="Let a DEBIT of AVAILABLE take more than there is; without effect on a CREDIT."
    )
    idempotency_key: IdempotencyKey | None = None

    def request(self) -> AdjustRequest:
        """The same, for the domain."""
        return AdjustRequest(
            program_id=self.program_id,
            asset_id=self.asset_id,
            type=self.type,
            amount=self.amount,
            description=self.description,
            bucket=self.bucket,
            allow_negative=self.allow_negative,
            idempotency_key=self.idempotency_key,
        )


class OperationBody(RequestModel):
    """What hold, release, forfeit and void-hold have in common."""

    program_id: UUID = Field(description="The program in whose context it happens.")
    asset_id: UUID = Field(description="An asset that is linked to the program.")
    description: Description
    amount: AmountText | None = Field(
        default=None, description="Omitted: the full bucket (SIMPLE) or all matching lots (LOT)."
    )
    earned_from: Timestamp | None = Field(default=None, description="LOT only: lots earned at or after this instant.")
    earned_to: Timestamp | None = Field(default=None, description="LOT only: lots earned at or before this instant.")
    lot_ids: LotIds | None = Field(default=None, description="LOT only: none but these lots.")
    reference_id: ReferenceId | None = Field(
        default=None,
        description="LOT only: a hold stamps its lots with it, everything else takes the lots that have it.",
    )
    idempotency_key: IdempotencyKey | None = None

    def request(self, operation: Operation, **more: Any) -> OperationRequest:
        """The same, for the domain; `more` are fields of the one operation."""
        return OperationRequest(
            operation=operation,
            program_id=self.program_id,
            asset_id=self.asset_id,
            description=self.description,
            amount=self.amount,
            reference_id=self.reference_id,
            lot_ids=self.lot_ids,
            earned_from=self.earned_from,
            earned_to=self.earned_to,
            idempotency_key=self.idempotency_key,
            **more,
        )


class HoldBody(OperationBody):
    """Value to reserve. `expires_at` and `expires_in` exclude each other."""

    expires_at: Timestamp | None = Field(
        default=None, description="The end of the hold (not of its lots); in the future."
    )
    expires_in: Duration | None = Field(
        default=None,
        description="The same, as a duration from now.",
        examples=["168h"],
        json_schema_extra={"maxLength": MAX_TEXT_LENGTH},
    )
    on_expiry: OnExpiry | None = Field(
        default=None, description="What becomes of the rest at the end: RELEASE (default) or FORFEIT."
    )


class ForfeitBody(OperationBody):
    """Value to take away for good."""

    bucket: Literal["AVAILABLE", "HELD"] = Field(description="The bucket to take it from.")


class VoidHoldBody(OperationBody):
    """Provisional value to give back to where it came from: always all of the reference."""

    reference_id: ReferenceId = Field(description="The reference of the CREDIT into HELD.")
    amount: AmountText | None = Field(default=None, description="Refused: a void is never partial.")
    lot_ids: LotIds | None = Field(default=None, description="Refused: a void is never partial.")
    earned_from: Timestamp | None = Field(default=None, description="Refused: a void is never partial.")
    earned_to: Timestamp | None = Field(default=None, description="Refused: a void is never partial.")


class BalanceOut(ResponseModel):
    """The buckets of one asset."""

    available: str = Field(description="Spendable; may be negative after a debit with allow_negative.")
    deferred: str = Field(description="Not matured yet.")
    held: str = Field(description="Reserved.")


class GroupAdjustOut(ResponseModel):
    """What an adjust did."""

    amount: str = Field(description="The amount, with exactly the asset's decimals.")
    asset_id: UUID
    bucket: AdjustBucket
    journal_entry_id: UUID = Field(description="The entry that recorded it.")
    message: str
    program_id: UUID
    type: AdjustType


class AdjustOut(GroupAdjustOut):
    """What an adjust did, and the balance after it."""

    balance: BalanceOut = Field(description="After the operation; for a replay, the balance now.")


class ProcessedLot(ResponseModel):
    """What an operation moved of one lot."""

    id: UUID = Field(description="The lot that is now in the target state.")
    amount: str = Field(description="What was moved.")


class OperationOut(ResponseModel):
    """What a hold, release, forfeit or void-hold did."""

    amount_processed: str = Field(description="What was moved; a release of LOT assets may find less than asked for.")
    asset_id: UUID
    balance: BalanceOut = Field(description="After the operation; for a replay, the balance now.")
    hold_id: UUID | None = omittable("The hold that was made, or that was named.")
    journal_entry_id: UUID = Field(description="The entry that recorded it.")
    lots_processed: list[ProcessedLot] | None = omittable("LOT assets only, in FIFO order.")
    message: str
    operation: Operation
    program_id: UUID
    reference_id: str | None = omittable("As it was sent.")


def present_operation(
    operation: Operation, program_id: UUID, asset_id: UUID, reference_id: str | None, result: OperationResult
) -> JsonResponse:
    """An `OperationOut`, sent as it is."""
    amount = format_amount(result.amount, result.scale)
    body: dict[str, Any] = {
        "amount_processed": amount,
        "asset_id": str(asset_id),
        "balance": _buckets(result.balance, result.scale),
        "journal_entry_id": str(result.journal_entry_id),
        "message": f"Processed {amount}",
        "operation": operation,
        "program_id": str(program_id),
    }
    if result.hold_id is not None:
        body["hold_id"] = str(result.hold_id)
    if result.lots is not None:
        body["lots_processed"] = [
            {"id": str(lot_id), "amount": format_amount(moved, result.scale)} for lot_id, moved in result.lots
        ]
    if reference_id is not None:
        body["reference_id"] = reference_id
    return respond_dict(body, replayed=result.replayed)


def _serve(router: APIRouter, path: str, holder_type: HolderType) -> None:
    """The operations on holders of one type, under `path`."""
    adjust_out = AdjustOut if holder_type == "PARTICIPANT" else GroupAdjustOut

    @router.post(f"{path}/{{id}}/balances/adjust", response_model=adjust_out)
    async def adjust_balance(request: Request, tx: Tx, id: UUID, body: Adjust) -> JsonResponse:
        """Credit or debit by hand."""
        result = await balances.adjust(tx, Holder(holder_type, id), body.request())
        tell_ended_holds(tx, request.app.state.services, result)
        return respond_dict(_adjusted(holder_type, body, result), replayed=result.replayed)

    @router.post(f"{path}/{{id}}/balances/hold", response_model=OperationOut)
    async def hold_balance(request: Request, tx: Tx, id: UUID, body: HoldBody) -> Response:
        """Reserve AVAILABLE value: it stays HELD until it is released or forfeited, or until the hold's end."""
        end = {"expires_at": body.expires_at, "expires_in": body.expires_in, "on_expiry": body.on_expiry}
        hold = body.request("HOLD", **end)
        if hold.has_end:
            return await make_timed_hold(tx, request.app.state.services, Holder(holder_type, id), hold)
        return await _operate(tx, request.app.state.services, Holder(holder_type, id), hold)

    @router.post(f"{path}/{{id}}/balances/release", response_model=OperationOut)
    async def release_balance(request: Request, tx: Tx, id: UUID, body: OperationBody) -> JsonResponse:
        """Bring HELD value back to AVAILABLE."""
        return await _operate(tx, request.app.state.services, Holder(holder_type, id), body.request("RELEASE"))

    @router.post(f"{path}/{{id}}/balances/forfeit", response_model=OperationOut)
    async def forfeit_balance(request: Request, tx: Tx, id: UUID, body: ForfeitBody) -> JsonResponse:
        """Take value away for good."""
        return await _operate(
            tx, request.app.state.services, Holder(holder_type, id), body.request("FORFEIT", bucket=body.bucket)
        )

    @router.post(f"{path}/{{id}}/balances/void-hold", response_model=OperationOut)
    async def void_held_balance(request: Request, tx: Tx, id: UUID, body: VoidHoldBody) -> JsonResponse:
        """Cancel provisional value: all of a reference goes back to where it came from."""
        return await _operate(tx, request.app.state.services, Holder(holder_type, id), body.request("VOID_HOLD"))


async def make_timed_hold(
    tx: Transaction, services: ApiServices, holder: Holder, request: OperationRequest
) -> Response:
    """Make a hold with an end by its workflow. Contract: holders.md 6.8.

    A replay costs no call of Temporal. Refused with `service_unavailable` when no worker made it in time; nothing is
    reserved then, nor will be. Raises Refusal.
    """
    result = await balances.find_operation(tx, holder, request)
    if result is not None:
        return present_operation("HOLD", request.program_id, request.asset_id, request.reference_id, result)
    # What is wrong whoever looks at it is said at once, with or without Temporal.
    balances.require_future_end(request, tx.now)
    wait_s = wait_of(services.settings)
    reservation = timed_holds.prepare(tx, holder, request, wait_s)

    async def work() -> Response:
        made = await in_time(
            lambda: services.gateway.make_hold(reservation, wait_s), lambda: _outcome(services, reservation), wait_s
        )
        return present_operation("HOLD", request.program_id, request.asset_id, request.reference_id, made)

    return Afterwards(work)


async def _outcome(services: ApiServices, reservation: Reservation) -> OperationResult:
    async def ask(tx: Transaction) -> OperationResult:
        found = await timed_holds.outcome(tx, reservation)
        if found is None:
            # Rolls the transaction back, so the key stays unused.
            raise Refusal("service_unavailable", timed_holds.TOO_LATE)
        return found

    return await look(services.database, reservation.organization_id, ask, patience_of(services.settings))


def tell_ended_holds(tx: Transaction, services: ApiServices, result: AdjustResult | OperationResult) -> None:
    """Tell the workflows of the holds that this operation ended, after the commit and without waiting for it."""
    if result.ended_holds:
        tx.after_commit(lambda: services.gateway.tell_holds_ended(result.ended_holds))


async def _operate(tx: Transaction, services: ApiServices, holder: Holder, request: OperationRequest) -> JsonResponse:
    result = await balances.operate(tx, holder, request)
    tell_ended_holds(tx, services, result)
    return present_operation(request.operation, request.program_id, request.asset_id, request.reference_id, result)


def _adjusted(holder_type: HolderType, body: Adjust, result: AdjustResult) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "amount": format_amount(result.amount, result.scale),
        "asset_id": str(body.asset_id),
        "bucket": body.bucket,
        "journal_entry_id": str(result.journal_entry_id),
        "message": "Group balance adjusted successfully",
        "program_id": str(body.program_id),
        "type": body.type,
    }
    if holder_type == "PARTICIPANT":
        answer["balance"] = _buckets(result.balance, result.scale)
        answer["message"] = "Balance adjusted successfully"
    return answer


def _buckets(balance: HolderBalance, scale: int) -> dict[str, str]:
    return {
        "available": format_amount(balance.available, scale),
        "deferred": format_amount(balance.deferred, scale),
        "held": format_amount(balance.held, scale),
    }


_serve(router, "/participants", "PARTICIPANT")
_serve(router, "/groups", "GROUP")
