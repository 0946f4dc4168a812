"""What falls due by itself in a simulated world: lots mature and expire, holds come to their end.

It happens when it is due, unless the real world was late: what really was due at the same instant for the same holder,
and was booked only later (or never), is booked just as late here. So rules as they are meet the balances that they met,
whether upkeep came within seconds or stood still for a day.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple
from uuid import UUID

from db.session import Transaction
from domain.events.state import Holder
from domain.events.world import World
from domain.hold_ends import end_in_books
from domain.ledger import movements
from domain.ledger.holds import Hold
from domain.ledger.lots import Lot, Selection
from domain.ledger.movements import HolderType, Position
from domain.simulations.entities import Frame
from domain.simulations.past import Place


class Due(NamedTuple):
    """Something of a holder that falls due at an instant."""

    kind: Literal["MATURITY", "EXPIRY", "END_OF_HOLD"]
    entity_id: UUID
    asset_id: UUID
    at: datetime


@dataclass(frozen=True, slots=True)
class Booked:
    """Where in the ledger the real counterpart was booked; never, as far as is known, without a sequence."""

    at: datetime | None = None
    sequence: int | None = None

    def is_before(self, place: Place) -> bool:
        """Whether it had been booked there."""
        return self.at is not None and self.sequence is not None and place.is_after(self.at, self.sequence)


Bookings = dict[Due, Booked | None]
"""What is known of the real world: None where it had nothing like that."""

# The first entry that ended the waiting of a lot or hold like that; no entry, where one still waits.
_BOOKINGS = """
select w.kind, w.entity_id, w.asset_id, w.at, b.created_at, b.sequence
from unnest(%(kinds)s::text[], %(entities)s::uuid[], %(assets)s::uuid[], %(instants)s::timestamptz[])
     as w (kind, entity_id, asset_id, at)
