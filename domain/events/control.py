"""Pausing and resuming a program's events, and how many wait. Contract: rules-and-events.md 7."""

from uuid import UUID

from db.session import Transaction
from domain.errors import not_found

_WAITING = """
select (select count(*) from (
            select from event where organization_id = %(organization_id)s
            and status in ('RECEIVED', 'PENDING') and due_at is null limit %(most)s) ready)
     + (select count(*) from (
            select from event where organization_id = %(organization_id)s
            and status in ('RECEIVED', 'PENDING') and due_at is not null limit %(most)s) waiting)
"""


async def set_paused(tx: Transaction, program_id: UUID, *, paused: bool) -> None:
    """Stop or resume the processing of a program's events; they are accepted all the same.

    A batch under way is finished. Raises Refusal `not_found`.
    """
    cursor = await tx.execute(
        "update program set processing_paused = %s where organization_id = %s and id = %s",
        (paused, tx.organization_id, program_id),
    )
    if cursor.rowcount == 0:
        raise not_found("program")


async def waiting_events(tx: Transaction, most: int) -> int:
    """How many events of the organization wait to be processed; counting stops at about `most`."""
    cursor = await tx.execute(_WAITING, {"organization_id": tx.organization_id, "most": most})
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])
