"""Everything at once on few holders: two programs, gifts in both directions, wallets, direct operations beside them.

Every movement is a credit, or a debit that may go below zero, so nothing may be refused, and the sum of what was
accepted is what the holders must have, in whatever order it was applied.
"""

import asyncio
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import count
from random import Random
from typing import Any
from uuid import UUID, uuid4

from drills.audit import balances, deadlocks, failures, progress_of, prove_ledger, settled
from drills.case import Broken, Case, Drill, Finding, Say, Sizes
from drills.client import Client, client_of
from drills.platform import Platform

HOLDERS = 20
EVENT_CLIENTS = 4
ADJUST_CLIENTS = 6
BATCH = 40
BACKLOG_EVENTS = 600
FUNDS = Decimal(10) ** 9
REPEATED_SHARE_LIMIT = 0.001

Totals = dict[tuple[UUID, UUID], Decimal]


@dataclass(slots=True)
class Load:
    """What is sent, and what must come of it."""

    client: Client
    programs: list[UUID]
    points: UUID
    budgeted: UUID
    holders: list[tuple[UUID, str]]
    ends_at: float
    totals: Totals = field(default_factory=lambda: defaultdict(Decimal))
    events: int = 0
    adjusts: int = 0
    has_room: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.ends_at

    def credit(self, holder: UUID, asset: UUID, amount: Decimal) -> None:
        """Note a movement that was accepted."""
        self.totals[holder, asset] += amount


async def run(platform: Platform, sizes: Sizes, say: Say) -> Finding:
    """Events and direct operations that touch each other's holders in every direction, at full load."""
    await platform.provide()
    before = await deadlocks(platform)
    repeated_before = _repetitions(platform)
    async with client_of(platform) as client:
        load = await _prepare(client, sizes.contention_s)
        say(f"full load for {sizes.contention_s:.0f} s")
        calls_before = client.calls
        async with asyncio.TaskGroup() as group:
            group.create_task(_watch(platform, load, say))
            for number in range(EVENT_CLIENTS):
                group.create_task(_send_events(load, number))
            for number in range(ADJUST_CLIENTS):
                group.create_task(_adjust(load, number))
        calls = client.calls - calls_before
        say("waiting for the last event")
        await settled(platform, *load.programs)
    say("comparing")
    await _check(platform, load)
    repeated = {what: n - repeated_before[what] for what, n in _repetitions(platform).items()}
    found = await deadlocks(platform) - before
    note = (
        f"{load.adjusts} adjusts; {found} deadlocks; repeated: {repeated['request']} requests, "
        f"{repeated['drain']} drains, {repeated['batch']} batches halved"
    )
    if sum(repeated.values()) > REPEATED_SHARE_LIMIT * calls:
        raise Broken(f"more than one transaction in a thousand was repeated: {note}; {calls} calls")
    return Finding(load.events, 0, None, note)


async def _prepare(client: Client, seconds: float) -> Load:
    run = uuid4().hex[:8]
    programs = [(await client.post("/programs", {"name": f"Contention {run} {n}"}))["id"] for n in range(2)]
    points, budgeted = [
        (
            await client.post(
                "/assets",
                {
                    "program_id": programs[0],
                    "name": policy,
                    "symbol": f"{policy[:3]}{run}".upper(),
                    "inventory_mode": "SIMPLE",
                    "issuance_policy": policy,
                    "scale": 2,
                },
            )
        )["id"]
        for policy in ("UNLIMITED", "PREFUNDED")
    ]
    for asset in (points, budgeted):
        await client.post(f"/programs/{programs[1]}/assets", {"asset_id": asset})
    for program in programs:
        await client.post(
            f"/programs/{program}/assets/{budgeted}/fund", {"amount": str(FUNDS), "description": "Budget"}
        )
        for order, (name, actions) in enumerate(_rules(points, budgeted), start=1):
            body = {"program_id": program, "name": name, "order": order, "actions": actions}
            await client.post("/rules", {**body, "condition": f'event.type == "{name}"'})
    holders = []
    for number in range(HOLDERS):
        name = f"{run}-{number}"
        holders.append((UUID((await client.post("/participants", {"external_id": name}))["id"]), name))
    ends_at = time.monotonic() + seconds
    return Load(client, [UUID(program) for program in programs], UUID(points), UUID(budgeted), holders, ends_at)


