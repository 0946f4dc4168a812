"""Making a hold with an end: a reservation that is either answered in time or never made. Contract: holders.md 6.8.

The hold is made by a workflow's step, which may run late: after the caller has been told that nothing was reserved. So
every reservation says until when it may be made, by the database's clock, which all processes share. It refuses itself
after that, and a caller who hasn't heard of it by then asks with `outcome`, which waits for one under way. After that
the answer is final, whatever workers do.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID, uuid5

from db.session import Transaction
from domain import balances
from domain.balances import Holder, OperationRequest, OperationResult
from domain.errors import Refusal, bad_field
from domain.hold_ends import HoldState, find_hold
from domain.ids import new_id

LONGEST = timedelta(days=36_525)
"""The longest that a hold may last: a hundred years."""

_NAMESPACE = UUID("b0b3a1de-8d7f-5a52-9a63-0f6a8f3d6c11")
_OWN_KEY = "automation:hold:"
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


def hold_id_of(program_id: UUID, idempotency_key: str) -> UUID:
    """The id of the hold with an end that is made with this key: the same for every retry."""
    return uuid5(_NAMESPACE, f"{program_id}:hold:{idempotency_key}")


async def prepare(tx: Transaction, holder: Holder, request: OperationRequest, wait_s: float) -> Reservation:
    """The reservation that this request for a hold with an end asks for; it may be made for `wait_s` seconds from now.

    Raises Refusal `bad_request` for an end more than a hundred years ahead. Contract: README.md "Identifiers".
    """
    _require_near_end(request, tx.now)
    key = request.idempotency_key
    hold_id = new_id() if key is None else hold_id_of(request.program_id, key)
    cursor = await tx.execute("select clock_timestamp() + make_interval(secs => %s)", (wait_s,))
    row = await cursor.fetchone()
    assert row is not None
    return Reservation(
        tx.organization_id,
        holder,
        replace(request, hold_id=hold_id, idempotency_key=key or f"{_OWN_KEY}{hold_id}"),
        row[0],
        tx.api_key_id,
        tx.request_id,
    )


async def reserve(tx: Transaction, reservation: Reservation) -> Reserved:
    """Make the hold, unless it has been made already or it is too late. The caller commits at once.

    Raises Refusal `service_unavailable` when it is too late, and those of `balances.operate`.
    """
    await _refuse_late(tx, reservation)
    result = await balances.operate(tx, reservation.holder, reservation.request)
    # Locks may have been waited for. Only sealing and the commit come after this.
    await _refuse_late(tx, reservation)
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
    own = (reservation.request.idempotency_key or "").startswith(_OWN_KEY)
    return replace(result, replayed=False) if own else result


async def _refuse_late(tx: Transaction, reservation: Reservation) -> None:
    cursor = await tx.execute("select clock_timestamp() > %s", (reservation.not_after,))
    if await cursor.fetchone() == (True,):
        raise Refusal("service_unavailable", "the hold could not be made in time; nothing is reserved")
