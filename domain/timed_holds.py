"""Making a hold with an end: a reservation that is either answered in time or never made. Contract: holders.md 6.8.

The hold is made by a workflow's step, in time or never (`domain.in_time`). A caller who hasn't heard of it in time asks
with `outcome`, which waits for one under way.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID

from db.session import Transaction
from domain import balances, limits
from domain.balances import Holder, OperationRequest, OperationResult
from domain.errors import bad_field
from domain.hold_ends import HoldState, find_hold
from domain.idempotency import OUR_KEYS, is_ours
from domain.ids import keyed_id, new_id
from domain.in_time import latest_instant, refuse_late

TOO_LATE = "the hold could not be made in time; nothing is reserved"
"""What the caller of a reservation hears that was not made."""

LONGEST = timedelta(days=limits.TERM_DAYS)
"""The longest that a hold may last: a hundred years."""

_OWN_KEY = f"{OUR_KEYS}hold:"
"""Begins the keys of requests that came without one; the API accepts no such key from callers."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A hold with an end that is to be made, and who asks for it. `not_after` is by the database's clock.

    The request carries the id that the hold gets. It always has a key, so that making it twice makes one hold.
    """

    organization_id: UUID
    holder: Holder
    request: OperationRequest
    not_after: datetime
    api_key_id: UUID | None = None
    request_id: str | None = None

    @property
    def hold_id(self) -> UUID:
        """The id that the hold gets."""
        assert self.request.hold_id is not None
        return self.request.hold_id


@dataclass(frozen=True, slots=True)
class Reserved:
    """What a reservation did, and how its hold stands."""

    result: OperationResult
    hold: HoldState


def prepare(tx: Transaction, holder: Holder, request: OperationRequest, wait_s: float) -> Reservation:
    """The reservation that this request for a hold with an end asks for.

    It may be made for `wait_s` seconds from the transaction's begin.

    Raises Refusal `bad_request` for an end more than a hundred years ahead. Contract: README.md "Identifiers".
    """
    _require_near_end(request, tx.now)
    key = request.idempotency_key
    hold_id = new_id() if key is None else keyed_id(request.program_id, "hold", key)
    return Reservation(
        tx.organization_id,
        holder,
        replace(request, hold_id=hold_id, idempotency_key=key or f"{_OWN_KEY}{hold_id}"),
        latest_instant(tx, wait_s),
        tx.api_key_id,
        tx.request_id,
    )


async def reserve(tx: Transaction, reservation: Reservation) -> Reserved:
    """Make the hold, unless it has been made already or it is too late. The caller commits at once.

    Raises Refusal: those of `balances.operate`. Its commit raises `service_unavailable` when it is too late.
    """
    refuse_late(tx, reservation.not_after, TOO_LATE)
    result = await balances.operate(tx, reservation.holder, reservation.request)
    hold = await find_hold(tx, result.hold_id or reservation.hold_id)
    assert hold is not None, "the hold was made by this transaction or by the one that it replays"
    return Reserved(_as_asked(reservation, result), hold)


async def outcome(tx: Transaction, reservation: Reservation) -> OperationResult | None:
    """What the reservation did, asked after its time; None when it wasn't made, and then it never will be.

    The transaction is to be rolled back. Raises DatabaseUnavailable where one that is being made doesn't end in time.
    """
    found = await balances.await_operation(tx, reservation.holder, reservation.request)
    return None if found is None else _as_asked(reservation, found)


def _require_near_end(request: OperationRequest, now: datetime) -> None:
    """Time only brings an end nearer, so this never refuses the replay of a hold that was made."""
    if request.expires_in is not None and request.expires_in > LONGEST:
        raise bad_field("expires_in", "must not be more than a hundred years", expected="a shorter duration")
    if request.expires_at is not None and request.expires_at - now > LONGEST:
        raise bad_field("expires_at", "must be within a hundred years", expected="an earlier timestamp")


def _as_asked(reservation: Reservation, result: OperationResult) -> OperationResult:
    """Without a key of the caller's there is nothing to replay, only a step that was repeated."""
    return replace(result, replayed=False) if is_ours(reservation.request.idempotency_key) else result
