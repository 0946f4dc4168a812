"""The proof after a drill: what the database holds is exactly what must have come of the events that were accepted."""

import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, LiteralString
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from drills.case import Broken
from drills.platform import Platform
from drills.workload import Entry, Expected, Program, Sent, State, expected
from embedded.child import PACKAGE_ROOT
from tests.ledger_invariants import assert_ledger_invariants

SETTLE_LIMIT_S = 300.0
POLL_S = 0.2

_EVENTS = """
select idempotency_key, external_id, status, error_message, attempts, starts, processed_at is not null as is_processed
from event where organization_id = %s and program_id = %s order by seq
"""

_ENTRIES = """
select v.idempotency_key, v.external_id as who, r.name as rule, e.action_type, h.external_id as holder, p.amount
from journal_entry e
left join event v on v.organization_id = e.organization_id and v.id = e.event_id
left join rule r on r.organization_id = e.organization_id and r.id = e.rule_id
join posting p on p.organization_id = e.organization_id and p.entry_id = e.id
join account a on a.organization_id = p.organization_id and a.id = p.account_id and a.entity_id is not null
left join participant h on h.organization_id = a.organization_id and h.id = a.entity_id
where e.organization_id = %s and e.program_id = %s
order by e.sequence, p.ordinal
"""

_STATES = """
select p.external_id as who, c.value as spend, t.tag is not null as is_gold, l.value as last
from participant p
left join counter c on c.organization_id = p.organization_id and c.entity_id = p.id and c.key = 'spend'
left join tag t on t.organization_id = p.organization_id and t.entity_id = p.id and t.tag = 'gold'
left join attribute l on l.organization_id = p.organization_id and l.entity_id = p.id and l.key = 'last'
where p.organization_id = %s and p.external_id like %s
"""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a program's events are."""

    accepted: int
    waiting: int

    @property
    def done(self) -> int:
        """Events that ended."""
        return self.accepted - self.waiting


async def progress_of(platform: Platform, *program_ids: UUID) -> Progress | None:
    """How many events there are and how many wait; None while Postgres is out of reach."""
    try:
        async with await _connect(platform) as connection:
            cursor = await connection.execute(
                "select count(*), count(*) filter (where status not in ('COMPLETED', 'FAILED')) from event"
                " where organization_id = %s and program_id = any(%s)",
                (platform.organization_id, list(program_ids)),
            )
            row = await cursor.fetchone()
    except psycopg.OperationalError:
        return None
    assert row is not None
    return Progress(*row)


async def settled(platform: Platform, *program_ids: UUID, within_s: float = SETTLE_LIMIT_S) -> float:
    """Wait until no event of these programs waits; the instant of it on the monotonic clock. Raises Broken."""
    deadline = time.monotonic() + within_s
    while True:
        progress = await progress_of(platform, *program_ids)
        now = time.monotonic()
        if progress is not None and progress.waiting == 0:
            return now
        if now > deadline:
            raise Broken(f"after {within_s:.0f} s events still wait: {progress}")
        await asyncio.sleep(POLL_S)


async def moved_on(platform: Platform, program_id: UUID, done: int, *, after: float = 0.0) -> float:
    """Wait until `done` events of the program have ended, looked at after the instant `after`; the instant of it.

    Raises Broken after five minutes.
    """
    deadline = time.monotonic() + SETTLE_LIMIT_S
    while True:
        progress = await progress_of(platform, program_id)
        now = time.monotonic()
        if progress is not None and progress.done >= done and now > after:
            return now
        if now > deadline:
            raise Broken(f"only {progress} after {SETTLE_LIMIT_S:.0f} s, instead of {done} done")
        await asyncio.sleep(POLL_S)


async def prove(
    platform: Platform,
    program: Program,
    events: Sequence[Sent],
    *,
    refused: dict[str, str] | None = None,
    in_order_sent: bool = True,
) -> None:
    """Compare everything with what must have come of `events`, and check the whole ledger. Raises Broken.

    `refused` names the errors of events that must end FAILED for another reason than their rules. With `in_order_sent`
    each participant's events must have been accepted in the order in which `events` has them.
    """
    async with await _connect(platform) as connection:
        rows = await _rows(connection, _EVENTS, platform.organization_id, program.id)
        sent = {event.key: event for event in events}
        _same("the accepted keys", sorted(row["idempotency_key"] for row in rows), sorted(sent))
        accepted = [sent[row["idempotency_key"]] for row in rows]
        if in_order_sent:
            _same("the order of acceptance", _by_participant(accepted), _by_participant(events))
        wanted = expected(accepted, refused)
        _check_outcomes(rows, wanted)
        _check_entries(await _rows(connection, _ENTRIES, platform.organization_id, program.id), wanted)
        states = await _rows(connection, _STATES, platform.organization_id, f"{program.prefix}p%")
        _check_states(states, wanted)
    await prove_ledger(platform)


