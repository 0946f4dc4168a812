"""Measuring how many events are COMPLETED per second, the same way for every case that asks."""

from collections.abc import Callable, Sequence

from benchmarks.case import Bench, Wrong
from benchmarks.load import Burst, BurstReport, offer
from benchmarks.workload import ENTRIES_PER_EVENT, BenchProgram, waiting_lists


def measure_events(
    bench: Bench,
    name: str,
    program: BenchProgram | None,
    make_requests: Callable[[], Sequence[bytes]],
    events: int,
    clients: int,
) -> list[BurstReport]:
    """Send `events` events in the requests that `make_requests` makes anew for each repetition; a report for each.

    A repetition ends when no event of the program (None: of the organization) waits. The processor time of the servers
    is kept under `name`. Raises Wrong when the events did not make exactly the journal entries that they must make: a
    run that skips work has no figure.
    """
    servers = bench.system.servers
    cpu_before_s = servers.processes.cpu_s() if servers else {}
    reports = [_measure_once(bench, program, make_requests(), events, clients) for _ in range(bench.sizes.repetitions)]
    if servers:
        total = events * bench.sizes.repetitions
        bench.cpu_ms_per_event[name] = {
            process: (after_s - cpu_before_s[process]) * 1000 / total
            for process, after_s in servers.processes.cpu_s().items()
        }
    return reports


def _measure_once(
    bench: Bench, program: BenchProgram | None, requests: Sequence[bytes], events: int, clients: int
) -> BurstReport:
    endpoint = bench.system.endpoint
    before = bench.rest.entries_written()
    report = offer(Burst(endpoint, requests, clients, 202, until_empty=waiting_lists(endpoint, program)))
    written = bench.rest.entries_written() - before
    if written != events * ENTRIES_PER_EVENT:
        raise Wrong(f"{events} events made {written} journal entries instead of {events * ENTRIES_PER_EVENT}")
    return report
