"""What is done in time or never. docs/decisions/0007-answered-or-never.md.

A workflow's step may run late: after its caller has been told that nothing was done. So every order of a caller says
until when it may be carried out, by the database's clock, which all processes share. The step refuses itself after
that: the database judges it in the message that commits the step, so that no standstill of the worker lies in between.
A caller who hasn't heard of it by then asks the database, and waits there for a commit that may be under way. After
that the answer is final, whatever workers do.
"""

from datetime import datetime, timedelta

from db.session import Transaction
from domain.errors import Refusal


async def wait_at_most(tx: Transaction, seconds: float) -> None:
    """Wait for no lock of this transaction longer than that: who waits in vain raises DatabaseUnavailable."""
    await tx.execute("select set_config('lock_timeout', %s, true)", (f"{max(1, int(seconds * 1000))}ms",))


def latest_instant(tx: Transaction, wait_s: float) -> datetime:
    """The instant until which an order that this transaction gives may be carried out: `wait_s` s after its begin."""
    assert tx.begun_at is not None, "a database opens transactions"
    return tx.begun_at + timedelta(seconds=wait_s)


def refuse_late(tx: Transaction, not_after: datetime | None, message: str) -> None:
    """Have the commit of a step refused once its time is over; None is never over.

    A step that is late has worked in vain, once: its commit raises Refusal `service_unavailable` with `message`.
    """
    if not_after is not None:
        tx.commit_by(not_after, Refusal("service_unavailable", message))
