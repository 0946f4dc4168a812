"""What each operation does to the books: its postings, and the lots and holds they explain. holders.md 6 to 8.

Pure functions over `Books` that hold what the operation needs: the accounts of locked holders, and the lots and holds
that it may take. Callers have passed the gates; what is short is refused here, before anything is posted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Literal
from uuid import UUID

from domain.errors import Refusal
from domain.ids import new_id
from domain.ledger.books import Account, ActionType, Books, Bucket, Entry, require
from domain.ledger.holds import Hold, HoldCarrier, HoldStatus, by_hold
from domain.ledger.lots import Lot, Part, Selection, overdraft_repaid, total
from domain.money import EXACT, ZERO
from domain.money import total as sum_of

HolderType = Literal["PARTICIPANT", "GROUP"]


@dataclass(frozen=True, slots=True)
class Position:
    """One holder's share of one asset."""

    holder_type: HolderType
    holder_id: UUID
    asset_id: UUID
    has_lots: bool

    def account(self, books: Books, bucket: Bucket) -> Account:
        """The account of this position in a bucket."""
        return books.account(self.holder_type, self.holder_id, self.asset_id, bucket)

    def select(self, bucket: Literal["AVAILABLE", "HELD"], now: datetime, **narrowing: object) -> Selection:
        """The lots of this position in a bucket; AVAILABLE ones only while they haven't expired."""
        spendable_at = now if bucket == "AVAILABLE" else None
        selection = Selection(self.holder_id, self.asset_id, bucket, spendable_at=spendable_at)
        return replace(selection, **narrowing)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Cause:
    """Why an entry is made, as it is recorded."""

    entry_id: UUID
    program_id: UUID
    now: datetime
    description: str | None = None
    event_id: UUID | None = None
    rule_id: UUID | None = None
    reference_id: str | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class HoldTerms:
    """How long a hold lasts, what becomes of the rest at its end, and who sees to that."""

    hold_id: UUID
    expires_at: datetime | None = None
    on_expiry: Literal["RELEASE", "FORFEIT"] | None = None
    carrier: HoldCarrier | None = None


def credit(
    books: Books,
    position: Position,
    cause: Cause,
    amount: Decimal,
    source: Account,
    *,
    expires_at: datetime | None = None,
    matures_at: datetime | None = None,
) -> Entry:
    """Credit AVAILABLE, or DEFERRED where `matures_at` lies in the future; on LOT assets it makes one lot."""
    bucket: Bucket = "DEFERRED" if matures_at is not None and matures_at > cause.now else "AVAILABLE"
    account = position.account(books, bucket)
    repaid = overdraft_repaid(account.balance, amount) if bucket == "AVAILABLE" else ZERO
    entry = post(books, "CREDIT", cause, [(source, amount.copy_negate()), (account, amount)])
    if position.has_lots:
        _open_lot(books, position, cause, amount, bucket, expires_at=expires_at, matures_at=matures_at, repaid=repaid)
    return entry


def credit_held(
    books: Books,
    position: Position,
    cause: Cause,
    amount: Decimal,
    source: Account,
    terms: HoldTerms,
    *,
    expires_at: datetime | None = None,
) -> Entry:
    """Credit HELD: provisional value, with a hold record and on LOT assets one provisional lot."""
    entry = post(books, "CREDIT", cause, [(source, amount.copy_negate()), (position.account(books, "HELD"), amount)])
    _open_hold(books, position, cause, amount, terms, "PROVISIONAL")
    if position.has_lots:
        books.lots.open(
            entry_id=cause.entry_id,
            entity_type=position.holder_type,
            entity_id=position.holder_id,
            asset_id=position.asset_id,
            program_id=cause.program_id,
            status="HELD",
            amount=amount,
            created_at=cause.now,
            expires_at=expires_at,
            reference_id=cause.reference_id,
            hold_id=terms.hold_id,
            is_provisional=True,
        )
    return entry


