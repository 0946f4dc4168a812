"""Lots in memory: which ones an operation takes, how they split, and what is written of it. Contract: holders.md 7.

Only LOT assets have lots. They are a projection: whoever posts an entry changes the lots it explains in the same
transaction, under the holder's lock, and every change is kept as a row that says which entry did it. As in `books`, a
mark and `undo` take back what came after it.

A split keeps the vintage (`created_at`, which decides FIFO), the expiry and the maturity: the source keeps its id and
loses the part, the part becomes a lot of its own. A lot that is taken whole only changes its status.
"""

from bisect import insort
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Literal
from uuid import UUID

from domain.ids import new_id
from domain.money import EXACT, ZERO

LotStatus = Literal["DEFERRED", "AVAILABLE", "HELD", "CONSUMED", "EXPIRED"]


@dataclass(slots=True, eq=False)
class Lot:
    """A lot of a locked holder. Fields as in `db.tables.Lot`."""

    id: UUID
    entity_type: str
    entity_id: UUID
    asset_id: UUID
    program_id: UUID
    status: LotStatus
    amount: Decimal
    remaining: Decimal
    created_at: datetime
    expires_at: datetime | None
    matures_at: datetime | None
    reference_id: str | None
    hold_id: UUID | None
    is_provisional: bool
    entry_id: UUID
    is_new: bool = False

    def __lt__(self, other: "Lot") -> bool:
        """FIFO: the earliest earned first, ties by id."""
        return (self.created_at, self.id) < (other.created_at, other.id)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which lots of a holder and asset an operation may take; bounds are inclusive, None doesn't narrow.

    `spendable_at` leaves out lots that have expired by then. Lots that a pending redemption has reserved are loaded
    only where `hold_id` names its hold.
    """

    entity_id: UUID
    asset_id: UUID
    status: LotStatus
    spendable_at: datetime | None = None
    reference_id: str | None = None
    lot_ids: Collection[UUID] | None = None
    earned_from: datetime | None = None
    earned_to: datetime | None = None
    hold_id: UUID | None = None
    only_provisional: bool = False

    def matches(self, lot: Lot) -> bool:
        """Whether the lot is one of these, as it is now."""
        return (
            lot.status == self.status
            and lot.remaining > ZERO
            and (self.spendable_at is None or lot.expires_at is None or lot.expires_at > self.spendable_at)
            and (self.reference_id is None or lot.reference_id == self.reference_id)
            and (self.lot_ids is None or lot.id in self.lot_ids)
            and (self.earned_from is None or lot.created_at >= self.earned_from)
            and (self.earned_to is None or lot.created_at <= self.earned_to)
            and (not self.only_provisional or lot.is_provisional)
            and (self.hold_id is None or lot.hold_id == self.hold_id)
        )


@dataclass(frozen=True, slots=True)
class Part:
    """What an operation takes of one lot."""

    lot: Lot
    amount: Decimal


@dataclass(frozen=True, slots=True)
class LotChangeRow:
    """What an entry did to a lot that existed before it; `before` restores the lot on undo."""

    entry_id: UUID
    lot: Lot
    delta: Decimal
    status: LotStatus
    before: tuple[Decimal, LotStatus, str | None, UUID | None, bool]


@dataclass(slots=True)
class LotBook:
    """The lots that are in memory, and what has been done to them.

    `opened` are new ones in the order of their making; `changes` belong to lots that existed before.
    """

    opened: list[Lot] = field(default_factory=list)
    changes: list[LotChangeRow] = field(default_factory=list)
    _lots: dict[tuple[UUID, UUID], list[Lot]] = field(default_factory=dict)
    _known: dict[UUID, Lot] = field(default_factory=dict)
    _log: list[LotChangeRow | Lot] = field(default_factory=list)

    def add(self, lots: Iterable[Lot]) -> list[Lot]:
        """Take over lots as they were loaded; ones that are here already stay as they are. All as they are here."""
        here = []
        for lot in lots:
            if lot.id not in self._known:
                self._known[lot.id] = lot
                insort(self._lots.setdefault((lot.entity_id, lot.asset_id), []), lot)
            here.append(self._known[lot.id])
        return here

    def loaded(self) -> Iterable[Lot]:
        """Every lot in memory."""
        return self._known.values()

    def matching(self, selection: Selection) -> Iterator[Lot]:
        """The lots in memory that match, FIFO."""
        shelf = self._lots.get((selection.entity_id, selection.asset_id), ())
        return (lot for lot in tuple(shelf) if selection.matches(lot))

    def take(self, selection: Selection, amount: Decimal | None) -> list[Part]:
        """FIFO parts of matching lots that together make `amount`, or less where they fall short; None takes all.

        Nothing is changed yet: `spend`, `move` and their like do that with the parts.
        """
        parts: list[Part] = []
        left = amount
        for lot in self.matching(selection):
            part = lot.remaining if left is None else min(lot.remaining, left)
            parts.append(Part(lot, part))
            if left is not None:
                left = EXACT.subtract(left, part)
                if left == ZERO:
                    break
        return parts

    def open(
        self,
        *,
        entry_id: UUID,
        entity_type: str,
        entity_id: UUID,
        asset_id: UUID,
        program_id: UUID,
        status: LotStatus,
        amount: Decimal,
        created_at: datetime,
        expires_at: datetime | None = None,
        matures_at: datetime | None = None,
        reference_id: str | None = None,
        hold_id: UUID | None = None,
        is_provisional: bool = False,
        repaid: Decimal = ZERO,
    ) -> Lot:
        """Make a new lot; `repaid` is what an overdraft takes of it at once. Contract: holders.md 7.2 "Overdraft"."""
        lot = Lot(
            new_id(),
            entity_type,
            entity_id,
            asset_id,
            program_id,
            status,
            amount,
            amount,
            created_at,
            expires_at,
            matures_at,
            reference_id,
            hold_id,
            is_provisional,
            entry_id,
            is_new=True,
        )
        self._known[lot.id] = lot
        insort(self._lots.setdefault((entity_id, asset_id), []), lot)
        self.opened.append(lot)
        self._log.append(lot)
        if repaid > ZERO:
            self.spend([Part(lot, repaid)], entry_id)
        return lot

    def spend(self, parts: Sequence[Part], entry_id: UUID, final: LotStatus = "CONSUMED") -> None:
        """Use up these parts; a lot of which nothing remains gets the `final` status."""
        for part in parts:
            remaining = EXACT.subtract(part.lot.remaining, part.amount)
            status = final if remaining == ZERO else part.lot.status
            self._change(part.lot, entry_id, remaining=remaining, status=status)

    def move(
        self,
        parts: Sequence[Part],
        entry_id: UUID,
        status: LotStatus,
        *,
        reference_id: str | None = None,
        hold_id: UUID | None = None,
    ) -> list[Part]:
        """Bring these parts to another status, with this reference and hold; the lots that they are now.

        A lot that is taken whole keeps its id; otherwise the part becomes a lot of its own.
        """
        return [self._move(part, entry_id, status, reference_id, hold_id) for part in parts]

    def refill(self, parts: Sequence[Part], entry_id: UUID) -> list[Part]:
        """Give value back to the lots that it came from, which are AVAILABLE then; the lots that it now lies in.

        They keep their vintage and their expiry. Of a lot whose rest is HELD meanwhile the part becomes a twin.
        Contract: holders.md 7.2.
        """
        return [self._refill(part, entry_id) for part in parts]

    def _refill(self, part: Part, entry_id: UUID) -> Part:
        lot = part.lot
        if lot.status == "HELD":
            return Part(self._twin(lot, entry_id, "AVAILABLE", part.amount), part.amount)
        remaining = EXACT.add(lot.remaining, part.amount)
        assert remaining <= lot.amount, "a lot never gets more back than it gave"
        self._change(lot, entry_id, remaining=remaining, status="AVAILABLE", reference_id=None, hold_id=None)
        return part

    def _move(
        self, part: Part, entry_id: UUID, status: LotStatus, reference_id: str | None, hold_id: UUID | None
    ) -> Part:
        lot = part.lot
        if part.amount == lot.remaining:
            self._change(lot, entry_id, status=status, reference_id=reference_id, hold_id=hold_id, is_provisional=False)
            return part
        self._change(lot, entry_id, remaining=EXACT.subtract(lot.remaining, part.amount))
        twin = self._twin(lot, entry_id, status, part.amount, reference_id=reference_id, hold_id=hold_id)
        return Part(twin, part.amount)

    def _twin(
        self,
        lot: Lot,
        entry_id: UUID,
        status: LotStatus,
        amount: Decimal,
        *,
        reference_id: str | None = None,
        hold_id: UUID | None = None,
    ) -> Lot:
        """A new lot of the same vintage, expiry and maturity."""
        return self.open(
            entry_id=entry_id,
            entity_type=lot.entity_type,
            entity_id=lot.entity_id,
            asset_id=lot.asset_id,
            program_id=lot.program_id,
            status=status,
            amount=amount,
            created_at=lot.created_at,
            expires_at=lot.expires_at,
            matures_at=lot.matures_at,
            reference_id=reference_id,
            hold_id=hold_id,
        )

    def _change(
        self,
        lot: Lot,
        entry_id: UUID,
        *,
        remaining: Decimal | None = None,
        status: LotStatus | None = None,
        reference_id: str | Literal[False] | None = False,
        hold_id: UUID | Literal[False] | None = False,
        is_provisional: bool | None = None,
    ) -> None:
        before = (lot.remaining, lot.status, lot.reference_id, lot.hold_id, lot.is_provisional)
        delta = ZERO if remaining is None else EXACT.subtract(remaining, lot.remaining)
        if remaining is not None:
            lot.remaining = remaining
        if status is not None:
            lot.status = status
        if reference_id is not False:
            lot.reference_id = reference_id
        if hold_id is not False:
            lot.hold_id = hold_id
        if is_provisional is not None:
            lot.is_provisional = is_provisional
        row = LotChangeRow(entry_id, lot, delta, lot.status, before)
        self.changes.append(row)
        self._log.append(row)

    def mark(self) -> int:
        """A point to which `undo` can go back."""
        return len(self._log)

    def undo(self, mark: int) -> None:
        """Take back everything done to lots since `mark`, newest first."""
        while len(self._log) > mark:
            done = self._log.pop()
            if isinstance(done, Lot):
                self.opened.pop()
                self._lots[done.entity_id, done.asset_id].remove(done)
            else:
                self.changes.pop()
                lot = done.lot
                lot.remaining, lot.status, lot.reference_id, lot.hold_id, lot.is_provisional = done.before


def total(parts: Iterable[Part]) -> Decimal:
    """What these parts come to."""
    result = ZERO
    for part in parts:
        result = EXACT.add(result, part.amount)
    return result


def overdraft_repaid(balance: Decimal, inflow: Decimal) -> Decimal:
    """What an inflow into AVAILABLE with this balance before it owes to an overdraft.

    While a balance is negative its holder has no AVAILABLE lots, so what is owed is just how far it is below zero.
    """
    return min(balance.copy_negate(), inflow) if balance < ZERO else ZERO
