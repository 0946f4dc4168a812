"""LOT assets: the batch workload with lots, and how many maturities and expiries upkeep books per second.

Upkeep runs in this process, against the system's database, through the same functions as its workflow: what is measured
is the booking, not the thirty seconds between two runs. The due lots are real ones, credited through the ledger.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from decimal import Decimal

from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.load import middle
from benchmarks.throughput import measure_events
from benchmarks.workload import BenchProgram, batch_requests, make_program, warm_up
from db.session import Database
from domain.clock import Clock, system_clock
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
    matured = await _booked_per_s(bench, program, count, matures=True)
    return matured, await _booked_per_s(bench, program, count, matures=False)


async def _booked_per_s(bench: Bench, program: BenchProgram, count: int, *, matures: bool) -> float:
    """Credit `count` lots that fall due in an hour, then book them with a clock that shows it.

    Until then the system's own upkeep leaves them be. As the ledger's time never goes back, this case comes last.
    """
    due_at = system_clock() + timedelta(hours=2 if matures else 4)
    async with _opened(bench, system_clock) as database:
        for start in range(0, count, LOTS_PER_TRANSACTION):
            numbers = range(start, min(start + LOTS_PER_TRANSACTION, count))
            await _credit(database, bench, program, numbers, due_at, matures)
    before = bench.rest.entries_written()
    async with _opened(bench, lambda: due_at + timedelta(seconds=1)) as database:
        started = time.perf_counter()
        await sweep(database, bench.servers.organization_id)
        elapsed = time.perf_counter() - started
    booked = bench.rest.entries_written() - before
    if booked != count:
        raise Wrong(f"{count} lots were due and {booked} were booked")
    return booked / elapsed


@asynccontextmanager
async def _opened(bench: Bench, clock: Clock) -> AsyncIterator[Database]:
    database = Database(bench.servers.application_database_url, size=2, timeout_s=10, clock=clock)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


async def _credit(
    database: Database, bench: Bench, program: BenchProgram, numbers: range, due_at: datetime, matures: bool
) -> None:
    ids = [bench.population.ids[number % len(bench.population.ids)] for number in numbers]
    asset_id = program.asset_ids[0]
    async with database.transaction(bench.servers.organization_id) as tx:
        await lock_participants(tx, ids)
        books = await load_accounts(tx, ids, [asset_id])
        for participant_id in ids:
            movements.credit(
                books,
                Position("PARTICIPANT", participant_id, asset_id, has_lots=True),
                Cause(new_id(), program.id, tx.now, "benchmark"),
                Decimal(1),
                books.system("SYSTEM_ISSUANCE", asset_id),
                expires_at=None if matures else due_at,
                matures_at=due_at if matures else None,
            )
        await write(tx, books)


CASE = Case(
    "lots",
    "LOT assets",
    ("events_per_s_lots", "lots_over_simple", "maturities_per_s", "expiries_per_s"),
    run,
    after=("batch",),
    needs_servers=True,
)