def debit(books: Books, position: Position, cause: Cause, amount: Decimal, *, allow_negative: bool) -> Entry:
    """Debit AVAILABLE into SYSTEM_BREAKAGE. With `allow_negative` the balance may go below zero.

    Going below zero uses up every lot, so lots that have expired are booked as such first. Raises Refusal
    `insufficient_balance`.
    """
    account = position.account(books, "AVAILABLE")
    if not allow_negative:
        require(account.balance, amount)
    parts: Sequence[Part] = ()
    if position.has_lots:
        parts = books.lots.take(position.select("AVAILABLE", cause.now), amount)
        if total(parts) < amount:
            if not allow_negative:
                raise Refusal("insufficient_balance", "insufficient balance")
            expire_due(books, position, cause.now)
    breakage = books.system("SYSTEM_BREAKAGE", position.asset_id)
    entry = post(books, "DEBIT", cause, [(account, amount.copy_negate()), (breakage, amount)])
    books.lots.spend(parts, cause.entry_id)
    return entry


def debit_held(
    books: Books, position: Position, cause: Cause, amount: Decimal, selection: Selection | None = None
) -> Entry:
    """Debit HELD into SYSTEM_BREAKAGE, of the selected lots (None: any); the holds it uses up are SETTLED.

    Raises Refusal `insufficient_balance`.
    """
    entry, _ = _take_held(books, position, cause, "DEBIT", amount, "SETTLED", selection=selection)
    return entry


def hold(
    books: Books, position: Position, cause: Cause, amount: Decimal | None, terms: HoldTerms, selection: Selection
) -> tuple[Entry, list[Part]]:
    """Move AVAILABLE to HELD: `amount` of the selected lots, or all of it; the entry and the lots that are now HELD.

    Raises Refusal `insufficient_balance`.
    """
    available = position.account(books, "AVAILABLE")
    parts: list[Part] = []
    if position.has_lots:
        parts = books.lots.take(selection, amount)
        reachable = min(total(parts), available.balance)
    else:
        reachable = available.balance
    wanted = reachable if amount is None else amount
    if wanted <= ZERO or reachable < wanted:
        raise Refusal("insufficient_balance", "insufficient balance")
    entry = post(books, "HOLD", cause, [(available, wanted.copy_negate()), (position.account(books, "HELD"), wanted)])
    _open_hold(books, position, cause, wanted, terms, "OWN")
    moved = books.lots.move(parts, cause.entry_id, "HELD", reference_id=cause.reference_id, hold_id=terms.hold_id)
    return entry, moved


def release(
    books: Books,
    position: Position,
    cause: Cause,
    amount: Decimal | None,
    selection: Selection,
    *,
    only: UUID | None = None,
    final: HoldStatus = "RELEASED",
) -> tuple[Entry, list[Part]]:
    """Move HELD back to AVAILABLE: up to `amount` of the selected lots (exactly `amount` on SIMPLE), or all of it.

    `only` names one hold. The entry, and the lots that are now AVAILABLE. Raises Refusal `insufficient_balance` when
    nothing matches.
    """
    parts: list[Part] = []
    if position.has_lots:
        parts = books.lots.take(selection, amount)
        taken, released = by_hold(parts), total(parts)
    else:
        taken = books.holds.take_oldest(position.holder_id, position.asset_id, amount, only=only)
        released = sum_of(taken.values())
        require(released, amount or ZERO)
    if released == ZERO:
        raise Refusal("insufficient_balance", "nothing is held that matches")
    available = position.account(books, "AVAILABLE")
    owed = overdraft_repaid(available.balance, released)
    held = position.account(books, "HELD")
    entry = post(books, "RELEASE", cause, [(held, released.copy_negate()), (available, released)])
    books.holds.reduce(taken, cause.entry_id, final)
    moved = books.lots.move(parts, cause.entry_id, "AVAILABLE")
    repay_overdraft(books, moved, owed, cause.entry_id)
    return entry, moved