async def prove_ledger(platform: Platform) -> None:
    """Check the invariants of the organization's whole ledger, and `scrip verify` on it. Raises Broken."""
    async with await _connect(platform) as connection:
        try:
            await assert_ledger_invariants(connection, platform.organization_id)
        except AssertionError as error:
            raise Broken(f"the ledger is not sound: {error}") from error
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli", "verify", "--org", str(platform.organization_id)),
        cwd=PACKAGE_ROOT,
        env={**platform.api.child.env, "SCRIP_OWNER_DATABASE_URL": platform.owner_url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise Broken(f"scrip verify: {output.decode(errors='replace')}")


def _check_outcomes(rows: Sequence[dict[str, Any]], wanted: Expected) -> None:
    outcomes = {row["idempotency_key"]: (row["status"], row["error_message"]) for row in rows}
    _same("the outcomes", outcomes, wanted.outcomes)
    charged = {row["idempotency_key"]: row["attempts"] for row in rows if row["attempts"] != 1}
    if charged:
        raise Broken(f"events were charged for what was no fault of theirs; attempts by key: {_some(charged)}")
    if not all(row["is_processed"] for row in rows):
        raise Broken("an event ended without processed_at")


def _check_entries(rows: Sequence[dict[str, Any]], wanted: Expected) -> None:
    found: dict[str, list[Entry]] = defaultdict(list)
    for row in rows:
        found[row["who"]].append(
            Entry(row["idempotency_key"], row["rule"], row["action_type"], row["holder"], row["amount"])
        )
    for who in sorted(found.keys() | wanted.entries.keys()):
        _same(f"the journal entries of {who}", found.get(who, []), wanted.entries.get(who, []))


def _check_states(rows: Sequence[dict[str, Any]], wanted: Expected) -> None:
    for row in rows:
        found = State(row["spend"], row["is_gold"], row["last"])
        _same(f"the state of {row['who']}", found, wanted.states.get(row["who"], State()))
    missing = wanted.states.keys() - {row["who"] for row in rows}
    if missing:
        raise Broken(f"participants are missing: {_some(missing)}")


def _by_participant(events: Sequence[Sent]) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = defaultdict(list)
    for event in events:
        keys[event.who].append(event.key)
    return dict(keys)


def _same(what: str, found: Any, wanted: Any) -> None:
    if found == wanted:
        return
    raise Broken(f"{what} differ: {_difference(found, wanted)}")


def _difference(found: Any, wanted: Any) -> str:
    """The first few places where two values of one shape differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)]
        return "; ".join(f"{key}: found {_some(found.get(key))}, wanted {_some(wanted.get(key))}" for key in keys[:3])
    if isinstance(found, list) and isinstance(wanted, list):
        at = next(
            (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted))
        )
        return f"{len(found)} instead of {len(wanted)}; at {at}: {found[at : at + 2]} instead of {wanted[at : at + 2]}"
    return f"found {_some(found)}, wanted {_some(wanted)}"


def _some(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


async def deadlocks(platform: Platform) -> int:
    """How many deadlocks Postgres has broken in this database so far."""
    async with await _connect(platform) as connection:
        (row,) = await _rows(connection, "select deadlocks from pg_stat_database where datname = current_database()")
    return int(row["deadlocks"])


async def balances(platform: Platform) -> dict[tuple[UUID, UUID], Decimal]:
    """What every holder of the organization has, all buckets together, by (holder, asset): the sums of all postings."""
    query = """
        select a.entity_id, a.asset_id, sum(p.amount) as total from posting p
        join account a on a.organization_id = p.organization_id and a.id = p.account_id
        where p.organization_id = %s and a.entity_id is not null group by 1, 2"""
    async with await _connect(platform) as connection:
        rows = await _rows(connection, query, platform.organization_id)
    return {(row["entity_id"], row["asset_id"]): row["total"] for row in rows}


async def read_rows(platform: Platform, query: LiteralString, params: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a query, as the owner of the tables sees them."""
    async with await _connect(platform) as connection, connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query, params)
        return await cursor.fetchall()


async def failures(platform: Platform, program_id: UUID) -> list[str]:
    """The error messages of a program's events that did not end COMPLETED."""
    query = """
        select idempotency_key, status, error_message from event
        where organization_id = %s and program_id = %s and status <> 'COMPLETED'"""
    async with await _connect(platform) as connection:
        rows = await _rows(connection, query, platform.organization_id, program_id)
    return [f"{row['idempotency_key']} {row['status']}: {row['error_message']}" for row in rows]


async def _connect(platform: Platform) -> psycopg.AsyncConnection[Any]:
    """A connection as the owner of the tables, who sees every organization."""
    return await psycopg.AsyncConnection.connect(platform.owner_url, autocommit=True, connect_timeout=5)


async def _rows(connection: psycopg.AsyncConnection[Any], query: Any, *params: Any) -> list[dict[str, Any]]:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query, params)
        return await cursor.fetchall()
