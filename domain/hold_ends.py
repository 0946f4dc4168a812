"""Holds that come to their end: what remains is released or forfeited, exactly once. Contract: holders.md 6.8.

Who carries an end (a hold's own workflow, the program's HoldEnds, upkeep) only decides when this code runs. What makes
it happen once is the hold's row, read again under its holder's lock: of an end and a release that race, one finds
nothing. Neither the status of the holder nor that of the program or asset matters.
"""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import UUID

from db.session import Database, Transaction
from domain import faults, limits
from domain.errors import Refusal
from domain.ids import new_id
from domain.ledger import movements
from domain.ledger.books import Books
from domain.ledger.holdings import load_holds, load_lots_of_holds
from domain.ledger.holds import Hold, HoldCarrier, HoldStatus
from domain.ledger.journal import load_accounts, write
from domain.ledger.movements import Cause, HolderType, Position
from domain.locks import lock_holders

logger = logging.getLogger("scrip.holds")

Order = Literal["RELEASE", "FORFEIT"]
"""What is to become of what remains in a hold."""

OWN: tuple[HoldCarrier, ...] = ("WORKFLOW",)
CARRIED: tuple[HoldCarrier, ...] = ("PROGRAM",)
ALL: tuple[HoldCarrier, ...] = OWN + CARRIED
"""Who ends holds: workflows of their own, the programs' HoldEnds, both."""

_FINAL_STATUS: dict[Order, HoldStatus] = {"RELEASE": "RELEASED", "FORFEIT": "FORFEITED"}

_DUE = """
select id from hold
where organization_id = %s and program_id = %s and status = 'ACTIVE' and expires_at is not null and expires_at <= %s
  and carrier = %s and kind <> 'REDEMPTION'
order by expires_at, id limit %s
"""

_NEXT_END = """
select expires_at from hold
where organization_id = %s and program_id = %s and status = 'ACTIVE' and expires_at is not null and expires_at > %s
  and carrier = %s and kind <> 'REDEMPTION'
order by expires_at, id limit 1
"""

# One probe of the index per program and carrier (`limit 1` keeps the planner from a join): there are few programs and
# may be millions of holds.
_PROGRAMS_WITH_ENDS = """
select distinct p.id, p.name from program p
cross join unnest(%(carriers)s::text[]) as c (carrier)
cross join lateral (
    select from hold
    where organization_id = %(organization_id)s and program_id = p.id and status = 'ACTIVE'
      and expires_at is not null and expires_at <= %(until)s and carrier = c.carrier and kind <> 'REDEMPTION'
    limit 1
) h
where p.organization_id = %(organization_id)s
order by p.id
"""


CLOCK_SKEW = timedelta(minutes=1)
"""How far ahead of the clock the instant of a step may be."""


@dataclass(frozen=True, slots=True)
class EndedHolds:
    """What one batch did. `more` says that further holds are due; `next_end` is the next end that isn't due yet."""

    ended: int
    more: bool
    next_end: datetime | None


@dataclass(frozen=True, slots=True)
class HoldState:
    """How a hold stands."""

    status: HoldStatus
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class CarriedHold:
    """An active hold with an end, as the one who carries it has to know it."""

    id: UUID
    program_id: UUID
    participant_id: UUID | None
    expires_at: datetime


def instant_of_step(clock: datetime, at: datetime | None) -> datetime:
    """The instant that a time-driven step acts by: the one it was told, `at`, or the clock where that is later.

    A step is told its instant so that Temporal's time and the clock can't disagree about it by seconds. One that is
    ahead by more than CLOCK_SKEW is a mistake of somebody's and doesn't count: nothing happens long before its time.
    """
    return at if at is not None and clock < at <= clock + CLOCK_SKEW else clock


async def end_due_holds(
    database: Database,
    organization_id: UUID,
    program_id: UUID,
    limit: int = limits.DUE_HOLDS,
    *,
    at: datetime | None = None,
    until: datetime | None = None,
    carrier: HoldCarrier = "PROGRAM",
) -> EndedHolds:
    """End up to `limit` holds of a program and a carrier that are due, the longest overdue first, in one transaction.

    Due is what ends by `instant_of_step` of `at`; or by `until`, where that is given. Raises DatabaseUnavailable.
    """

    async def work(tx: Transaction) -> EndedHolds:
        now = until or instant_of_step(tx.now, at)
        due = await tx.execute(_DUE, (tx.organization_id, program_id, now, carrier, limit))
        hold_ids = [row[0] for row in await due.fetchall()]
        ended = await _end(tx, hold_ids, now, order=None)
        if ended:
            await faults.reach("hold_ends.written", carrier)
        # Holds that can't be ended are logged; where a whole batch is of that kind, trying again at once won't help.
        more = ended > 0 and len(hold_ids) == limit
        following = await tx.execute(_NEXT_END, (tx.organization_id, program_id, now, carrier))
        row = await following.fetchone()
        next_end = row[0] if row else None
        if next_end is not None and at is not None and next_end <= at:
            # Whoever asks is ahead of the clock. It would come back at once, over and over, for an end that has passed.
            next_end = at + CLOCK_SKEW
        return EndedHolds(ended, more, next_end)

    batch = await database.repeat(organization_id, work)
    if batch.ended:
        await faults.reach("hold_ends.committed", carrier)
    return batch


