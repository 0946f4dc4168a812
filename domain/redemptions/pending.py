"""What becomes of a reserved redemption: confirmed, canceled or expired, exactly one. Contract: redemptions.md 3.

Whoever comes (a call, a workflow's step, a read that finds it overdue) decides nothing by itself: what happens follows
from the redemption's row, read again under its participant's lock.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

from db import json
from db.session import Transaction
from domain import gates, idempotency, limits, rewards
from domain.errors import Refusal, bad_field
from domain.hold_ends import instant_of_step
from domain.ids import new_id
from domain.ledger import spending
from domain.ledger.holdings import load_holds
from domain.ledger.holds import HoldStatus
from domain.ledger.journal import load_accounts, write
from domain.ledger.movements import Cause
from domain.locks import lock_participants
from domain.money import EXACT, ZERO, parse_amount
from domain.redemptions.parties import load_parties, load_reserved, lock_parties, place_of, position_of
from domain.redemptions.records import SELECT, ConfirmRequest, Redemption, fetch, look_up, require_minimum

_End = Literal["CANCELED", "EXPIRED"]
_FINAL_HOLD: dict[_End, HoldStatus] = {"CANCELED": "RELEASED", "EXPIRED": "EXPIRED"}

_OVERDUE_OF_PARTICIPANT = f"""
{SELECT} and r.participant_id = %(participant_id)s and r.status = 'PENDING' and r.expires_at <= %(now)s
order by r.expires_at, r.id limit %(limit)s
"""

_OVERDUE = """
select id from redemption
where organization_id = %s and status = 'PENDING' and expires_at <= %s and id <> all(%s)
order by expires_at, id limit %s
"""

_BY_IDS = f"{SELECT} and r.id = any(%(ids)s)"

_CONFIRMED = """
update redemption set status = %(status)s, amount = %(amount)s, quantity = %(quantity)s,
    journal_entry_id = %(journal_entry_id)s, target_lot_id = %(target_lot_id)s, confirmed_at = %(confirmed_at)s,
    confirm_key = %(confirm_key)s, confirm_hash = %(confirm_hash)s, updated_at = %(updated_at)s
where organization_id = %(organization_id)s and id = %(id)s
"""

_ENDED = """
update redemption set status = %(status)s, canceled_at = %(canceled_at)s, cancel_reason = %(cancel_reason)s,
    updated_at = greatest(updated_at, %(now)s)
where organization_id = %(organization_id)s and id = any(%(ids)s)
"""

_ALL_BACK = """
update redemption_lot set refilled = amount where organization_id = %s and redemption_id = any(%s)
"""

_PART_BACK = """
update redemption_lot l set refilled = r.amount
from json_to_recordset(%(parts)s::json) as r (held_lot_id uuid, amount numeric)
where l.organization_id = %(organization_id)s and l.redemption_id = %(id)s and l.held_lot_id = r.held_lot_id
"""


@dataclass(frozen=True, slots=True)
class _Taking:
    """What a confirm takes, in full where the request doesn't say."""

    amount: Decimal
    quantity: int | None

    @property
    def hash(self) -> bytes:
        """What the key of a confirm stands for."""
        return idempotency.payload_hash({"amount": self.amount, "quantity": self.quantity})


async def confirm(tx: Transaction, redemption_id: UUID, request: ConfirmRequest) -> Redemption:
    """Take what is reserved, or a part of it; the rest goes back. Contract: redemptions.md 3.3.

    Repeating a confirm that was carried out answers with the redemption as it is now. One that comes at or after
    `expires_at` doesn't raise, because the value must go back first: it returns the redemption as EXPIRED, and the
    caller commits and only then refuses (`require_in_time`).

    Raises Refusal: `not_found`, `bad_request`, `invalid_scale`, `idempotency_conflict`, `redemption_not_pending`,
    `participant_inactive`, `asset_archived`, `amount_below_minimum`.
    """
    redemption = await fetch(tx, redemption_id)
    taking = _taking(redemption, request)
    if redemption.status == "PENDING":
        # What is given back is counted on the reward, which is locked first; else the reward has no part in this.
        if redemption.is_overdue(tx.now) or taking.quantity != redemption.requested_quantity:
            await _lock_rewards(tx, [redemption])
        participant = await lock_parties(tx, redemption.participant_id, redemption.target)
        redemption = await fetch(tx, redemption_id)
    _require_same_key(redemption, taking, request.idempotency_key)
    if redemption.status != "PENDING":
        return _repeated(redemption, taking)
    if redemption.is_overdue(tx.now):
        await _end(tx, [redemption], "EXPIRED", description="expired")
        return redemption
    _require_open(redemption, taking, participant)
    await _take(tx, redemption, taking, request.idempotency_key)
    return redemption


