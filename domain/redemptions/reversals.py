"""Giving value of a redemption back, in full or in parts. Contract: redemptions.md 2.5 and 2.6."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, LiteralString
from uuid import UUID

from db import json
from db.session import Transaction
from domain import gates, idempotency, rewards
from domain.errors import Problem, Refusal, bad_field
from domain.ids import new_id
from domain.ledger import spending
from domain.ledger.books import Books
from domain.ledger.holdings import load_lots, load_lots_by_id
from domain.ledger.journal import write
from domain.ledger.lots import Part, Selection, total
from domain.ledger.movements import Cause
from domain.ledger.spending import Target
from domain.money import EXACT, format_amount, parse_amount
from domain.pagination import Page, PageRequest, cut, decode_cursor, sort_name
from domain.redemptions.parties import load_parties, lock_parties, place_of, position_of
from domain.redemptions.records import Redemption, Reversal, fetch

_SORT = sort_name(["created_at", "id"], descending=False)

_NEXT = timedelta(microseconds=1)

_COLUMNS: LiteralString = """
v.id, v.redemption_id, v.amount, v.quantity, v.reason, v.journal_entry_id, v.created_at
"""

# The last parts taken, as far back as the amount reaches; `refilled` is what each of them has been given back so far.
_TAKEN_LAST = """
select ordinal, lot_id, least(left_over, %(amount)s - before) from (
    select ordinal, lot_id, amount - refilled as left_over,
           sum(amount - refilled) over (order by ordinal desc) - (amount - refilled) as before
    from redemption_lot where organization_id = %(organization_id)s and redemption_id = %(redemption_id)s
) taken
where left_over > 0 and before < %(amount)s
order by ordinal desc
"""

_REFILLED = """
update redemption_lot l set refilled = l.refilled + r.amount
from json_to_recordset(%(parts)s::json) as r (ordinal int, amount numeric)
where l.organization_id = %(organization_id)s and l.redemption_id = %(redemption_id)s and l.ordinal = r.ordinal
"""

_RECORD = """
with reversed as (
    update redemption set reversed_amount = %(reversed_amount)s, reversed_quantity = %(reversed_quantity)s,
                          status = %(status)s, updated_at = %(now)s
    where organization_id = %(organization_id)s and id = %(redemption_id)s
)
insert into redemption_reversal (organization_id, id, redemption_id, amount, quantity, reason, journal_entry_id,
                                 api_key_id, created_at)
values (%(organization_id)s, %(id)s, %(redemption_id)s, %(amount)s, %(quantity)s, %(reason)s, %(journal_entry_id)s,
        %(api_key_id)s, %(now)s)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseRequest:
    """What to give back: `amount` as sent or `quantity`, whichever the redemption counts in; None: all that remains."""

    reason: str
    amount: str | None = None
    quantity: int | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Reversed:
    """A reversal, and whether it had been made before with the same key."""

    reversal: Reversal
    replayed: bool


async def reverse(tx: Transaction, redemption_id: UUID, request: ReverseRequest) -> Reversed:
    """Give value back to the participant's AVAILABLE, from the target captured when it was redeemed.

    Raises Refusal: `not_found`, `bad_request`, `invalid_scale`, `idempotency_conflict`, `redemption_not_confirmed`,
    `participant_inactive`, `already_fully_reversed`, `reversal_exceeds_redemption`.
    """
    redemption = await fetch(tx, redemption_id)
    sent_amount = _check_unit(redemption, request)
    reversal_id, entry_id = new_id(), new_id()
    claim = await idempotency.claim(
        tx,
        redemption.program_id,
        "redemption_reversal",
        request.idempotency_key,
        payload=_payload(redemption_id, request, sent_amount),
        result={"reversal_id": str(reversal_id), "journal_entry_id": str(entry_id)},
    )
    if claim.replayed:
        return Reversed(await _get(tx, redemption, UUID(claim.result["reversal_id"])), replayed=True)

    if redemption.reward_id is not None and redemption.is_counted:
        await rewards.lock(tx, redemption.program_id, redemption.reward_id)
    participant = await lock_parties(tx, redemption.participant_id, redemption.target)
    redemption = await fetch(tx, redemption_id)
    amount, quantity = _require_open(redemption, participant, sent_amount, request.quantity)
    # The transaction may have begun before one that it then waited for: reversals are listed as they were booked.
    at = max(tx.now, redemption.updated_at + _NEXT)
    reversal = Reversal(reversal_id, redemption_id, amount, quantity, request.reason, entry_id, at, redemption.scale)
    await _book(tx, redemption, reversal)
    return Reversed(reversal, replayed=False)


