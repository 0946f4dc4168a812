"""What is done in time or never. docs/decisions/0007-answered-or-never.md.

A workflow's step may run late: after its caller has been told that nothing was done. So every order of a caller says
until when it may be carried out, by the database's clock, which all processes share. The step refuses itself after
that, and a caller who hasn't heard of it by then asks the database once no step can be under way any more. After that
the answer is final, whatever workers do.
"""

from datetime import datetime

from db.session import Transaction
from domain.errors import Refusal


async def latest_instant(tx: Transaction, wait_s: float) -> datetime:
    """The instant until which an order that is given now may be carried out: `wait_s` seconds from now."""
    cursor = await tx.execute("select clock_timestamp() + make_interval(secs => %s)", (wait_s,))
    row = await cursor.fetchone()
    assert row is not None
    instant: datetime = row[0]
    return instant


async def refuse_late(tx: Transaction, not_after: datetime | None, message: str) -> None:
    """Refuse a step whose time is over; None is never over.

    To be called when the step has its locks, because they may have been waited for. Raises Refusal
    `service_unavailable` with `message`.
    """
    if not_after is None:
        return
    cursor = await tx.execute("select clock_timestamp() > %s", (not_after,))
    if await cursor.fetchone() == (True,):
        raise Refusal("service_unavailable", message)
