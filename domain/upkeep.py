"""Upkeep: what falls due by itself, and what should be looked after now and then.

Contract: holders.md 7.3 and 6.8, redemptions.md 3.5.

Lots mature and expire, holds and pending redemptions come to their end. Whoever runs this (a schedule every 30 seconds,
an operator's command, both at once) finds what is due in index order, a batch at a time, each batch a transaction of
its own under its holders' locks. So a run that dies half way leaves whole batches behind, the next one goes on where it
stopped, and one that comes after it writes nothing. Memory and locks depend on the batch, never on how much is due.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Literal, LiteralString
from uuid import UUID

from db.session import Database, Transaction
from domain import faults, limits, redemptions
from domain.hold_ends import ALL, end_due_holds, instant_of_step, programs_with_ends
from domain.ledger import movements
from domain.ledger.books import Books
from domain.ledger.holdings import load_lots_by_id
from domain.ledger.holds import HoldCarrier
from domain.ledger.journal import load_accounts, write
from domain.ledger.lots import Lot
from domain.ledger.movements import Position
from domain.locks import lock_holders
from domain.money import ZERO

logger = logging.getLogger("scrip.upkeep")

DueKind = Literal["MATURITY", "EXPIRY"]
_Batched = Literal["MATURITY", "EXPIRY", "REDEMPTIONS"]
_Kind = Literal["MATURITY", "EXPIRY", "REDEMPTIONS", "HOLDS"]

SLICE_BATCHES = 4
"""How many batches an organization gets before the others have their turn."""
SKIPPED = 100
"""How many of a kind a sweep skips. Where more go wrong it isn't about single ones, and the kind is given up."""

