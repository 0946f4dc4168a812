"""The design that Scrip avoids, on the same server: one workflow per event.

Each workflow has one activity that does nothing, because an event's effect can only be made by an activity; 50 at once,
in a worker process of their own. No code of ours could make a workflow per event faster than this. Workflows without
even an activity are measured beside them, as the limit of the server itself.
"""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from temporalio.client import Client

from benchmarks.baseline_worker import EMPTY_WORKFLOW, NOOP_WORKFLOW
from benchmarks.case import Bench, Case, Figure
from benchmarks.load import ROOT

AT_ONCE = 50
WARM_UP_WORKFLOWS = 50


def run(bench: Bench) -> Iterator[Figure]:
    """Yield no-op workflows per second and how many times more events per second Scrip completes in batches."""
    address, queue = bench.servers.temporal_address, f"benchmark-{uuid4().hex}"
    with baseline_worker(address, queue):
        rate = asyncio.run(_measure(address, queue, NOOP_WORKFLOW, bench.sizes.workflows))
        empty = asyncio.run(_measure(address, queue, EMPTY_WORKFLOW, bench.sizes.workflows))
    batch = bench.figures["events_per_s_batch"]
    yield Figure("workflow_per_event_per_s", rate, "/s")
    yield Figure("empty_workflow_per_s", empty, "/s")
    yield Figure("events_over_workflow_baseline", batch.value / rate, "x", (), batch.client_cpu_share)


async def _measure(address: str, queue: str, name: str, workflows: int) -> float:
    client = await Client.connect(address)
    await _execute(client, queue, name, WARM_UP_WORKFLOWS)
    started = time.perf_counter()
    await _execute(client, queue, name, workflows)
    return workflows / (time.perf_counter() - started)


async def _execute(client: Client, queue: str, name: str, count: int) -> None:
    todo = iter(range(count))

    async def execute_some() -> None:
        for number in todo:
            await client.execute_workflow(name, id=f"{queue}/{uuid4().hex}-{number}", task_queue=queue)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(execute_some())


@contextmanager
def baseline_worker(address: str, queue: str) -> Iterator[None]:
    """A process that serves the baselines' workflows on `queue`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.baseline_worker", address, queue], cwd=ROOT, stdin=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


CASE = Case(
    "workflow_per_event",
    "Baseline: a workflow per event",
    ("workflow_per_event_per_s", "empty_workflow_per_s", "events_over_workflow_baseline"),
    run,
    after=("batch",),
    needs_servers=True,
)
