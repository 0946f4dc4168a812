"""A broadcast to many participants: from the event that broadcasts to the last of its events COMPLETED.

A fan-out keeps few events waiting, so that others in its program don't queue up behind it. So this is what a broadcast
and the processing of its events do together; and what an event of somebody else waits meanwhile is measured beside it.
"""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID, uuid4

import psycopg

from benchmarks.case import Bench, Case, Figure, Wrong
from benchmarks.load import EVENT_ID, Burst, Watch, offer, percentile, watch
from benchmarks.workload import EVENTS_PER_REQUEST, waiting_lists

CLIENTS = 4
LIMIT_S = 300.0
POLL_S = 0.02
# Events of others while the broadcast is under way: one every so often, the first when it has certainly begun.
OTHERS = 20
OTHERS_BEGIN_S = 0.5
OTHERS_EVERY_S = 0.1

_STATE = """
select a.execution_status = 'completed', a.participants_processed,
       exists (select from event e where e.organization_id = a.organization_id and e.program_id = a.program_id
               and e.status in ('RECEIVED', 'PENDING'))
from automation a where a.organization_id = %s and a.program_id = %s
"""


def run(bench: Bench) -> Iterator[Figure]:
    """Yield participants per second, and the median wait of an event that somebody sends meanwhile."""
    count = bench.sizes.batch_events
    program_id = _make_program(bench)
    _enroll(bench, program_id, count)
    started = time.perf_counter()
    bench.rest.post("/v1/events", _event(program_id, "launcher", "launch"))
    report = watch(Watch(bench.system.endpoint, _others(bench, program_id), _look_at(bench)))
    _wait(bench, program_id, count)
    elapsed_s = time.perf_counter() - started
    yield Figure("broadcast_participants_per_s", count / elapsed_s, "/s")
    yield Figure(
        "accept_to_completed_during_broadcast_p50_ms",
        percentile(sorted(report.waits_ms), 50),
        "ms",
        client_cpu_share=report.client_cpu_share,
    )


def _make_program(bench: Bench) -> UUID:
    program_id = UUID(bench.rest.post("/v1/programs", {"name": "Benchmark broadcast"})["id"])
    rules: list[tuple[str, dict[str, Any]]] = [
        ("launch", {"type": "BROADCAST", "event_name": "digest", "payload": {"bonus": 50}}),
        ("digest", {"type": "COUNTER", "key": "digests", "value": "1"}),
    ]
    for order, (event_type, action) in enumerate(rules, start=1):
        rule = {"name": event_type, "condition": f'event.type == "{event_type}"', "actions": [action]}
        bench.rest.post("/v1/rules", {"program_id": str(program_id), "order": order, **rule})
    return program_id


def _enroll(bench: Bench, program_id: UUID, count: int) -> None:
    """Let so many participants, the launcher among them, join by an event each."""
    endpoint, run = bench.system.endpoint, uuid4().hex[:8]
    names = ["launcher", *(f"broadcast-{run}-{number}" for number in range(1, count))]
    events = [_event(program_id, name, "join") for name in names]
    requests = [
        endpoint.post("/v1/events/batch", json.dumps({"events": events[start : start + EVENTS_PER_REQUEST]}).encode())
        for start in range(0, count, EVENTS_PER_REQUEST)
    ]
    # No other program has events now, so the whole organization's queue is this one's.
    offer(Burst(endpoint, requests, CLIENTS, 202, until_empty=waiting_lists(endpoint, None)))


def _others(bench: Bench, program_id: UUID) -> Sequence[tuple[float, bytes]]:
    return [
        (
            OTHERS_BEGIN_S + number * OTHERS_EVERY_S,
            bench.system.endpoint.post("/v1/events", json.dumps(_event(program_id, "launcher", "other")).encode()),
        )
        for number in range(OTHERS)
    ]


def _look_at(bench: Bench) -> bytes:
    return bench.system.endpoint.get(f"/v1/events/{EVENT_ID.decode()}")


def _event(program_id: UUID, external_id: str, event_type: str) -> dict[str, Any]:
    return {
        "program_id": str(program_id),
        "external_id": external_id,
        "idempotency_key": uuid4().hex,
        "event_timestamp": "2026-03-01T12:00:00Z",
        "event_data": {"type": event_type},
    }


def _wait(bench: Bench, program_id: UUID, count: int) -> None:
    """Wait for the last event of the broadcast. Raises Wrong when not everybody was reached."""
    deadline = time.monotonic() + LIMIT_S
    with psycopg.connect(bench.servers.owner_database_url, autocommit=True) as connection:
        while time.monotonic() < deadline:
            state = connection.execute(_STATE, (bench.servers.organization_id, program_id)).fetchone()
            if state is not None and state[0] and not state[2]:
                if state[1] != count:
                    raise Wrong(f"the broadcast reached {state[1]} of {count} participants")
                return
            time.sleep(POLL_S)
    raise Wrong(f"the broadcast was not done within {LIMIT_S:.0f} s")


CASE = Case(
    "broadcast",
    "A broadcast to many participants",
    ("broadcast_participants_per_s", "accept_to_completed_during_broadcast_p50_ms"),
    run,
    needs_servers=True,
    is_full=True,
)
