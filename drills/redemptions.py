"""Workers killed in the middle of two-step redemptions: each ends as it was ordered, once, and no value stays held."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import cycle
from typing import Any, Literal
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import dict_row
from temporalio.client import Client as TemporalClient
from temporalio.service import RPCError

from drills.audit import prove_ledger
from drills.case import Broken, Case, Drill, Finding, Say, Sizes
from drills.client import Client, client_of
from drills.platform import Platform
from tests.redemption_invariants import assert_redemption_invariants
from workflows import redemption
from workflows.converter import DATA_CONVERTER

CLIENTS = 6
PARTICIPANTS = 12
FUNDS = 10_000
AMOUNT = Decimal(10)
PART = Decimal(4)
AT_PASS = 3
GIVE_UP_S = 180.0

POINTS = (
    "redemption.reserved",
    "redemption.confirmed",
    "redemption.canceled",
    "redemption.expired",
    "redemption.reversed",
    "redemption.committed",
)

Ending = Literal["confirm", "confirm a part", "cancel", "time out", "reverse"]
ENDINGS: tuple[Ending, ...] = ("confirm", "confirm a part", "cancel", "time out", "reverse")
STATUS = {
    "confirm": ("COMPLETED", AMOUNT),
    "confirm a part": ("COMPLETED", PART),
    "cancel": ("CANCELED", AMOUNT),
    "time out": ("EXPIRED", AMOUNT),
    "reverse": ("FULLY_REVERSED", AMOUNT),
}

_STATES = """
select idempotency_key, status, amount from redemption where organization_id = %s and program_id = %s
"""

_HELD = """
select count(*) as n from hold where organization_id = %s and program_id = %s and status = 'ACTIVE'
"""


@dataclass(frozen=True, slots=True)
class _Shop:
    """Who redeems what."""

    program: str
    assets: tuple[str, ...]
    participants: tuple[str, ...]


async def kill_at(point: str, platform: Platform, sizes: Sizes, say: Say) -> Finding:
    """Kill the worker at `point`, start it again at once; the client repeats what was not answered."""
    await platform.provide(worker_faults=f"{point}=kill@{AT_PASS}")
    plan = dict(zip((f"redemption-{n}" for n in range(sizes.redemptions)), cycle(ENDINGS), strict=False))
    async with client_of(platform) as client, _temporal(platform) as temporal:
        shop = await _open_shop(client)
        async with platform.supervised(platform.worker) as restarts:
            say("reserving, confirming, canceling, timing out, reversing")
            todo = iter(plan.items())
            watch = asyncio.create_task(_strike(restarts))
            async with asyncio.TaskGroup() as group:
                for number in range(CLIENTS):
                    group.create_task(_redeem_some(client, temporal, shop, todo, number))
            done_at = time.monotonic()
        if len(restarts) != 1:
            watch.cancel()
            raise Broken(f"{platform.worker.name} died {len(restarts)} times instead of once")
        killed_at = await watch
    say("comparing")
    await _prove(platform, shop, plan)
    return Finding(len(plan), 1, done_at - killed_at, f"{client.lost} calls lost, {client.unavailable} times 503")


async def _strike(restarts: list[str]) -> float:
    """The instant at which the worker was found dead."""
    while True:
        if restarts:
            return time.monotonic()
        await asyncio.sleep(0.05)


async def _open_shop(client: Client) -> _Shop:
    run = uuid4().hex[:8]
    program = (await client.post("/programs", {"name": f"Redemptions {run}"}))["id"]
    assets = []
    for mode in ("SIMPLE", "LOT"):
        asset = {
            "program_id": program,
            "name": mode,
            "symbol": f"{mode}{run}".upper(),
            "inventory_mode": mode,
            "issuance_policy": "UNLIMITED",
            "scale": 2,
        }
        assets.append((await client.post("/assets", asset))["id"])
    participants = []
    for number in range(PARTICIPANTS):
        participants.append((await client.post("/participants", {"external_id": f"{run}-{number}"}))["id"])
        for asset_id in assets:
            credit = {"program_id": program, "asset_id": asset_id, "type": "CREDIT", "amount": str(FUNDS)}
            path = f"/participants/{participants[-1]}/balances/adjust"
            await client.post(path, {**credit, "description": "Funds", "idempotency_key": f"{number}-{asset_id}"})
    return _Shop(program, tuple(assets), tuple(participants))


async def _redeem_some(client: Client, temporal: TemporalClient, shop: _Shop, todo: Any, number: int) -> None:
    for turn, (key, ending) in enumerate(todo):
        participant = shop.participants[(number + turn * CLIENTS) % len(shop.participants)]
        body = {
            "program_id": shop.program,
            "asset_id": shop.assets[turn % len(shop.assets)],
            "amount": str(AMOUNT),
            "description": "Drill",
            "requires_confirmation": True,
            "idempotency_key": key,
        }
        made = (await client.post(f"/participants/{participant}/redemptions", body))["id"]
        await _end(client, temporal, made, ending, key)


async def _end(client: Client, temporal: TemporalClient, made: str, ending: Ending, key: str) -> None:
    if ending == "time out":
        await _time_out(client, temporal, made)
    elif ending == "cancel":
        await client.post(f"/redemptions/{made}/cancel", {"reason": "Drill"})
    else:
        await client.post(f"/redemptions/{made}/confirm", {"amount": str(PART)} if ending == "confirm a part" else {})
    if ending == "reverse":
        await client.post(f"/redemptions/{made}/reverse", {"reason": "Drill", "idempotency_key": key})


async def _time_out(client: Client, temporal: TemporalClient, made: str) -> None:
    """Order it as an operator does, and see that it happens."""
    handle = temporal.get_workflow_handle(redemption.workflow_id(UUID(made)))
    deadline = time.monotonic() + GIVE_UP_S
    await handle.signal("expire_now")
    while (await client.get(f"/redemptions/{made}"))["status"] == "PENDING":
        if time.monotonic() > deadline:
            raise Broken(f"redemption {made} was not timed out within {GIVE_UP_S:.0f} s")
        await asyncio.sleep(0.1)


async def _prove(platform: Platform, shop: _Shop, plan: dict[str, Ending]) -> None:
    """Every redemption is there once and as it was ordered, nothing is held, everything agrees. Raises Broken."""
    async with await psycopg.AsyncConnection.connect(platform.owner_url, autocommit=True) as connection:
        connection.row_factory = dict_row  # type: ignore[assignment]
        rows: Any = await (await connection.execute(_STATES, (platform.organization_id, shop.program))).fetchall()
        found = Counter((row["idempotency_key"], row["status"], row["amount"]) for row in rows)
        wanted = Counter((key, *STATUS[ending]) for key, ending in plan.items())
        if found != wanted:
            raise Broken(f"redemptions differ: found {found - wanted}, wanted {wanted - found}")
        held: Any = await (await connection.execute(_HELD, (platform.organization_id, shop.program))).fetchone()
        if held["n"]:
            raise Broken(f"{held['n']} holds are still active")
        try:
            await assert_redemption_invariants(connection, platform.organization_id)
        except AssertionError as error:
            raise Broken(f"redemptions do not agree with the ledger: {error}") from error
    await prove_ledger(platform)


@asynccontextmanager
async def _temporal(platform: Platform) -> AsyncIterator[TemporalClient]:
    try:
        yield await TemporalClient.connect(platform.temporal_address, data_converter=DATA_CONVERTER)
    except RPCError as error:
        raise Broken(f"Temporal refused an operator's order: {error}") from error


DRILL = Drill(
    "redemptions",
    "Kill the worker between the steps of two-step redemptions",
    tuple(Case(f"kill {point}", f"kill -9 at {point}", partial(kill_at, point)) for point in POINTS),
)
