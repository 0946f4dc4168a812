"""The program of the drills: rules whose outcome depends on the order of events, and what must come of them.

Each participant's purchases add up in a counter; past 1,000 the next purchase earns a tag and a bonus, which a refund
takes away again; an attribute keeps the number of the last event; a gift moves value to another participant; a purchase
that earns too much at once is refused as a whole. So an event that is lost, doubled, half done or out of order shows.
`expected` is these rules once more, in Python, for whatever order the events were accepted in.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import count, cycle
from random import Random
from typing import Any
from uuid import UUID

from drills.case import Broken
from drills.client import Client

PARTICIPANTS = 60
CLIENTS = 6
REFUSED = "action CREDIT failed: amount exceeds max_transaction_amount"

_runs = count(1)
_SIZES = (1, 7, 25, 60, 100)


@dataclass(frozen=True, slots=True)
class Sent:
    """One event as the client sends it; `number` counts a program's events from 0."""

    number: int
    who: str
    data: dict[str, Any]

    @property
    def key(self) -> str:
        """Its idempotency key."""
        return f"event-{self.number}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A journal entry as the ledger must have it: `holder` is whose balance it changes, by how much."""

    key: str
    rule: str
    action: str
    holder: str
    amount: Decimal


@dataclass(slots=True)
class State:
    """What a participant has besides money."""

    spend: Decimal | None = None
    is_gold: bool = False
    last: str | None = None


@dataclass(slots=True)
class Expected:
    """What must be there at the end: the outcome of each key, and each participant's entries in order and state.

    Entries are listed under the participant whose events made them.
    """

    outcomes: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    entries: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    states: dict[str, State] = field(default_factory=lambda: defaultdict(State))


@dataclass(frozen=True, slots=True)
class Program:
    """A program with the rules of the drills. `prefix` begins the external ids of its participants."""

    id: UUID
    asset_id: UUID
    prefix: str


async def make_program(client: Client, name: str) -> Program:
    """Create the program, its asset and its rules through the API."""
    run = next(_runs)
    program_id = (await client.post("/programs", {"name": f"Drill {run}: {name}"}))["id"]
    asset = {
        "program_id": program_id,
        "name": "Points",
        "symbol": f"DRILL{run}",
        "inventory_mode": "SIMPLE",
        "issuance_policy": "UNLIMITED",
        "scale": 2,
        "max_transaction_amount": "1000.00",
    }
    asset_id = (await client.post("/assets", asset))["id"]
    for order, (rule, condition, actions) in enumerate(_rules(asset_id), start=1):
        body = {"program_id": program_id, "name": rule, "order": order, "condition": condition, "actions": actions}
        await client.post("/rules", body)
    return Program(UUID(program_id), UUID(asset_id), f"{run}-")


def make_events(program: Program, number: int, seed: int = 1) -> list[Sent]:
    """`number` events of sixty participants, the same for the same seed."""
    draw = Random(seed)
    names = [f"{program.prefix}p{index}" for index in range(PARTICIPANTS)]
    return [Sent(index, draw.choice(names), _payload(draw, index, names)) for index in range(number)]


def body_of(program: Program, event: Sent) -> dict[str, Any]:
    """The event as JSON for the API."""
    return {
        "program_id": str(program.id),
        "external_id": event.who,
        "idempotency_key": event.key,
        "event_timestamp": "2026-03-01T12:00:00Z",
        "event_data": event.data,
    }


async def offer(client: Client, program: Program, events: Sequence[Sent]) -> None:
    """Send `events` as several clients at once; returns when all are accepted. Raises Broken when one is refused.

    Each client has participants of its own and sends their events in order, one call at a time: single events and
    batches of several sizes in turn.
    """
    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            mine = [event for event in events if _index(event) % CLIENTS == number]
            group.create_task(_offer_in_order(client, program, mine))


