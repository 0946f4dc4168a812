"""Events in batches of 100 from four clients: from the first request to the last COMPLETED."""

from collections.abc import Iterator

from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.load import Burst, middle, offer
from benchmarks.workload import ENTRIES_PER_EVENT, batch_requests, make_program, waiting_lists, warm_up

NAME = "batch"
CLIENTS = 4


def run(bench: Bench) -> Iterator[Figure]:
    """Yield events and journal entries per second, and what the client took."""
    endpoint, count = bench.system.endpoint, bench.sizes.batch_events
    program = bench.programs[NAME] = make_program(bench.rest, NAME)
    warm_up(endpoint, program, bench.population, bench.sizes.warm_up_events)
    rates, accepted, shares = [], [], []
    for _ in range(bench.sizes.repetitions):
        requests = batch_requests(endpoint, program, bench.population, count)
        before = bench.rest.entries_written()
        report = offer(Burst(endpoint, requests, CLIENTS, 202, until_empty=waiting_lists(endpoint, program)))
        written = bench.rest.entries_written() - before
        if written != count * ENTRIES_PER_EVENT:
            raise Wrong(f"{count} events made {written} journal entries instead of {count * ENTRIES_PER_EVENT}")
        rates.append(count / report.done_s)
        accepted.append(count / report.answered_s)
        shares.append(report.client_cpu_share)
    share = max(shares)
    rate = middle(rates)
    entry_rates = tuple(each * ENTRIES_PER_EVENT for each in rates)
    yield Figure("events_per_s_batch", rate, "/s", tuple(rates), share)
    yield Figure("entries_per_s_batch", rate * ENTRIES_PER_EVENT, "/s", entry_rates, share)
    yield Figure("accepted_per_s_batch", middle(accepted), "/s", tuple(accepted), share)


CASE = Case(
    NAME,
    "Events, batches of 100",
    ("events_per_s_batch", "entries_per_s_batch", "accepted_per_s_batch"),
    run,
)
