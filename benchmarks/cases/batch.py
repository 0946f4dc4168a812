"""Events in batches of 100 from four clients: from the first request to the last COMPLETED."""

from collections.abc import Iterator

from benchmarks.case import Bench, Case, Figure
from benchmarks.load import middle
from benchmarks.throughput import measure_events
from benchmarks.workload import ENTRIES_PER_EVENT, batch_requests, make_program, warm_up

NAME = "batch"
CLIENTS = 4


def run(bench: Bench) -> Iterator[Figure]:
    """Yield events and journal entries per second, and how fast the events were accepted."""
    endpoint, count = bench.system.endpoint, bench.sizes.batch_events
    program = bench.programs[NAME] = make_program(bench.rest, NAME)
    warm_up(endpoint, program, bench.population, bench.sizes.warm_up_events)

    def requests() -> list[bytes]:
        return batch_requests(endpoint, program, bench.population, count)

    reports = measure_events(bench, NAME, program, requests, count, CLIENTS)
    share = max(report.client_cpu_share for report in reports)
    rates = tuple(count / report.done_s for report in reports)
    entry_rates = tuple(rate * ENTRIES_PER_EVENT for rate in rates)
    accepted = tuple(count / report.answered_s for report in reports)
    yield Figure("events_per_s_batch", middle(rates), "/s", rates, share)
    yield Figure("entries_per_s_batch", middle(entry_rates), "/s", entry_rates, share)
    yield Figure("accepted_per_s_batch", middle(accepted), "/s", accepted, share)


CASE = Case(
    NAME,
    "Events, batches of 100",
    ("events_per_s_batch", "entries_per_s_batch", "accepted_per_s_batch"),
    run,
)
