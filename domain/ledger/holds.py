"""Hold records in memory, the twin of `lots`. Contract: holders.md 6.8.

Every value in HELD belongs to exactly one hold. On SIMPLE assets operations that name no hold use up the oldest first;
on LOT assets the lots say which hold they belong to.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Literal
from uuid import UUID

from domain.ids import new_id
from domain.ledger.lots import Part
from domain.money import EXACT, ZERO

HoldStatus = Literal["ACTIVE", "RELEASED", "FORFEITED", "SETTLED", "VOIDED", "EXPIRED"]
HoldKind = Literal["OWN", "PROVISIONAL", "REDEMPTION"]
HoldCarrier = Literal["WORKFLOW", "PROGRAM"]


@dataclass(slots=True, eq=False)
class Hold:
    """A hold of a locked holder. Fields as in `db.tables.Hold`."""

    id: UUID
    entity_type: str
    entity_id: UUID
    program_id: UUID
    asset_id: UUID
    kind: HoldKind
    amount: Decimal
    remaining: Decimal
    status: HoldStatus
    reference_id: str | None
    description: str | None
    expires_at: datetime | None
    on_expiry: str | None
    carrier: HoldCarrier | None
    entry_id: UUID
    created_at: datetime
    is_new: bool = False


@dataclass(frozen=True, slots=True)
class HoldChangeRow:
    """What an entry took of a hold that existed before it."""

    entry_id: UUID
    hold: Hold
    delta: Decimal
    status: HoldStatus


@dataclass(slots=True)
class HoldBook:
    """The holds that are in memory, and what has been done to them."""

    opened: list[Hold] = field(default_factory=list)
    changes: list[HoldChangeRow] = field(default_factory=list)
    _holds: dict[UUID, Hold] = field(default_factory=dict)
    _of: dict[tuple[UUID, UUID], list[Hold]] = field(default_factory=dict)
    _log: list[HoldChangeRow | Hold] = field(default_factory=list)

    def add(self, holds: Iterable[Hold]) -> None:
        """Take over holds as they were loaded; ones that are here already stay as they are."""
        for hold in holds:
            if hold.id not in self._holds:
                self._put(hold)

    def get(self, hold_id: UUID) -> Hold:
        """The hold of this id. Raises KeyError when it isn't loaded."""
        return self._holds[hold_id]

    def has(self, hold_id: UUID) -> bool:
        """Whether the hold of this id is loaded."""
        return hold_id in self._holds

    def open(
        self,
        *,
        hold_id: UUID | None = None,
        entry_id: UUID,
        entity_type: str,
        entity_id: UUID,
        program_id: UUID,
        asset_id: UUID,
        kind: HoldKind,
        amount: Decimal,
        created_at: datetime,
        reference_id: str | None = None,
        description: str | None = None,
        expires_at: datetime | None = None,
        on_expiry: str | None = None,
        carrier: HoldCarrier | None = None,
    ) -> Hold:
        """Make a new, active hold."""
        hold = Hold(
            hold_id or new_id(),
            entity_type,
            entity_id,
            program_id,
            asset_id,
            kind,
            amount,
            amount,
            "ACTIVE",
            reference_id,
            description,
            expires_at,
            on_expiry,
            carrier,
            entry_id,
            created_at,
            is_new=True,
        )
        self._put(hold)
        self.opened.append(hold)
        self._log.append(hold)
        return hold

    def take_oldest(
        self, entity_id: UUID, asset_id: UUID, amount: Decimal | None, *, only: UUID | None = None
    ) -> dict[UUID, Decimal]:
        """What to take of which active hold to make `amount`, the oldest first; None takes all of them.

        Holds of pending redemptions are passed over, unless `only` names one.
        """
        wanted = sorted(
            (
                hold
                for hold in self._of.get((entity_id, asset_id), ())
                if hold.status == "ACTIVE" and (hold.id == only if only is not None else hold.kind != "REDEMPTION")
            ),
            key=lambda hold: (hold.created_at, hold.id),
        )
        taken: dict[UUID, Decimal] = {}
        left = amount
        for hold in wanted:
            if left == ZERO:
                break
            taken[hold.id] = hold.remaining if left is None else min(hold.remaining, left)
            if left is not None:
                left = EXACT.subtract(left, taken[hold.id])
        return taken

    def reduce(self, taken: Mapping[UUID, Decimal], entry_id: UUID, final: HoldStatus) -> None:
        """Take these amounts of these holds; one of which nothing remains gets the `final` status."""
        for hold_id, amount in taken.items():
            hold = self._holds[hold_id]
            hold.remaining = EXACT.subtract(hold.remaining, amount)
            assert hold.remaining >= ZERO, "a hold is never taken beyond what remains of it"
            if hold.remaining == ZERO:
                hold.status = final
            row = HoldChangeRow(entry_id, hold, amount.copy_negate(), hold.status)
            self.changes.append(row)
            self._log.append(row)

    def _put(self, hold: Hold) -> None:
        self._holds[hold.id] = hold
        self._of.setdefault((hold.entity_id, hold.asset_id), []).append(hold)

    @property
    def ended(self) -> list[Hold]:
        """The holds of which nothing remains by what has been done here."""
        return [change.hold for change in self.changes if change.status != "ACTIVE"]

    def mark(self) -> int:
        """A point to which `undo` can go back."""
        return len(self._log)

    def undo(self, mark: int) -> None:
        """Take back everything done to holds since `mark`, newest first."""
        while len(self._log) > mark:
            done = self._log.pop()
            if isinstance(done, Hold):
                self.opened.pop()
                del self._holds[done.id]
                self._of[done.entity_id, done.asset_id].remove(done)
            else:
                self.changes.pop()
                done.hold.remaining = EXACT.subtract(done.hold.remaining, done.delta)
                done.hold.status = "ACTIVE"


def by_hold(parts: Iterable[Part]) -> dict[UUID, Decimal]:
    """What these parts of HELD lots come to per hold. To be asked before the parts are moved or spent."""
    taken: dict[UUID, Decimal] = {}
    for part in parts:
        assert part.lot.hold_id is not None, "a HELD lot belongs to a hold"
        taken[part.lot.hold_id] = EXACT.add(taken.get(part.lot.hold_id, ZERO), part.amount)
    return taken
