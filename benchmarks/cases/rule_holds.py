"""Holds with an end that rules make: how many a second, what they cost Temporal, and how late they end."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from uuid import UUID, uuid4

import psycopg
from temporalio.client import Client

from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.cases.temporal_cost import OPERATIONS, history
from benchmarks.load import Burst, offer
from benchmarks.workload import EVENTS_PER_REQUEST, BenchProgram, make_asset, waiting_lists
from workflows import hold_ends
from workflows.event_processing import workflow_id

CLIENTS = 4
LASTS_S = 5
ENDED_WITHIN_S = 120


def run(bench: Bench) -> Iterator[Figure]:
    """Yield authorizations per second, Temporal's operations per 1,000 of them, and the latest end after its time."""
    count = bench.sizes.batch_events // 2
    program = _make_program(bench)
    endpoint = bench.system.endpoint
    started = time.perf_counter()
    report = offer(
        Burst(endpoint, _requests(bench, program, count), CLIENTS, 202, until_empty=waiting_lists(endpoint, program))
    )
    yield Figure("rule_holds_per_s", count / report.done_s, "/s", (), report.client_cpu_share)
    late_s = _await_ends(bench, program, count)
    elapsed = time.perf_counter() - started
    operations = asyncio.run(_operations(bench.servers.temporal_address, program.id))
    yield Figure("temporal_operations_per_1000_holds", operations * 1000 / count, "")
    yield Figure("hold_ends_per_s", count / max(elapsed - LASTS_S, 0.001), "/s")
    yield Figure("latest_hold_end_s", late_s, "s")


def _make_program(bench: Bench) -> BenchProgram:
    program_id = UUID(bench.rest.post("/v1/programs", {"name": "Benchmark authorizations"})["id"])
    asset_id = make_asset(bench.rest, program_id, "Points", "LOT")
    action = {
        "type": "CREDIT",
        "asset_id": str(asset_id),
        "amount": "event.amount",
        "bucket": "HELD",
        "reference_id": "event.authorization",
        "hold_until": f"{LASTS_S}s",
    }
    rule = {"name": "Authorize", "condition": 'event.type == "authorization"', "actions": [action]}
    bench.rest.post("/v1/rules", {"program_id": str(program_id), **rule})
    return BenchProgram(program_id, [asset_id])


def _requests(bench: Bench, program: BenchProgram, count: int) -> list[bytes]:
    names = bench.population.external_ids
    events = [
        {
            "program_id": str(program.id),
            "external_id": names[number % len(names)],
            "idempotency_key": uuid4().hex,
            "event_timestamp": "2026-01-01T00:00:00Z",
            "event_data": {"type": "authorization", "amount": 12.34, "authorization": f"auth-{number}"},
        }
        for number in range(count)
    ]
    return [
        bench.system.endpoint.post(
            "/v1/events/batch", json.dumps({"events": events[start : start + EVENTS_PER_REQUEST]}).encode()
        )
        for start in range(0, count, EVENTS_PER_REQUEST)
    ]


def _await_ends(bench: Bench, program: BenchProgram, count: int) -> float:
    """Wait until every hold has ended; how many seconds after its time the latest one did."""
    give_up_at = time.monotonic() + ENDED_WITHIN_S
    query = """select count(*), max(extract(epoch from updated_at - expires_at)) from hold
               where organization_id = %s and program_id = %s and status = 'EXPIRED'"""
    with psycopg.connect(bench.servers.owner_database_url, autocommit=True) as connection:
        while True:
            row = connection.execute(query, (bench.servers.organization_id, program.id)).fetchone()
            assert row is not None
            if row[0] == count:
                return float(row[1])
            if time.monotonic() > give_up_at:
                raise Wrong(f"{row[0]} of {count} holds have ended")
            time.sleep(0.2)


async def _operations(address: str, program_id: UUID) -> int:
    """What the program's events and ends of holds cost Temporal in all."""
    client = await Client.connect(address)
    counted = Counter[int]()
    for id_ in (workflow_id(program_id), hold_ends.workflow_id(program_id)):
        counted += Counter([kind async for kind in history(client, id_)])
    return sum(counted[kind] for kind in OPERATIONS)


CASE = Case(
    "rule_holds",
    "Holds that rules make",
    ("rule_holds_per_s", "temporal_operations_per_1000_holds", "hold_ends_per_s", "latest_hold_end_s"),
    run,
    needs_servers=True,
)