def _rules(points: str, budgeted: str) -> list[tuple[str, list[dict[str, Any]]]]:
    there = {"target": {"type": "PARTICIPANT", "external_id": "event.to"}}
    return [
        (
            "gift",
            [
                {"type": "DEBIT", "asset_id": points, "amount": "event.amount", "allow_negative": True},
                {"type": "CREDIT", "asset_id": points, "amount": "event.amount", **there},
            ],
        ),
        # The other way round: what the event names first is locked no earlier for it.
        (
            "take",
            [
                {"type": "DEBIT", "asset_id": points, "amount": "event.amount", "allow_negative": True, **there},
                {"type": "CREDIT", "asset_id": points, "amount": "event.amount"},
                {"type": "COUNTER", "key": "taken", "value": "1", **there},
            ],
        ),
        (
            "draw",
            [
                {"type": "CREDIT", "asset_id": budgeted, "amount": "event.amount"},
                {"type": "COUNTER", "key": "drawn", "value": "event.amount", "target": {"type": "PROGRAM"}},
            ],
        ),
    ]


async def _send_events(load: Load, number: int) -> None:
    draw = Random(number)
    program = load.programs[number % len(load.programs)]
    for turn in count():
        await load.has_room.wait()
        if load.is_over:
            return
        batch = [_event(load, draw, program, f"{number}-{turn}-{index}") for index in range(BATCH)]
        answer = await load.client.post_once("/events/batch", {"events": batch})
        if answer["error_count"]:
            raise Broken(f"events were refused: {answer}")
        load.events += BATCH


def _event(load: Load, draw: Random, program: UUID, key: str) -> dict[str, Any]:
    (holder, name), (other, other_name) = draw.sample(load.holders, 2)
    kind, amount = draw.choice(("gift", "take", "draw")), draw.randint(1, 500)
    if kind == "draw":
        load.credit(holder, load.budgeted, Decimal(amount))
        load.credit(program, load.budgeted, Decimal(-amount))
    else:
        sign = -1 if kind == "gift" else 1
        load.credit(holder, load.points, Decimal(sign * amount))
        load.credit(other, load.points, Decimal(-sign * amount))
    return {
        "program_id": str(program),
        "external_id": name,
        "idempotency_key": key,
        "event_timestamp": "2026-03-01T12:00:00Z",
        "event_data": {"type": kind, "amount": amount, "to": other_name},
    }


async def _adjust(load: Load, number: int) -> None:
    draw = Random(100 + number)
    for turn in count():
        if load.is_over:
            return
        holder, _ = draw.choice(load.holders)
        program = draw.choice(load.programs)
        asset, kind = draw.choice(((load.points, "CREDIT"), (load.points, "DEBIT"), (load.budgeted, "CREDIT")))
        amount = Decimal(draw.randint(1, 50_000)) / 100
        body = {
            "program_id": str(program),
            "asset_id": str(asset),
            "type": kind,
            "amount": str(amount),
            "description": "Drill",
            "allow_negative": kind == "DEBIT",
            "idempotency_key": f"{number}-{turn}",
        }
        await load.client.post_once(f"/participants/{holder}/balances/adjust", body)
        load.credit(holder, asset, amount if kind == "CREDIT" else -amount)
        if asset == load.budgeted:
            load.credit(program, asset, -amount)
        load.adjusts += 1


async def _watch(platform: Platform, load: Load, say: Say) -> None:
    while not load.is_over:
        progress = await progress_of(platform, *load.programs)
        if progress is not None:
            (load.has_room.clear if progress.waiting > BACKLOG_EVENTS else load.has_room.set)()
            say(f"{load.adjusts} adjusts, {progress.done} of {progress.accepted} events processed")
        await asyncio.sleep(0.1)
    load.has_room.set()


async def _check(platform: Platform, load: Load) -> None:
    for program in load.programs:
        if failed := await failures(platform, program):
            raise Broken(f"{len(failed)} events did not end COMPLETED: {'; '.join(failed[:3])}")
    wanted = dict(load.totals)
    for program in load.programs:
        wanted[program, load.budgeted] = wanted.get((program, load.budgeted), Decimal(0)) + FUNDS
    found = await balances(platform)
    wrong = {key: (found.get(key), total) for key, total in wanted.items() if found.get(key, Decimal(0)) != total}
    if wrong:
        raise Broken(f"{len(wrong)} balances are wrong, such as (found, wanted): {next(iter(wrong.items()))}")
    await prove_ledger(platform)


def _repetitions(platform: Platform) -> Counter[str]:
    """How often a request, a drain or a batch was repeated so far, as the logs tell."""
    worker = platform.worker.output()
    return Counter(
        request=platform.api.output().count('"request repeated"'),
        drain=worker.count("Completing activity as failed"),
        batch=worker.count("halving it"),
    )


DRILL = Drill(
    "contention",
    "Gifts in both directions, two programs, wallets and direct operations on twenty holders at full load",
    (Case("contention", "events and direct operations on the same few holders", run),),
)
