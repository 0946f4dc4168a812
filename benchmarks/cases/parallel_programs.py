"""The batch workload on one program and on many at once: what one organization gains from several queues."""

from collections.abc import Iterator

from benchmarks.case import Bench, Case, Figure
from benchmarks.load import middle
from benchmarks.throughput import measure_events
from benchmarks.workload import EVENTS_PER_REQUEST, BenchProgram, batch_requests, make_program, warm_up

NAME = "parallel_programs"
CLIENTS = 8


def run(bench: Bench) -> Iterator[Figure]:
    """Yield events per second over one program and over all of them."""
    programs = [make_program(bench.rest, f"parallel {number}") for number in range(bench.sizes.programs)]
    for program in programs:
        warm_up(bench.system.endpoint, program, bench.population, bench.sizes.warm_up_events)
    yield _measure(bench, programs[:1], "events_per_s_one_program")
    yield _measure(bench, programs, "events_per_s_many_programs")


def _measure(bench: Bench, programs: list[BenchProgram], name: str) -> Figure:
    share_of_each = bench.sizes.batch_events // len(programs) // EVENTS_PER_REQUEST * EVENTS_PER_REQUEST
    count = share_of_each * len(programs)

    def requests() -> list[bytes]:
        by_program = [
            batch_requests(bench.system.endpoint, program, bench.population, share_of_each) for program in programs
        ]
        # In turns, so that all programs are busy from the beginning to the end.
        return [request for turn in zip(*by_program, strict=True) for request in turn]

    reports = measure_events(bench, None, requests, count, CLIENTS)
    rates = tuple(count / report.done_s for report in reports)
    return Figure(name, middle(rates), "/s", rates, max(report.client_cpu_share for report in reports))


CASE = Case(
    NAME,
    "One program and many in parallel",
    ("events_per_s_one_program", "events_per_s_many_programs"),
    run,
    needs_servers=True,
    is_full=True,
)