async def require_confirmable(tx: Transaction, redemption: Redemption, request: ConfirmRequest) -> None:
    """Refuse what `confirm` would refuse as things stand, of a pending redemption; nothing is locked.

    For who is about to have it confirmed by a workflow. Raises what `confirm` raises.
    """
    taking = _taking(redemption, request)
    participant = await tx.row(
        "select status from participant where organization_id = %s and id = %s",
        (tx.organization_id, redemption.participant_id),
    )
    _require_open(redemption, taking, participant)


async def cancel(tx: Transaction, redemption_id: UUID, reason: str) -> Redemption:
    """Give back what is reserved; `reason` describes the entry. Contract: redemptions.md 3.4.

    Repeating it changes nothing. As with `confirm`, one that is overdue is returned as EXPIRED, for the caller to
    commit and then to refuse with `require_in_time`. Raises Refusal `not_found` or `redemption_not_pending`.
    """
    redemption = await fetch(tx, redemption_id)
    if redemption.status == "PENDING":
        (redemption,) = await _locked(tx, [redemption])
    if redemption.status == "CANCELED":
        return redemption
    if redemption.status != "PENDING":
        raise _not_pending(redemption)
    if redemption.is_overdue(tx.now):
        await _end(tx, [redemption], "EXPIRED", description="expired")
    else:
        await _end(tx, [redemption], "CANCELED", description=reason)
    return redemption


async def expire(
    tx: Transaction, redemption_id: UUID, *, at: datetime | None = None, at_once: bool = False
) -> Redemption | None:
    """Give back what is reserved if it is PENDING and due, or `at_once` (an operator's order); how it stands now.

    Due is what ends by `hold_ends.instant_of_step` of `at`. None where there is no such redemption. Contract:
    redemptions.md 3.5.
    """
    redemption = await look_up(tx, redemption_id)
    now = instant_of_step(tx.now, at)
    if redemption is None or not (redemption.is_overdue(now) or (at_once and redemption.status == "PENDING")):
        return redemption
    (redemption,) = await _locked(tx, [redemption])
    if redemption.status == "PENDING":
        await _end(tx, [redemption], "EXPIRED", description="expired")
    return redemption


async def expire_due(tx: Transaction, participant_id: UUID) -> int:
    """Expire what is overdue of a participant, so that a read doesn't meet it as PENDING; how many.

    At most `limits.DUE_REDEMPTIONS`, the longest overdue first.
    """
    params = {
        "organization_id": tx.organization_id,
        "participant_id": participant_id,
        "now": tx.now,
        "limit": limits.DUE_REDEMPTIONS,
    }
    overdue = [Redemption(*row) for row in await (await tx.execute(_OVERDUE_OF_PARTICIPANT, params)).fetchall()]
    if not overdue:
        return 0
    ending = [redemption for redemption in await _locked(tx, overdue) if redemption.status == "PENDING"]
    await _end(tx, ending, "EXPIRED", description="expired")
    return len(ending)


async def find_overdue(tx: Transaction, until: datetime, limit: int, skipped: Collection[UUID] = ()) -> list[UUID]:
    """Pending redemptions of the organization whose time was over at `until`, the longest overdue first."""
    cursor = await tx.execute(_OVERDUE, (tx.organization_id, until, list(skipped), limit))
    return [row[0] for row in await cursor.fetchall()]