async def end_hold(
    tx: Transaction, hold_id: UUID, *, order: Order | None, at: datetime | None = None, program_id: UUID | None = None
) -> HoldState | None:
    """End one hold: by its own terms if it is due (`order` None), or at once by an operator's order; how it stands now.

    Due is what ends by `instant_of_step` of `at`. A hold that isn't active any more is left as it is, and so is
    one of another program where `program_id` names one. None for a hold that doesn't exist.
    """
    now = instant_of_step(tx.now, at)
    if await _end(tx, [hold_id], now, order, program_id):
        await faults.reach("hold_ends.written", "WORKFLOW")
    return await find_hold(tx, hold_id)


async def find_hold(tx: Transaction, hold_id: UUID) -> HoldState | None:
    """How this hold stands; None where there is none."""
    cursor = await tx.execute(
        "select status, expires_at from hold where organization_id = %s and id = %s", (tx.organization_id, hold_id)
    )
    row = await cursor.fetchone()
    return None if row is None else HoldState(*row)


async def programs_with_ends(
    tx: Transaction, until: datetime, carriers: Collection[HoldCarrier]
) -> list[tuple[UUID, str]]:
    """The programs, as (id, name), that have an active hold of these carriers which ends by `until`."""
    params = {"organization_id": tx.organization_id, "until": until, "carriers": list(carriers)}
    cursor = await tx.execute(_PROGRAMS_WITH_ENDS, params)
    return [(program_id, name) for program_id, name in await cursor.fetchall()]


async def carried_holds(
    tx: Transaction, program_id: UUID, after: CarriedHold | None, limit: int = limits.HOLDS_PER_LOOK
) -> list[CarriedHold]:
    """A page of the program's active holds that have a workflow of their own, the next to end first."""
    start = (after.expires_at, after.id) if after else (datetime(1970, 1, 1, tzinfo=UTC), UUID(int=0))
    cursor = await tx.execute(
        """
        select id, program_id, case when entity_type = 'PARTICIPANT' then entity_id end, expires_at from hold
        where organization_id = %s and program_id = %s and status = 'ACTIVE' and expires_at is not null
          and (expires_at, id) > (%s, %s) and carrier = 'WORKFLOW' and kind <> 'REDEMPTION'
        order by expires_at, id limit %s
        """,
        (tx.organization_id, program_id, *start, limit),
    )
    return [CarriedHold(*row) for row in await cursor.fetchall()]


async def _end(
    tx: Transaction, hold_ids: list[UUID], now: datetime, order: Order | None, program_id: UUID | None = None
) -> int:
    """End those of these holds that (still) are to be ended; how many."""
    holders = await _holders_of(tx, hold_ids)
    if not holders:
        return 0
    await lock_holders(tx, {(kind, entity_id) for kind, entity_id, _ in holders})
    asset_ids = {asset_id for _, _, asset_id in holders}
    books = await load_accounts(tx, {entity_id for _, entity_id, _ in holders}, asset_ids)
    await load_holds(tx, books.holds, hold_ids)
    await load_lots_of_holds(tx, books.lots, hold_ids)
    with_lots = await _assets_with_lots(tx, asset_ids)
    ended = 0
    for hold in (books.holds.get(hold_id) for hold_id in hold_ids if books.holds.has(hold_id)):
        if _is_to_end(hold, now, order) and program_id in (None, hold.program_id):
            ended += end_in_books(books, hold, now, order, has_lots=hold.asset_id in with_lots)
    await write(tx, books)
    return ended


def _is_to_end(hold: Hold, now: datetime, order: Order | None) -> bool:
    if hold.status != "ACTIVE" or hold.kind == "REDEMPTION":
        return False
    return order is not None or (hold.expires_at is not None and hold.expires_at <= now)


def end_in_books(books: Books, hold: Hold, now: datetime, order: Order | None, *, has_lots: bool) -> bool:
    """Release or forfeit what remains in a hold, whose lots are loaded; False where that can't be, and nothing is done.

    By the hold's own terms where `order` is None.
    """
    holder_type: HolderType = "GROUP" if hold.entity_type == "GROUP" else "PARTICIPANT"
    position = Position(holder_type, hold.entity_id, hold.asset_id, has_lots)
    selection = position.select("HELD", now, hold_id=hold.id)
    effect = order or hold.on_expiry or "RELEASE"
    final: HoldStatus = "EXPIRED" if order is None else _FINAL_STATUS[order]
    cause = Cause(
        new_id(),
        hold.program_id,
        now,
        description="end of hold" if order is None else f"{effect.lower()} by an operator",
        reference_id=hold.reference_id,
    )
    operation = movements.forfeit_held if effect == "FORFEIT" else movements.release
    try:
        operation(books, position, cause, None, selection, only=hold.id, final=final)
    except Refusal as refusal:
        # Its lots and its record disagree. Nothing was posted, and the other holds must not wait for this one.
        logger.error("hold %s cannot be ended: %s", hold.id, refusal)
        return False
    return True


async def _holders_of(tx: Transaction, hold_ids: list[UUID]) -> list[tuple[str, UUID, UUID]]:
    """(type, id, asset) of whoever has these holds, read before the locks. They never change."""
    if not hold_ids:
        return []
    cursor = await tx.execute(
        "select distinct entity_type, entity_id, asset_id from hold where organization_id = %s and id = any(%s)",
        (tx.organization_id, hold_ids),
    )
    return await cursor.fetchall()


async def _assets_with_lots(tx: Transaction, asset_ids: Iterable[UUID]) -> set[UUID]:
    cursor = await tx.execute(
        "select id from asset where organization_id = %s and id = any(%s) and inventory_mode = 'LOT'",
        (tx.organization_id, list(asset_ids)),
    )
    return {row[0] for row in await cursor.fetchall()}
