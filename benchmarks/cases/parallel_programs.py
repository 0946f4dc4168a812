"""The batch workload on one program and on many at once: what one organization gains from several queues.

Many programs are measured twice: each with participants of its own, and all with the same 1,000, where almost every
batch waits for a participant that another program's batch has locked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.case import Bench, Case, Figure
from benchmarks.load import middle
from benchmarks.throughput import measure_events
from benchmarks.workload import (
    EVENTS_PER_REQUEST,
    BenchProgram,
    Population,
    batch_requests,
    make_population,
    make_program,
    warm_up,
)

CLIENTS = 8


@dataclass(frozen=True, slots=True)
class _Lane:
    """A program and whom its events are about."""

    program: BenchProgram
    population: Population


def run(bench: Bench) -> Iterator[Figure]:
    """Yield events per second over one program, over many, and over many with the same participants."""
    endpoint, count = bench.system.endpoint, bench.sizes.programs
    apart = [_make_lane(bench, make_population(endpoint)) for _ in range(count)]
    yield _measure(bench, apart[:1], "events_per_s_one_program")
    yield _measure(bench, apart, "events_per_s_many_programs")
    shared = [_make_lane(bench, bench.population) for _ in range(count)]
    yield _measure(bench, shared, "events_per_s_many_programs_same_participants")


def _make_lane(bench: Bench, population: Population) -> _Lane:
    program = make_program(bench.rest, "parallel")
    warm_up(bench.system.endpoint, program, population, bench.sizes.warm_up_events)
    return _Lane(program, population)


def _measure(bench: Bench, lanes: Sequence[_Lane], name: str) -> Figure:
    of_each = bench.sizes.batch_events // len(lanes) // EVENTS_PER_REQUEST * EVENTS_PER_REQUEST
    count = of_each * len(lanes)

    def requests() -> list[bytes]:
        by_lane = [batch_requests(bench.system.endpoint, lane.program, lane.population, of_each) for lane in lanes]
        # In turns, so that all programs are busy from the beginning to the end.
        return [request for turn in zip(*by_lane, strict=True) for request in turn]

    reports = measure_events(bench, name, None, requests, count, CLIENTS)
    rates = tuple(count / report.done_s for report in reports)
    return Figure(name, middle(rates), "/s", rates, max(report.client_cpu_share for report in reports))


CASE = Case(
    "parallel_programs",
    "One program and many in parallel",
    ("events_per_s_one_program", "events_per_s_many_programs", "events_per_s_many_programs_same_participants"),
    run,
    needs_servers=True,
    is_full=True,
)
