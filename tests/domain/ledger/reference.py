"""A small ledger in plain Python, written from the contract alone: what the real one is compared with.

It knows one asset, some holders and some programs. It has no accounts and no entries: balances are what lots, holds and
two numbers say. Contract: holders.md 6 and 7, redemptions.md 5.2.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from itertools import count

ZERO = Decimal(0)

Parts = list[tuple["RefLot", Decimal]]


class Refused(Exception):
    """The contract refuses the operation, with this code."""

    def __init__(self, code: str = "insufficient_balance") -> None:
        super().__init__(code)
        self.code = code


@dataclass(eq=False)
class RefHold:
    number: int
    program: int
    amount: Decimal
    remaining: Decimal
    created_at: datetime
    ends_at: datetime | None = None
    on_expiry: str | None = None
    status: str = "ACTIVE"

    def reduce(self, amount: Decimal, final: str) -> None:
        self.remaining -= amount
        if not self.remaining:
            self.status = final


@dataclass(eq=False)
class RefLot:
    number: int
    program: int
    status: str
    amount: Decimal
    remaining: Decimal
    created_at: datetime
    expires_at: datetime | None = None
    matures_at: datetime | None = None
    reference: str | None = None
    hold: RefHold | None = None
    provisional: bool = False

    def spend(self, amount: Decimal, final: str = "CONSUMED") -> None:
        self.remaining -= amount
        if not self.remaining:
            self.status = final


@dataclass(eq=False)
class RefHolder:
    """`available` is the whole balance of a SIMPLE asset; `overdraft` is how far a LOT balance is below zero."""

    lots: list[RefLot] = field(default_factory=list)
    holds: list[RefHold] = field(default_factory=list)
    available: Decimal = ZERO
    overdraft: Decimal = ZERO

    def lot_sum(self, status: str) -> Decimal:
        return sum((lot.remaining for lot in self.lots if lot.status == status), ZERO)

    def held(self) -> Decimal:
        return sum((hold.remaining for hold in self.holds), ZERO)


@dataclass(frozen=True)
class Choice:
    """Which lots an operation may take."""

    reference: str | None = None
    lots: Collection[int] | None = None
    earned_from: datetime | None = None
    earned_to: datetime | None = None
    hold: RefHold | None = None

    def allows(self, lot: RefLot) -> bool:
        return (
            (self.reference is None or lot.reference == self.reference)
            and (self.lots is None or lot.number in self.lots)
            and (self.earned_from is None or lot.created_at >= self.earned_from)
            and (self.earned_to is None or lot.created_at <= self.earned_to)
            and (self.hold is None or lot.hold is self.hold)
        )


ANY = Choice()


@dataclass
class Reference:
    """One asset. `now` is moved by whoever drives it; wallets exist on PREFUNDED assets only."""

    has_lots: bool
    prefunded: bool
    now: datetime
    holders: list[RefHolder]
    wallets: list[Decimal]
    issued: Decimal = ZERO
    broken: Decimal = ZERO
    _numbers: "count[int]" = field(default_factory=count)

    # --- what can be seen ---

    def buckets(self, holder: RefHolder) -> tuple[Decimal, Decimal, Decimal]:
        if not self.has_lots:
            return holder.available, holder.held(), ZERO
        assert holder.lot_sum("HELD") == holder.held()
        return holder.lot_sum("AVAILABLE") - holder.overdraft, holder.held(), holder.lot_sum("DEFERRED")

    def fifo(self, holder: RefHolder) -> list[RefLot]:
        return sorted(holder.lots, key=lambda lot: (lot.created_at, lot.number))

    # --- operations ---

    def fund(self, program: int, amount: Decimal) -> None:
        self.issued += amount
        self.wallets[program] += amount

    def burn(self, program: int, amount: Decimal) -> None:
        if self.wallets[program] < amount:
            raise Refused
        self.wallets[program] -= amount
        self.broken += amount

    def credit(
        self,
        holder: RefHolder,
        program: int,
        amount: Decimal,
        expires_at: datetime | None = None,
        matures_at: datetime | None = None,
    ) -> None:
        self._draw(program, amount)
        self._inflow(holder, program, amount, expires_at, matures_at)

    def credit_held(
        self,
        holder: RefHolder,
        program: int,
        amount: Decimal,
        reference: str | None = None,
        expires_at: datetime | None = None,
    ) -> None:
        self._draw(program, amount)
        hold = self._open_hold(holder, program, amount)
        if self.has_lots:
            lot = self._open_lot(holder, program, "HELD", amount, expires_at, None)
            lot.reference, lot.hold, lot.provisional = reference, hold, True

    def debit(self, holder: RefHolder, amount: Decimal, *, allow_negative: bool) -> None:
        if not self.has_lots:
            if holder.available < amount and not allow_negative:
                raise Refused
            holder.available -= amount
        else:
            spendable = self._spendable(holder)
            parts = _take(spendable, amount)
            rest = amount - _sum(parts)
            if rest and not allow_negative:
                raise Refused
            if rest:
                self._expire(holder)
            for lot, part in parts:
                lot.spend(part)
            holder.overdraft += rest
        self.broken += amount

    def hold(
        self,
        holder: RefHolder,
        program: int,
        amount: Decimal | None,
        reference: str | None = None,
        choice: Choice = ANY,
        ends_at: datetime | None = None,
        on_expiry: str | None = None,
    ) -> None:
        lots = [lot for lot in self._spendable(holder) if choice.allows(lot)]
        reachable = sum((lot.remaining for lot in lots), ZERO) if self.has_lots else holder.available
        wanted = reachable if amount is None else amount
        if wanted <= 0 or wanted > reachable:
            raise Refused
        hold = self._open_hold(holder, program, wanted)
        hold.ends_at, hold.on_expiry = ends_at, on_expiry
        if self.has_lots:
            self._move(holder, _take(lots, wanted), "HELD", reference, hold)
        else:
            holder.available -= wanted

    def release(self, holder: RefHolder, amount: Decimal | None, choice: Choice = ANY, final: str = "RELEASED") -> None:
        if not self.has_lots:
            released = self._reduce_holds(holder, amount, choice, final)
            holder.available += released
            return
        parts = _take(self._held_lots(holder, choice), amount)
        if not parts:
            raise Refused
        _reduce(parts, final)
        for lot, part in self._move(holder, parts, "AVAILABLE", None, None):
            self._repay(holder, lot, part)

    def forfeit(self, holder: RefHolder, bucket: str, amount: Decimal | None, choice: Choice = ANY) -> None:
        if bucket == "HELD":
            self.broken += self._take_held(holder, amount, choice, "FORFEITED")
            return
        lots = [lot for lot in self._spendable(holder) if choice.allows(lot)]
        reachable = sum((lot.remaining for lot in lots), ZERO) if self.has_lots else holder.available
        wanted = reachable if amount is None else amount
        if wanted <= 0 or wanted > reachable:
            raise Refused
        if self.has_lots:
            for lot, part in _take(lots, wanted):
                lot.spend(part)
        else:
            holder.available -= wanted
        self.broken += wanted

    def transfer(self, source: RefHolder, program: int, shares: list[tuple[RefHolder, Decimal]]) -> None:
        wanted = sum((amount for _, amount in shares), ZERO)
        if self.has_lots:
            parts = _take(self._spendable(source), wanted)
            if _sum(parts) < wanted:
                raise Refused
            for lot, part in parts:
                lot.spend(part)
        else:
            if source.available < wanted:
                raise Refused
            source.available -= wanted
        for recipient, amount in shares:
            self._inflow(recipient, program, amount, None, None)

    def debit_held(self, holder: RefHolder, amount: Decimal) -> None:
        self.broken += self._take_held(holder, amount, ANY, "SETTLED")

    def void(self, holder: RefHolder, reference: str) -> None:
        parts = self._provisional(holder, reference)
        if not parts:
            raise Refused
        _reduce(parts, "VOIDED")
        for lot, part in parts:
            lot.spend(part)
            self._give_back(lot.program, part)

    def settle(
        self,
        holder: RefHolder,
        program: int,
        amount: Decimal,
        reference: str,
        expires_at: datetime | None = None,
        matures_at: datetime | None = None,
    ) -> None:
        parts = self._provisional(holder, reference)
        delta = amount - _sum(parts)
        if delta > 0:
            self._draw(program, delta)
        surplus = max(-delta, ZERO)
        for lot, part in reversed(parts):
            back = min(part, surplus)
            self._give_back(lot.program, back)
            surplus -= back
        _reduce(parts, "SETTLED")
        expiries = [lot.expires_at for lot, _ in parts if lot.expires_at is not None]
        if matures_at is not None:
            expiries = [expiry for expiry in expiries if expiry > matures_at]
        for lot, part in parts:
            lot.spend(part)
        self._inflow(holder, program, amount, expires_at or min(expiries, default=None), matures_at)

    def end(self, holder: RefHolder, hold: RefHold, operation: str, amount: Decimal | None) -> None:
        """Release or forfeit one hold by its id."""
        if hold.status != "ACTIVE":
            raise Refused("hold_not_active")
        if amount is not None and amount > hold.remaining:
            raise Refused
        if operation == "RELEASE":
            self.release(holder, amount, Choice(hold=hold))
        else:
            self.forfeit(holder, "HELD", amount, Choice(hold=hold))

    def sweep(self) -> None:
        """What time brings: maturities in the order they fall due, expiries, then the ends of holds, per program."""
        deferred = [(lot.matures_at, lot.number, lot, holder) for holder, lot in self._all_lots("DEFERRED")]
        for matures_at, _, lot, holder in sorted(deferred, key=lambda due: due[:2]):
            if matures_at is not None and matures_at <= self.now:
                lot.status = "AVAILABLE"
                self._repay(holder, lot, lot.remaining)
        for holder in self.holders:
            self._expire(holder)
        due = [
            (hold.program, hold.ends_at, hold.number, hold, holder)
            for holder in self.holders
            for hold in holder.holds
            if hold.status == "ACTIVE" and hold.ends_at is not None and hold.ends_at <= self.now
        ]
        for *_, hold, holder in sorted(due, key=lambda end: end[:3]):
            if hold.on_expiry == "FORFEIT":
                self.broken += self._take_held(holder, None, Choice(hold=hold), "EXPIRED")
            else:
                self.release(holder, None, Choice(hold=hold), "EXPIRED")

    # --- parts ---

    def _draw(self, program: int, amount: Decimal) -> None:
        if not self.prefunded:
            self.issued += amount
            return
        if self.wallets[program] < amount:
            raise Refused("insufficient_program_balance")
        self.wallets[program] -= amount

    def _give_back(self, program: int, amount: Decimal) -> None:
        if self.prefunded:
            self.wallets[program] += amount
        else:
            self.issued -= amount

    def _inflow(
        self,
        holder: RefHolder,
        program: int,
        amount: Decimal,
        expires_at: datetime | None,
        matures_at: datetime | None,
    ) -> None:
        if not self.has_lots:
            holder.available += amount
            return
        is_deferred = matures_at is not None and matures_at > self.now
        lot = self._open_lot(
            holder, program, "DEFERRED" if is_deferred else "AVAILABLE", amount, expires_at, matures_at
        )
        if not is_deferred:
            self._repay(holder, lot, amount)

    def _repay(self, holder: RefHolder, lot: RefLot, inflow: Decimal) -> None:
        repaid = min(holder.overdraft, inflow)
        holder.overdraft -= repaid
        if repaid:
            lot.spend(repaid)

    def _open_lot(
        self,
        holder: RefHolder,
        program: int,
        status: str,
        amount: Decimal,
        expires_at: datetime | None,
        matures_at: datetime | None,
        created_at: datetime | None = None,
    ) -> RefLot:
        number = next(self._numbers)
        lot = RefLot(number, program, status, amount, amount, created_at or self.now, expires_at, matures_at)
        holder.lots.append(lot)
        return lot

    def _open_hold(self, holder: RefHolder, program: int, amount: Decimal) -> RefHold:
        hold = RefHold(next(self._numbers), program, amount, amount, self.now)
        holder.holds.append(hold)
        return hold

    def _spendable(self, holder: RefHolder) -> list[RefLot]:
        return [
            lot
            for lot in self.fifo(holder)
            if lot.status == "AVAILABLE" and (lot.expires_at is None or lot.expires_at > self.now)
        ]

    def _held_lots(self, holder: RefHolder, choice: Choice) -> list[RefLot]:
        return [lot for lot in self.fifo(holder) if lot.status == "HELD" and choice.allows(lot)]

    def _provisional(self, holder: RefHolder, reference: str) -> Parts:
        lots = self._held_lots(holder, Choice(reference=reference))
        return _take([lot for lot in lots if lot.provisional], None)

    def _all_lots(self, status: str) -> Iterable[tuple[RefHolder, RefLot]]:
        return ((holder, lot) for holder in self.holders for lot in holder.lots if lot.status == status)

    def _take_held(self, holder: RefHolder, amount: Decimal | None, choice: Choice, final: str) -> Decimal:
        if not self.has_lots:
            return self._reduce_holds(holder, amount, choice, final)
        parts = _take(self._held_lots(holder, choice), amount)
        if not parts or (amount is not None and _sum(parts) < amount):
            raise Refused
        _reduce(parts, final)
        for lot, part in parts:
            lot.spend(part)
        return _sum(parts)

    def _reduce_holds(self, holder: RefHolder, amount: Decimal | None, choice: Choice, final: str) -> Decimal:
        """Take from the oldest holds, or from the one that is named; what that came to."""
        active = [hold for hold in holder.holds if hold.status == "ACTIVE" and choice.hold in (None, hold)]
        reachable = sum((hold.remaining for hold in active), ZERO)
        wanted = reachable if amount is None else amount
        if not wanted or wanted > reachable:
            raise Refused
        left = wanted
        for hold in sorted(active, key=lambda hold: (hold.created_at, hold.number)):
            part = min(left, hold.remaining)
            if part:
                hold.reduce(part, final)
            left -= part
        return wanted

    def _move(self, holder: RefHolder, parts: Parts, status: str, reference: str | None, hold: RefHold | None) -> Parts:
        moved: Parts = []
        for source, part in parts:
            lot = source
            if part < source.remaining:
                source.remaining -= part
                lot = self._open_lot(
                    holder, source.program, status, part, source.expires_at, source.matures_at, source.created_at
                )
            lot.status, lot.reference, lot.hold, lot.provisional = status, reference, hold, False
            moved.append((lot, part))
        return moved

    def _expire(self, holder: RefHolder) -> None:
        for lot in holder.lots:
            if lot.status == "AVAILABLE" and lot.expires_at is not None and lot.expires_at <= self.now:
                self.broken += lot.remaining
                lot.spend(lot.remaining, "EXPIRED")


def _take(lots: list[RefLot], amount: Decimal | None) -> Parts:
    """FIFO parts that make `amount` or less; None takes all."""
    parts: Parts = []
    for lot in lots:
        part = lot.remaining if amount is None else min(lot.remaining, amount - _sum(parts))
        if part:
            parts.append((lot, part))
    return parts


def _sum(parts: Parts) -> Decimal:
    return sum((part for _, part in parts), ZERO)


def _reduce(parts: Parts, final: str) -> None:
    for lot, part in parts:
        assert lot.hold is not None
        lot.hold.reduce(part, final)
