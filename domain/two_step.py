"""Two-step redemptions as their workflow's steps: each is done in time or never, and once. Contract: redemptions.md 3.

`domain.redemptions` says what each step does to a redemption. This adds what it takes to do it in a workflow, where a
step may run twice and may run late. Orders of callers carry `not_after` (`domain.in_time`) and, where the redemption's
own id isn't enough to tell a repetition, always a key. Whoever comes first under the participant's lock wins; the
others see its result.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from uuid import UUID

from db.session import Database, Transaction
from domain import faults, limits, redemptions
from domain.errors import Refusal
from domain.idempotency import OUR_KEYS, is_ours
from domain.ids import keyed_id, new_id
from domain.in_time import latest_instant, refuse_late
from domain.locks import lock_participants
from domain.redemptions import (
    ConfirmRequest,
    Created,
    Redemption,
    RedemptionRequest,
    RedemptionStatus,
    Reversed,
    ReverseRequest,
)
from domain.redemptions.records import look_up

NOT_RESERVED = "the redemption could not be made in time; nothing is reserved"
"""What the caller of a reservation hears that was not made."""

NOT_DONE = "the redemption's workflow could not be reached in time; nothing was done"
"""What the caller hears whose confirm, cancel or reversal was not carried out."""

_OWN_KEY = f"{OUR_KEYS}redemption:"
"""Begins the keys of requests that came without one; the API accepts no such key from callers."""

_PENDING = """
select organization_id, id, program_id, participant_id, expires_at from pending_redemptions(%s, %s, %s, %s)
"""


@dataclass(frozen=True, slots=True)
class RedemptionState:
    """How a two-step redemption stands, as its workflow has to know it."""

    status: RedemptionStatus
    amount: Decimal
    quantity: int | None
    reversed_amount: Decimal
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class CarriedRedemption:
    """A two-step redemption as the one who starts its workflow has to know it; the end is not known before it is made.

    What `expires_at` names has passed where the workflow is started for a reversal.
    """

    organization_id: UUID
    id: UUID
    program_id: UUID
    participant_id: UUID
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Reservation:
    """A two-step redemption that is to be made, and who asks for it. `not_after` is by the database's clock.

    The request always has a key, so that making it twice makes one.
    """

    organization_id: UUID
    redemption_id: UUID
    request: RedemptionRequest
    not_after: datetime
    api_key_id: UUID | None = None
    request_id: str | None = None

    @property
    def carried(self) -> CarriedRedemption:
        """The redemption that it makes."""
        request = self.request
        return CarriedRedemption(
            self.organization_id, self.redemption_id, request.program_id, request.participant_id, None
        )


@dataclass(frozen=True, slots=True)
class Reserved:
    """The redemption that was made, or that an earlier use of the key made, and how it stands."""

    redemption_id: UUID
    replayed: bool
    state: RedemptionState


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be done with a redemption, and who asks for it. `not_after` as in Reservation; None for operators."""

    organization_id: UUID
    redemption_id: UUID
    not_after: datetime | None = None
    api_key_id: UUID | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmOrder(Order):
    """Take what is reserved, or a smaller amount or quantity."""

    amount: str | None = None
    quantity: int | None = None
    idempotency_key: str | None = None

    @property
    def request(self) -> ConfirmRequest:
        """The same, for the domain."""
        return ConfirmRequest(amount=self.amount, quantity=self.quantity, idempotency_key=self.idempotency_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelOrder(Order):
    """Give back what is reserved."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseOrder(Order):
    """Give back what was taken, or a part of it. It always has a key, so that doing it twice gives back once."""

    reason: str
    idempotency_key: str
    amount: str | None = None
    quantity: int | None = None

    @property
    def request(self) -> ReverseRequest:
        """The same, for the domain."""
        return ReverseRequest(
            reason=self.reason, amount=self.amount, quantity=self.quantity, idempotency_key=self.idempotency_key
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpireOrder(Order):
    """Let it expire: because it is `due`, or at once by an operator's order (None)."""

    due: datetime | None = None


@dataclass(frozen=True, slots=True)
class ReversalDone:
    """The reversal that was made, or that an earlier use of the key made, and how the redemption stands."""

    reversal_id: UUID
    replayed: bool
    state: RedemptionState


# --- what callers ask for --------------------------------------------------------------------------------------------


def prepare(tx: Transaction, request: RedemptionRequest, wait_s: float) -> Reservation:
    """The reservation that this request for a two-step redemption asks for; it may be made for `wait_s` seconds.

    Contract: README.md "Identifiers" (the redemption's id).
    """
    key = request.idempotency_key
    redemption_id = new_id() if key is None else keyed_id(request.program_id, "redemption", key)
    return Reservation(
        tx.organization_id,
        redemption_id,
        replace(request, idempotency_key=key or f"{_OWN_KEY}{redemption_id}"),
        latest_instant(tx, wait_s),
        tx.api_key_id,
        tx.request_id,
    )


def confirm_order(tx: Transaction, redemption_id: UUID, request: ConfirmRequest, wait_s: float) -> ConfirmOrder:
    """The order that this request asks for; it may be carried out for `wait_s` seconds from the transaction's begin."""
    return ConfirmOrder(
        organization_id=tx.organization_id,
        redemption_id=redemption_id,
        not_after=latest_instant(tx, wait_s),
        api_key_id=tx.api_key_id,
        request_id=tx.request_id,
        amount=request.amount,
        quantity=request.quantity,
        idempotency_key=request.idempotency_key,
    )


def cancel_order(tx: Transaction, redemption_id: UUID, reason: str, wait_s: float) -> CancelOrder:
    """The order that this request asks for; it may be carried out for `wait_s` seconds from the transaction's begin."""
    return CancelOrder(
        organization_id=tx.organization_id,
        redemption_id=redemption_id,
        not_after=latest_instant(tx, wait_s),
        api_key_id=tx.api_key_id,
        request_id=tx.request_id,
        reason=reason,
    )


def reverse_order(tx: Transaction, redemption_id: UUID, request: ReverseRequest, wait_s: float) -> ReverseOrder:
    """The order that this request asks for; it may be carried out for `wait_s` seconds from the transaction's begin."""
    return ReverseOrder(
        organization_id=tx.organization_id,
        redemption_id=redemption_id,
        not_after=latest_instant(tx, wait_s),
        api_key_id=tx.api_key_id,
        request_id=tx.request_id,
        reason=request.reason,
        idempotency_key=request.idempotency_key or f"{_OWN_KEY}{new_id()}",
        amount=request.amount,
        quantity=request.quantity,
    )


# --- the workflow's steps --------------------------------------------------------------------------------------------
# Each is a transaction's whole work; the caller commits at once. Whether it is too late is judged by the commit itself,
# so where a step is said to raise `service_unavailable`, its commit does. It has then worked in vain, once.


async def reserve(tx: Transaction, reservation: Reservation) -> Reserved:
    """Make the redemption, unless it has been made already or it is too late.

    Raises Refusal `service_unavailable` when it is too late, and those of `redemptions.reserve`.
    """
    created = await redemptions.reserve(tx, reservation.request, reservation.redemption_id)
    refuse_late(tx, reservation.not_after, NOT_RESERVED)
    await faults.reach("redemption.reserved")
    replayed = created.replayed and not is_ours(reservation.request.idempotency_key)
    return Reserved(created.redemption.id, replayed, state_of(created.redemption))


async def confirm(tx: Transaction, order: ConfirmOrder) -> RedemptionState:
    """Take what is reserved; how the redemption stands then, EXPIRED where its time was over.

    Raises Refusal `service_unavailable` when it is too late for the caller, and those of `redemptions.confirm`.
    """
    confirmed = await redemptions.confirm(tx, order.redemption_id, order.request)
    refuse_late(tx, order.not_after, NOT_DONE)
    await faults.reach("redemption.confirmed")
    return state_of(confirmed)


async def cancel(tx: Transaction, order: CancelOrder) -> RedemptionState:
    """Give back what is reserved; how the redemption stands then, EXPIRED where its time was over.

    Raises Refusal `service_unavailable` when it is too late for the caller, and those of `redemptions.cancel`.
    """
    canceled = await redemptions.cancel(tx, order.redemption_id, order.reason)
    refuse_late(tx, order.not_after, NOT_DONE)
    await faults.reach("redemption.canceled")
    return state_of(canceled)


async def reverse(tx: Transaction, order: ReverseOrder) -> ReversalDone:
    """Give back what was taken.

    Raises Refusal `service_unavailable` when it is too late for the caller, and those of `redemptions.reverse`.
    """
    done = await redemptions.reverse(tx, order.redemption_id, order.request)
    refuse_late(tx, order.not_after, NOT_DONE)
    await faults.reach("redemption.reversed")
    state = await find_state(tx, order.redemption_id)
    assert state is not None, "it was reversed"
    return ReversalDone(done.reversal.id, done.replayed and not is_ours(order.idempotency_key), state)


async def expire(tx: Transaction, order: ExpireOrder) -> RedemptionState | None:
    """Give back what is reserved because it is due, or by an operator's order; how the redemption stands then.

    None where there is none. One that isn't pending any more, or isn't due yet, is left as it is.
    """
    expired = await redemptions.expire(tx, order.redemption_id, at=order.due, at_once=order.due is None)
    await faults.reach("redemption.expired")
    return None if expired is None else state_of(expired)


async def find_state(tx: Transaction, redemption_id: UUID) -> RedemptionState | None:
    """How this redemption stands; None where there is none."""
    found = await look_up(tx, redemption_id)
    return None if found is None else state_of(found)


def state_of(redemption: Redemption) -> RedemptionState:
    """How a two-step redemption stands, or a one-step one that has the key which a reservation came with."""
    return RedemptionState(
        redemption.status,
        redemption.amount,
        redemption.quantity,
        redemption.reversed_amount,
        redemption.expires_at or redemption.created_at,
    )


# --- what has become of an order whose answer didn't come in time -----------------------------------------------------
# No step begins any more, and these wait for one under way by its key or lock. They do the work again to see whether it
# had been done, so the transaction is rolled back by the refusal where it hadn't.


async def outcome_of_reservation(tx: Transaction, reservation: Reservation) -> Created:
    """What the reservation made, asked after its time.

    Raises Refusal `service_unavailable` where it wasn't made, and then it never will be; or what else is against it.
    """
    created = await redemptions.reserve(tx, reservation.request, reservation.redemption_id)
    if not created.replayed:
        raise Refusal("service_unavailable", NOT_RESERVED)
    return Created(created.redemption, replayed=not is_ours(reservation.request.idempotency_key))


async def outcome_of_reversal(tx: Transaction, order: ReverseOrder) -> Reversed:
    """The reversal that the order made, asked after its time. Raises Refusal as `outcome_of_reservation`."""
    done = await redemptions.reverse(tx, order.redemption_id, order.request)
    if not done.replayed:
        raise Refusal("service_unavailable", NOT_DONE)
    return Reversed(done.reversal, replayed=not is_ours(order.idempotency_key))


async def outcome_of_order(
    tx: Transaction, redemption: Redemption, repeat: Callable[[], Awaitable[Redemption]]
) -> Redemption:
    """What has become of a pending redemption that was ordered to be confirmed or canceled, asked after its time.

    `repeat` does the same again. Raises Refusal `service_unavailable` where it still is pending, and then the order
    never is carried out; or what is against the order now.
    """
    await lock_participants(tx, [redemption.participant_id])
    now = await look_up(tx, redemption.id)
    if now is None or now.status == "PENDING":
        raise Refusal("service_unavailable", NOT_DONE)
    return await repeat()


# --- what others look after ------------------------------------------------------------------------------------------


async def pending_after(
    database: Database, after: CarriedRedemption | None, limit: int = limits.HOLDS_PER_LOOK
) -> list[CarriedRedemption]:
    """A page of the redemptions of all organizations that wait to be confirmed. Raises DatabaseUnavailable."""
    start = (UUID(int=0), datetime(1970, 1, 1, tzinfo=UTC), UUID(int=0))
    if after is not None:
        assert after.expires_at is not None
        start = (after.organization_id, after.expires_at, after.id)
    return [CarriedRedemption(*row) for row in await database.system_rows(_PENDING, (*start, limit))]
