"""Redemptions and their reversals over HTTP. Contract: redemptions.md 2; two-step ones go to `api.two_step`."""

from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import Query
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

from api.balances import Duration
from api.models import AmountText, Boolean, Description, IdempotencyKey, Integer, ListOf, RequestModel
from api.queries import From, PageOf50, To, pagination_of
from api.redemption_bodies import Quantity, RedemptionOut, ReversalOut, present, present_reversal
from api.responses import JsonResponse, respond_dict
from api.route import ApiServices, Tx, make_router
from api.two_step import two_step_create, two_step_reverse
from db.session import Transaction
from domain import redemptions
from domain.durations import MAX_TEXT_LENGTH
from domain.redemptions import (
    LONGEST_EXPIRY,
    SHORTEST_EXPIRY,
    RedemptionFilter,
    RedemptionRequest,
    RedemptionStatus,
    ReverseRequest,
)
from domain.redemptions.records import fetch

router = make_router("Redemptions")

_SHORTEST_S, _LONGEST_S = int(SHORTEST_EXPIRY.total_seconds()), int(LONGEST_EXPIRY.total_seconds())


class _RedemptionBody(RequestModel):
    """What both kinds of redemption have in common."""

    program_id: UUID = Field(description="The program in whose context it happens.")
    metadata: dict[str, Any] | None = Field(
        default=None, description="Whatever you want to keep with it; at most 16 KiB as compact JSON."
    )
    requires_confirmation: Boolean = Field(
        default=False, description="Only reserve: the redemption is PENDING until it is confirmed, canceled or expires."
    )
    expires_in_seconds: Annotated[Integer, Field(ge=_SHORTEST_S, le=_LONGEST_S)] | None = Field(
        default=None, description="Two-step only: how long it can be confirmed; a day if omitted."
    )
    expires_in: Duration | None = Field(
        default=None,
        description="The same, as a duration.",
        examples=["24h"],
        json_schema_extra={"maxLength": MAX_TEXT_LENGTH},
    )
    idempotency_key: IdempotencyKey | None = None

    @model_validator(mode="after")
    def _expires_once(self) -> "_RedemptionBody":
        if self.expires_in is not None and self.expires_in_seconds is not None:
            message = "must not be sent together with expires_in_seconds"
            raise PydanticCustomError("one_of", message, {"field": "expires_in", "expected": "absent"})
        return self

    def _request(self, participant_id: UUID, **more: Any) -> RedemptionRequest:
        expires_in = self.expires_in
        if self.expires_in_seconds is not None:
            expires_in = timedelta(seconds=self.expires_in_seconds)
        return RedemptionRequest(
            participant_id=participant_id,
            program_id=self.program_id,
            metadata=self.metadata,
            requires_confirmation=self.requires_confirmation,
            expires_in=expires_in,
            idempotency_key=self.idempotency_key,
            **more,
        )


class AmountRedemption(_RedemptionBody):
    """A free amount to redeem: a cash-out, a statement credit, a payment."""

    asset_id: UUID = Field(description="An asset that is linked to the program.")
    amount: AmountText
    description: Description

    def request(self, participant_id: UUID) -> RedemptionRequest:
        """The same, for the domain."""
        return self._request(participant_id, asset_id=self.asset_id, amount=self.amount, description=self.description)


class ItemRedemption(_RedemptionBody):
    """An item of the catalog to redeem."""

    reward_id: UUID = Field(description="A reward of the program's catalog.")
    quantity: Quantity | None = Field(default=None, description="UNIT_BASED only: how many units; 1 if omitted.")
    amount: AmountText | None = Field(default=None, description="AMOUNT_BASED only: at least the reward's minimum.")
    description: Annotated[str, Field(max_length=500)] | None = Field(
        default=None, description="Why, for people; at most 500 characters. `Redeemed: <name>` if omitted."
    )

    def request(self, participant_id: UUID) -> RedemptionRequest:
        """The same, for the domain."""
        return self._request(
            participant_id,
            reward_id=self.reward_id,
            quantity=self.quantity,
            amount=self.amount,
            description=self.description,
        )


