"""Reading a balance on a short account and on a long one: what it costs must not depend on the history.

The history is written in this process, in bulk, through the ledger's own write path: one entry is one posting of the
account, and every tenth is a credit that makes a lot. What is measured is the answer over HTTP, one request at a time.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal
from uuid import UUID

from benchmarks.case import Bench, Case, Figure
from benchmarks.load import Burst, offer, percentile
from benchmarks.workload import BenchProgram, make_program
from db.session import Database, Transaction
from domain.clock import system_clock
from domain.ids import new_id
from domain.ledger import movements
from domain.ledger.holdings import load_lots
from domain.ledger.journal import load_accounts, write
from domain.ledger.movements import Cause, Position
from domain.locks import lock_participants

READS = 300
ENTRIES_PER_TRANSACTION = 500
SHORT_POSTINGS = 1_000
# 200,000 at the headline's sizes.
LONG_POSTINGS_PER_BATCH_EVENT = 10
POSTINGS_PER_LOT = 10
# Nearly all lots stay as they are.
CREDIT = Decimal(1_000)
DEBIT = Decimal(1)


@dataclass(frozen=True, slots=True)
class _Account:
    """Whose history is written: one participant's share of one LOT asset."""

    program_id: UUID
    position: Position


def run(bench: Bench) -> Iterator[Figure]:
    """Yield the median time of a balance read on the short account and on the long one."""
    program = make_program(bench.rest, "balance_read", inventory_mode="LOT")
    ages: tuple[tuple[Literal["short", "long"], int], ...] = (
        ("short", SHORT_POSTINGS),
        ("long", LONG_POSTINGS_PER_BATCH_EVENT * bench.sizes.batch_events),
    )
    for (age, postings), participant_id in zip(ages, bench.population.ids, strict=False):
        asyncio.run(_fill(bench, program, participant_id, postings))
        yield _measure(bench, participant_id, f"balance_read_ms_{age}")


def _measure(bench: Bench, participant_id: UUID, name: str) -> Figure:
    endpoint = bench.system.endpoint
    request = endpoint.get(f"/v1/participants/{participant_id}/balances")
    report = offer(Burst(endpoint, [request] * READS, 1, 200))
    return Figure(name, percentile(report.latencies_ms, 50), "ms", (), report.client_cpu_share)


async def _fill(bench: Bench, program: BenchProgram, participant_id: UUID, postings: int) -> None:
    servers = bench.servers
    database = Database(servers.owner_database_url, size=1, timeout_s=60, clock=system_clock)
    account = _Account(program.id, Position("PARTICIPANT", participant_id, program.asset_ids[0], has_lots=True))
    await database.open()
    try:
        for start in range(0, postings, ENTRIES_PER_TRANSACTION):
            async with database.transaction(servers.organization_id) as tx:
                await _write_entries(tx, account, range(start, min(start + ENTRIES_PER_TRANSACTION, postings)))
    finally:
        await database.close()


async def _write_entries(tx: Transaction, account: _Account, numbers: range) -> None:
    """One entry per number: now and then a credit with a lot of its own, otherwise a small debit."""
    position = account.position
    await lock_participants(tx, [position.holder_id])
    books = await load_accounts(tx, [position.holder_id], [position.asset_id])
    await load_lots(tx, books.lots, position.select("AVAILABLE", tx.now), DEBIT * len(numbers))
    source = books.system("SYSTEM_ISSUANCE", position.asset_id)
    for number in numbers:
        cause = Cause(new_id(), account.program_id, tx.now, "benchmark")
        if number % POSTINGS_PER_LOT == 0:
            movements.credit(books, position, cause, CREDIT, source)
        else:
            movements.debit(books, position, cause, DEBIT, allow_negative=False)
    await write(tx, books)


CASE = Case(
    "balance_read",
    "A balance on a short and on a long account",
    ("balance_read_ms_short", "balance_read_ms_long"),
    run,
    needs_servers=True,
    is_full=True,
)