async def consider_reversal(tx: Transaction, redemption: Redemption, request: ReverseRequest) -> Reversal | None:
    """What the first use of the request's key made; None where there was none and, as things stand, it can be made.

    For who is about to have it made by a workflow: what is to be refused is refused without one. Nothing is locked, so
    `reverse` judges again. Raises what `reverse` raises.
    """
    sent_amount = _check_unit(redemption, request)
    if request.idempotency_key is not None:
        payload = _payload(redemption.id, request, sent_amount)
        key, program_id = request.idempotency_key, redemption.program_id
        found = await idempotency.find(tx, program_id, "redemption_reversal", key, payload)
        if found is not None:
            return await _get(tx, redemption, UUID(found["reversal_id"]))
    participant = await tx.row(
        "select status from participant where organization_id = %s and id = %s",
        (tx.organization_id, redemption.participant_id),
    )
    _require_open(redemption, participant, sent_amount, request.quantity)
    return None


async def find_reversals(tx: Transaction, redemption_id: UUID, page: PageRequest) -> Page[Reversal]:
    """A page of a redemption's reversals, the oldest first. Raises Refusal `not_found`."""
    redemption = await fetch(tx, redemption_id)
    after = decode_cursor(page.cursor, _SORT, [datetime, UUID])
    after_at, after_id = after or (None, None)
    cursor = await tx.execute(
        f"""
        select {_COLUMNS} from redemption_reversal v
        where v.organization_id = %(organization_id)s and v.redemption_id = %(redemption_id)s
          {"and (v.created_at, v.id) > (%(after_at)s, %(after_id)s)" if after else ""}
        order by v.created_at, v.id limit %(rows)s
        """,
        {
            "organization_id": tx.organization_id,
            "redemption_id": redemption_id,
            "after_at": after_at,
            "after_id": after_id,
            "rows": page.limit + 1,
        },
    )
    found = [Reversal(*(*row, redemption.scale)) for row in await cursor.fetchall()]
    return cut(found, page.limit, _SORT, lambda reversal: (reversal.created_at, reversal.id))


def _payload(redemption_id: UUID, request: ReverseRequest, amount: Decimal | None) -> dict[str, object]:
    """What a key stands for. Contract: redemptions.md 1.2."""
    return {
        "redemption_id": redemption_id,
        "amount": amount,
        "quantity": request.quantity,
        "reason": request.reason,
    }


def _require_open(
    redemption: Redemption, participant: Mapping[str, Any] | None, amount: Decimal | None, quantity: int | None
) -> tuple[Decimal, int | None]:
    """What to give back, as amount and in units, after every gate in the contract's order. redemptions.md 2.5."""
    if redemption.status in ("PENDING", "CANCELED", "EXPIRED"):
        raise Refusal("redemption_not_confirmed", f"redemption is {redemption.status}")
    gates.require_participant(participant, needs_active=True)
    return _remainder(redemption, amount, quantity)


def _check_unit(redemption: Redemption, request: ReverseRequest) -> Decimal | None:
    """The amount that was sent, if one was. Raises Refusal `bad_request` or `invalid_scale`."""
    if redemption.is_counted:
        if request.amount is not None:
            raise bad_field("amount", "a UNIT_BASED item is reversed by quantity", expected="absent")
        if request.quantity is not None and request.quantity < 1:
            raise bad_field("quantity", "must be at least 1", expected="at least 1", received=request.quantity)
        return None
    if request.quantity is not None:
        raise bad_field("quantity", "only a UNIT_BASED item is reversed by quantity", expected="absent")
    return None if request.amount is None else parse_amount(request.amount, redemption.scale)


def _remainder(redemption: Redemption, amount: Decimal | None, quantity: int | None) -> tuple[Decimal, int | None]:
    """What to give back, as amount and in units. Raises Refusal when that is more than what remains."""
    remaining = EXACT.subtract(redemption.amount, redemption.reversed_amount)
    if not remaining:
        raise Refusal("already_fully_reversed", "nothing remains that could be reversed")
    if redemption.quantity is not None:
        assert redemption.unit_cost is not None
        assert redemption.reversed_quantity is not None
        units = redemption.quantity - redemption.reversed_quantity
        if quantity is None:
            return remaining, units
        if quantity > units:
            raise _exceeds("quantity", str(units), str(quantity))
        return EXACT.multiply(redemption.unit_cost, Decimal(quantity)), quantity
    if amount is None:
        return remaining, None
    if amount > remaining:
        raise _exceeds("amount", format_amount(remaining, redemption.scale), format_amount(amount, redemption.scale))
    return amount, None


