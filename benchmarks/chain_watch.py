"""Watching who waits for the organization's chain head: the one lock that every write of an organization takes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg

_EVERY_S = 0.01

# Backends at work on a transaction of ours, and those of them that wait for another's seal.
_LOOK = """
select count(*) filter (where state <> 'idle'),
       count(*) filter (where state = 'active' and wait_event_type = 'Lock' and query like '%seal_entries%')
from pg_stat_activity where application_name = 'scrip' and pid <> pg_backend_pid()
"""


@dataclass(slots=True)
class ChainWatch:
    """What was seen: backends in a transaction, and backends waiting for the chain head, summed over all looks."""

    in_transaction: int = 0
    waiting: int = 0

    @property
    def share_waiting(self) -> float:
        """The share of all time spent in transactions that was spent waiting for the chain head."""
        return self.waiting / self.in_transaction if self.in_transaction else 0.0


@contextmanager
def watch_chain(owner_database_url: str) -> Iterator[ChainWatch]:
    """Look a hundred times a second for the length of the block: sampling, because a lock tells nobody how long."""
    watch, stop = ChainWatch(), threading.Event()

    def look() -> None:
        with psycopg.connect(owner_database_url, autocommit=True) as connection:
            while not stop.wait(_EVERY_S):
                row = connection.execute(_LOOK).fetchone()
                assert row is not None
                watch.in_transaction += row[0]
                watch.waiting += row[1]

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join(5)
