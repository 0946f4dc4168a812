"""Events one per request from 32 clients: from the first request to the last COMPLETED."""

from collections.abc import Iterator

from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.load import Burst, middle, offer, percentile
from benchmarks.workload import ENTRIES_PER_EVENT, event_requests, make_program, waiting_lists, warm_up

NAME = "single"
CLIENTS = 32


def run(bench: Bench) -> Iterator[Figure]:
    """Yield events per second and how long a request took."""
    endpoint, count = bench.system.endpoint, bench.sizes.single_events
    program = bench.programs[NAME] = make_program(bench.rest, NAME)
    warm_up(endpoint, program, bench.population, bench.sizes.warm_up_events)
    offer(Burst(endpoint, event_requests(endpoint, program, bench.population, CLIENTS * 4), CLIENTS, 202))
    rates, latencies_ms, shares = [], [], []
    for _ in range(bench.sizes.repetitions):
        requests = event_requests(endpoint, program, bench.population, count)
        before = bench.rest.entries_written()
        report = offer(Burst(endpoint, requests, CLIENTS, 202, until_empty=waiting_lists(endpoint, program)))
        written = bench.rest.entries_written() - before
        if written != count * ENTRIES_PER_EVENT:
            raise Wrong(f"{count} events made {written} journal entries instead of {count * ENTRIES_PER_EVENT}")
        rates.append(count / report.done_s)
        latencies_ms += report.latencies_ms
        shares.append(report.client_cpu_share)
    share = max(shares)
    yield Figure("events_per_s_single", middle(rates), "/s", tuple(rates), share)
    yield Figure("single_request_p50_ms", percentile(latencies_ms, 50), "ms", (), share)
    yield Figure("single_request_p99_ms", percentile(latencies_ms, 99), "ms", (), share)


CASE = Case(
    NAME,
    "Events, one per request",
    ("events_per_s_single", "single_request_p50_ms", "single_request_p99_ms"),
    run,
)
