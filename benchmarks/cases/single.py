"""Events one per request from 32 clients: from the first request to the last COMPLETED."""

from collections.abc import Iterator

from benchmarks.case import Bench, Case, Figure
from benchmarks.load import Burst, middle, offer, percentile
from benchmarks.throughput import measure_events
from benchmarks.workload import event_requests, make_program, waiting_lists, warm_up

NAME = "single"
CLIENTS = 32
WARM_UP_REQUESTS = 200


def run(bench: Bench) -> Iterator[Figure]:
    """Yield events per second and how long a request took."""
    endpoint, count = bench.system.endpoint, bench.sizes.single_events
    program = bench.programs[NAME] = make_program(bench.rest, NAME)
    warm_up(endpoint, program, bench.population, bench.sizes.warm_up_events)

    def requests(count: int = count) -> list[bytes]:
        return event_requests(endpoint, program, bench.population, count)

    offer(Burst(endpoint, requests(WARM_UP_REQUESTS), CLIENTS, 202, until_empty=waiting_lists(endpoint, program)))
    reports = measure_events(bench, NAME, program, requests, count, CLIENTS)
    share = max(report.client_cpu_share for report in reports)
    rates = tuple(count / report.done_s for report in reports)
    latencies_ms = [latency_ms for report in reports for latency_ms in report.latencies_ms]
    yield Figure("events_per_s_single", middle(rates), "/s", rates, share)
    yield Figure("single_request_p50_ms", percentile(latencies_ms, 50), "ms", (), share)
    yield Figure("single_request_p99_ms", percentile(latencies_ms, 99), "ms", (), share)


CASE = Case(
    NAME,
    "Events, one per request",
    ("events_per_s_single", "single_request_p50_ms", "single_request_p99_ms"),
    run,
)
