"""Reading a balance on a short account and on a long one: what it costs must not depend on the history.

The histories are made by Postgres itself (`benchmarks/history.py`). What is measured is the answer of the API, which
reads as the application's role, over HTTP, one request at a time.
"""

from collections.abc import Iterator
from typing import Literal
from uuid import UUID

import psycopg

from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.history import Account, balance_after, write_history
from benchmarks.load import Burst, offer, percentile
from benchmarks.workload import make_program

READS = 300
SHORT_POSTINGS = 1_000
# 1,000,000 at the headline's sizes.
LONG_POSTINGS_PER_BATCH_EVENT = 50


def run(bench: Bench) -> Iterator[Figure]:
    """Yield the median time of a balance read on the short account and on the long one."""
    program = make_program(bench.rest, "balance_read", inventory_mode="LOT")
    ages: tuple[tuple[Literal["short", "long"], int], ...] = (
        ("short", SHORT_POSTINGS),
        ("long", LONG_POSTINGS_PER_BATCH_EVENT * bench.sizes.batch_events),
    )
    for (age, postings), participant_id in zip(ages, bench.population.ids, strict=False):
        account = Account(bench.servers.organization_id, program.id, program.asset_ids[0], participant_id)
        with psycopg.connect(bench.servers.owner_database_url, autocommit=True) as connection:
            write_history(connection, account, postings)
        _check(bench, participant_id, postings)
        yield _measure(bench, participant_id, f"balance_read_ms_{age}")


def _check(bench: Bench, participant_id: UUID, postings: int) -> None:
    """What is read must be what was written. Raises Wrong."""
    (balance,) = bench.rest.get(f"/v1/participants/{participant_id}/balances")["data"]
    wanted = f"{balance_after(postings)}.00"
    if balance["available"] != wanted:
        raise Wrong(f"the balance after {postings} postings is {balance['available']} instead of {wanted}")


def _measure(bench: Bench, participant_id: UUID, name: str) -> Figure:
    endpoint = bench.system.endpoint
    request = endpoint.get(f"/v1/participants/{participant_id}/balances")
    report = offer(Burst(endpoint, [request] * READS, 1, 200))
    return Figure(name, percentile(report.latencies_ms, 50), "ms", (), report.client_cpu_share)


CASE = Case(
    "balance_read",
    "A balance on a short and on a long account",
    ("balance_read_ms_short", "balance_read_ms_long"),
    run,
    needs_servers=True,
    is_full=True,
)
