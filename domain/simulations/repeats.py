"""Doing again in a simulated world what others did: each operation by its own kind, with its own amount.

Where the simulated rules have changed what there is, an operation takes what it can: whatever really was taken out of
AVAILABLE is taken, if need be below zero; value in HELD only as far as it goes. Lots are chosen oldest first and by
reference, as nothing says which ones a call had named.
"""

from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Literal, cast
from uuid import UUID

from domain.errors import Refusal
from domain.events.state import CounterState, Holder, StateJournal
from domain.events.world import World
from domain.ids import new_id
from domain.ledger import movements
from domain.ledger.books import Account, Books, Bucket
from domain.ledger.holds import HoldStatus
from domain.ledger.lots import Selection, total
from domain.ledger.movements import Cause, HoldTerms, Position
from domain.money import EXACT, ZERO
from domain.simulations.holders import Reservation, ReservedPart
from domain.simulations.meanwhile import NewLot, Operation, StateChange

NOBODY = UUID(int=0)

OnExpiry = Literal["RELEASE", "FORFEIT"]


@dataclass(slots=True)
class Repeater:
    """Repeats operations in one world. `reserved` is what pending redemptions reserve, by holder and hold.

    `incomplete` counts the operations that found less than they really moved.
    """

    world: World
    reserved: dict[UUID, dict[UUID, Reservation]] = field(default_factory=dict)
    incomplete: int = 0

    def move(self, operation: Operation) -> None:
        """Do to a program's wallet what an operation did to it."""
        wallet = self.world.books.account("PROGRAM", operation.entity_id, operation.asset_id, "AVAILABLE")
        _shift(wallet, operation.in_bucket("AVAILABLE"))

    def operate(self, operation: Operation, position: Position) -> None:
        """Do to a holder's share of an asset what an operation did to it."""
        again = _Again(self, operation, position)
        try:
            is_complete = again.run()
        except Refusal:
            is_complete = False
        self.incomplete += not is_complete


