"""LOT assets: the batch workload with lots, and how many maturities and expiries upkeep books per second.

Upkeep runs in this process, against the system's database, through the same functions as its workflow: what is measured
is the booking, not the thirty seconds between two runs. The due lots are real ones, credited through the ledger.
"""

import asyncio
import time
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from uuid import UUID

from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.load import middle
from benchmarks.throughput import measure_events
from benchmarks.workload import BenchProgram, batch_requests, make_program, warm_up
from db.session import Database
from domain.clock import system_clock
from domain.ids import new_id
from domain.ledger import movements
from domain.ledger.journal import load_accounts, write
from domain.ledger.movements import Cause, Position
from domain.locks import lock_participants
from domain.upkeep import sweep

CLIENTS = 4
LOTS_PER_TRANSACTION = 500


def run(bench: Bench) -> Iterator[Figure]:
    """Yield events per second with LOT assets, their share of those with SIMPLE ones, and lots matured and expired."""
    endpoint, count = bench.system.endpoint, bench.sizes.batch_events
    program = make_program(bench.rest, "lots", inventory_mode="LOT")
    warm_up(endpoint, program, bench.population, bench.sizes.warm_up_events)

    def requests() -> list[bytes]:
        return batch_requests(endpoint, program, bench.population, count)

    reports = measure_events(bench, "lots", program, requests, count, CLIENTS)
    share = max(report.client_cpu_share for report in reports)
    rates = tuple(count / report.done_s for report in reports)
    simple = bench.figures["events_per_s_batch"].value
    yield Figure("events_per_s_lots", middle(rates), "/s", rates, share)
    yield Figure("lots_over_simple", middle(rates) / simple, "x")
    matured, expired = asyncio.run(_upkeep(bench, program, bench.sizes.adjusts))
    yield Figure("maturities_per_s", matured, "/s")
    yield Figure("expiries_per_s", expired, "/s")


async def _upkeep(bench: Bench, program: BenchProgram, count: int) -> tuple[float, float]:
    servers = bench.servers
    database = Database(servers.owner_database_url, size=2, timeout_s=10, clock=system_clock)
    await database.open()
    try:
        return (
            await _booked_per_s(database, servers.organization_id, bench, program, count, matures=True),
            await _booked_per_s(database, servers.organization_id, bench, program, count, matures=False),
        )
    finally:
        await database.close()


async def _booked_per_s(
    database: Database, organization_id: UUID, bench: Bench, program: BenchProgram, count: int, *, matures: bool
) -> float:
    """Credit `count` lots that fall due in an hour, and book them as of then; until then the system leaves them be."""
    due_at = system_clock() + timedelta(hours=1)
    for start in range(0, count, LOTS_PER_TRANSACTION):
        numbers = range(start, min(start + LOTS_PER_TRANSACTION, count))
        ids = [bench.population.ids[number % len(bench.population.ids)] for number in numbers]
        async with database.transaction(organization_id) as tx:
            await lock_participants(tx, ids)
            books = await load_accounts(tx, ids, [program.asset_ids[0]])
            source = books.system("SYSTEM_ISSUANCE", program.asset_ids[0])
            for participant_id in ids:
                movements.credit(
                    books,
                    Position("PARTICIPANT", participant_id, program.asset_ids[0], has_lots=True),
                    Cause(new_id(), program.id, tx.now, "benchmark"),
                    Decimal(1),
                    source,
                    expires_at=None if matures else due_at,
                    matures_at=due_at if matures else None,
                )
            await write(tx, books)
    before = bench.rest.entries_written()
    started = time.perf_counter()
    await sweep(database, organization_id, at=due_at + timedelta(seconds=1))
    elapsed = time.perf_counter() - started
    booked = bench.rest.entries_written() - before
    if booked < count:
        raise Wrong(f"{count} lots were due and {booked} were booked")
    return booked / elapsed


CASE = Case(
    "lots",
    "LOT assets",
    ("events_per_s_lots", "lots_over_simple", "maturities_per_s", "expiries_per_s"),
    run,
    after=("batch",),
    needs_servers=True,
)
