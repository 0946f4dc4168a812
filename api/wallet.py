"""The program wallet over HTTP. Contract: basics.md 5.9."""

from typing import Annotated
from uuid import UUID

from fastapi import Query
from pydantic import Field

from api.models import AmountText, IdempotencyKey, ListOf, RequestModel, ResponseModel
from api.queries import PageOf50, listed
from api.responses import JsonResponse, respond_dict
from api.route import Tx, make_router
from domain import wallet
from domain.money import ZERO, format_amount
from domain.wallet import WalletBalance, WalletRequest, WalletResult

router = make_router("Program wallet")

FUNDED = "Program funded successfully"
BURNED = "Program balance burned successfully"
NO_WALLET = "No effect: an asset with issuance policy UNLIMITED has no program wallet"


class WalletMove(RequestModel):
    """An amount to fund or burn."""

    amount: AmountText
    description: Annotated[str, Field(max_length=500)] | None = Field(
        default=None, description="Why, for people; at most 500 characters."
    )
    idempotency_key: IdempotencyKey | None = None


class WalletMoveOut(ResponseModel):
    """What a fund or burn did."""

    available: str = Field(description="The wallet after the operation; for a replay, the wallet now.")
    journal_entry_id: UUID | None = Field(description="The entry that recorded it; null for UNLIMITED assets.")
    message: str


class WalletBalanceOut(ResponseModel):
    """What the wallet holds of one PREFUNDED asset."""

    asset_id: UUID
    available: str = Field(description="What can still be credited to holders, or burned.")
    deferred: str = Field(description="Always zero.")
    held: str = Field(description="Always zero.")
    issuance_policy: str = Field(description="Always PREFUNDED.")


@router.post("/programs/{id}/assets/{asset_id}/fund", response_model=WalletMoveOut)
async def fund_program(tx: Tx, id: UUID, asset_id: UUID, body: WalletMove) -> JsonResponse:
    """Add budget to the program's wallet."""
    return _respond(await wallet.fund(tx, _request(id, asset_id, body)), FUNDED)


@router.post("/programs/{id}/assets/{asset_id}/burn", response_model=WalletMoveOut)
async def burn_program_balance(tx: Tx, id: UUID, asset_id: UUID, body: WalletMove) -> JsonResponse:
    """Remove budget from the program's wallet."""
    return _respond(await wallet.burn(tx, _request(id, asset_id, body)), BURNED)


@router.get("/programs/{id}/balance", response_model=ListOf[WalletBalanceOut])
async def list_wallet_balances(
    tx: Tx,
    id: UUID,
    page: PageOf50,
    asset_id: Annotated[UUID | None, Query(description="Only this asset.")] = None,
) -> ListOf[WalletBalanceOut]:
    """List the wallet's balances: PREFUNDED assets only, the newest asset first."""
    return listed(await wallet.wallet_balances(tx, id, asset_id=asset_id, page=page), _present)


def _request(program_id: UUID, asset_id: UUID, body: WalletMove) -> WalletRequest:
    return WalletRequest(
        program_id=program_id,
        asset_id=asset_id,
        amount=body.amount,
        description=body.description,
        idempotency_key=body.idempotency_key,
    )


def _respond(result: WalletResult, message: str) -> JsonResponse:
    entry_id = result.journal_entry_id
    body = {
        "available": format_amount(result.available, result.scale),
        "journal_entry_id": None if entry_id is None else str(entry_id),
        "message": NO_WALLET if entry_id is None else message,
    }
    return respond_dict(body, replayed=result.replayed)


def _present(balance: WalletBalance) -> WalletBalanceOut:
    zero = format_amount(ZERO, balance.scale)
    return WalletBalanceOut.model_construct(
        asset_id=balance.asset_id,
        available=format_amount(balance.available, balance.scale),
        deferred=zero,
        held=zero,
        issuance_policy=balance.issuance_policy,
    )