async def expire_overdue(
    tx: Transaction, until: datetime, limit: int = limits.DUE_REDEMPTIONS, skipped: Collection[UUID] = ()
) -> tuple[int, bool]:
    """Expire up to `limit` redemptions as `find_overdue` finds them; how many, and whether there may be more."""
    ids = await find_overdue(tx, until, limit, skipped)
    params = {"organization_id": tx.organization_id, "ids": ids}
    found = [Redemption(*row) for row in await (await tx.execute(_BY_IDS, params)).fetchall()]
    ending = [redemption for redemption in await _locked(tx, found) if redemption.status == "PENDING"]
    await _end(tx, ending, "EXPIRED", description="expired")
    return len(ending), len(ids) == limit


def require_in_time(redemption: Redemption) -> None:
    """Refuse a confirm or cancel that came too late, by what it returned. Raises Refusal `redemption_not_pending`."""
    if redemption.status == "EXPIRED":
        raise _not_pending(redemption)


# --- confirm ---------------------------------------------------------------------------------------------------------


def _taking(redemption: Redemption, request: ConfirmRequest) -> _Taking:
    """What the request takes. Raises Refusal `bad_request` or `invalid_scale`."""
    reserved = redemption.requested_amount or redemption.amount
    if redemption.is_counted:
        if request.amount is not None:
            raise bad_field("amount", "a UNIT_BASED item is confirmed by quantity", expected="absent")
        most = redemption.requested_quantity or redemption.quantity
        if request.quantity is None:
            return _Taking(reserved, most)
        assert most is not None
        assert redemption.unit_cost is not None
        if not 1 <= request.quantity <= most:
            message = f"must be 1 to {most}, which is what is reserved"
            raise bad_field("quantity", message, expected=f"1 to {most}", received=request.quantity)
        return _Taking(EXACT.multiply(redemption.unit_cost, Decimal(request.quantity)), request.quantity)
    if request.quantity is not None:
        raise bad_field("quantity", "only a UNIT_BASED item is confirmed by quantity", expected="absent")
    if request.amount is None:
        return _Taking(reserved, None)
    amount = parse_amount(request.amount, redemption.scale)
    if amount > reserved:
        raise bad_field("amount", "is more than what is reserved", expected="decimal string", received=request.amount)
    return _Taking(amount, None)


def _require_open(redemption: Redemption, taking: _Taking, participant: Mapping[str, Any] | None) -> None:
    """The gates of a confirm."""
    gates.require_participant(participant, needs_active=True)
    if redemption.asset_status == "ARCHIVED":
        raise Refusal("asset_archived", "asset is ARCHIVED")
    if redemption.unit_cost is not None and taking.quantity is None:
        require_minimum(taking.amount, redemption.unit_cost, redemption.scale)


def _require_same_key(redemption: Redemption, taking: _Taking, key: str | None) -> None:
    if key is not None and key == redemption.confirm_key and redemption.confirm_hash != taking.hash:
        raise idempotency.conflict(key)


def _repeated(redemption: Redemption, taking: _Taking) -> Redemption:
    """The redemption, if it was confirmed and `taking` is just what was taken. Raises Refusal otherwise."""
    if redemption.confirmed_at is None or taking.amount != redemption.amount:
        raise _not_pending(redemption)
    return redemption


async def _take(tx: Transaction, redemption: Redemption, taking: _Taking, key: str | None) -> None:
    """Book a confirm, and change the redemption by it. Everything is locked, and every gate passed."""
    books = await load_parties(tx, redemption.participant_id, redemption.target, redemption.asset_id)
    await load_holds(tx, books.holds, [redemption.id])
    lots = await load_reserved(tx, books, [redemption.id] if redemption.has_lots else [])
    reserved = lots.get(redemption.id, [])
    taken, rest = spending.split(reserved, taking.amount)
    position, left = position_of(redemption), EXACT.subtract(redemption.amount, taking.amount)
    cause = _cause(tx, redemption, redemption.description)
    place = place_of(books, redemption.target, redemption.asset_id, has_lots=redemption.has_lots)
    made = spending.take_reserved(books, position, cause, taking.amount, redemption.id, taken, place)
    if left > ZERO:
        back = _cause(tx, redemption, f"not taken: {redemption.description}"[:500])
        spending.give_back_reserved(books, position, back, left, redemption.id, rest, "SETTLED")
    if redemption.reward_id is not None and redemption.quantity is not None and taking.quantity is not None:
        units = redemption.quantity - taking.quantity
        if units > 0:
            await rewards.give_back(tx, redemption.reward_id, redemption.participant_id, units)
    redemption.status = "COMPLETED"
    redemption.amount, redemption.quantity = taking.amount, taking.quantity
    redemption.journal_entry_id = cause.entry_id
    redemption.target_lot_id = None if made is None else made.id
    # The transaction may have begun before one that it then waited for.
    redemption.confirmed_at = redemption.updated_at = max(tx.now, redemption.updated_at)
    if key is not None:
        redemption.confirm_key, redemption.confirm_hash = key, taking.hash
    params = {"organization_id": tx.organization_id, **asdict(redemption)}
    await tx.execute(_CONFIRMED, params)
    if rest:
        parts = [{"held_lot_id": part.held.id, "amount": part.amount} for part in rest]
        await tx.execute(_PART_BACK, {**params, "parts": json.parameter(parts)})
    await write(tx, books)