def expected(events: Iterable[Sent], refused: dict[str, str] | None = None) -> Expected:
    """What must come of these events, in the order in which they were accepted.

    `refused` gives the error message of events that end FAILED for another reason than their rules.
    """
    result = Expected()
    for event in events:
        error = (refused or {}).get(event.key) or (REFUSED if _earned(event) > 1000 else None)
        result.outcomes[event.key] = ("FAILED", error) if error else ("COMPLETED", None)
        if error is None:
            result.entries[event.who] += list(_apply(event, result.states[event.who]))
    return result


def _rules(asset_id: str) -> list[tuple[str, str, list[dict[str, Any]]]]:
    def move(action: str, amount: str, **more: Any) -> dict[str, Any]:
        return {"type": action, "asset_id": asset_id, "amount": amount, **more}

    return [
        ("spend", 'event.type == "purchase"', [{"type": "COUNTER", "key": "spend", "value": "event.amount"}]),
        ("earn", 'event.type == "purchase"', [move("CREDIT", "event.amount * 1.25")]),
        (
            "milestone",
            'event.type == "purchase" && has(participant.counters.spend) && participant.counters.spend >= 1000'
            ' && !("gold" in participant.tags)',
            [{"type": "TAG", "tag": "gold"}, move("CREDIT", "50")],
        ),
        (
            "refund",
            'event.type == "refund"',
            [move("DEBIT", "event.amount", allow_negative=True), {"type": "UNTAG", "tag": "gold"}],
        ),
        (
            "gift",
            'event.type == "gift"',
            [
                move("DEBIT", "event.amount", allow_negative=True),
                move("CREDIT", "event.amount", target={"type": "PARTICIPANT", "external_id": "event.to"}),
            ],
        ),
        ("last", 'event.type != "visit"', [{"type": "SET_ATTRIBUTE", "key": "last", "value": "string(event.number)"}]),
    ]


def _payload(draw: Random, number: int, names: Sequence[str]) -> dict[str, Any]:
    kind = draw.choices(("purchase", "refund", "gift", "visit"), (70, 12, 12, 6))[0]
    data: dict[str, Any] = {"type": kind, "number": number}
    if kind == "visit":
        return data
    # One purchase in fifty earns more than the asset allows in one movement.
    data["amount"] = 900 if kind == "purchase" and draw.random() < 0.02 else draw.randint(1, 400)
    if kind == "gift":
        data["to"] = draw.choice(names)
    return data


def _earned(event: Sent) -> Decimal:
    return event.data["amount"] * Decimal("1.25") if event.data["type"] == "purchase" else Decimal(0)


def _apply(event: Sent, state: State) -> Iterator[Entry]:
    def entry(rule: str, action: str, amount: Decimal, holder: str = event.who) -> Entry:
        return Entry(event.key, rule, action, holder, amount)

    kind, amount = event.data["type"], Decimal(event.data.get("amount", 0))
    # Rules see the state as it was before their event.
    earns_bonus = kind == "purchase" and state.spend is not None and state.spend >= 1000 and not state.is_gold
    if kind == "purchase":
        state.spend = (state.spend or Decimal(0)) + amount
        yield entry("earn", "CREDIT", _earned(event))
    if earns_bonus:
        state.is_gold = True
        yield entry("milestone", "CREDIT", Decimal(50))
    if kind == "refund":
        state.is_gold = False
        yield entry("refund", "DEBIT", -amount)
    if kind == "gift":
        yield entry("gift", "DEBIT", -amount)
        yield entry("gift", "CREDIT", amount, event.data["to"])
    if kind != "visit":
        state.last = str(event.number)


async def _offer_in_order(client: Client, program: Program, events: Sequence[Sent]) -> None:
    for chunk in _chunks(events):
        bodies = [body_of(program, event) for event in chunk]
        if len(bodies) == 1:
            await client.post("/events", bodies[0])
            continue
        answer = await client.post("/events/batch", {"events": bodies})
        if answer["error_count"]:
            raise Broken(f"events were refused: {answer}")


def _index(event: Sent) -> int:
    return int(event.who.rpartition("p")[2])


def _chunks(events: Sequence[Sent]) -> Iterator[Sequence[Sent]]:
    start = 0
    for size in cycle(_SIZES):
        if start >= len(events):
            return
        yield events[start : start + size]
        start += size
