"""How much of the time in transactions is spent waiting for the organization's chain head, under both kinds of load."""

from collections.abc import Iterator

from benchmarks.case import Bench, Case, Figure
from benchmarks.cases.adjust import CLIENTS as ADJUST_CLIENTS
from benchmarks.chain_watch import watch_chain
from benchmarks.load import Burst, offer
from benchmarks.workload import adjust_requests, batch_requests, waiting_lists

CLIENTS = 4


def run(bench: Bench) -> Iterator[Figure]:
    """Yield the share of waiting with batches of events, and with direct adjusts."""
    endpoint, url = bench.system.endpoint, bench.servers.owner_database_url
    program, adjusted = bench.programs["batch"], bench.programs["adjust"]
    events = batch_requests(endpoint, program, bench.population, bench.sizes.batch_events // 2)
    burst = Burst(endpoint, events, CLIENTS, 202, until_empty=waiting_lists(endpoint, program))
    with watch_chain(url) as watch:
        offer(burst)
    yield Figure("chain_lock_wait_share_batch", watch.share_waiting, "x")
    adjusts = adjust_requests(endpoint, adjusted, bench.population, bench.sizes.adjusts)
    with watch_chain(url) as watch:
        offer(Burst(endpoint, adjusts, ADJUST_CLIENTS, 200))
    yield Figure("chain_lock_wait_share_adjust", watch.share_waiting, "x")


CASE = Case(
    "chain_lock",
    "Waiting for the chain head",
    ("chain_lock_wait_share_batch", "chain_lock_wait_share_adjust"),
    run,
    after=("batch", "adjust"),
    needs_servers=True,
)