# --- cancel and expire -----------------------------------------------------------------------------------------------


async def _end(tx: Transaction, redemptions: Collection[Redemption], end: _End, *, description: str) -> None:
    """Give back everything that these pending redemptions reserve, and change them by it. All of them are locked."""
    if not redemptions:
        return
    participants = {redemption.participant_id for redemption in redemptions}
    books = await load_accounts(tx, participants, {redemption.asset_id for redemption in redemptions})
    await load_holds(tx, books.holds, [redemption.id for redemption in redemptions])
    reserved = await load_reserved(tx, books, [r.id for r in redemptions if r.has_lots])
    for redemption in redemptions:
        spending.give_back_reserved(
            books,
            position_of(redemption),
            _cause(tx, redemption, description),
            redemption.amount,
            redemption.id,
            reserved.get(redemption.id, ()),
            _FINAL_HOLD[end],
        )
        if redemption.reward_id is not None and redemption.quantity is not None:
            await rewards.give_back(tx, redemption.reward_id, redemption.participant_id, redemption.quantity)
        redemption.status = end
        redemption.updated_at = max(tx.now, redemption.updated_at)
        if end == "CANCELED":
            redemption.canceled_at, redemption.cancel_reason = tx.now, description
    ids = [redemption.id for redemption in redemptions]
    params = {
        "organization_id": tx.organization_id,
        "ids": ids,
        "status": end,
        "now": tx.now,
        "canceled_at": tx.now if end == "CANCELED" else None,
        "cancel_reason": description if end == "CANCELED" else None,
    }
    await tx.execute(_ENDED, params)
    if reserved:
        await tx.execute(_ALL_BACK, (tx.organization_id, list(reserved)))
    # Whoever meets one that is overdue didn't ask for its end.
    await write(tx, books, by_caller=end == "CANCELED")


async def _locked(tx: Transaction, redemptions: Collection[Redemption]) -> list[Redemption]:
    """These redemptions read again under the locks that giving them back takes, in their order."""
    await _lock_rewards(tx, redemptions)
    await lock_participants(tx, {redemption.participant_id for redemption in redemptions})
    params = {"organization_id": tx.organization_id, "ids": [redemption.id for redemption in redemptions]}
    rows = await (await tx.execute(_BY_IDS, params)).fetchall()
    found = {redemption.id: redemption for redemption in (Redemption(*row) for row in rows)}
    return [found[redemption.id] for redemption in redemptions]


async def _lock_rewards(tx: Transaction, redemptions: Collection[Redemption]) -> None:
    """Lock the rewards whose units these redemptions count, by id."""
    counted = {(r.reward_id, r.program_id) for r in redemptions if r.reward_id is not None and r.is_counted}
    for reward_id, program_id in sorted(counted):
        await rewards.lock(tx, program_id, reward_id)


def _cause(tx: Transaction, redemption: Redemption, description: str) -> Cause:
    """Every entry of a two-step redemption names it."""
    return Cause(new_id(), redemption.program_id, tx.now, description, reference_id=str(redemption.id))


def _not_pending(redemption: Redemption) -> Refusal:
    return Refusal("redemption_not_pending", f"redemption is {redemption.status}")
