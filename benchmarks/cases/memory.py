"""The most resident memory that the processes had while the cases before ran."""

from collections.abc import Iterator

from benchmarks.case import Bench, Case, Figure

BYTES_PER_MB = 1_000_000


def run(bench: Bench) -> Iterator[Figure]:
    """Yield megabytes (10^6 bytes) per process."""
    for name in ("api", "worker", "temporal"):
        yield Figure(f"rss_mb_{name}", bench.servers.memory.peaks[name] / BYTES_PER_MB, "MB")


CASE = Case(
    "memory",
    "Memory",
    ("rss_mb_api", "rss_mb_worker", "rss_mb_temporal"),
    run,
    after=("batch", "single"),
    needs_servers=True,
)
