"""Shelves: the lots and holds that the actions of a batch take from, read no further than they reach.

Direct operations know their amount and read FIFO as far as it goes. A batch of events learns its amounts only while it
is applied, so it reads the beginning of every shelf, keeps in mind how far that was, and is told when an event would
have to reach further; then it reads on and applies its events again. Contract: holders.md 6.8 and 7.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, Protocol
from uuid import UUID

from db.session import Transaction
from domain import limits
from domain.ledger.books import Books
from domain.ledger.holdings import HOLD_COLUMNS, LOT_COLUMNS, load_holds, load_lots, load_oldest_holds
from domain.ledger.holds import Hold
from domain.ledger.lots import Lot, Selection
from domain.money import EXACT, ZERO

Place = tuple[datetime, UUID]
"""Where something lies in FIFO order."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """The lots of one holder, asset and bucket; on SIMPLE assets, which have none, the holds behind HELD.

    With a reference: only the HELD lots that bear it.
    """

    holder_id: UUID
    asset_id: UUID
    bucket: Literal["AVAILABLE", "HELD"]
    has_lots: bool
    reference_id: str | None = None


class Placed(Protocol):
    """A lot or a hold."""

    @property
    def created_at(self) -> datetime:
        """When it was earned or made."""

    @property
    def id(self) -> UUID:
        """Its id."""


@dataclass(slots=True)
class Shelves:
    """How far each shelf has been read, how much was asked of it, and which ones turned out to be read too little.

    `misses` counts how often that was.
    """

    complete: set[Shelf] = field(default_factory=set)
    read_to: dict[Shelf, Place] = field(default_factory=dict)
    asked: dict[Shelf, Decimal | None] = field(default_factory=dict)
    short: set[Shelf] = field(default_factory=set)
    misses: int = 0

    def covers(self, shelf: Shelf, amount: Decimal | None, taken: Iterable[Placed], sum_taken: Decimal) -> bool:
        """Whether `taken` is what FIFO takes for `amount` (None for all), whatever of the shelf hasn't been read.

        If not, the shelf is noted as short. What is asked of a shelf adds up over a batch.
        """
        before = self.asked.get(shelf, ZERO)
        self.asked[shelf] = None if before is None or amount is None else EXACT.add(before, amount)
        if shelf in self.complete or self._whole(shelf) in self.complete:
            return True
        read_to = self.read_to.get(shelf)
        if sum_taken == amount and read_to is not None and all((t.created_at, t.id) <= read_to for t in taken):
            return True
        self.short.add(shelf)
        self.misses += 1
        return False

    def wanted(self) -> dict[Shelf, Decimal | None]:
        """How far the shelves that were short are to be read: to what was asked of them in all."""
        return {shelf: self.asked[shelf] for shelf in self.short}

    @staticmethod
    def _whole(shelf: Shelf) -> Shelf:
        if shelf.reference_id is None:
            return shelf
        return Shelf(shelf.holder_id, shelf.asset_id, shelf.bucket, shelf.has_lots)


_FIRST_LOTS = f"""
select l.* from unnest(%(holders)s::uuid[]) as h (id) cross join unnest(%(assets)s::uuid[]) as a (id)
cross join lateral (
    select {LOT_COLUMNS} from lot
    where organization_id = %(organization_id)s and entity_id = h.id and asset_id = a.id and status = %(bucket)s
      and remaining > 0 and (%(bucket)s = 'AVAILABLE' or not exists (
          select from hold r where r.organization_id = lot.organization_id and r.id = lot.hold_id
          and r.kind = 'REDEMPTION'))
    order by created_at, id limit %(limit)s
) l
"""

_FIRST_HOLDS = f"""
select o.* from unnest(%(holders)s::uuid[]) as h (id) cross join unnest(%(assets)s::uuid[]) as a (id)
cross join lateral (
    select {HOLD_COLUMNS} from hold
    where organization_id = %(organization_id)s and entity_id = h.id and asset_id = a.id and status = 'ACTIVE'
      and kind <> 'REDEMPTION'
    order by created_at, id limit %(limit)s
) o
"""


async def load_shelves(
    tx: Transaction,
    books: Books,
    holder_ids: Collection[UUID],
    kinds: Collection[Shelf],
    further: dict[Shelf, Decimal | None],
) -> Shelves:
    """Read the beginning of each of these kinds of shelves for every holder, and what is wanted `further`.

    `kinds` give asset, bucket and kind only; the shelves in `further` are read until they make their amounts, None to
    their end. The holds behind HELD lots come with them. The caller holds the holders' locks.
    """
    shelves = Shelves()
    await _load_beginnings(tx, books, shelves, holder_ids, kinds)
    await _load_further(tx, books, shelves, further)
    await load_holds(tx, books.holds, {lot.hold_id for lot in books.lots.loaded() if lot.hold_id is not None})
    return shelves


async def _load_beginnings(
    tx: Transaction, books: Books, shelves: Shelves, holder_ids: Collection[UUID], wanted: Collection[Shelf]
) -> None:
    for bucket, has_lots in {(shelf.bucket, shelf.has_lots) for shelf in wanted}:
        assets = sorted({s.asset_id for s in wanted if (s.bucket, s.has_lots) == (bucket, has_lots)})
        params: dict[str, Any] = {
            "organization_id": tx.organization_id,
            "holders": list(holder_ids),
            "assets": assets,
            "bucket": bucket,
            "limit": limits.SHELF_BEGINNING,
        }
        rows = await (await tx.execute(_FIRST_LOTS if has_lots else _FIRST_HOLDS, params)).fetchall()
        found: dict[tuple[UUID, UUID], list[Placed]] = {}
        for row in rows:
            item: Lot | Hold = Lot(*row) if has_lots else Hold(*row)
            found.setdefault((item.entity_id, item.asset_id), []).append(item)
            if isinstance(item, Lot):
                books.lots.add([item])
            else:
                books.holds.add([item])
        for holder_id in holder_ids:
            for asset_id in assets:
                read = found.get((holder_id, asset_id), [])
                shelf = Shelf(holder_id, asset_id, bucket, has_lots)
                if len(read) < limits.SHELF_BEGINNING:
                    shelves.complete.add(shelf)
                else:
                    shelves.read_to[shelf] = (read[-1].created_at, read[-1].id)


async def _load_further(tx: Transaction, books: Books, shelves: Shelves, wanted: dict[Shelf, Decimal | None]) -> None:
    for shelf, amount in wanted.items():
        if not shelf.has_lots:
            read_to = await load_oldest_holds(tx, books.holds, shelf.holder_id, shelf.asset_id, amount)
        else:
            every = Selection(shelf.holder_id, shelf.asset_id, shelf.bucket, reference_id=shelf.reference_id)
            # Lots that have expired are read with the others, as an overdraft books them; they pay for nothing.
            spendable = replace(every, spendable_at=tx.now if shelf.bucket == "AVAILABLE" else None)
            # By reference all of it is read: it is little, and whoever takes less than all is served too.
            read_to = await load_lots(tx, books.lots, every, None if shelf.reference_id else amount, spendable)
        if read_to is None:
            shelves.complete.add(shelf)
        else:
            shelves.read_to[shelf] = read_to
