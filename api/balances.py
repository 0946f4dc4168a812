"""Balance operations on participants over HTTP. Contract: holders.md 6."""

from typing import Literal
from uuid import UUID

from pydantic import Field

from api.models import AmountText, Boolean, Description, IdempotencyKey, RequestModel, ResponseModel
from api.responses import JsonResponse, respond_dict
from api.route import Tx, make_router
from domain import balances
from domain.balances import AdjustRequest, AdjustResult, AdjustType, Holder
from domain.money import format_amount

router = make_router("Balances")

AdjustBucket = Literal["AVAILABLE", "HELD"]


class Adjust(RequestModel):
    """A credit or debit by hand."""

    program_id: UUID = Field(description="The program in whose context it happens.")
    asset_id: UUID = Field(description="An asset that is linked to the program.")
    type: AdjustType = Field(description="CREDIT adds, DEBIT takes away.")
    amount: AmountText
    description: Description
    bucket: AdjustBucket = Field(default="AVAILABLE", description="The bucket that changes.")
    allow_negative: Boolean = Field(
        default=False, description="Let a DEBIT take more than there is; without effect on a CREDIT."
    )
    idempotency_key: IdempotencyKey | None = None


class BalanceOut(ResponseModel):
    """The buckets of one asset."""

    available: str = Field(description="Spendable; may be negative after a debit with allow_negative.")
    deferred: str = Field(description="Not matured yet.")
    held: str = Field(description="Reserved.")


class AdjustOut(ResponseModel):
    """What an adjust did."""

    amount: str = Field(description="The amount, with exactly the asset's decimals.")
    asset_id: UUID
    balance: BalanceOut = Field(description="After the operation; for a replay, the balance now.")
    bucket: AdjustBucket
    journal_entry_id: UUID = Field(description="The entry that recorded it.")
    message: str
    program_id: UUID
    type: AdjustType


@router.post("/participants/{id}/balances/adjust", response_model=AdjustOut)
async def adjust_balance(tx: Tx, id: UUID, body: Adjust) -> JsonResponse:
    """Credit or debit a participant by hand."""
    request = AdjustRequest(
        program_id=body.program_id,
        asset_id=body.asset_id,
        type=body.type,
        amount=body.amount,
        description=body.description,
        bucket=body.bucket,
        allow_negative=body.allow_negative,
        idempotency_key=body.idempotency_key,
    )
    result = await balances.adjust(tx, Holder("PARTICIPANT", id), request)
    return respond_dict(present_adjust(body, result), replayed=result.replayed)


def present_adjust(body: Adjust, result: AdjustResult) -> dict[str, object]:
    """An `AdjustOut`, as the dict that is sent."""
    balance = result.balance
    return {
        "amount": format_amount(result.amount, result.scale),
        "asset_id": str(body.asset_id),
        "balance": {
            "available": format_amount(balance.available, result.scale),
            "deferred": format_amount(balance.deferred, result.scale),
            "held": format_amount(balance.held, result.scale),
        },
        "bucket": body.bucket,
        "journal_entry_id": str(result.journal_entry_id),
        "message": "Balance adjusted successfully",
        "program_id": str(body.program_id),
        "type": body.type,
    }