_DUE: dict[DueKind, LiteralString] = {
    "MATURITY": """
        select id, entity_type, entity_id, asset_id from lot
        where organization_id = %s and status = 'DEFERRED' and matures_at <= %s and id <> all(%s)
        order by matures_at, id limit %s
    """,
    "EXPIRY": """
        select id, entity_type, entity_id, asset_id from lot
        where organization_id = %s and status = 'AVAILABLE' and remaining > 0 and expires_at <= %s and id <> all(%s)
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
    """What was done in one organization, in entries written, and what went wrong.

    `failed` counts lots and redemptions that were skipped, and kinds or programs that were given up. Each is in the log
    as an error.
    """

    matured: int = 0
    expired: int = 0
    holds_ended: int = 0
    redemptions_expired: int = 0
    failed: int = 0

    def __add__(self, other: "Swept") -> "Swept":
        return Swept(
            self.matured + other.matured,
            self.expired + other.expired,
            self.holds_ended + other.holds_ended,
            self.redemptions_expired + other.redemptions_expired,
            self.failed + other.failed,
        )


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
    skipped: Collection[UUID] = (),
) -> tuple[int, bool]:
    """Mature or expire up to `limit` lots of an organization that are due and not `skipped`, in one transaction.

    Due is what falls due by `instant_of_step` of `at`. How many entries were written, and whether there may be more.
    Raises DatabaseUnavailable; or whatever is wrong with one of the lots, and then nothing was done.
    """

    async def work(tx: Transaction) -> tuple[int, bool]:
        now = instant_of_step(tx.now, at)
        found = await (await tx.execute(_DUE[kind], (tx.organization_id, now, list(skipped), limit))).fetchall()
        if not found:
            return 0, False
        await lock_holders(tx, {(entity_type, entity_id) for _, entity_type, entity_id, _ in found})
        books = await load_accounts(tx, {row[2] for row in found}, {row[3] for row in found})
        lots = await load_lots_by_id(tx, books.lots, [row[0] for row in found])
        # What fell due first comes first: it decides which lot repays an overdraft.
        for lot in sorted(lots, key=lambda lot: (_due_at(lot, kind), lot.created_at, lot.id)):
            _process(books, lot, kind, now)
        written = len(books.entries)
        await write(tx, books)
        await faults.reach("due_lots.written", kind)
        return written, len(found) == limit

    done = await database.repeat(organization_id, work)
    if done[0]:
        await faults.reach("due_lots.committed", kind)
    return done


def _due_at(lot: Lot, kind: DueKind) -> datetime:
    due_at = lot.matures_at if kind == "MATURITY" else lot.expires_at
    assert due_at is not None, "it was found by that instant"
    return due_at


class Sweep:
    """One organization's sweep, a slice at a time: maturities, expiries, and what is overdue by `hold_grace`.

    The latter are holds and pending redemptions, whose own workflows come first. The kinds take turns, a batch each, so
    that none waits for the backlog of another; nor does what is wrong with one stop the others. Where a batch of lots
    or redemptions goes wrong, smaller ones lead to the one that is to blame. It is logged as an error and skipped, so
    the next sweep meets it again: nothing about its money is changed or forgotten.
    """

    def __init__(
        self,
        database: Database,
        organization_id: UUID,
        *,
        at: datetime | None = None,
        hold_grace: timedelta = timedelta(0),
    ) -> None:
        self.organization_id = organization_id
        self._database = database
        self._at = at
        self._hold_grace = hold_grace
        self._pending: deque[_Kind] = deque(("MATURITY", "EXPIRY", "HOLDS", "REDEMPTIONS"))
        self._whole: dict[_Batched, int] = {
            "MATURITY": limits.DUE_LOTS,
            "EXPIRY": limits.DUE_LOTS,
            "REDEMPTIONS": limits.DUE_REDEMPTIONS,
        }
        self._sizes = dict(self._whole)
        self._skipped: dict[_Batched, set[UUID]] = {kind: set() for kind in self._whole}
        self._programs: deque[tuple[UUID, HoldCarrier]] | None = None
        self._swept = Swept()

    async def go_on(
        self,
        batches: int = SLICE_BATCHES,
        *,
        progress: Callable[[], None] = lambda: None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> tuple[Swept, bool]:
        """Do so many batches, fewer where there is less to do; what this slice did, and whether the sweep is finished.

        Only batches that leave something for later count. `progress` is called after every batch; when `is_over` says
        so the slice stops after the batch under way. Raises DatabaseUnavailable.
        """
        self._swept = Swept()
        while self._pending and batches > 0:
            kind = self._pending.popleft()
            more = await self._batch(kind)
            progress()
            if more:
                self._pending.append(kind)
                batches = 0 if is_over() else batches - 1
        return self._swept, not self._pending

    async def _batch(self, kind: _Kind) -> bool:
        """Do a batch of this kind; whether there may be more."""
        try:
            return await (self._end_holds() if kind == "HOLDS" else self._book(kind))
        except Exception:
            await self._require_database()
            # The kind is given up until the next sweep. The others go on.
            self._note_failure("upkeep failed", kind=kind)
            return False

    async def _book(self, kind: _Batched) -> bool:
        size, skipped = self._sizes[kind], self._skipped[kind]
        try:
            written, more = await self._book_some(kind, size)
        except Exception:
            await self._require_database()
            if size > 1:
                self._sizes[kind] = size // 2
                return True
            first = await self._first_due(kind)
            if first is None or len(skipped) >= SKIPPED:
                raise
            self._note_failure("what is due cannot be processed", kind=kind, id=first)
            skipped.add(first)
            self._sizes[kind] = self._whole[kind]
            return True
        if kind == "EXPIRY":
            self._swept += Swept(expired=written)
        elif kind == "REDEMPTIONS":
            self._swept += Swept(redemptions_expired=written)
        else:
            self._swept += Swept(matured=written)
            # A lot that matures late may have to expire at once.
            if written and "EXPIRY" not in self._pending:
                self._pending.append("EXPIRY")
        return more

    async def _book_some(self, kind: _Batched, size: int) -> tuple[int, bool]:
        skipped = self._skipped[kind]
        if kind == "REDEMPTIONS":
            until = self._overdue_since(self._database.clock())
            return await self._database.repeat(
                self.organization_id, lambda tx: redemptions.expire_overdue(tx, until, size, skipped)
            )
        return await process_due_lots(
            self._database, self.organization_id, kind, at=self._at, limit=size, skipped=skipped
        )

    async def _first_due(self, kind: _Batched) -> UUID | None:
        skipped = list(self._skipped[kind])
        async with self._database.transaction(self.organization_id) as tx:
            if kind == "REDEMPTIONS":
                overdue = await redemptions.find_overdue(tx, self._overdue_since(tx.now), 1, skipped)
                return overdue[0] if overdue else None
            now = instant_of_step(tx.now, self._at)
            cursor = await tx.execute(_DUE[kind], (tx.organization_id, now, skipped, 1))
            row = await cursor.fetchone()
        return None if row is None else row[0]

    def _overdue_since(self, clock: datetime) -> datetime:
        """Since when somebody should have ended what is ended here."""
        return instant_of_step(clock, self._at) - self._hold_grace

    async def _end_holds(self) -> bool:
        """End a batch of holds that nobody has ended in time, whoever carries them: the net below the workflows."""
        until = self._overdue_since(self._database.clock())
        if self._programs is None:
            self._programs = await self._programs_with_ends(until)
        if not self._programs:
            return False
        program_id, carrier = self._programs.popleft()
        try:
            batch = await end_due_holds(self._database, self.organization_id, program_id, until=until, carrier=carrier)
        except Exception:
            await self._require_database()
            self._note_failure("holds cannot be ended", program_id=program_id)
        else:
            self._swept += Swept(holds_ended=batch.ended)
            if batch.more:
                self._programs.append((program_id, carrier))
        return bool(self._programs)

    async def _programs_with_ends(self, until: datetime) -> deque[tuple[UUID, HoldCarrier]]:
        async with self._database.transaction(self.organization_id) as tx:
            found = {carrier: await programs_with_ends(tx, until, (carrier,)) for carrier in ALL}
        return deque((program_id, carrier) for carrier, programs in found.items() for program_id, _ in programs)

    async def _require_database(self) -> None:
        """Raise DatabaseUnavailable unless Postgres answers: then what went wrong, be it a lock, is about the batch."""
        async with self._database.transaction(self.organization_id) as tx:
            await tx.execute("select 1")

    def _note_failure(self, message: str, **about: object) -> None:
        self._swept += Swept(failed=1)
        named = {name: str(value) for name, value in about.items()}
        logger.exception("%s: %s", message, named, extra={"organization_id": str(self.organization_id), **named})


async def sweep(
    database: Database,
    organization_id: UUID,
    *,
    at: datetime | None = None,
    hold_grace: timedelta = timedelta(0),
    progress: Callable[[], None] = lambda: None,
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[Swept, bool]:
    """Do all that is due in one organization, slice by slice: see Sweep.

    When `is_over` says so it stops after the batch under way. What was done, and whether all of it was. Raises
    DatabaseUnavailable.
    """
    work = Sweep(database, organization_id, at=at, hold_grace=hold_grace)
    done, finished = await work.go_on(progress=progress, is_over=is_over)
    while not finished and not is_over():
        part, finished = await work.go_on(progress=progress, is_over=is_over)
        done += part
    return done, finished


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
