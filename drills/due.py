"""What time does, with the worker killed or hanging in the middle of it: every end happens once, and none too early.

Rules make holds with an end (value reserved, value credited into HELD) and lots that mature, that expire and that do
both; the API makes holds with an end, each with a workflow of its own. All of it falls due at about the same time, and
then the worker is struck.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from itertools import count
from random import Random
from typing import Any
from uuid import UUID

from temporalio.client import Client as TemporalClient

from drills.audit import balances, failures, prove_ledger, read_rows, settled
from drills.case import Broken, Case, Drill, Finding, Say, Sizes
from drills.client import Client, client_of
from drills.platform import Platform
from workflows.upkeep import UPKEEP_ID

PARTICIPANTS = 40
OWN_HOLDS = 24
EVENTS_PER_CALL = 60
SPREAD_S = 2.0
EXPIRY_AFTER_MATURITY = timedelta(seconds=1)
POLL_S = 0.2
STRIKE_LIMIT_S = 120.0
RECOVERY_LIMIT_S = 180.0
# Steps that end holds (15 s, a hold's own 30 s) and that book lots (20 s) count as lost before such a stall is over:
# another attempt begins while the first one hangs.
STALL_FURTHER_S = 20.0

_runs = count(1)

_LEFT = """
select (select count(*) from hold where organization_id = %(organization_id)s and program_id = %(program_id)s
            and status = 'ACTIVE')
     + (select count(*) from lot where organization_id = %(organization_id)s and program_id = %(program_id)s
            and (status = 'DEFERRED' or (status = 'AVAILABLE' and remaining > 0 and expires_at is not null))) as n
"""

# What became of each hold, and each entry that changed it.
_HOLDS = """
select h.amount, h.expires_at as due_at, h.status, h.remaining, h.carrier,
       array_agg(e.action_type order by e.sequence) as actions, min(e.created_at) as done_at,
       bool_and(e.event_id is null and e.rule_id is null and e.api_key_id is null) as is_by_time
from hold h
left join hold_change c on c.organization_id = h.organization_id and c.hold_id = h.id
left join journal_entry e on e.organization_id = c.organization_id and e.id = c.entry_id
where h.organization_id = %(organization_id)s and h.program_id = %(program_id)s
group by h.organization_id, h.id
"""

# The same for lots that mature or expire; `dues` and `done` are in the order of the entries.
_LOTS = """
select l.amount, l.status, l.remaining, array_agg(e.action_type order by e.sequence) as actions,
       array_agg(case e.action_type when 'MATURITY' then l.matures_at else l.expires_at end
                 order by e.sequence) as dues,
       array_agg(e.created_at order by e.sequence) as done,
       bool_and(e.event_id is null and e.rule_id is null and e.api_key_id is null) as is_by_time
from lot l
left join lot_change c on c.organization_id = l.organization_id and c.lot_id = l.id
left join journal_entry e on e.organization_id = c.organization_id and e.id = c.entry_id
where l.organization_id = %(organization_id)s and l.program_id = %(program_id)s and l.asset_id = %(miles)s
group by l.organization_id, l.id
"""

_BY_TIME = """
select action_type, count(*) as n from journal_entry
where organization_id = %(organization_id)s and program_id = %(program_id)s and event_id is null
  and api_key_id is null group by 1
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where it happens: points are a SIMPLE asset, vouchers and miles have lots."""

    program_id: UUID
    points: UUID
    vouchers: UUID
    miles: UUID
    prefix: str


@dataclass(frozen=True, slots=True)
class Promise:
    """Value of a holder that something happens to at `until`: because of a rule's `kind`, or a hold by API call."""

    holder: str
    kind: str
    amount: int
    until: datetime


@dataclass(frozen=True, slots=True)
class Outcome:
    """What must become of it: the asset, what the holder has of it then, and which entries time makes of it."""

    asset: str
    left: int
    actions: tuple[str, ...]


_OUTCOMES: dict[str, Callable[[int], Outcome]] = {
    "authorize": lambda amount: Outcome("points", amount, ("RELEASE",)),
    "authorize lots": lambda amount: Outcome("vouchers", amount, ("RELEASE",)),
    "reserve": lambda amount: Outcome("points", amount, ("RELEASE",)),
    "reserve lots": lambda amount: Outcome("vouchers", amount, ("RELEASE",)),
    "mature": lambda amount: Outcome("miles", amount, ("MATURITY",)),
    "expire": lambda amount: Outcome("miles", 0, ("EXPIRY",)),
    "mature and expire": lambda amount: Outcome("miles", 0, ("MATURITY", "EXPIRY")),
    "own": lambda amount: Outcome("points", amount, ("RELEASE",)),
    "own, forfeited": lambda amount: Outcome("points", 0, ("FORFEIT",)),
}
"""By kind; the last two are made by API call and have a workflow each."""

