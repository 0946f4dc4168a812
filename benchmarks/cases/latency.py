"""How long an event waits on a system that has little to do: ten events a second, from the 202 to COMPLETED.

Arrivals are random (exponential gaps, a fixed seed): evenly spaced ones would always meet a worker that is still
looking for the one before. The instant of COMPLETED is that of the first answer that shows it to a client which looks
every 5 ms, so the figure includes that answer and up to 5 ms of waiting for it.
"""

from collections.abc import Iterator
from itertools import accumulate
from random import Random

from benchmarks.case import Bench, Case, Figure
from benchmarks.load import EVENT_ID, Watch, percentile, watch
from benchmarks.workload import event_requests, make_program, warm_up

NAME = "latency"
EVENTS_PER_S = 10.0
LEAD_S = 1.0
_SEED = 10


def run(bench: Bench) -> Iterator[Figure]:
    """Yield the median and the 99th percentile of the wait."""
    endpoint = bench.system.endpoint
    program = bench.programs[NAME] = make_program(bench.rest, NAME)
    warm_up(endpoint, program, bench.population, bench.sizes.warm_up_events)
    requests = event_requests(endpoint, program, bench.population, bench.sizes.latency_events)
    draw = Random(_SEED)
    instants = accumulate((draw.expovariate(EVENTS_PER_S) for _ in requests[1:]), initial=LEAD_S)
    look_at = endpoint.get(f"/v1/events/{EVENT_ID.decode()}")
    report = watch(Watch(endpoint, list(zip(instants, requests, strict=True)), look_at))
    share = report.client_cpu_share
    yield Figure("accept_to_completed_p50_ms", percentile(report.waits_ms, 50), "ms", (), share)
    yield Figure("accept_to_completed_p99_ms", percentile(report.waits_ms, 99), "ms", (), share)


CASE = Case(
    NAME,
    "An event's wait at 10 events/s",
    ("accept_to_completed_p50_ms", "accept_to_completed_p99_ms"),
    run,
)