def forfeit(
    books: Books, position: Position, cause: Cause, amount: Decimal | None, selection: Selection
) -> tuple[Entry, list[Part]]:
    """Move AVAILABLE to SYSTEM_BREAKAGE for good. Raises Refusal `insufficient_balance`."""
    account = position.account(books, "AVAILABLE")
    parts: list[Part] = []
    reachable = account.balance
    if position.has_lots:
        parts = books.lots.take(selection, amount)
        reachable = min(total(parts), account.balance)
    wanted = reachable if amount is None else amount
    if wanted <= ZERO or reachable < wanted:
        raise Refusal("insufficient_balance", "insufficient balance")
    breakage = books.system("SYSTEM_BREAKAGE", position.asset_id)
    entry = post(books, "FORFEIT", cause, [(account, wanted.copy_negate()), (breakage, wanted)])
    books.lots.spend(parts, cause.entry_id)
    return entry, parts


def forfeit_held(
    books: Books,
    position: Position,
    cause: Cause,
    amount: Decimal | None,
    selection: Selection,
    *,
    only: UUID | None = None,
    final: HoldStatus = "FORFEITED",
) -> tuple[Entry, list[Part]]:
    """Move HELD to SYSTEM_BREAKAGE for good; `only` names one hold. Raises Refusal `insufficient_balance`."""
    return _take_held(books, position, cause, "FORFEIT", amount, final, selection=selection, only=only)


def transfer(books: Books, source: Position, cause: Cause, shares: Sequence[tuple[Position, Decimal]]) -> Entry:
    """Move AVAILABLE of `source` into AVAILABLE of each recipient: one posting per share, in their order.

    The source is none of the recipients; one of these may come more than once. Lots of the source are taken FIFO; each
    share makes one new lot, without expiry. Raises Refusal `insufficient_balance`. Contract: redemptions.md 5.2.
    """
    wanted = sum_of(amount for _, amount in shares)
    account = source.account(books, "AVAILABLE")
    require(account.balance, wanted)
    parts: Sequence[Part] = ()
    if source.has_lots:
        parts = books.lots.take(source.select("AVAILABLE", cause.now), wanted)
        require(total(parts), wanted)
    inflows = [(recipient.account(books, "AVAILABLE"), amount) for recipient, amount in shares]
    entry = post(books, "TRANSFER", cause, [(account, wanted.copy_negate()), *inflows])
    if not source.has_lots:
        return entry
    books.lots.spend(parts, cause.entry_id)
    for (recipient, amount), line in zip(shares, entry.lines[1:], strict=True):
        assert line.balance is not None, "holders have running balances"
        # The balance before this very posting: shares before it may have repaid the overdraft already.
        repaid = overdraft_repaid(EXACT.subtract(line.balance, amount), amount)
        _open_lot(books, recipient, cause, amount, "AVAILABLE", expires_at=None, matures_at=None, repaid=repaid)
    return entry


def void_hold(
    books: Books, position: Position, cause: Cause, selection: Selection, sources: dict[UUID, Account]
) -> tuple[Entry, list[Part]]:
    """Take back provisional value that the selection names; it returns to where it came from.

    `sources` has the account that each lot's program credits this asset from. Raises Refusal `insufficient_balance`
    when nothing matches.
    """
    parts = books.lots.take(selection, None)
    if not parts:
        raise Refusal("insufficient_balance", "nothing provisional is held under this reference")
    movements = [(position.account(books, "HELD"), total(parts).copy_negate())]
    movements += _returns(parts, sources)
    entry = post(books, "VOID_HOLD", cause, movements)
    books.holds.reduce(by_hold(parts), cause.entry_id, "VOIDED")
    books.lots.spend(parts, cause.entry_id)
    return entry, parts


@dataclass(frozen=True, slots=True)
class Settlement:
    """What a settle did: the value held before under the reference, and the signed difference to the amount."""

    entry: Entry
    held_amount: Decimal
    delta: Decimal


