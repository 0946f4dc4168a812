"""What spending does to the books: redeem, reserve and what follows from that, give back. redemptions.md 1.4, 1.5, 3.

Pure functions over `Books`, as in `movements`. Value goes to a target: a system account or the AVAILABLE bucket of a
holder or program, where on LOT assets a holder gets one lot per redemption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from uuid import UUID

from domain.ledger.books import Account, Books, Entry, require
from domain.ledger.holds import HoldStatus
from domain.ledger.lots import Lot, Part, overdraft_repaid, total
from domain.ledger.movements import Cause, HoldTerms, Position, expire_due, post, repay_overdraft
from domain.money import EXACT, ZERO


@dataclass(frozen=True, slots=True)
class Target:
    """Where redeemed value goes. `position` only for a holder of a LOT asset; `lot` is the one its redemption made."""

    account: Account
    position: Position | None = None
    lot: Lot | None = None


@dataclass(frozen=True, slots=True)
class Reserved:
    """Value that lies in the HELD lot `held` and came from the lot `origin`: the same if that was taken whole."""

    origin: Lot
    held: Lot
    amount: Decimal


def redeem(
    books: Books, position: Position, cause: Cause, amount: Decimal, target: Target
) -> tuple[list[Part], Lot | None]:
    """Move AVAILABLE to the target: the parts of lots it was taken from, FIFO, and the lot that the target got.

    Raises Refusal `insufficient_balance`; spending never overdraws.
    """
    account = position.account(books, "AVAILABLE")
    parts = _spendable(books, position, cause, amount)
    made = _receive(books, target, cause, amount, account)
    books.lots.spend(parts, cause.entry_id)
    return parts, made


def reserve(books: Books, position: Position, cause: Cause, amount: Decimal, terms: HoldTerms) -> list[Reserved]:
    """Move AVAILABLE to HELD for a redemption, with its hold; on LOT assets the lots that it lies in, FIFO.

    Raises Refusal `insufficient_balance`.
    """
    available, held = position.account(books, "AVAILABLE"), position.account(books, "HELD")
    parts = _spendable(books, position, cause, amount)
    post(books, "HOLD", cause, [(available, amount.copy_negate()), (held, amount)])
    books.holds.open(
        hold_id=terms.hold_id,
        entry_id=cause.entry_id,
        entity_type=position.holder_type,
        entity_id=position.holder_id,
        program_id=cause.program_id,
        asset_id=position.asset_id,
        kind="REDEMPTION",
        amount=amount,
        created_at=cause.now,
        reference_id=cause.reference_id,
        description=cause.description,
        expires_at=terms.expires_at,
        on_expiry=terms.on_expiry,
        carrier=terms.carrier,
    )
    moved = books.lots.move(parts, cause.entry_id, "HELD", reference_id=cause.reference_id, hold_id=terms.hold_id)
    return [Reserved(part.lot, now.lot, part.amount) for part, now in zip(parts, moved, strict=True)]


def take_reserved(
    books: Books,
    position: Position,
    cause: Cause,
    amount: Decimal,
    hold_id: UUID,
    reserved: Sequence[Reserved],
    target: Target,
) -> Lot | None:
    """Move `amount` of what a redemption's hold reserves to the target; the lot that the target got.

    On LOT assets `reserved` makes up just that amount.
    """
    made = _receive(books, target, cause, amount, position.account(books, "HELD"))
    books.holds.reduce({hold_id: amount}, cause.entry_id, "SETTLED")
    books.lots.spend([Part(part.held, part.amount) for part in reserved], cause.entry_id)
    return made


def give_back_reserved(
    books: Books,
    position: Position,
    cause: Cause,
    amount: Decimal,
    hold_id: UUID,
    reserved: Sequence[Reserved],
    final: HoldStatus,
) -> Entry:
    """Release `amount`, which is all that remains in a redemption's hold; the hold ends as `final`.

    On LOT assets `reserved` makes up just that amount and goes back into its lots of origin; an overdraft takes what
    is owed to it first.
    """
    held, available = position.account(books, "HELD"), position.account(books, "AVAILABLE")
    owed = overdraft_repaid(available.balance, amount)
    entry = post(books, "RELEASE", cause, [(held, amount.copy_negate()), (available, amount)])
    books.holds.reduce({hold_id: amount}, cause.entry_id, final)
    back = [_go_back(books, part, cause.entry_id) for part in reserved]
    repay_overdraft(books, back, owed, cause.entry_id)
    return entry


def reverse(
    books: Books, position: Position, cause: Cause, amount: Decimal, target: Target, refills: Sequence[Part]
) -> None:
    """Move `amount` from the target back to AVAILABLE, and on LOT assets into the lots in `refills`, which make it up.

    Nothing falls short: an account that has spent the money goes below zero. Of a holder's lots it takes the one that
    the redemption made first, then FIFO.
    """
    account = position.account(books, "AVAILABLE")
    owed = overdraft_repaid(account.balance, amount)
    drawn = _draw(books, target, cause, amount)
    post(books, "REDEMPTION_REVERSAL", cause, [(target.account, amount.copy_negate()), (account, amount)])
    books.lots.spend(drawn, cause.entry_id)
    back = books.lots.refill(refills, cause.entry_id)
    # What is owed is taken as any spending would take it: from the oldest lot first.
    repay_overdraft(books, sorted(back, key=lambda part: part.lot), owed, cause.entry_id)


def split(reserved: Sequence[Reserved], amount: Decimal) -> tuple[list[Reserved], list[Reserved]]:
    """The first parts, which make `amount`, and the others; a part at the border is in both."""
    first: list[Reserved] = []
    rest: list[Reserved] = []
    for part in reserved:
        share = min(part.amount, amount)
        if share > ZERO:
            first.append(Reserved(part.origin, part.held, share))
        if share < part.amount:
            rest.append(Reserved(part.origin, part.held, EXACT.subtract(part.amount, share)))
        amount = EXACT.subtract(amount, share)
    return first, rest


def _spendable(books: Books, position: Position, cause: Cause, amount: Decimal) -> list[Part]:
    """The lots that `amount` is spent from, none on SIMPLE assets. Raises Refusal `insufficient_balance`."""
    require(position.account(books, "AVAILABLE").balance, amount)
    if not position.has_lots:
        return []
    parts = books.lots.take(position.select("AVAILABLE", cause.now), amount)
    require(total(parts), amount)
    return parts


def _receive(books: Books, target: Target, cause: Cause, amount: Decimal, source: Account) -> Lot | None:
    """Post the REDEMPTION out of `source`; the lot that the target got, if it has lots."""
    repaid = overdraft_repaid(target.account.balance, amount)
    post(books, "REDEMPTION", cause, [(source, amount.copy_negate()), (target.account, amount)])
    if target.position is None:
        return None
    return books.lots.open(
        entry_id=cause.entry_id,
        entity_type=target.position.holder_type,
        entity_id=target.position.holder_id,
        asset_id=target.position.asset_id,
        program_id=cause.program_id,
        status="AVAILABLE",
        amount=amount,
        created_at=cause.now,
        repaid=repaid,
    )


def _go_back(books: Books, part: Reserved, entry_id: UUID) -> Part:
    """Give a HELD part back to its lot of origin, where it then lies.

    A lot that was taken whole only changes its status. So does the part's own lot, which has the same vintage, where
    what was left of the origin is held by somebody else now.
    """
    held = Part(part.held, part.amount)
    if part.held is part.origin or part.origin.status == "HELD":
        return books.lots.move([held], entry_id, "AVAILABLE")[0]
    books.lots.spend([held], entry_id)
    return books.lots.refill([Part(part.origin, part.amount)], entry_id)[0]


def _draw(books: Books, target: Target, cause: Cause, amount: Decimal) -> list[Part]:
    """The lots of the target that `amount` is taken from; fewer where it goes below zero, then none is left over."""
    if target.position is None:
        return []
    lots = books.lots.matching(target.position.select("AVAILABLE", cause.now))
    parts: list[Part] = []
    left = amount
    for lot in sorted(lots, key=lambda lot: lot is not target.lot):
        if left == ZERO:
            break
        parts.append(Part(lot, min(lot.remaining, left)))
        left = EXACT.subtract(left, parts[-1].amount)
    if left > ZERO:
        # Below zero every lot goes; those that have expired do so by their own entries.
        expire_due(books, target.position, cause.now)
    return parts