cross join lateral (
    select e.created_at, e.sequence from lot l
    join lot_change c on c.organization_id = l.organization_id and c.lot_id = l.id
    join journal_entry e on e.organization_id = c.organization_id and e.id = c.entry_id
    where w.kind <> 'END_OF_HOLD' and l.organization_id = %(organization_id)s and l.entity_id = w.entity_id
      and l.asset_id = w.asset_id and e.action_type = w.kind
      and case w.kind when 'MATURITY' then l.matures_at else l.expires_at end = w.at
    union all
    select null, null from lot l
    where w.kind <> 'END_OF_HOLD' and l.organization_id = %(organization_id)s and l.entity_id = w.entity_id
      and l.asset_id = w.asset_id and l.remaining > 0
      and case w.kind when 'MATURITY' then l.status = 'DEFERRED' and l.matures_at = w.at
                      else l.status = 'AVAILABLE' and l.expires_at = w.at end
    union all
    select e.created_at, e.sequence from hold h
    join hold_change c on c.organization_id = h.organization_id and c.hold_id = h.id and c.status <> 'ACTIVE'
    join journal_entry e on e.organization_id = c.organization_id and e.id = c.entry_id and e.created_at >= w.at
    where w.kind = 'END_OF_HOLD' and h.organization_id = %(organization_id)s and h.entity_id = w.entity_id
      and h.asset_id = w.asset_id and h.expires_at = w.at
    union all
    select null, null from hold h
    where w.kind = 'END_OF_HOLD' and h.organization_id = %(organization_id)s and h.entity_id = w.entity_id
      and h.asset_id = w.asset_id and h.expires_at = w.at and h.status = 'ACTIVE'
    order by 2 nulls last limit 1
) b
"""


async def read_bookings(tx: Transaction, dues: Collection[Due]) -> Bookings:
    """When the real counterparts of these were booked."""
    wanted = list(dues)
    params = {
        "organization_id": tx.organization_id,
        "kinds": [due.kind for due in wanted],
        "entities": [due.entity_id for due in wanted],
        "assets": [due.asset_id for due in wanted],
        "instants": [due.at for due in wanted],
    }
    found: Bookings = dict.fromkeys(wanted)
    for *due, at, sequence in await (await tx.execute(_BOOKINGS, params)).fetchall():
        found[Due(*due)] = Booked(at, sequence)
    return found


class Dues:
    """What falls due in one world while it is played. `unknown` are those whose real counterparts have to be read."""

    def __init__(self, world: World, frame: Frame, bookings: Bookings) -> None:
        self.unknown: set[Due] = set()
        self._world = world
        self._frame = frame
        self._bookings = bookings
        self._holders: dict[UUID, Holder] = {}
        self._next: dict[UUID, datetime] = {}
        self._refused: set[UUID] = set()
        self._seen = self._marks()

    def follow(self, holder: Holder) -> None:
        """Watch what this holder has from now on."""
        self._holders[holder.id] = holder
        self._look_at(holder.id)

    def notice(self) -> None:
        """Take note of what has been done to lots and holds since the last call."""
        lots, holds = self._world.books.lots, self._world.books.holds
        opened, changed, held, reduced = self._seen
        touched = {lot.entity_id for lot in lots.opened[opened:]}
        touched |= {change.lot.entity_id for change in lots.changes[changed:]}
        touched |= {hold.entity_id for hold in holds.opened[held:]}
        touched |= {change.hold.entity_id for change in holds.changes[reduced:]}
        self._seen = self._marks()
        for entity_id in touched & self._holders.keys():
            self._look_at(entity_id)

    def book(self, place: Place, only: UUID | None = None) -> None:
        """Book what is due at this place, of one holder or of all."""
        due = [entity_id for entity_id, at in self._next.items() if at <= place.at and only in (None, entity_id)]
        for entity_id in due:
            while self._book_one(entity_id, place):
                pass
            self._look_at(entity_id)
        self._seen = self._marks()

    def _marks(self) -> tuple[int, int, int, int]:
        lots, holds = self._world.books.lots, self._world.books.holds
        return len(lots.opened), len(lots.changes), len(holds.opened), len(holds.changes)

    def _look_at(self, entity_id: UUID) -> None:
        instants = [due.at for due, _ in self._waiting(entity_id)]
        if instants:
            self._next[entity_id] = min(instants)
        else:
            self._next.pop(entity_id, None)

    def _waiting(self, entity_id: UUID) -> Iterator[tuple[Due, Lot | Hold]]:
        books = self._world.books
        for asset_id in self._frame.followed_lots:
            for lot in books.lots.matching(Selection(entity_id, asset_id, "DEFERRED")):
                if lot.matures_at is not None:
                    yield Due("MATURITY", entity_id, asset_id, lot.matures_at), lot
            for lot in books.lots.matching(Selection(entity_id, asset_id, "AVAILABLE")):
                if lot.expires_at is not None:
                    yield Due("EXPIRY", entity_id, asset_id, lot.expires_at), lot
        for asset_id in self._frame.followed:
            for hold_id in books.holds.take_oldest(entity_id, asset_id, None):
                hold = books.holds.get(hold_id)
                if hold.expires_at is not None and hold_id not in self._refused:
                    yield Due("END_OF_HOLD", entity_id, asset_id, hold.expires_at), hold

    def _book_one(self, entity_id: UUID, place: Place) -> bool:
        """Book what has been due for longest; False when there is nothing that can be booked."""
        ready = [(due, item) for due, item in self._waiting(entity_id) if self._is_ready(due, place)]
        if not ready:
            return False
        due, item = min(ready, key=lambda found: found[0].at)
        holder_type: HolderType = "GROUP" if self._holders[entity_id].entity_type == "GROUP" else "PARTICIPANT"
        has_lots = due.asset_id in self._frame.followed_lots
        position = Position(holder_type, entity_id, due.asset_id, has_lots)
        if isinstance(item, Hold):
            if not end_in_books(self._world.books, item, due.at, None, has_lots=has_lots):
                self._refused.add(item.id)
        elif due.kind == "MATURITY":
            movements.mature(self._world.books, position, item, due.at)
        else:
            movements.expire(self._world.books, position, item, due.at)
        return True

    def _is_ready(self, due: Due, place: Place) -> bool:
        if due.at > place.at:
            return False
        if due not in self._bookings:
            self.unknown.add(due)
            return True
        booked = self._bookings[due]
        return booked is None or booked.is_before(place)
