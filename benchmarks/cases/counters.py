"""A participant with one counter and one with a thousand: a change must cost the same on both."""

import json
from collections.abc import Iterator
from uuid import UUID, uuid4

from benchmarks.case import Bench, Case, Figure
from benchmarks.load import Burst, middle, offer
from benchmarks.workload import (
    EVENTS_PER_REQUEST,
    BenchProgram,
    Population,
    batch_requests,
    make_program,
    waiting_lists,
)

MANY_COUNTERS = 1_000
CLIENTS = 2


def run(bench: Bench) -> Iterator[Figure]:
    """Yield events per second that all count on one participant, by how many counters it has."""
    program = make_program(bench.rest, "counters")
    count = bench.sizes.batch_events // 10 // EVENTS_PER_REQUEST * EVENTS_PER_REQUEST
    people = {
        "events_per_s_one_counter": _participant_with(bench, 1),
        "events_per_s_thousand_counters": _participant_with(bench, MANY_COUNTERS),
    }
    for person in people.values():
        _measure(bench, program, person, EVENTS_PER_REQUEST * 2)
    rates: dict[str, list[float]] = {name: [] for name in people}
    # In turns, so that whatever changes meanwhile meets both.
    for _ in range(bench.sizes.repetitions):
        for name, person in people.items():
            rates[name].append(_measure(bench, program, person, count))
    for name in people:
        yield Figure(name, middle(rates[name]), "/s", tuple(rates[name]))


def _participant_with(bench: Bench, counters: int) -> Population:
    endpoint, external_id = bench.system.endpoint, f"bench-counters-{uuid4().hex[:8]}"
    participant = bench.rest.post("/v1/participants", {"external_id": external_id})["id"]
    body = json.dumps({"value": "1"}).encode()
    requests = [
        endpoint.put(f"/v1/participants/{participant}/state/counters/other-{number}", body)
        for number in range(counters - 1)
    ]
    if requests:
        offer(Burst(endpoint, requests, 8, 200))
    return Population([external_id], [UUID(participant)])


def _measure(bench: Bench, program: BenchProgram, person: Population, count: int) -> float:
    endpoint = bench.system.endpoint
    requests = batch_requests(endpoint, program, person, count)
    report = offer(Burst(endpoint, requests, CLIENTS, 202, until_empty=waiting_lists(endpoint, program)))
    return count / report.done_s


CASE = Case(
    "counters",
    "One counter and a thousand on one participant",
    ("events_per_s_one_counter", "events_per_s_thousand_counters"),
    run,
)