def settle(
    books: Books,
    position: Position,
    cause: Cause,
    amount: Decimal,
    source: Account,
    selection: Selection,
    sources: dict[UUID, Account],
    *,
    expires_at: datetime | None = None,
    matures_at: datetime | None = None,
) -> Settlement:
    """Credit `amount` in place of what is provisionally held under the reference. Contract: holders.md 6.7.

    Only the difference moves: more is drawn from `source`, less goes back to where each held lot came from, the newest
    lot's first. Nothing held: a plain credit. Raises Refusal `insufficient_program_balance` when `source` is a wallet
    that doesn't cover the difference.
    """
    parts = books.lots.take(selection, None)
    held_amount = total(parts)
    delta = EXACT.subtract(amount, held_amount)
    if not source.is_system:
        require(source.balance, delta, code="insufficient_program_balance", what="program balance")
    if not parts:
        entry = credit(books, position, cause, amount, source, expires_at=expires_at, matures_at=matures_at)
        return Settlement(entry, held_amount, delta)
    bucket: Bucket = "DEFERRED" if matures_at is not None and matures_at > cause.now else "AVAILABLE"
    account = position.account(books, bucket)
    repaid = overdraft_repaid(account.balance, amount) if bucket == "AVAILABLE" else ZERO
    movements = [(position.account(books, "HELD"), held_amount.copy_negate()), (account, amount)]
    if delta > ZERO:
        movements.append((source, delta.copy_negate()))
    elif delta < ZERO:
        movements += _returns(_newest(parts, delta.copy_negate()), sources)
    entry = post(books, "CREDIT", cause, movements)
    expiries = [part.lot.expires_at for part in parts if part.lot.expires_at is not None]
    books.holds.reduce(by_hold(parts), cause.entry_id, "SETTLED")
    books.lots.spend(parts, cause.entry_id)
    if matures_at is not None:
        # An expiry before its own maturity would take the value before anybody could have it.
        expiries = [expiry for expiry in expiries if expiry > matures_at]
    expires_at = expires_at or min(expiries, default=None)
    _open_lot(books, position, cause, amount, bucket, expires_at=expires_at, matures_at=matures_at, repaid=repaid)
    return Settlement(entry, held_amount, delta)


def mature(books: Books, position: Position, lot: Lot, now: datetime) -> Entry:
    """Bring a DEFERRED lot to AVAILABLE; an overdraft is repaid from it first. Contract: holders.md 7.3."""
    amount = lot.remaining
    cause = Cause(new_id(), lot.program_id, now, description="maturity")
    available = position.account(books, "AVAILABLE")
    owed = overdraft_repaid(available.balance, amount)
    deferred = position.account(books, "DEFERRED")
    entry = post(books, "MATURITY", cause, [(deferred, amount.copy_negate()), (available, amount)])
    repay_overdraft(books, books.lots.move([Part(lot, amount)], cause.entry_id, "AVAILABLE"), owed, cause.entry_id)
    return entry


def expire_due(books: Books, position: Position, now: datetime) -> list[Entry]:
    """Book the EXPIRY of the position's loaded lots that are past `expires_at`: one entry each. holders.md 7.3."""
    due = [
        lot
        for lot in books.lots.matching(Selection(position.holder_id, position.asset_id, "AVAILABLE"))
        if lot.expires_at is not None and lot.expires_at <= now
    ]
    return [expire(books, position, lot, now) for lot in due]


def expire(books: Books, position: Position, lot: Lot, now: datetime) -> Entry:
    """Book the EXPIRY of one lot: what remains of it goes to SYSTEM_BREAKAGE."""
    amount = lot.remaining
    cause = Cause(new_id(), lot.program_id, now, description="expiry")
    breakage = books.system("SYSTEM_BREAKAGE", position.asset_id)
    available = position.account(books, "AVAILABLE")
    entry = post(books, "EXPIRY", cause, [(available, amount.copy_negate()), (breakage, amount)])
    books.lots.spend([Part(lot, amount)], cause.entry_id, "EXPIRED")
    return entry


# --- parts -----------------------------------------------------------------------------------------------------------


def post(books: Books, action_type: ActionType, cause: Cause, movements: Sequence[tuple[Account, Decimal]]) -> Entry:
    """Post the one entry of an operation, as its cause says. What `Books.post` demands holds here."""
    return books.post(
        action_type,
        movements,
        program_id=cause.program_id,
        description=cause.description,
        event_id=cause.event_id,
        rule_id=cause.rule_id,
        reference_id=cause.reference_id,
        request_id=cause.request_id,
        entry_id=cause.entry_id,
    )


