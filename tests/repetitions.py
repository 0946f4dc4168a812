"""How often Postgres made somebody begin again: what a race must not do where locks are taken in one order."""

from collections.abc import Iterator
from contextlib import contextmanager

from db.session import Database


@contextmanager
def nothing_repeated(database: Database) -> Iterator[None]:
    """Assert that none of the transactions within the block was given up for a deadlock or another conflict.

    What locks in the global order (docs/ledger.md "Locks") has none of them, not just few.
    """
    before = database.tally
    yield
    begun, conflicted = database.tally.begun - before.begun, database.tally.conflicted - before.conflicted
    assert begun > 0, "nothing was done"
    assert conflicted == 0, f"{conflicted} of {begun} transactions had to be repeated"
