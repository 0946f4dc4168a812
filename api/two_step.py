"""Two-step redemptions over HTTP: reserve, confirm, cancel, reverse. Contract: redemptions.md 3; docs/two-step.md.

What the database alone can answer (a replay, a repetition, a refusal) it answers, with or without Temporal. The rest is
carried out by the redemption's workflow, in time or never.
"""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeVar
from uuid import UUID

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from api.afterwards import Afterwards, in_time, look, patience_of, wait_of
from api.models import AmountText, Description, IdempotencyKey, RequestModel
from api.redemption_bodies import Quantity, RedemptionOut, present, present_reversal
from api.responses import respond_dict
from api.route import ApiServices, Tx, make_router
from db.session import Transaction
from domain import redemptions, two_step
from domain.redemptions import (
    ConfirmRequest,
    Created,
    Redemption,
    RedemptionRequest,
    Reversed,
    ReverseRequest,
)
from domain.redemptions.records import fetch
from domain.two_step import CarriedRedemption

T = TypeVar("T")

router = make_router("Redemptions")


class Confirm(RequestModel):
    """How much of what is reserved to take; everything if neither amount nor quantity is sent."""

    amount: AmountText | None = Field(default=None, description="For everything but UNIT_BASED items.")
    quantity: Quantity | None = Field(default=None, description="For UNIT_BASED items: how many units.")
    idempotency_key: IdempotencyKey | None = None

    def request(self) -> ConfirmRequest:
        """The same, for the domain."""
        return ConfirmRequest(amount=self.amount, quantity=self.quantity, idempotency_key=self.idempotency_key)


class Cancel(RequestModel):
    """Why what is reserved is given back."""

    reason: Description


@router.post("/redemptions/{id}/confirm", response_model=RedemptionOut)
async def confirm_redemption(request: Request, tx: Tx, id: UUID, body: Confirm | None = None) -> Response:
    """Take what a pending redemption reserves, or a part of it; the rest goes back."""
    services: ApiServices = request.app.state.services
    confirm = (body or Confirm()).request()
    redemption = await fetch(tx, id)
    if _is_settled(redemption, tx.now):
        return _settled(await redemptions.confirm(tx, id, confirm))
    await redemptions.require_confirmable(tx, redemption, confirm)
    wait_s = wait_of(services.settings)
    order = two_step.confirm_order(tx, id, confirm, wait_s)
    return _ordered(
        tx,
        services,
        redemption,
        ask=lambda carried: services.gateway.confirm_redemption(carried, order, wait_s),
        again=lambda later: redemptions.confirm(later, id, confirm),
    )


@router.post("/redemptions/{id}/cancel", response_model=RedemptionOut)
async def cancel_redemption(request: Request, tx: Tx, id: UUID, body: Cancel) -> Response:
    """Give back what a pending redemption reserves."""
    services: ApiServices = request.app.state.services
    redemption = await fetch(tx, id)
    if _is_settled(redemption, tx.now):
        return _settled(await redemptions.cancel(tx, id, body.reason))
    wait_s = wait_of(services.settings)
    order = two_step.cancel_order(tx, id, body.reason, wait_s)
    return _ordered(
        tx,
        services,
        redemption,
        ask=lambda carried: services.gateway.cancel_redemption(carried, order, wait_s),
        again=lambda later: redemptions.cancel(later, id, body.reason),
    )


async def two_step_create(
    tx: Transaction, services: ApiServices, request: RedemptionRequest, *, expiry_field: str
) -> Response:
    """Reserve a redemption that is to be confirmed. Contract: redemptions.md 3.2.

    A replay costs no call of Temporal. Refused with `service_unavailable` when no worker reserved it in time; nothing
    is reserved then, nor will be. Raises Refusal.
    """
    made = await redemptions.consider_reservation(tx, request, expiry_field=expiry_field)
    if made is not None:
        return _created(Created(made, replayed=True))
    organization_id, wait_s = tx.organization_id, wait_of(services.settings)
    reservation = two_step.prepare(tx, request, wait_s)

    async def ask() -> Created:
        reserved = await services.gateway.reserve_redemption(reservation, wait_s)
        record = await look(
            services.database, organization_id, lambda later: redemptions.get(later, reserved.redemption_id)
        )
        return Created(record, reserved.replayed)

    async def outcome() -> Created:
        return await _outcome(
            services, organization_id, lambda later: two_step.outcome_of_reservation(later, reservation)
        )

    async def work() -> Response:
        return _created(await in_time(ask, outcome, wait_s))

    return Afterwards(work)


