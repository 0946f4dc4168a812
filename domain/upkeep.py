"""Upkeep: what falls due by itself, and what should be looked after now and then. Contract: holders.md 7.3, 6.8.

Lots mature and expire, holds come to their end. Whoever runs this (a schedule every 30 seconds, an operator's command,
both at once) finds what is due in index order, a batch at a time, each batch a transaction of its own under its
holders' locks. So a run that dies half way leaves whole batches behind, the next one goes on where it stopped, and one
that comes after it writes nothing. Memory and locks depend on the batch, never on how much is due.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Literal, LiteralString
from uuid import UUID

from db.session import Database, Transaction
from domain import limits
from domain.hold_ends import ALL, end_due_holds, programs_with_ends
from domain.ledger import movements
from domain.ledger.books import Books
from domain.ledger.holdings import load_lots_by_id
from domain.ledger.journal import load_accounts, write
from domain.ledger.lots import Lot
from domain.ledger.movements import Position
from domain.locks import lock_holders
from domain.money import ZERO

logger = logging.getLogger("scrip.upkeep")

DueKind = Literal["MATURITY", "EXPIRY"]

_DUE: dict[DueKind, LiteralString] = {
    "MATURITY": """
        select id, entity_type, entity_id, asset_id from lot
        where organization_id = %s and status = 'DEFERRED' and matures_at <= %s
        order by matures_at, id limit %s
    """,
    "EXPIRY": """
        select id, entity_type, entity_id, asset_id from lot
        where organization_id = %s and status = 'AVAILABLE' and remaining > 0 and expires_at <= %s
        order by expires_at, id limit %s
    """,
}

# A promise can only lie far ahead when clocks or backups have been set back: its events would wait for that long.
_WITHDRAW_STALE_PROMISES = """
update lane set drained_until = null
where organization_id = %s and drained_until > clock_timestamp() + make_interval(secs => %s)
"""

# Position by position in the order of `hold_active_idx`; one statement, so all of it is seen at one moment.
_DRIFT = """
with page as (
    select entity_id, asset_id, sum(remaining) as active, array_agg(id) as hold_ids from hold
    where organization_id = %(organization_id)s and status = 'ACTIVE'
      and (entity_id, asset_id) > (%(after_entity_id)s, %(after_asset_id)s)
    group by entity_id, asset_id order by entity_id, asset_id limit %(limit)s
)
select page.entity_id, page.asset_id, page.active,
       coalesce((select p.balance from account a
                 cross join lateral (select balance from posting
                                     where organization_id = a.organization_id and account_id = a.id
                                     order by version desc limit 1) p
                 where a.organization_id = %(organization_id)s and a.entity_id = page.entity_id
                   and a.asset_id = page.asset_id and a.bucket = 'HELD'), 0) as held,
       case when s.inventory_mode = 'LOT' then
           coalesce((select sum(l.remaining) from lot l
                     where l.organization_id = %(organization_id)s and l.hold_id = any(page.hold_ids)
                       and l.status = 'HELD'), 0) end as in_lots
