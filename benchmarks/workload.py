"""The fixed workload that every figure is taken on, so that figures of different days can be compared.

1,000 participants; events of 8 fields; a program with two assets (SIMPLE, scale 2) and five rules, of which two CREDIT
and one COUNTER match every event, one does not match by type and one does not match by amount. So an event makes two
journal entries with two postings each, one state change, and one counter update.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import Any
from uuid import UUID, uuid4

from benchmarks.load import Burst, Endpoint, offer
from benchmarks.rest import Rest

PARTICIPANTS = 1_000
EVENTS_PER_REQUEST = 100
ENTRIES_PER_EVENT = 2
CLIENTS_AT_SETUP = 8

# A batch that was taken before has other ids: what is measured is never a replay.
_SEED = 20_261_101


@dataclass(frozen=True, slots=True)
class BenchProgram:
    """A program with the five rules, ready to take events."""

    id: UUID
    asset_ids: Sequence[UUID]


@dataclass(frozen=True, slots=True)
class Population:
    """The participants of a run. `external_ids[i]` is the caller's id of `ids[i]`."""

    external_ids: Sequence[str]
    ids: Sequence[UUID]


def make_population(endpoint: Endpoint) -> Population:
    """Create the participants."""
    run = uuid4().hex[:8]
    external_ids = [f"bench-{run}-{number:04}" for number in range(PARTICIPANTS)]
    bodies = [json.dumps({"external_id": external_id}).encode() for external_id in external_ids]
    requests = [endpoint.post("/v1/participants", body) for body in bodies]
    report = offer(Burst(endpoint, requests, CLIENTS_AT_SETUP, 201, keep_bodies=True))
    return Population(external_ids, [UUID(json.loads(body)["id"]) for body in report.bodies])


def make_program(
    rest: Rest, name: str, inventory_mode: str = "SIMPLE", further_rules: Sequence[dict[str, Any]] = ()
) -> BenchProgram:
    """Create a program with its assets and rules; `further_rules` come after the fixed ones."""
    program_id = UUID(rest.post("/v1/programs", {"name": f"Benchmark {name}"})["id"])
    asset_ids = [make_asset(rest, program_id, name, inventory_mode) for name in ("Points", "Cashback")]
    for order, rule in enumerate([*_rules(*asset_ids), *further_rules], start=1):
        rest.post("/v1/rules", {"program_id": str(program_id), "order": order, "stop_after_match": False, **rule})
    return BenchProgram(program_id, asset_ids)


def event_requests(
    endpoint: Endpoint, program: BenchProgram, population: Population, count: int, *, each_once: bool = False
) -> list[bytes]:
    """`count` events, one request each. With `each_once` the participants take turns instead of being drawn."""
    events = _events(program, population, count, each_once=each_once)
    return [endpoint.post("/v1/events", json.dumps(event).encode()) for event in events]


def batch_requests(
    endpoint: Endpoint, program: BenchProgram, population: Population, count: int, *, each_once: bool = False
) -> list[bytes]:
    """`count` events in requests of 100."""
    events = list(_events(program, population, count, each_once=each_once))
    return [
        endpoint.post("/v1/events/batch", json.dumps({"events": events[start : start + EVENTS_PER_REQUEST]}).encode())
        for start in range(0, count, EVENTS_PER_REQUEST)
    ]


def waiting_lists(endpoint: Endpoint, program: BenchProgram | None) -> list[bytes]:
    """The lists that are empty when every event of the program (None: of the organization) has been processed."""
    scope = f"program_id={program.id}&" if program else ""
    return [endpoint.get(f"/v1/events?{scope}status={status}&limit=1") for status in ("RECEIVED", "PENDING")]


def warm_up(endpoint: Endpoint, program: BenchProgram, population: Population, count: int) -> None:
    """Process `count` events: every participant is enrolled and has accounts, every process has seen its code."""
    requests = batch_requests(endpoint, program, population, count, each_once=True)
    offer(Burst(endpoint, requests, 2, 202, until_empty=waiting_lists(endpoint, program)))


def adjust_requests(
    endpoint: Endpoint, program: BenchProgram, population: Population, count: int, *, each_once: bool = False
) -> list[bytes]:
    """`count` credits by hand, of participants that are drawn (or take turns), each with a key of its own."""
    draw = Random(_SEED)
    run = uuid4().hex
    requests = []
    for number in range(count):
        participant_id = population.ids[number % PARTICIPANTS] if each_once else draw.choice(population.ids)
        body = {
            "program_id": str(program.id),
            "asset_id": str(program.asset_ids[0]),
            "type": "CREDIT",
            "amount": f"{draw.randint(1, 10_000) / 100:.2f}",
            "description": "Goodwill",
            "idempotency_key": f"{run}-{number}",
        }
        path = f"/v1/participants/{participant_id}/balances/adjust"
        requests.append(endpoint.post(path, json.dumps(body).encode()))
    return requests


def make_asset(rest: Rest, program_id: UUID, name: str, inventory_mode: str) -> UUID:
    """Create an UNLIMITED asset with two decimals, linked to the program."""
    asset = {
        "program_id": str(program_id),
        "name": name,
        "symbol": uuid4().hex[:16],
        "inventory_mode": inventory_mode,
        "issuance_policy": "UNLIMITED",
        "scale": 2,
    }
    return UUID(rest.post("/v1/assets", asset)["id"])


def _rules(points: UUID, cashback: UUID) -> list[dict[str, Any]]:
    def credit(asset_id: UUID, amount: str) -> dict[str, str]:
        return {"type": "CREDIT", "asset_id": str(asset_id), "amount": amount}

    return [
        {
            "name": "Points on every purchase",
            "condition": 'event.type == "purchase" && event.amount >= 1.0',
            "actions": [credit(points, "round(event.amount * 10, 0)")],
        },
        {
            "name": "Cashback in the app",
            "condition": 'event.type == "purchase" && event.channel == "app" && event.currency == "EUR"',
            "actions": [credit(cashback, "round(event.amount * 0.02, 2)")],
        },
        {
            "name": "Count purchases",
            "condition": 'event.type == "purchase"',
            "actions": [{"type": "COUNTER", "key": "purchases", "value": "1"}],
        },
        {
            "name": "Refunds",
            "condition": 'event.type == "refund"',
            "actions": [credit(points, "1.00")],
        },
        {
            "name": "Very large purchases",
            "condition": 'event.type == "purchase" && event.amount > 100000.0',
            "actions": [credit(points, "500.00")],
        },
    ]


def _events(program: BenchProgram, population: Population, count: int, *, each_once: bool) -> Iterator[dict[str, Any]]:
    draw = Random(_SEED)
    run = uuid4().hex
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    external_ids = population.external_ids
    for number in range(count):
        yield {
            "program_id": str(program.id),
            "external_id": external_ids[number % PARTICIPANTS] if each_once else draw.choice(external_ids),
            "idempotency_key": f"{run}-{number}",
            "event_timestamp": now,
            "event_data": {
                "type": "purchase",
                "amount": draw.randint(500, 50_000) / 100,
                "currency": "EUR",
                "channel": "app",
                "merchant": f"merchant-{draw.randint(1, 200)}",
                "category": draw.choice(("grocery", "travel", "fuel", "books")),
                "country": draw.choice(("DE", "FR", "ES", "PT")),
                "order_id": f"{run[:8]}-{number:08}",
            },
        }