@dataclass(slots=True)
class _Again:
    """One operation on one position."""

    repeater: Repeater
    done: Operation
    position: Position

    def run(self) -> bool:
        """Do it; whether all of it could be done. Raises Refusal where nothing could."""
        held, reserved = self.done.in_bucket("HELD"), self._reservations()
        if self.done.action_type == "HOLD":
            return self._reserve(held) if self._is_reservation() else self._hold(held)
        if reserved:
            return self._use_reserved(reserved, held.copy_negate())
        if self.done.action_type == "RELEASE":
            return self._release(held.copy_negate())
        if self.done.action_type == "VOID_HOLD":
            movements.void_hold(self._books, self.position, self._cause(), self._provisional(), self._sources())
            return True
        if held < ZERO and self._brought_in() > ZERO:
            return self._settle()
        return self._take(held) & self._bring(held)

    @property
    def _books(self) -> Books:
        return self.repeater.world.books

    def _cause(self, now: datetime | None = None) -> Cause:
        done = self.done
        return Cause(
            new_id(),
            done.program_id,
            now or (done.hold.created_at if done.hold is not None else done.at),
            description=done.description,
            reference_id=done.reference_id,
        )

    def _brought_in(self) -> Decimal:
        return EXACT.add(self.done.in_bucket("AVAILABLE"), self.done.in_bucket("DEFERRED"))

    def _issuance(self) -> Account:
        return self._books.system("SYSTEM_ISSUANCE", self.position.asset_id)

    def _sources(self) -> dict[UUID, Account]:
        """Where the value of provisional lots goes back to: wallets get theirs by their own postings."""
        lots = self._books.lots.matching(self._provisional())
        return {lot.program_id: self._issuance() for lot in lots}

    def _provisional(self) -> Selection:
        return self.position.select("HELD", self.done.at, reference_id=self.done.reference_id, only_provisional=True)

    def _spendable(self) -> Selection:
        return self.position.select("AVAILABLE", self._cause().now)

    def _reachable(self, wanted: Decimal) -> Decimal:
        """How much of this AVAILABLE has, none if it is overdrawn."""
        there = self.position.account(self._books, "AVAILABLE").balance
        if self.position.has_lots:
            there = min(there, total(self._books.lots.take(self._spendable(), wanted)))
        return max(ZERO, min(there, wanted))

    # --- AVAILABLE ---------------------------------------------------------------------------------------------------

    def _take(self, held: Decimal) -> bool:
        """Take out of AVAILABLE and HELD what it took."""
        available = self.done.in_bucket("AVAILABLE")
        if available < ZERO:
            # Whatever took it (a debit, a redemption, a transfer) used up the oldest lots.
            taken = available.copy_negate()
            movements.debit(self._books, self.position, self._cause(), taken, allow_negative=True)
        return self._take_held(held.copy_negate()) if held < ZERO else True

    def _bring(self, held: Decimal) -> bool:
        """Bring in what it brought: lots with their vintage and terms, or an amount."""
        if held > ZERO:
            self._credit_held(held)
        for amount, matures in ((self.done.in_bucket("AVAILABLE"), False), (self.done.in_bucket("DEFERRED"), True)):
            if amount > ZERO:
                self._credit(amount, matures=matures)
        return True

    def _credit(self, amount: Decimal, *, matures: bool) -> None:
        for lot in self._lots_of(amount):
            movements.credit(
                self._books,
                self.position,
                self._cause(lot.created_at),
                lot.amount,
                self._issuance(),
                expires_at=lot.expires_at,
                matures_at=lot.matures_at if matures else None,
            )

    def _credit_held(self, amount: Decimal) -> None:
        (lot, *_) = self._lots_of(amount)
        movements.credit_held(
            self._books,
            self.position,
            self._cause(lot.created_at),
            amount,
            self._issuance(),
            self._hold_terms(),
            expires_at=lot.expires_at,
        )

    def _lots_of(self, amount: Decimal) -> tuple[NewLot, ...]:
        """The lots that it made; one without terms where there are none, or where they don't make up the amount."""
        made = sum((lot.amount for lot in self.done.lots), start=ZERO)
        return self.done.lots if made == amount else (NewLot(amount, self.done.at, None, None),)

    def _settle(self) -> bool:
        amount = self._brought_in()
        (lot, *_) = self._lots_of(amount)
        movements.settle(
            self._books,
            self.position,
            self._cause(lot.created_at),
            amount,
            self._issuance(),
            self._provisional(),
            self._sources(),
            expires_at=lot.expires_at,
            matures_at=lot.matures_at,
        )
        return True

    # --- HELD --------------------------------------------------------------------------------------------------------

    def _hold(self, wanted: Decimal) -> bool:
        amount = self._reachable(wanted)
        if amount > ZERO:
            terms, spendable = self._hold_terms(), self._spendable()
            movements.hold(self._books, self.position, self._cause(), amount, terms, spendable)
        return amount == wanted

    def _hold_terms(self) -> HoldTerms:
        hold = self.done.hold
        if hold is None:
            return HoldTerms(new_id())
        return HoldTerms(hold.id, hold.expires_at, cast(OnExpiry | None, hold.on_expiry), hold.carrier)

    def _release(self, wanted: Decimal) -> bool:
        only, amount = self._held(wanted)
        if amount > ZERO:
            movements.release(self._books, self.position, self._cause(), amount, self._selected_held(only), only=only)
        return amount == wanted

    def _take_held(self, wanted: Decimal) -> bool:
        only, amount = self._held(wanted)
        if amount > ZERO:
            final: HoldStatus = "SETTLED" if self.done.action_type == "DEBIT" else "FORFEITED"
            movements.forfeit_held(
                self._books,
                self.position,
                self._cause(),
                amount,
                self._selected_held(only),
                only=only,
                final=final,
            )
        return amount == wanted

    def _held(self, wanted: Decimal) -> tuple[UUID | None, Decimal]:
        """The one hold that it took from, where the simulated world has it; and how much of `wanted` is there."""
        holds = self._books.holds
        ids = [hold_id for hold_id, _ in self.done.reduced if holds.has(hold_id)]
        only = ids[0] if len(ids) == 1 and len(self.done.reduced) == 1 else None
        if self.position.has_lots:
            return only, total(self._books.lots.take(self._selected_held(only), wanted))
        taken = holds.take_oldest(self.position.holder_id, self.position.asset_id, wanted, only=only)
        return only, sum(taken.values(), start=ZERO)

    def _selected_held(self, only: UUID | None) -> Selection:
        if only is not None:
            return self.position.select("HELD", self.done.at, hold_id=only)
        return self.position.select("HELD", self.done.at, reference_id=self.done.reference_id)

    # --- pending redemptions -----------------------------------------------------------------------------------------
    # What they reserve is out of reach for rules, so it is kept apart from lots and holds that rules can take.

    def _is_reservation(self) -> bool:
        return self.done.hold is not None and self.done.hold.kind == "REDEMPTION"

    def _reservations(self) -> list[UUID]:
        return [hold_id for hold_id, kind in self.done.reduced if kind == "REDEMPTION"]

    def _reserve(self, wanted: Decimal) -> bool:
        assert self.done.hold is not None
        amount = self._reachable(wanted)
        parts: list[ReservedPart] = []
        if self.position.has_lots:
            taken = self._books.lots.take(self._spendable(), amount)
            parts = [
                ReservedPart(part.amount, part.lot.program_id, part.lot.created_at, part.lot.expires_at)
                for part in taken
            ]
            self._books.lots.spend(taken, self._cause().entry_id)
        self._shift("AVAILABLE", amount.copy_negate())
        self._shift("HELD", amount)
        of_holder = self.repeater.reserved.setdefault(self.position.holder_id, {})
        of_holder[self.done.hold.id] = Reservation(self.position.asset_id, amount, parts)
        return amount == wanted

    def _use_reserved(self, hold_ids: list[UUID], wanted: Decimal) -> bool:
        """Take what was reserved for good, or give it back into lots like those that it came from."""
        left = wanted
        of_holder = self.repeater.reserved.get(self.position.holder_id, {})
        for hold_id in hold_ids:
            reservation = of_holder.get(hold_id)
            if reservation is None:
                continue
            amount = min(left, reservation.amount)
            parts = _drawn(reservation, amount)
            if reservation.amount == ZERO:
                del of_holder[hold_id]
            self._shift("HELD", amount.copy_negate())
            if self.done.action_type == "RELEASE":
                self._give_back(amount, parts)
            left = EXACT.subtract(left, amount)
        return left == ZERO

    def _give_back(self, amount: Decimal, parts: list[ReservedPart]) -> None:
        if not self.position.has_lots:
            self._shift("AVAILABLE", amount)
            return
        for part in parts:
            movements.credit(
                self._books,
                self.position,
                Cause(new_id(), part.program_id, part.created_at),
                part.amount,
                self._issuance(),
                expires_at=part.expires_at,
            )

    def _shift(self, bucket: Bucket, amount: Decimal) -> None:
        _shift(self.position.account(self._books, bucket), amount)