def _take_held(
    books: Books,
    position: Position,
    cause: Cause,
    action_type: ActionType,
    amount: Decimal | None,
    final: HoldStatus,
    *,
    selection: Selection | None = None,
    only: UUID | None = None,
) -> tuple[Entry, list[Part]]:
    """Take `amount` (None: all) out of HELD for good, from the selected lots or the oldest holds."""
    parts: list[Part] = []
    if position.has_lots:
        parts = books.lots.take(selection or position.select("HELD", cause.now), amount)
        taken, reachable = by_hold(parts), total(parts)
    else:
        taken = books.holds.take_oldest(position.holder_id, position.asset_id, amount, only=only)
        reachable = sum_of(taken.values())
    wanted = reachable if amount is None else amount
    if wanted <= ZERO or reachable < wanted:
        raise Refusal("insufficient_balance", "insufficient balance")
    breakage = books.system("SYSTEM_BREAKAGE", position.asset_id)
    held = position.account(books, "HELD")
    entry = post(books, action_type, cause, [(held, wanted.copy_negate()), (breakage, wanted)])
    books.holds.reduce(taken, cause.entry_id, final)
    books.lots.spend(parts, cause.entry_id)
    return entry, parts


def _open_lot(
    books: Books,
    position: Position,
    cause: Cause,
    amount: Decimal,
    bucket: Literal["AVAILABLE", "HELD", "DEFERRED"],
    *,
    expires_at: datetime | None,
    matures_at: datetime | None,
    repaid: Decimal,
) -> None:
    books.lots.open(
        entry_id=cause.entry_id,
        entity_type=position.holder_type,
        entity_id=position.holder_id,
        asset_id=position.asset_id,
        program_id=cause.program_id,
        status=bucket,
        amount=amount,
        created_at=cause.now,
        expires_at=expires_at,
        matures_at=matures_at,
        repaid=repaid,
    )


def _open_hold(
    books: Books,
    position: Position,
    cause: Cause,
    amount: Decimal,
    terms: HoldTerms,
    kind: Literal["OWN", "PROVISIONAL"],
) -> Hold:
    return books.holds.open(
        hold_id=terms.hold_id,
        entry_id=cause.entry_id,
        entity_type=position.holder_type,
        entity_id=position.holder_id,
        program_id=cause.program_id,
        asset_id=position.asset_id,
        kind=kind,
        amount=amount,
        created_at=cause.now,
        reference_id=cause.reference_id,
        description=cause.description,
        expires_at=terms.expires_at,
        on_expiry=terms.on_expiry,
        carrier=terms.carrier,
    )


def repay_overdraft(books: Books, parts: Sequence[Part], owed: Decimal, entry_id: UUID) -> None:
    """Let an overdraft take `owed` of value that has just come back into AVAILABLE."""
    for part in parts:
        if owed == ZERO:
            return
        repaid = min(owed, part.amount)
        books.lots.spend([Part(part.lot, repaid)], entry_id)
        owed = EXACT.subtract(owed, repaid)


def _returns(parts: Sequence[Part], sources: dict[UUID, Account]) -> list[tuple[Account, Decimal]]:
    """What goes back to which source, one posting per account."""
    back: dict[UUID, tuple[Account, Decimal]] = {}
    for part in parts:
        account = sources[part.lot.program_id]
        _, before = back.get(account.id, (account, ZERO))
        back[account.id] = (account, EXACT.add(before, part.amount))
    return list(back.values())


def _newest(parts: Sequence[Part], amount: Decimal) -> list[Part]:
    """Parts that make `amount`, the newest lots first."""
    chosen: list[Part] = []
    for part in reversed(parts):
        if amount == ZERO:
            break
        share = min(part.amount, amount)
        chosen.append(Part(part.lot, share))
        amount = EXACT.subtract(amount, share)
    return chosen
