"""What the server processes take: memory at its peak, and processor time per event.

The processor time hardly depends on what else the machine does, so it tells a slower program from a busy machine.
"""

from collections.abc import Iterator

from benchmarks.case import Bench, Case, Figure
from benchmarks.system import PROCESSES

BYTES_PER_MB = 1_000_000
MEASURED = ("batch", "single")
# Most of what Postgres holds is memory that its processes share: the resident size of one of them says nothing.
WITH_MEMORY = ("api", "worker", "temporal")


def run(bench: Bench) -> Iterator[Figure]:
    """Yield megabytes (10^6 bytes) per process, and milliseconds of one core per event, of each process and in all."""
    for name in WITH_MEMORY:
        yield Figure(f"rss_mb_{name}", bench.servers.processes.peak_bytes[name] / BYTES_PER_MB, "MB")
    for case in MEASURED:
        cost_ms = bench.cpu_ms_per_event[case]
        for name in PROCESSES:
            yield Figure(f"cpu_ms_per_event_{case}_{name}", cost_ms[name], "ms")
        yield Figure(f"cpu_ms_per_event_{case}", sum(cost_ms.values()), "ms")


CASE = Case(
    "processes",
    "Memory and processor time",
    (
        *(f"rss_mb_{name}" for name in WITH_MEMORY),
        *(f"cpu_ms_per_event_{case}{part}" for case in MEASURED for part in (*(f"_{name}" for name in PROCESSES), "")),
    ),
    run,
    after=MEASURED,
    needs_servers=True,
)
