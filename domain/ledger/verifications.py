"""Records of the checks of whole chains that run in the background. Contract: README.md "Small print".

A record is RUNNING from its start until it ends VALID or INVALID, with what the walk found, or ABANDONED: cancelled,
terminated or failed before it came to a result. What ended stays as it is. The workflow `verify/{organization}` is what
lets only one run per organization; so whichever begins ends those that were left behind as RUNNING.
"""

from typing import Literal
from uuid import UUID

from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col, select, update

from db.session import Database, Transaction
from db.tables import LedgerVerification
from domain.errors import not_found
from domain.ledger.verify import Walk, begin_walk

Status = Literal["RUNNING", "VALID", "INVALID", "ABANDONED"]

_ORGANIZATIONS_PAGE = 1_000

_NEWEST_RESULT = """
select status from ledger_verification
where organization_id = %s and status in ('VALID', 'INVALID')
order by started_at desc, id desc limit 1
"""


async def announce(tx: Transaction, verification_id: UUID) -> LedgerVerification:
    """The record of this verification, made if it isn't there yet: RUNNING, with nothing checked."""
    walk = await begin_walk(tx)
    record = LedgerVerification(
        organization_id=tx.organization_id,
        id=verification_id,
        status="RUNNING",
        entries_checked=0,
        head_sequence=walk.head_sequence,
        started_at=tx.now,
    )
    await tx.run(insert(LedgerVerification).values(record.model_dump()).on_conflict_do_nothing())
    return await get(tx, verification_id)


async def begin(tx: Transaction, verification_id: UUID) -> Walk:
    """Begin the walk of this verification, which needs no record yet; the walk to go on with.

    Raises Refusal `not_found` for an organization that doesn't exist.
    """
    walk = await begin_walk(tx)
    await tx.run(
        update(LedgerVerification)
        .where(
            col(LedgerVerification.organization_id) == tx.organization_id,
            col(LedgerVerification.status) == "RUNNING",
            col(LedgerVerification.id) != verification_id,
        )
        .values(status="ABANDONED", finished_at=tx.now)
    )
    await announce(tx, verification_id)
    await note(tx, verification_id, walk)
    return walk


async def note(tx: Transaction, verification_id: UUID, walk: Walk) -> None:
    """Record how far the walk has come, and its outcome once it has finished. What has ended is left as it is."""
    status: Status = "RUNNING"
    if walk.finished:
        status = "VALID" if walk.valid else "INVALID"
    await _change(
        tx,
        verification_id,
        status=status,
        entries_checked=walk.entries_checked,
        head_sequence=walk.head_sequence,
        first_invalid_entry_id=walk.first_invalid_entry_id,
        problem=walk.problem,
        finished_at=tx.now if walk.finished else None,
    )


async def abandon(tx: Transaction, verification_id: UUID) -> None:
    """Record that this verification ends without a result. What has ended is left as it is."""
    await _change(tx, verification_id, status="ABANDONED", finished_at=tx.now)


async def get(tx: Transaction, verification_id: UUID) -> LedgerVerification:
    """The record. Raises Refusal `not_found`."""
    record = await tx.first(
        select(LedgerVerification).where(
            LedgerVerification.organization_id == tx.organization_id, LedgerVerification.id == verification_id
        )
    )
    if record is None:
        raise not_found("verification")
    return record


async def organizations_after(database: Database, after: UUID | None, limit: int) -> list[UUID]:
    """The next `limit` organizations in the order of their ids, from the first one where `after` is None."""
    return [row[0] for row in await database.system_rows("select organization_ids(%s, %s)", (after, limit))]


async def count_invalid(database: Database) -> int:
    """How many organizations there are whose newest verification with a result found their ledger invalid."""
    invalid, after = 0, None
    while page := await organizations_after(database, after, _ORGANIZATIONS_PAGE):
        for organization_id in page:
            async with database.transaction(organization_id) as tx:
                row = await (await tx.execute(_NEWEST_RESULT, (organization_id,))).fetchone()
            invalid += row == ("INVALID",)
        after = page[-1]
    return invalid


async def _change(tx: Transaction, verification_id: UUID, **values: object) -> None:
    await tx.run(
        update(LedgerVerification)
        .where(
            col(LedgerVerification.organization_id) == tx.organization_id,
            col(LedgerVerification.id) == verification_id,
            col(LedgerVerification.status) == "RUNNING",
        )
        .values(**values)
    )