def _exceeds(field: str, most: str, received: str) -> Refusal:
    message = f"{field} is more than the {most} that remain to be reversed"
    problem = Problem(field, message, expected=f"at most {most}", received=received)
    return Refusal("reversal_exceeds_redemption", message, [problem])


async def _book(tx: Transaction, redemption: Redemption, reversal: Reversal) -> None:
    """Book a reversal, and change the redemption by it. Everything is locked, and every gate passed."""
    amount = reversal.amount
    books = await load_parties(tx, redemption.participant_id, redemption.target, redemption.asset_id)
    refills = await _refills(tx, books, redemption, amount) if redemption.has_lots else []
    place = await _load_place(tx, books, redemption, amount)
    cause = Cause(reversal.journal_entry_id, redemption.program_id, tx.now, reversal.reason)
    spending.reverse(books, position_of(redemption), cause, amount, place, [part for _, part in refills])
    if redemption.reward_id is not None and reversal.quantity is not None:
        await rewards.give_back(tx, redemption.reward_id, redemption.participant_id, reversal.quantity)
    reversed_amount = EXACT.add(redemption.reversed_amount, amount)
    params = {
        "organization_id": tx.organization_id,
        "id": reversal.id,
        "redemption_id": redemption.id,
        "amount": amount,
        "quantity": reversal.quantity,
        "reason": reversal.reason,
        "journal_entry_id": reversal.journal_entry_id,
        "api_key_id": tx.api_key_id,
        "now": reversal.created_at,
        "reversed_amount": reversed_amount,
        "reversed_quantity": None
        if reversal.quantity is None
        else (redemption.reversed_quantity or 0) + reversal.quantity,
        "status": "FULLY_REVERSED" if reversed_amount == redemption.amount else "PARTIALLY_REVERSED",
    }
    await tx.execute(_RECORD, params)
    if refills:
        parts = [{"ordinal": ordinal, "amount": part.amount} for ordinal, part in refills]
        await tx.execute(_REFILLED, {**params, "parts": json.parameter(parts)})
    await write(tx, books)


async def _refills(tx: Transaction, books: Books, redemption: Redemption, amount: Decimal) -> list[tuple[int, Part]]:
    """The lots that get `amount` back, the last taken first, each with its place in the list of what was taken."""
    cursor = await tx.execute(
        _TAKEN_LAST,
        {"organization_id": tx.organization_id, "redemption_id": redemption.id, "amount": amount},
    )
    rows = await cursor.fetchall()
    lots = {lot.id: lot for lot in await load_lots_by_id(tx, books.lots, [lot_id for _, lot_id, _ in rows])}
    return [(ordinal, Part(lots[lot_id], share)) for ordinal, lot_id, share in rows]


async def _load_place(tx: Transaction, books: Books, redemption: Redemption, amount: Decimal) -> Target:
    """The target with the lots that `amount` is drawn from: the one this redemption made, others as far as needed."""
    target = redemption.target
    own = None
    if target.lot_id is not None:
        (own,) = await load_lots_by_id(tx, books.lots, [target.lot_id])
    place = place_of(books, target, redemption.asset_id, has_lots=redemption.has_lots, lot=own)
    if place.position is None:
        return place
    spendable = place.position.select("AVAILABLE", tx.now)
    if own is None or not spendable.matches(own) or own.remaining < amount:
        await load_lots(tx, books.lots, spendable, amount)
        if total(books.lots.take(spendable, amount)) < amount:
            # Below zero every lot goes, the expired ones by their own entries.
            every = Selection(place.position.holder_id, redemption.asset_id, "AVAILABLE")
            await load_lots(tx, books.lots, every, None)
    return place


async def _get(tx: Transaction, redemption: Redemption, reversal_id: UUID) -> Reversal:
    cursor = await tx.execute(
        f"select {_COLUMNS} from redemption_reversal v where v.organization_id = %s and v.id = %s",
        (tx.organization_id, reversal_id),
    )
    row = await cursor.fetchone()
    assert row is not None, "reversals are never deleted"
    return Reversal(*(*row, redemption.scale))
