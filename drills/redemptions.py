"""Workers killed in the middle of two-step redemptions, and Temporal's whole state thrown away while they wait.

Each redemption ends as it was ordered, once, and no value stays held.
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Mapping
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
from temporalio.service import RPCError, RPCStatusCode

from drills.audit import prove_ledger, read_rows
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
LOOKS_AT_ONCE = 20
POLL_S = 0.2
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
WHILE_LOST: tuple[Ending, ...] = ("confirm", "cancel", "time out")
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

_BY_KEY = """
select idempotency_key, id from redemption where organization_id = %(organization_id)s and program_id = %(program_id)s
"""

_BRING_FORWARD = """
with due as (
    update redemption set expires_at = clock_timestamp() + make_interval(secs => %s)
    where organization_id = %s and id = any(%s) returning organization_id, id, expires_at)
update hold set expires_at = due.expires_at from due
where hold.organization_id = due.organization_id and hold.id = due.id
"""

_PENDING = """
select count(*) as n from redemption
where organization_id = %(organization_id)s and program_id = %(program_id)s and status = 'PENDING'
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


async def lose_temporal(platform: Platform, sizes: Sizes, say: Say) -> Finding:
    """Delete Temporal's database while redemptions wait, start it empty, run `scrip reconcile`, end them all."""
    await platform.provide()
    plan = dict(zip((f"redemption-{n}" for n in range(sizes.pending_redemptions)), cycle(WHILE_LOST), strict=False))
    async with client_of(platform) as client:
        shop = await _open_shop(client)
        say("reserving")
        await _at_once(_reserve(client, shop, number, key) for number, key in enumerate(plan))
        ids = await _ids(platform, shop)
        say("stopping Temporal")
        await platform.temporal.stop()
        for file in platform.temporal_files:
            file.unlink()
        await _bring_forward(platform, [ids[key] for key in plan if plan[key] == "time out"], sizes.expiry_s)
        say("starting Temporal with nothing")
        await platform.temporal.start()
        started_at = time.monotonic()
        say("reconciling")
        await _reconcile(platform)
        async with _temporal(platform) as temporal:
            found = await _workflows(temporal, ids.values())
            if found["none"]:
                raise Broken(f"{found['none']} of {len(ids)} redemptions have no workflow after `scrip reconcile`")
            recovered = time.monotonic() - started_at
            say("confirming, canceling, letting expire")
            await _at_once(_end(client, temporal, str(ids[key]), plan[key], key) for key in _called(plan))
            await _expired(platform, shop, sizes.expiry_s + GIVE_UP_S)
            await _all_closed(temporal, ids.values())
    say("comparing")
    await _prove(platform, shop, plan)
    return Finding(len(plan), 1, recovered, f"{client.unavailable} times 503, {_in_words(found)} when it was back")


def _called(plan: Mapping[str, Ending]) -> list[str]:
    """Those that a client ends; the others are left to the time."""
    return [key for key, ending in plan.items() if ending != "time out"]


async def _at_once(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it, a few at a time."""
    todo = iter(work)

    async def some() -> None:
        for one in todo:
            await one

    async with asyncio.TaskGroup() as group:
        for _ in range(LOOKS_AT_ONCE):
            group.create_task(some())


async def _reserve(client: Client, shop: _Shop, number: int, key: str) -> None:
    await client.post(*_call(shop, number, number, key))


async def _ids(platform: Platform, shop: _Shop) -> dict[str, UUID]:
    rows = await read_rows(platform, _BY_KEY, _params(platform, shop))
    return {row["idempotency_key"]: row["id"] for row in rows}


def _params(platform: Platform, shop: _Shop) -> dict[str, Any]:
    return {"organization_id": platform.organization_id, "program_id": shop.program}


async def _bring_forward(platform: Platform, redemption_ids: list[UUID], expiry_s: float) -> None:
    """Let these expire so many seconds from now; callers can't ask for less than a minute."""
    async with await psycopg.AsyncConnection.connect(platform.owner_url, autocommit=True) as connection:
        await connection.execute(_BRING_FORWARD, (expiry_s, platform.organization_id, redemption_ids))


async def _reconcile(platform: Platform) -> None:
    """Run `scrip reconcile`. Raises Broken where it fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "cli",
        "reconcile",
        env=platform.worker.child.env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise Broken(f"`scrip reconcile` ended with {process.returncode}: {output.decode(errors='replace')[-500:]}")


async def _workflows(temporal: TemporalClient, redemption_ids: Iterable[UUID]) -> Counter[str]:
    """How many of these redemptions have a workflow that runs, or one that ended how, or none."""
    seen: Counter[str] = Counter()

    async def look(redemption_id: UUID) -> None:
        try:
            run = await temporal.get_workflow_handle(redemption.workflow_id(redemption_id)).describe()
        except RPCError as error:
            if error.status != RPCStatusCode.NOT_FOUND:
                raise
            seen["none"] += 1
            return
        assert run.status is not None
        seen[run.status.name.lower()] += 1

    await _at_once(map(look, redemption_ids))
    return seen


async def _expired(platform: Platform, shop: _Shop, limit_s: float) -> None:
    """Wait until none is pending. Not through the API: whoever reads one that is overdue expires it."""
    deadline = time.monotonic() + limit_s
    while True:
        (row,) = await read_rows(platform, _PENDING, _params(platform, shop))
        if row["n"] == 0:
            return
        if time.monotonic() > deadline:
            raise Broken(f"after {limit_s:.0f} s {row['n']} redemptions are still pending")
        await asyncio.sleep(POLL_S)


async def _all_closed(temporal: TemporalClient, redemption_ids: Collection[UUID]) -> None:
    """Wait until every workflow has ended by itself. Raises Broken."""
    deadline = time.monotonic() + GIVE_UP_S
    while (found := await _workflows(temporal, redemption_ids))["completed"] < len(redemption_ids):
        if time.monotonic() > deadline:
            raise Broken(f"workflows have not ended: {_in_words(found)}")
        await asyncio.sleep(POLL_S)


def _in_words(found: Counter[str]) -> str:
    return ", ".join(f"{n} workflows {status}" for status, n in sorted(found.items()) if n)


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
        made = (await client.post(*_call(shop, number + turn * CLIENTS, turn, key)))["id"]
        await _end(client, temporal, made, ending, key)


def _call(shop: _Shop, participant: int, asset: int, key: str) -> tuple[str, dict[str, Any]]:
    """Path and body of a call that reserves a redemption."""
    body = {
        "program_id": shop.program,
        "asset_id": shop.assets[asset % len(shop.assets)],
        "amount": str(AMOUNT),
        "description": "Drill",
        "requires_confirmation": True,
        "idempotency_key": key,
    }
    return f"/participants/{shop.participants[participant % len(shop.participants)]}/redemptions", body


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
    "Kill the worker between the steps of two-step redemptions; delete Temporal's database while they wait",
    (
        *(Case(f"kill {point}", f"kill -9 at {point}", partial(kill_at, point)) for point in POINTS),
        Case("redemptions without Temporal", "delete Temporal's database while redemptions wait", lose_temporal),
    ),
)
