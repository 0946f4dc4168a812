"""Credits by hand from 16 clients, one organization, 1,000 participants: each is one journal entry when answered."""

from collections.abc import Iterator

from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.load import Burst, middle, offer, percentile
from benchmarks.workload import PARTICIPANTS, adjust_requests, make_program

NAME = "adjust"
CLIENTS = 16


def run(bench: Bench) -> Iterator[Figure]:
    """Yield operations per second and how long one took."""
    endpoint, count = bench.system.endpoint, bench.sizes.adjusts
    program = bench.programs[NAME] = make_program(bench.rest, NAME)
    # The first credit of a participant opens an account: that is not what is measured.
    opening = adjust_requests(endpoint, program, bench.population, PARTICIPANTS, each_once=True)
    offer(Burst(endpoint, opening, CLIENTS, 200))
    reports = []
    for _ in range(bench.sizes.repetitions):
        requests = adjust_requests(endpoint, program, bench.population, count)
        before = bench.rest.entries_written()
        reports.append(offer(Burst(endpoint, requests, CLIENTS, 200)))
        written = bench.rest.entries_written() - before
        if written != count:
            raise Wrong(f"{count} adjusts made {written} journal entries")
    share = max(report.client_cpu_share for report in reports)
    rates = tuple(count / report.answered_s for report in reports)
    latencies_ms = [latency_ms for report in reports for latency_ms in report.latencies_ms]
    yield Figure("adjust_per_s", middle(rates), "/s", rates, share)
    yield Figure("adjust_p50_ms", percentile(latencies_ms, 50), "ms", (), share)
    yield Figure("adjust_p99_ms", percentile(latencies_ms, 99), "ms", (), share)


CASE = Case(NAME, "Direct adjusts", ("adjust_per_s", "adjust_p50_ms", "adjust_p99_ms"), run)
