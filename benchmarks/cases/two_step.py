"""Two-step redemptions: reserved, then confirmed, 16 clients; beside what Temporal needs for two calls at the least.

The baselines are workflows that are started by one update and ended by a second one, on the same server in the same
run, just as many at once. In one of them the updates do nothing at all: nothing that a workflow carries which waits
between two calls can be faster. In the other each runs an activity that does nothing, as effects usually are made.
"""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any
from uuid import uuid4

from temporalio.client import Client, WithStartWorkflowOperation
from temporalio.common import WorkflowIDConflictPolicy

from benchmarks.baseline_worker import FIRST_UPDATE, SECOND_UPDATE, TWO_STEP_WORKFLOW
from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.cases.workflow_per_event import baseline_worker
from benchmarks.load import Burst, middle, offer
from benchmarks.workload import PARTICIPANTS, BenchProgram, adjust_requests, make_program

CLIENTS = 16
WARM_UP = 32


@dataclass(frozen=True, slots=True)
class _Round:
    """What one round took: all first calls, then all second calls."""

    per_s: float
    first_p50_ms: float
    second_p50_ms: float
    client_cpu_share: float | None = None


def run(bench: Bench) -> Iterator[Figure]:
    """Yield redemptions per second, each of them two calls, the baselines' rates, the ratios, and medians of each."""
    program = make_program(bench.rest, "two steps")
    opening = adjust_requests(bench.system.endpoint, program, bench.population, PARTICIPANTS, each_once=True)
    offer(Burst(bench.system.endpoint, opening, CLIENTS, 200))
    count = bench.sizes.workflows // 3
    address, queue = bench.servers.temporal_address, f"benchmark-{uuid4().hex}"
    _redeem(bench, program, WARM_UP)
    ours: list[_Round] = []
    least: list[_Round] = []
    usual: list[_Round] = []
    with baseline_worker(address, queue):
        asyncio.run(_update(address, queue, WARM_UP, with_activity=True))
        # In turn, so that a machine that is busy for a while slows all of them.
        for _ in range(bench.sizes.repetitions):
            ours.append(_redeem(bench, program, count))
            least.append(asyncio.run(_update(address, queue, count, with_activity=False)))
            usual.append(asyncio.run(_update(address, queue, count, with_activity=True)))
    shares = [made.client_cpu_share for made in ours if made.client_cpu_share is not None]
    rates = [made.per_s for made in ours]
    yield Figure("two_step_per_s", middle(rates), "/s", tuple(rates), max(shares))
    yield _median("two_step_reserve_p50_ms", [made.first_p50_ms for made in ours])
    yield _median("two_step_confirm_p50_ms", [made.second_p50_ms for made in ours])
    for name, rounds in (("updates", least), ("updates_with_activity", usual)):
        of_baseline = [made.per_s for made in rounds]
        yield Figure(f"two_{name}_per_s", middle(of_baseline), "/s", tuple(of_baseline))
        yield _median(f"first_of_two_{name}_p50_ms", [made.first_p50_ms for made in rounds])
        yield _median(f"second_of_two_{name}_p50_ms", [made.second_p50_ms for made in rounds])
        yield Figure(f"two_step_over_two_{name}", middle(rates) / middle(of_baseline), "x")


def _median(name: str, values: Sequence[float]) -> Figure:
    return Figure(name, middle(values), "ms", tuple(values))


def _redeem(bench: Bench, program: BenchProgram, count: int) -> _Round:
    before = bench.rest.entries_written()
    endpoint = bench.system.endpoint
    reserved = offer(Burst(endpoint, _reservations(bench, program, count), CLIENTS, 201, keep_bodies=True))
    paths = [f"/v1/redemptions/{json.loads(body)['id']}/confirm" for body in reserved.bodies]
    confirmed = offer(Burst(endpoint, [endpoint.post(path, b"{}") for path in paths], CLIENTS, 200))
    written = bench.rest.entries_written() - before
    if written != 2 * count:
        raise Wrong(f"{count} redemptions of two steps made {written} journal entries")
    return _Round(
        count / (reserved.answered_s + confirmed.answered_s),
        median(reserved.latencies_ms),
        median(confirmed.latencies_ms),
        max(reserved.client_cpu_share, confirmed.client_cpu_share),
    )


def _reservations(bench: Bench, program: BenchProgram, count: int) -> list[bytes]:
    draw, run = Random(7), uuid4().hex
    body = {
        "program_id": str(program.id),
        "asset_id": str(program.asset_ids[0]),
        "amount": "0.01",
        "description": "Gift card",
        "requires_confirmation": True,
    }
    return [
        bench.system.endpoint.post(
            f"/v1/participants/{draw.choice(bench.population.ids)}/redemptions",
            json.dumps({**body, "idempotency_key": f"{run}-{number}"}).encode(),
        )
        for number in range(count)
    ]


async def _update(address: str, queue: str, count: int, *, with_activity: bool) -> _Round:
    client = await Client.connect(address)
    ids = [f"{queue}/{uuid4().hex}" for _ in range(count)]
    began = time.perf_counter()
    first = await _call(client, queue, ids, FIRST_UPDATE, with_activity)
    second = await _call(client, queue, ids, SECOND_UPDATE, with_activity)
    return _Round(count / (time.perf_counter() - began), median(first), median(second))


async def _call(client: Client, queue: str, ids: Sequence[str], update: str, with_activity: bool) -> list[float]:
    """Send every workflow this update, `CLIENTS` at once; the milliseconds of each."""
    todo, took_ms = iter(ids), list[float]()

    async def call_some() -> None:
        for workflow_id in todo:
            start: WithStartWorkflowOperation[Any, Any] = WithStartWorkflowOperation(
                TWO_STEP_WORKFLOW,
                id=workflow_id,
                task_queue=queue,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            )
            began = time.perf_counter()
            await client.execute_update_with_start_workflow(
                update, with_activity, start_workflow_operation=start, id=str(uuid4())
            )
            took_ms.append((time.perf_counter() - began) * 1_000)

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(call_some())
    return took_ms


CASE = Case(
    "two_step",
    "Two-step redemptions",
    (
        "two_step_per_s",
        "two_step_reserve_p50_ms",
        "two_step_confirm_p50_ms",
        "two_updates_per_s",
        "first_of_two_updates_p50_ms",
        "second_of_two_updates_p50_ms",
        "two_step_over_two_updates",
        "two_updates_with_activity_per_s",
        "first_of_two_updates_with_activity_p50_ms",
        "second_of_two_updates_with_activity_p50_ms",
        "two_step_over_two_updates_with_activity",
    ),
    run,
    needs_servers=True,
)