class Reverse(RequestModel):
    """How much of a redemption to give back; everything that remains if neither amount nor quantity is sent."""

    reason: Description
    amount: AmountText | None = Field(default=None, description="For everything but UNIT_BASED items.")
    quantity: Quantity | None = Field(default=None, description="For UNIT_BASED items: how many units.")
    idempotency_key: IdempotencyKey | None = None

    def request(self) -> ReverseRequest:
        """The same, for the domain."""
        return ReverseRequest(
            reason=self.reason, amount=self.amount, quantity=self.quantity, idempotency_key=self.idempotency_key
        )


@router.post("/participants/{id}/redemptions", status_code=201, response_model=RedemptionOut)
async def redeem_amount(request: Request, tx: Tx, id: UUID, body: AmountRedemption) -> Response:
    """Spend an amount of AVAILABLE value."""
    return await _create(tx, request.app.state.services, body, body.request(id))


@router.post("/participants/{id}/redemptions/items", status_code=201, response_model=RedemptionOut)
async def redeem_item(request: Request, tx: Tx, id: UUID, body: ItemRedemption) -> Response:
    """Buy an item of the catalog."""
    return await _create(tx, request.app.state.services, body, body.request(id))


@router.get("/participants/{id}/redemptions", response_model=ListOf[RedemptionOut])
async def list_redemptions(
    tx: Tx,
    id: UUID,
    page: PageOf50,
    status: Annotated[RedemptionStatus | None, Query(description="Only this status.")] = None,
    reward_catalog_item_id: Annotated[UUID | None, Query(description="Only redemptions of this reward.")] = None,
    program_id: Annotated[UUID | None, Query(description="Only redemptions in this program.")] = None,
    asset_id: Annotated[UUID | None, Query(description="Only redemptions of this asset.")] = None,
    since: From = None,
    to: To = None,
) -> JsonResponse:
    """List a participant's redemptions, newest first."""
    wanted = RedemptionFilter(
        status=status,
        reward_id=reward_catalog_item_id,
        program_id=program_id,
        asset_id=asset_id,
        created_from=since,
        created_to=to,
    )
    found = await redemptions.find_page(tx, id, wanted, page)
    return respond_dict({"data": list(map(present, found.items)), "pagination": pagination_of(found).model_dump()})


@router.get("/redemptions/{id}", response_model=RedemptionOut)
async def get_redemption(tx: Tx, id: UUID) -> JsonResponse:
    """Get one redemption."""
    return respond_dict(present(await redemptions.get(tx, id)))


@router.post("/redemptions/{id}/reverse", status_code=201, response_model=ReversalOut)
async def reverse_redemption(request: Request, tx: Tx, id: UUID, body: Reverse) -> Response:
    """Give value of a redemption back, in full or in part."""
    redemption = await fetch(tx, id)
    if redemption.is_two_step:
        return await two_step_reverse(tx, request.app.state.services, redemption, body.request())
    done = await redemptions.reverse(tx, id, body.request())
    return respond_dict(present_reversal(done.reversal), 200 if done.replayed else 201, replayed=done.replayed)


@router.get("/redemptions/{id}/reversals", response_model=ListOf[ReversalOut])
async def list_reversals(tx: Tx, id: UUID, page: PageOf50) -> JsonResponse:
    """List the reversals of a redemption, oldest first."""
    found = await redemptions.find_reversals(tx, id, page)
    data = list(map(present_reversal, found.items))
    return respond_dict({"data": data, "pagination": pagination_of(found).model_dump()})


async def _create(
    tx: Transaction, services: ApiServices, body: _RedemptionBody, request: RedemptionRequest
) -> Response:
    # A refusal names the field that was sent.
    field = "expires_in_seconds" if body.expires_in is None else "expires_in"
    created = None if request.requires_confirmation else await redemptions.create(tx, request, expiry_field=field)
    if created is None:
        return await two_step_create(tx, services, request, expiry_field=field)
    replayed = created.replayed
    return respond_dict(present(created.redemption), 200 if replayed else 201, replayed=replayed)