async def two_step_reverse(
    tx: Transaction, services: ApiServices, redemption: Redemption, request: ReverseRequest
) -> Response:
    """Reverse a two-step redemption, in full or in part. Contract: redemptions.md 2.5.

    As with `two_step_create`, a replay costs no call, and what is answered 503 is never done. Raises Refusal.
    """
    made = await redemptions.consider_reversal(tx, redemption, request)
    if made is not None:
        return _reversed(Reversed(made, replayed=True))
    organization_id, wait_s = tx.organization_id, wait_of(services.settings)
    order = two_step.reverse_order(tx, redemption.id, request, wait_s)

    async def ask() -> Reversed:
        done = await services.gateway.reverse_redemption(_carried(organization_id, redemption), order, wait_s)
        record = await look(
            services.database,
            organization_id,
            lambda later: redemptions.consider_reversal(later, redemption, order.request),
        )
        assert record is not None, "the order's key has been used"
        return Reversed(record, done.replayed)

    async def outcome() -> Reversed:
        return await _outcome(services, organization_id, lambda later: two_step.outcome_of_reversal(later, order))

    async def work() -> Response:
        return _reversed(await in_time(ask, outcome, wait_s))

    return Afterwards(work)


def _ordered(
    tx: Transaction,
    services: ApiServices,
    redemption: Redemption,
    *,
    ask: Callable[[CarriedRedemption], Awaitable[object]],
    again: Callable[[Transaction], Awaitable[Redemption]],
) -> Response:
    """The redemption as its workflow left it: `ask` has it confirmed or canceled, `again` does the same in a look."""
    organization_id = tx.organization_id

    async def asked() -> Redemption:
        await ask(_carried(organization_id, redemption))
        return await look(services.database, organization_id, lambda later: redemptions.get(later, redemption.id))

    async def outcome() -> Redemption:
        return await _outcome(
            services,
            organization_id,
            lambda later: two_step.outcome_of_order(later, redemption, lambda: again(later)),
        )

    async def work() -> Response:
        record = await in_time(asked, outcome, wait_of(services.settings))
        redemptions.require_in_time(record)
        return respond_dict(present(record))

    return Afterwards(work)


async def _outcome(services: ApiServices, organization_id: UUID, work: Callable[[Transaction], Awaitable[T]]) -> T:
    """What has become of an order whose time is over. Raises OutcomeUnknown where a step under way doesn't end soon."""
    return await look(services.database, organization_id, work, patience_of(services.settings))


def _carried(organization_id: UUID, redemption: Redemption) -> CarriedRedemption:
    return CarriedRedemption(
        organization_id, redemption.id, redemption.program_id, redemption.participant_id, redemption.expires_at
    )


def _is_settled(redemption: Redemption, now: datetime) -> bool:
    """Whether what becomes of it is decided, be it by the time."""
    return redemption.status != "PENDING" or redemption.is_overdue(now)


def _settled(redemption: Redemption) -> Response:
    """The answer from the row alone. One that turned out to be overdue is expired first, then refused."""
    if redemption.status != "EXPIRED":
        return respond_dict(present(redemption))

    async def refuse() -> Response:
        redemptions.require_in_time(redemption)
        raise AssertionError("an expired redemption is refused")

    return Afterwards(refuse)


def _created(created: Created) -> Response:
    return respond_dict(present(created.redemption), 200 if created.replayed else 201, replayed=created.replayed)


def _reversed(done: Reversed) -> Response:
    return respond_dict(present_reversal(done.reversal), 200 if done.replayed else 201, replayed=done.replayed)