from page join asset s on s.organization_id = %(organization_id)s and s.id = page.asset_id
order by page.entity_id, page.asset_id
"""


@dataclass(frozen=True, slots=True)
class Swept:
    """What was done in one organization, in entries written."""

    matured: int = 0
    expired: int = 0
    holds_ended: int = 0


@dataclass(frozen=True, slots=True)
class Drift:
    """A holder's position whose projections disagree with the ledger. Nothing changes it but a person.

    `held` is the account's balance, `active` what its active holds say, `in_lots` what the lots in them say (LOT only).
    """

    entity_id: UUID
    asset_id: UUID
    held: Decimal
    active: Decimal
    in_lots: Decimal | None


async def process_due_lots(
    database: Database,
    organization_id: UUID,
    kind: DueKind,
    *,
    at: datetime | None = None,
    limit: int = limits.DUE_LOTS,
) -> tuple[int, bool]:
    """Mature or expire up to `limit` lots of an organization that are due, in one transaction.

    Due is what falls due by the later of the clock and `at`. How many entries were written, and whether there may be
    more. Raises DatabaseUnavailable.
    """

    async def work(tx: Transaction) -> tuple[int, bool]:
        now = tx.now if at is None else max(tx.now, at)
        found = await (await tx.execute(_DUE[kind], (tx.organization_id, now, limit))).fetchall()
        if not found:
            return 0, False
        await lock_holders(tx, {(entity_type, entity_id) for _, entity_type, entity_id, _ in found})
        books = await load_accounts(tx, {row[2] for row in found}, {row[3] for row in found})
        lots = await load_lots_by_id(tx, books.lots, [row[0] for row in found])
        for lot in sorted(lots):
            _process(books, lot, kind, now)
        written = len(books.entries)
        await write(tx, books)
        return written, len(found) == limit

    return await database.repeat(organization_id, work)


async def sweep(
    database: Database,
    organization_id: UUID,
    *,
    at: datetime | None = None,
    hold_grace: timedelta = timedelta(0),
    progress: Callable[[], None] = lambda: None,
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[Swept, bool]:
    """Do all that is due in one organization: maturities, expiries, and holds that are overdue by `hold_grace`.

    `progress` is called after every batch; when `is_over` says so the sweep stops after the batch under way. What was
    done, and whether all of it was. Raises DatabaseUnavailable.
    """
    counts = {"MATURITY": 0, "EXPIRY": 0}
    kinds: tuple[DueKind, ...] = ("MATURITY", "EXPIRY")
    for kind in kinds:
        more = True
        while more:
            written, more = await process_due_lots(database, organization_id, kind, at=at)
            counts[kind] += written
            progress()
            if more and is_over():
                return Swept(counts["MATURITY"], counts["EXPIRY"]), False
    ended, finished = await _sweep_holds(database, organization_id, at, hold_grace, progress, is_over)
    return Swept(counts["MATURITY"], counts["EXPIRY"], ended), finished


async def _sweep_holds(
    database: Database,
    organization_id: UUID,
    at: datetime | None,
    grace: timedelta,
    progress: Callable[[], None],
    is_over: Callable[[], bool],
) -> tuple[int, bool]:
    """End the holds that nobody has ended in time, whoever carries them: the net below the workflows."""
    now = database.clock() if at is None else max(database.clock(), at)
    until = now - grace
    async with database.transaction(organization_id) as tx:
        programs = await programs_with_ends(tx, until, ALL)
    ended = 0
    for program_id, _ in programs:
        more = True
        while more:
            batch = await end_due_holds(database, organization_id, program_id, until=until, carriers=ALL)
            ended, more = ended + batch.ended, batch.more
            progress()
            if more and is_over():
                return ended, False
    return ended, True


async def repair(tx: Transaction) -> int:
    """Mend what is no money: withdraw promises to look for events that reach implausibly far; how many."""
    cursor = await tx.execute(_WITHDRAW_STALE_PROMISES, (tx.organization_id, 2 * limits.DRAIN_LIMIT_S))
    if cursor.rowcount:
        logger.warning("withdrew %d stale promises", cursor.rowcount)
    return cursor.rowcount


async def find_drift(
    database: Database, organization_id: UUID, progress: Callable[[], None] = lambda: None
) -> list[Drift]:
    """Positions with active holds whose holds, lots and HELD balance disagree, the first hundred at most.

    It reads and reports. That money is never changed silently is the point: what to do about it is for a person, and
    the nightly verification says what the ledger itself has to say.
    """
    drifts: list[Drift] = []
    after = (UUID(int=0), UUID(int=0))
    while len(drifts) < limits.DRIFTS_REPORTED:
        async with database.transaction(organization_id) as tx:
            params = {
                "organization_id": organization_id,
                "after_entity_id": after[0],
                "after_asset_id": after[1],
                "limit": limits.POSITIONS_PER_PAGE,
            }
            rows = await tx.rows(_DRIFT, params)
        for row in rows:
            drift = Drift(row["entity_id"], row["asset_id"], row["held"], row["active"], row["in_lots"])
            if drift.held != drift.active or drift.in_lots not in (None, drift.active):
                logger.error("holds disagree with the ledger: %s", drift)
                drifts.append(drift)
        progress()
        if len(rows) < limits.POSITIONS_PER_PAGE:
            break
        after = (rows[-1]["entity_id"], rows[-1]["asset_id"])
    return drifts[: limits.DRIFTS_REPORTED]


def _process(books: Books, lot: Lot, kind: DueKind, now: datetime) -> None:
    """Mature or expire a lot, unless somebody else has come first: it was read again under its holder's lock."""
    position = Position("GROUP" if lot.entity_type == "GROUP" else "PARTICIPANT", lot.entity_id, lot.asset_id, True)
    if kind == "MATURITY":
        if lot.status == "DEFERRED" and lot.matures_at is not None and lot.matures_at <= now:
            movements.mature(books, position, lot, now)
    elif lot.status == "AVAILABLE" and lot.remaining > ZERO and lot.expires_at is not None and lot.expires_at <= now:
        movements.expire(books, position, lot, now)