def _drawn(reservation: Reservation, amount: Decimal) -> list[ReservedPart]:
    """The first parts of a reservation, which make `amount`; it is smaller by them then."""
    drawn: list[ReservedPart] = []
    rest: list[ReservedPart] = []
    left = amount
    for part in reservation.parts:
        share = min(part.amount, left)
        left = EXACT.subtract(left, share)
        if share > ZERO:
            drawn.append(ReservedPart(share, part.program_id, part.created_at, part.expires_at))
        if share < part.amount:
            remains = EXACT.subtract(part.amount, share)
            rest.append(ReservedPart(remains, part.program_id, part.created_at, part.expires_at))
    reservation.parts = rest
    reservation.amount = EXACT.subtract(reservation.amount, amount)
    return drawn


def _shift(account: Account, amount: Decimal) -> None:
    account.balance = EXACT.add(account.balance, amount)


def repeat_change(holder: Holder, change: StateChange) -> None:
    """Do to a holder's state what others did: what was set is set, what a rule added is added."""
    if change.state_type == "tag":
        if change.new_value is None:
            holder.tags.discard(change.key)
        else:
            holder.tags.add(change.key)
    elif change.state_type == "attribute":
        holder.attributes.pop(change.key, None)
        if change.new_value is not None:
            holder.attributes[change.key] = change.new_value
    elif change.new_value is None:
        holder.counters.pop(change.key, None)
    else:
        _repeat_counter(holder, change, Decimal(change.new_value))


def _repeat_counter(holder: Holder, change: StateChange, value: Decimal) -> None:
    # A window that has elapsed begins anew with whatever comes next, here as there.
    if change.operation == "auto_reset":
        return
    if change.event_id is None:
        holder.counters[change.key] = CounterState(value, change.window, change.at)
        return
    added = EXACT.subtract(value, Decimal(change.old_value or 0))
    window = change.window if change.key not in holder.counters else None
    StateJournal().add_to_counter(holder, change.key, added, window, change.at, change.event_id, NOBODY)