RULES = tuple(kind for kind in _OUTCOMES if not kind.startswith("own"))


async def kill_at(point: str, platform: Platform, sizes: Sizes, say: Say) -> Finding:
    """Kill the worker at `point`, start it again at once."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(client_of(platform))
        place, promises = await _promise(platform, client, sizes, say)
        await platform.provide(worker_faults=f"{point}=kill")
        restarts = await stack.enter_async_context(platform.supervised(platform.worker))
        struck_at = await _struck(platform, lambda: bool(restarts), point, promises, say)
        say("killed; waiting until nothing is left")
        recovered = await _all_done(platform, place) - struck_at
    if len(restarts) != 1:
        raise Broken(f"the worker died {len(restarts)} times instead of once")
    return await prove(platform, place, promises, recovered, say)


async def stall_at(point: str, platform: Platform, sizes: Sizes, say: Say) -> Finding:
    """Let the worker hang at `point` for longer than its heartbeat, while a second one goes on."""
    stall_s = sizes.stall_s + STALL_FURTHER_S
    async with client_of(platform) as client:
        place, promises = await _promise(platform, client, sizes, say)
    await platform.provide(worker_faults=f"{point}=stall:{stall_s}")
    struck_at = await _struck(platform, lambda: platform.worker.has_reached(point), point, promises, say)
    await platform.second_worker.start()
    say("hanging; waiting until nothing is left")
    recovered = await _all_done(platform, place) - struck_at
    say("waiting for what the first attempt does when it comes back")
    await asyncio.sleep(max(struck_at + stall_s + 3 - time.monotonic(), 0))
    return await prove(platform, place, promises, recovered, say)


async def _promise(platform: Platform, client: Client, sizes: Sizes, say: Say) -> tuple[Place, list[Promise]]:
    """Make everything that falls due, in time before it does."""
    await platform.provide()
    place = await _make_place(client)
    draw = Random(1)
    starts_at = datetime.now(UTC) + timedelta(seconds=sizes.due_in_s)

    def promise(number: int, kind: str) -> Promise:
        until = starts_at + timedelta(seconds=SPREAD_S * draw.random())
        return Promise(f"{place.prefix}p{number % PARTICIPANTS}", kind, draw.randint(1, 400), until)

    by_rules = [promise(number, RULES[number % len(RULES)]) for number in range(sizes.due_events)]
    own = [promise(number, ("own", "own, forfeited")[number % 2]) for number in range(OWN_HOLDS)]
    say("sending events")
    for start in range(0, len(by_rules), EVENTS_PER_CALL):
        numbered = list(enumerate(by_rules))[start : start + EVENTS_PER_CALL]
        answer = await client.post("/events/batch", {"events": [_event(place, *one) for one in numbered]})
        if answer["error_count"]:
            raise Broken(f"events were refused: {answer}")
    for number, one in enumerate(own):
        await _hold(client, place, number, one)
    await settled(platform, place.program_id)
    if failed := await failures(platform, place.program_id):
        raise Broken(f"{len(failed)} events did not end COMPLETED: {'; '.join(failed[:3])}")
    return place, [*by_rules, *own]


async def _make_place(client: Client) -> Place:
    run = next(_runs)
    program_id = (await client.post("/programs", {"name": f"Drill of time {run}"}))["id"]
    assets = {}
    for name, inventory_mode in (("points", "SIMPLE"), ("vouchers", "LOT"), ("miles", "LOT")):
        asset = {
            "program_id": program_id,
            "name": name,
            "symbol": f"{name[:4]}{run}T".upper(),
            "inventory_mode": inventory_mode,
            "issuance_policy": "UNLIMITED",
            "scale": 2,
        }
        assets[name] = (await client.post("/assets", asset))["id"]
    for order, kind in enumerate(RULES, start=1):
        rule = {"program_id": program_id, "name": kind, "order": order, "condition": f'event.type == "{kind}"'}
        await client.post("/rules", {**rule, "actions": _actions(kind, assets)})
    return Place(UUID(program_id), **{name: UUID(id) for name, id in assets.items()}, prefix=f"due{run}-")


def _actions(kind: str, assets: dict[str, str]) -> list[dict[str, Any]]:
    held = assets["vouchers" if kind.endswith("lots") else "points"]

    def move(action: str, asset: str, **more: Any) -> dict[str, Any]:
        return {"type": action, "asset_id": asset, "amount": "event.amount", **more}

    if kind.startswith("authorize"):
        return [move("CREDIT", held, bucket="HELD", hold_until="event.until")]
    if kind.startswith("reserve"):
        return [move("CREDIT", held), move("HOLD", held, hold_until="event.until")]
    terms = {
        "mature": {"matures_at": "event.until"},
        "expire": {"expires_at": "event.until"},
        "mature and expire": {"matures_at": "event.until", "expires_at": "event.later"},
    }
    return [move("CREDIT", assets["miles"], **terms[kind])]


def _event(place: Place, number: int, promise: Promise) -> dict[str, Any]:
    later = promise.until + EXPIRY_AFTER_MATURITY
    return {
        "program_id": str(place.program_id),
        "external_id": promise.holder,
        "idempotency_key": f"promise-{number}",
        "event_timestamp": "2026-03-01T12:00:00Z",
        "event_data": {
            "type": promise.kind,
            "amount": promise.amount,
            "until": promise.until.isoformat(),
            "later": later.isoformat(),
        },
    }


async def _hold(client: Client, place: Place, number: int, promise: Promise) -> None:
    """Credit a holder and hold it until then, by API call."""
    holder = (await client.post("/participants", {"external_id": promise.holder}))["id"]
    movement = {
        "program_id": str(place.program_id),
        "asset_id": str(place.points),
        "amount": str(promise.amount),
        "description": "Drill",
    }
    path = f"/participants/{holder}/balances"
    await client.post(f"{path}/adjust", {**movement, "type": "CREDIT", "idempotency_key": f"own-{number}"})
    end = {
        "expires_at": promise.until.isoformat(),
        "on_expiry": "FORFEIT" if promise.kind.endswith("forfeited") else "RELEASE",
    }
    await client.post(f"{path}/hold", {**movement, **end, "idempotency_key": f"own-{number}"})


async def _struck(
    platform: Platform, has_struck: Callable[[], bool], point: str, promises: Sequence[Promise], say: Say
) -> float:
    """Wait for the fault to strike when all is due; the instant of it on the monotonic clock. Raises Broken."""
    last = max(promise.until for promise in promises) + EXPIRY_AFTER_MATURITY
    say("waiting until it is due")
    deadline = time.monotonic() + STRIKE_LIMIT_S
    is_triggered = False
    while not has_struck():
        if not is_triggered and datetime.now(UTC) > last:
            # By itself it begins within half a minute. After this nobody helps.
            temporal = await TemporalClient.connect(platform.temporal_address)
            await temporal.get_schedule_handle(UPKEEP_ID).trigger()
            is_triggered = True
        if time.monotonic() > deadline:
            raise Broken(f"the fault point {point} was not reached within {STRIKE_LIMIT_S:.0f} s")
        await asyncio.sleep(0.02)
    return time.monotonic()


async def _all_done(platform: Platform, place: Place) -> float:
    """Wait until no hold is active and no lot is due; the instant of it on the monotonic clock. Raises Broken."""
    deadline = time.monotonic() + RECOVERY_LIMIT_S
    while True:
        (row,) = await read_rows(platform, _LEFT, _params(platform, place))
        if row["n"] == 0:
            return time.monotonic()
        if time.monotonic() > deadline:
            raise Broken(f"after {RECOVERY_LIMIT_S:.0f} s {row['n']} holds and lots are still due")
        await asyncio.sleep(POLL_S)


async def prove(platform: Platform, place: Place, promises: Sequence[Promise], recovered: float, say: Say) -> Finding:
    """Each promise was kept once, by an entry of its own that nobody asked for, and not before its time."""
    say("comparing")
    params = _params(platform, place)
    holds = await read_rows(platform, _HOLDS, params)
    lots = await read_rows(platform, _LOTS, params)
    ends = [(row["actions"], [row["due_at"]], [row["done_at"]], row["is_by_time"]) for row in holds]
    ends += [(row["actions"], row["dues"], row["done"], row["is_by_time"]) for row in lots]
    for actions, dues, done, is_by_time in ends:
        if len(done) != len(dues) or None in done or not is_by_time:
            raise Broken(f"something became {actions} instead of what time makes of it")
        if any(at < due for at, due in zip(done, dues, strict=True)):
            raise Broken(f"{actions} came at {done}, before {dues}")
    _same("the holds", Counter(map(_hold_seen, holds)), Counter(_wanted(promises, is_hold=True)))
    _same("the lots", Counter(map(_lot_seen, lots)), Counter(_wanted(promises, is_hold=False)))
    found = {row["action_type"]: row["n"] for row in await read_rows(platform, _BY_TIME, params)}
    _same("the entries", Counter(found), Counter(action for p in promises for action in _outcome(p).actions))
    await _check_balances(platform, place, promises)
    await prove_ledger(platform)
    latest = max((at - due).total_seconds() for _, dues, done, _ in ends for at, due in zip(done, dues, strict=True))
    return Finding(len(promises), 1, recovered, f"{len(ends)} holds and lots, the last {latest:.0f} s after its time")


def _wanted(promises: Sequence[Promise], *, is_hold: bool) -> list[tuple[Any, ...]]:
    """The same as `_hold_seen` and `_lot_seen`, of what was promised."""
    wanted: list[tuple[Any, ...]] = []
    for promise in promises:
        outcome = _outcome(promise)
        amount = Decimal(promise.amount)
        if is_hold and outcome.asset != "miles":
            carrier = "WORKFLOW" if promise.kind.startswith("own") else "PROGRAM"
            wanted.append((amount, carrier, "EXPIRED", Decimal(0), promise.until, outcome.actions))
        if not is_hold and outcome.asset == "miles":
            status = "AVAILABLE" if outcome.left else "EXPIRED"
            wanted.append((amount, status, Decimal(outcome.left), outcome.actions))
    return wanted


def _hold_seen(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["amount"], row["carrier"], row["status"], row["remaining"], row["due_at"], tuple(row["actions"])


def _lot_seen(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["amount"], row["status"], row["remaining"], tuple(row["actions"])


async def _check_balances(platform: Platform, place: Place, promises: Sequence[Promise]) -> None:
    names = {
        row["id"]: row["external_id"]
        for row in await read_rows(
            platform,
            "select id, external_id from participant where organization_id = %(organization_id)s",
            _params(platform, place),
        )
    }
    assets = {place.points: "points", place.vouchers: "vouchers", place.miles: "miles"}
    found = {
        (names[holder], assets[asset]): total
        for (holder, asset), total in (await balances(platform)).items()
        if asset in assets and total
    }
    wanted: Counter[tuple[str, str]] = Counter()
    for promise in promises:
        outcome = _outcome(promise)
        wanted[promise.holder, outcome.asset] += outcome.left
    _same("the balances", found, {key: Decimal(total) for key, total in wanted.items() if total})


def _outcome(promise: Promise) -> Outcome:
    return _OUTCOMES[promise.kind](promise.amount)


def _same(what: str, found: Any, wanted: Any) -> None:
    if found == wanted:
        return
    keys = [key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)]
    example = "; ".join(f"{key}: found {found.get(key)}, wanted {wanted.get(key)}" for key in keys[:3])
    raise Broken(f"{what} differ in {len(keys)} places: {example}")


def _params(platform: Platform, place: Place) -> dict[str, Any]:
    return {"organization_id": platform.organization_id, "program_id": place.program_id, "miles": place.miles}


KILLS = (
    "hold_ends.written[PROGRAM]",
    "hold_ends.committed[PROGRAM]",
    "hold_ends.written[WORKFLOW]",
    "hold_ends.committed[WORKFLOW]",
    "due_lots.written[MATURITY]",
    "due_lots.committed[EXPIRY]",
)
STALLS = (
    "hold_ends.written[PROGRAM]",
    "hold_ends.committed[PROGRAM]",
    "hold_ends.written[WORKFLOW]",
    "due_lots.committed[MATURITY]",
    "due_lots.written[EXPIRY]",
)

DRILL = Drill(
    "due",
    "Ends of holds, maturities and expiries: kill the worker in them; stall it there while another attempt overlaps",
    (
        *(Case(f"kill {point}", f"kill -9 at {point}", partial(kill_at, point)) for point in KILLS),
        *(Case(f"stall {point}", f"hang at {point}", partial(stall_at, point)) for point in STALLS),
    ),
)
