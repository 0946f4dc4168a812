"""The same work on a young ledger and on one of a million entries: what an event and an adjust cost must stay flat."""

from collections.abc import Iterator

from benchmarks.case import Bench, Case, Figure
from benchmarks.cases.adjust import CLIENTS as ADJUST_CLIENTS
from benchmarks.load import Burst, middle, offer
from benchmarks.throughput import measure_events
from benchmarks.workload import (
    ENTRIES_PER_EVENT,
    BenchProgram,
    adjust_requests,
    batch_requests,
    make_program,
    waiting_lists,
    warm_up,
)

ENTRIES = 1_000_000
CLIENTS = 4
EVENTS_PER_PORTION = 20_000


def run(bench: Bench) -> Iterator[Figure]:
    """Yield events and adjusts per second before the ledger is filled up to a million entries, and after."""
    program = make_program(bench.rest, "growth")
    warm_up(bench.system.endpoint, program, bench.population, bench.sizes.warm_up_events)
    yield from _figures(bench, program, "young")
    _fill(bench, program)
    yield from _figures(bench, program, "million")


def _figures(bench: Bench, program: BenchProgram, age: str) -> Iterator[Figure]:
    endpoint, count = bench.system.endpoint, bench.sizes.batch_events

    def requests() -> list[bytes]:
        return batch_requests(endpoint, program, bench.population, count)

    reports = measure_events(bench, f"growth_{age}", program, requests, count, CLIENTS)
    rates = tuple(count / report.done_s for report in reports)
    yield Figure(f"events_per_s_{age}_ledger", middle(rates), "/s", rates)
    adjusts = [
        offer(
            Burst(
                endpoint,
                adjust_requests(endpoint, program, bench.population, bench.sizes.adjusts),
                ADJUST_CLIENTS,
                200,
            )
        )
        for _ in range(bench.sizes.repetitions)
    ]
    rates = tuple(bench.sizes.adjusts / report.answered_s for report in adjusts)
    yield Figure(f"adjusts_per_s_{age}_ledger", middle(rates), "/s", rates)


def _fill(bench: Bench, program: BenchProgram) -> None:
    endpoint = bench.system.endpoint
    while (missing := ENTRIES - bench.rest.entries_written()) > 0:
        count = min(EVENTS_PER_PORTION, -(-missing // ENTRIES_PER_EVENT // 100) * 100)
        requests = batch_requests(endpoint, program, bench.population, max(count, 100))
        offer(Burst(endpoint, requests, CLIENTS, 202, until_empty=waiting_lists(endpoint, program)))


CASE = Case(
    "growth",
    "A young ledger and a million entries",
    (
        "events_per_s_young_ledger",
        "adjusts_per_s_young_ledger",
        "events_per_s_million_ledger",
        "adjusts_per_s_million_ledger",
    ),
    run,
    is_full=True,
)
