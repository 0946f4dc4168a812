"""One batch of events in one transaction: lock, load, apply in memory, write in bulk.

The order of things is what keeps money right (docs/decisions/0004-batches.md): the program's advisory lock, so that two
attempts never overlap; the events in the order of acceptance; new participants; then the locks of everything the events
touch in the global order; then the state, read again under them. What expressions will touch is learnt by applying the
batch once on unlocked reads (the scout pass), only where rules have targets at all. Contract: rules-and-events.md 4, 7.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import DictRow

from db import json
from db.session import Database, Transaction
from domain import faults, limits
from domain.clock import format_timestamp
from domain.events.engine import AssetTerms, Outcome, QueuedEvent, Reference, World, apply_event
from domain.events.retries import RetryPolicy
from domain.events.world import Change, CounterState, Holder, history_operation, history_value
from domain.ids import new_id
from domain.ledger import journal
from domain.locks import lock_participants, lock_programs
from domain.rules.compiled import RuleSet, load_rule_set


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What one batch did. `entries` is the number of journal entries it wrote."""

    events: int = 0
    completed: int = 0
    failed: int = 0
    entries: int = 0


async def process_batch(
    database: Database,
    organization_id: UUID,
    program_id: UUID,
    limit: int,
    retries: RetryPolicy,
    poison: str | None = None,
    only: UUID | None = None,
    progress: Callable[[], None] = lambda: None,
) -> BatchResult:
    """Process up to `limit` due events of a program in one transaction; zero events when none is due.

    With `poison` the events are not applied but end FAILED with that message: it is what happens to the one event of a
    batch that cannot be processed at all. With `only` the batch is that event alone, and nothing when it isn't the next
    one any more: another attempt has taken it, or a wait has ended meanwhile. `progress` is called after each event.
    Raises what the database raises; then nothing of the batch has happened.
    """
    async with database.transaction(organization_id) as tx:
        await _take_lane(tx, program_id)
        program = await _program(tx, program_id)
        if program is None or program["processing_paused"]:
            return BatchResult()
        events = await _due_events(tx, program_id, limit if only is None else 1)
        if not events or (only is not None and events[0].id != only):
            return BatchResult()
        if poison is not None:
            await _write_events(tx, [Outcome(event, "FAILED", error=poison) for event in events], retries)
            return BatchResult(len(events), failed=len(events))
        rules = await load_rule_set(tx, program_id, program["rules_version"])
        world, outcomes = await _apply(tx, program, rules, events, progress)
        await faults.reach("batch.applied")
        await _write(tx, world, outcomes, retries)
        await faults.reach("batch.written")
    await faults.reach("batch.committed")
    return BatchResult(
        len(outcomes),
        sum(outcome.verdict == "COMPLETED" for outcome in outcomes),
        sum(_is_final_failure(outcome, retries) for outcome in outcomes),
        len(world.books.entries),
    )


@dataclass(frozen=True, slots=True)
class Start:
    """An event that is about to be tried, and how often it was begun, this time included."""

    event_id: UUID
    starts: int


async def mark_started(database: Database, organization_id: UUID, program_id: UUID) -> Start | None:
    """Commit that the program's next due event is about to be tried; None when none is due or the program is paused.

    The count is set back when the event's transaction commits, so it counts the times that a worker was lost over it.
    """
    async with database.transaction(organization_id) as tx:
        await _take_lane(tx, program_id)
        program = await _program(tx, program_id)
        if program is None or program["processing_paused"]:
            return None
        events = await _due_events(tx, program_id, 1)
        if not events:
            return None
        cursor = await tx.execute(
            "update event set starts = starts + 1 where organization_id = %s and id = %s returning starts",
            (organization_id, events[0].id),
        )
        row = await cursor.fetchone()
        assert row is not None
        return Start(events[0].id, row[0])


async def withdraw_start(database: Database, organization_id: UUID, event_id: UUID) -> None:
    """Take back a mark: the attempt failed for a reason that is not the event's, and no worker was lost."""
    async with database.transaction(organization_id) as tx:
        await tx.execute(
            "update event set starts = starts - 1 where organization_id = %s and id = %s and starts > 0",
            (organization_id, event_id),
        )


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a program's queue holds in store: `next_due_at` is None when nothing waits."""

    next_due_at: datetime | None
    is_paused: bool


async def outlook(database: Database, organization_id: UUID, program_id: UUID) -> Outlook:
    """When the program's next event falls due, now included, and whether it would be processed then."""
    async with database.transaction(organization_id) as tx:
        program = await _program(tx, program_id)
        if program is None or program["processing_paused"]:
            return Outlook(None, is_paused=program is not None)
        row = await (await tx.execute(_NEXT_DUE, (organization_id, program_id) * 2)).fetchone()
        assert row is not None
        return Outlook(tx.now if row[0] else row[1], is_paused=False)


# --- reading ---------------------------------------------------------------------------------------------------------

_NEXT_DUE = """
select exists (select from event where organization_id = %s and program_id = %s
               and status in ('RECEIVED', 'PENDING') and due_at is null),
       (select min(due_at) from event where organization_id = %s and program_id = %s
        and status in ('RECEIVED', 'PENDING') and due_at is not null)
"""

_EVENT_COLUMNS = """
id, participant_id, external_id, recipient_id, recipient_external_id, event_type, event_data, event_timestamp, depth,
attempts, request_id
"""

# Events that wait for their next attempt don't hold up others, so they come when they are due; a quarter of the batch
# is theirs, so that neither kind can starve the other.
_DUE = f"""
select * from (
    select {_EVENT_COLUMNS} from event
    where organization_id = %(organization_id)s and program_id = %(program_id)s
      and status in ('RECEIVED', 'PENDING') and due_at is not null and due_at <= %(now)s
    order by due_at, seq limit greatest(%(limit)s / 4, 1)
) waited
union all
select * from (
    select {_EVENT_COLUMNS} from event
    where organization_id = %(organization_id)s and program_id = %(program_id)s
      and status in ('RECEIVED', 'PENDING') and due_at is null
    order by seq limit %(limit)s
) fresh
limit %(limit)s
"""


async def _take_lane(tx: Transaction, program_id: UUID) -> None:
    """Wait until no other attempt works on this program; held to the end of the transaction."""
    await tx.execute("select pg_advisory_xact_lock(hashtextextended(%s, 0))", (str(program_id),))


async def _program(tx: Transaction, program_id: UUID) -> DictRow | None:
    return await tx.row(
        "select id, on_unknown_participant, rules_version, processing_paused from program"
        " where organization_id = %s and id = %s",
        (tx.organization_id, program_id),
    )


async def _due_events(tx: Transaction, program_id: UUID, limit: int) -> list[QueuedEvent]:
    params = {"organization_id": tx.organization_id, "program_id": program_id, "now": tx.now, "limit": limit}
    return [QueuedEvent(*row) for row in await (await tx.execute(_DUE, params)).fetchall()]


# --- locking, loading, applying --------------------------------------------------------------------------------------


class BatchTooWide(Exception):
    """The batch kept reaching for more participants; a smaller one is to be tried."""


async def _apply(
    tx: Transaction,
    program: DictRow,
    rules: RuleSet,
    events: Sequence[QueuedEvent],
    progress: Callable[[], None],
) -> tuple[World, list[Outcome]]:
    """Apply the events to a world whose every holder is locked, and return both; slow ones only as far as time went."""
    members = {reference for event in events for reference in _references(event)}
    references = set(members)
    scouting = rules.has_targets
    for _ in range(limits.BATCH_GROWTHS + scouting):
        await tx.execute("savepoint batch")
        world = await _load(tx, program, rules, references, members, locked=not scouting)
        outcomes = await _apply_in_order(world, rules, events, tx.now, progress)
        references = members | world.reached
        if not world.missing and not scouting and not _created_in_vain(world, references):
            return world, [outcome for outcome in outcomes if outcome is not None]
        # Rolling back to the savepoint lets go of the locks, so that another set can be locked in order.
        await tx.execute("rollback to savepoint batch")
        scouting = scouting and bool(world.missing)
    raise BatchTooWide(f"{len(events)} events")


async def _apply_in_order(
    world: World, rules: RuleSet, events: Sequence[QueuedEvent], now: datetime, progress: Callable[[], None]
) -> list[Outcome | None]:
    """Apply the events one after another; slow ones cut the batch short, and what is left waits for the next."""
    outcomes: list[Outcome | None] = []
    ends_at = time.monotonic() + limits.BATCH_CUT_MS / 1000
    for event in events:
        if outcomes and time.monotonic() > ends_at:
            break
        await faults.reach("event.applying", event.external_id)
        outcomes.append(apply_event(world, rules, event, now))
        progress()
    return outcomes


def _created_in_vain(world: World, references: set[Reference]) -> bool:
    """Whether somebody was made whom no event reaches after all: an event before changed what the rules do."""
    return any(Reference(external_id=world.participants[id].external_id) not in references for id in world.created)


def _references(event: QueuedEvent) -> Iterable[Reference]:
    if event.participant_id is not None:
        yield Reference(id=event.participant_id)
    elif event.external_id is not None:
        yield Reference(external_id=event.external_id)
    if event.recipient_id is not None:
        yield Reference(id=event.recipient_id)
    elif event.recipient_external_id is not None:
        yield Reference(external_id=event.recipient_external_id)


async def _load(
    tx: Transaction,
    program: DictRow,
    rules: RuleSet,
    references: set[Reference],
    members: set[Reference],
    *,
    locked: bool,
) -> World:
    """Everything the events may touch; with `locked`, under the locks of the global order.

    `members` are the participants and recipients of the events, who become members of the program; targets don't.
    """
    creates_unknown = program["on_unknown_participant"] == "CREATE"
    program_id: UUID = program["id"]
    external_ids = [r.external_id for r in references if r.external_id is not None]
    ids = {r.id for r in references if r.id is not None}
    created: set[UUID] = set()
    if external_ids:
        found, created = await _resolve_external_ids(tx, external_ids, create=creates_unknown)
        ids |= found | created
    assets = await _asset_terms(tx, program_id, rules.asset_ids)
    draws_on_wallet = any(asset.is_prefunded for asset in assets.values())
    if locked and (draws_on_wallet or rules.uses_program_state):
        await lock_programs(tx, [program_id])
    holders = await _participants(tx, ids, locked=locked)
    if locked:
        await faults.reach("batch.locked")
    joining = created | {h.id for h in holders.values() if _is_member(h, members)}
    await _enroll(tx, program_id, joining)
    program_holder = Holder("PROGRAM", program_id)
    await _load_state(tx, list(holders.values()), rules.counter_keys, rules.attribute_keys)
    if rules.uses_program_state:
        await _load_state(tx, [program_holder], rules.program_counter_keys, rules.program_attribute_keys)
    account_holders = [*holders, program_id] if draws_on_wallet else list(holders)
    books = await journal.load_accounts(tx, account_holders, list(assets))
    for holder in (*holders.values(), program_holder):
        holder.open_view(tx.now)
    return World(
        program=program_holder,
        participants=holders,
        by_external_id={h.external_id: h for h in holders.values() if h.external_id is not None},
        known=references,
        assets=assets,
        books=books,
        created=created,
    )


_EXTERNAL_IDS = "select external_id, id from participant where organization_id = %s and external_id = any(%s)"

_CREATE = """
insert into participant (organization_id, id, external_id, status, created_at, updated_at)
select %(organization_id)s, r.id, r.external_id, 'ACTIVE', %(now)s, %(now)s
from json_to_recordset(%(rows)s::json) as r (id uuid, external_id text)
order by r.external_id
on conflict (organization_id, external_id) do nothing
"""


async def _resolve_external_ids(
    tx: Transaction, external_ids: Sequence[str], *, create: bool
) -> tuple[set[UUID], set[UUID]]:
    """The ids behind these external ids, known ones and new ones: unknown ones are created where the policy says so.

    Creation comes before any participant is locked: whoever waits here for another's insert holds nothing yet.
    """
    found = dict(await _external_ids(tx, external_ids))
    unknown = sorted(set(external_ids) - set(found))
    if not unknown or not create:
        return set(found.values()), set()
    rows = json.parameter([{"id": new_id(), "external_id": external_id} for external_id in unknown])
    await tx.execute(_CREATE, {"organization_id": tx.organization_id, "now": tx.now, "rows": rows})
    # A statement of its own: one that somebody else created meanwhile is visible only now.
    return set(found.values()), {participant_id for _, participant_id in await _external_ids(tx, unknown)}


async def _external_ids(tx: Transaction, external_ids: Sequence[str]) -> list[Any]:
    return await (await tx.execute(_EXTERNAL_IDS, (tx.organization_id, list(external_ids)))).fetchall()


def _is_member(holder: Holder, members: set[Reference]) -> bool:
    return Reference(id=holder.id) in members or Reference(external_id=holder.external_id) in members


async def _participants(tx: Transaction, ids: set[UUID], *, locked: bool) -> dict[UUID, Holder]:
    if not ids:
        return {}
    if locked:
        await lock_participants(tx, ids)
    rows = await tx.execute(
        "select id, external_id, status from participant where organization_id = %s and id = any(%s)",
        (tx.organization_id, list(ids)),
    )
    return {
        participant_id: Holder("PARTICIPANT", participant_id, external_id, status)
        for participant_id, external_id, status in await rows.fetchall()
    }


_ENROLL = """
insert into enrollment (organization_id, program_id, participant_id, status, created_at, updated_at)
select %(organization_id)s, %(program_id)s, participant_id, 'ACTIVE', %(now)s, %(now)s
from unnest(%(participant_ids)s::uuid[]) as participant_id
order by participant_id
on conflict (organization_id, program_id, participant_id)
    do update set status = 'ACTIVE', updated_at = excluded.updated_at
"""


async def _enroll(tx: Transaction, program_id: UUID, participant_ids: set[UUID]) -> None:
    """Make these participants members of the program. Contract: rules-and-events.md 7.2."""
    if not participant_ids:
        return
    enrolled = await tx.execute(
        "select participant_id from enrollment where organization_id = %s and program_id = %s"
        " and participant_id = any(%s) and status = 'ACTIVE'",
        (tx.organization_id, program_id, list(participant_ids)),
    )
    outside = participant_ids - {row[0] for row in await enrolled.fetchall()}
    if outside:
        params = {
            "organization_id": tx.organization_id,
            "program_id": program_id,
            "participant_ids": list(outside),
            "now": tx.now,
        }
        await tx.execute(_ENROLL, params)


_ASSETS = """
select a.id, a.scale, a.inventory_mode = 'LOT', a.issuance_policy = 'PREFUNDED',
       a.status = 'ARCHIVED', l.asset_id is not null, a.max_transaction_amount
from asset a
left join program_asset l on l.organization_id = a.organization_id and l.program_id = %s and l.asset_id = a.id
where a.organization_id = %s and a.id = any(%s)
"""


async def _asset_terms(tx: Transaction, program_id: UUID, asset_ids: Iterable[UUID]) -> dict[UUID, AssetTerms]:
    ids = list(asset_ids)
    if not ids:
        return {}
    rows = await (await tx.execute(_ASSETS, (program_id, tx.organization_id, ids))).fetchall()
    return {row[0]: AssetTerms(*row) for row in rows}


async def _load_state(
    tx: Transaction,
    holders: Sequence[Holder],
    counter_keys: frozenset[str] | None,
    attribute_keys: frozenset[str] | None,
) -> None:
    """Read the tags, and the counters and attributes of these keys (None for all) that the rules can reach.

    Whatever else is stored on a holder costs nothing, however much it is.
    """
    by_id = {holder.id: holder for holder in holders}
    scope = (tx.organization_id, list(by_id))
    cursor = await tx.execute(
        "select entity_id, tag from tag where organization_id = %s and entity_id = any(%s)", scope
    )
    for entity_id, tag in await cursor.fetchall():
        by_id[entity_id].tags.add(tag)
    if counter_keys is None or counter_keys:
        cursor = await tx.execute(*_keyed(_COUNTERS, scope, counter_keys))
        for entity_id, key, *stored in await cursor.fetchall():
            by_id[entity_id].counters[key] = CounterState(*stored)
    if attribute_keys is None or attribute_keys:
        cursor = await tx.execute(*_keyed(_ATTRIBUTES, scope, attribute_keys))
        for entity_id, key, value in await cursor.fetchall():
            by_id[entity_id].attributes[key] = value


_COUNTERS: LiteralString = """
select entity_id, key, value, reset_after, last_reset_at from counter
where organization_id = %s and entity_id = any(%s)
"""
_ATTRIBUTES: LiteralString = """
select entity_id, key, value from attribute where organization_id = %s and entity_id = any(%s)
"""


def _keyed(
    query: LiteralString, scope: tuple[Any, ...], keys: frozenset[str] | None
) -> tuple[LiteralString, tuple[Any, ...]]:
    """`query` narrowed to these keys by a condition of its own, which the primary key can serve; None for all."""
    return (query, scope) if keys is None else (query + " and key = any(%s)", (*scope, list(keys)))


# --- writing ---------------------------------------------------------------------------------------------------------

_UPDATE_EVENTS = """
update event e set
    status = r.status, participant_id = coalesce(r.participant_id, e.participant_id),
    recipient_id = coalesce(r.recipient_id, e.recipient_id), error_message = r.error_message, attempts = r.attempts,
    due_at = r.due_at, processed_at = r.processed_at, updated_at = %(now)s, starts = 0,
    evaluations = r.evaluations, matched_rule_ids = r.matched
from json_to_recordset(%(rows)s::json) as r (
    id uuid, status text, participant_id uuid, recipient_id uuid, error_message text, attempts smallint,
    due_at timestamptz, processed_at timestamptz, evaluations json, matched uuid[])
where e.organization_id = %(organization_id)s and e.id = r.id
"""

_INSERT_HISTORY = """
insert into state_history (organization_id, entity_id, changed_at, id, state_type, key, operation, old_value, new_value,
                           event_id, rule_id)
select %(organization_id)s, r.entity_id, %(now)s, r.id, r.state_type, r.key, r.operation, r.old_value, r.new_value,
       r.event_id, r.rule_id
from json_to_recordset(%(rows)s::json) as r (
    entity_id uuid, id uuid, state_type text, key text, operation text, old_value text, new_value text, event_id uuid,
    rule_id uuid)
"""

_WRITE_STATE = {
    ("tag", True): """
        insert into tag (organization_id, entity_id, tag, created_at)
        select %(organization_id)s, r.entity_id, r.key, %(now)s
        from json_to_recordset(%(rows)s::json) as r (entity_id uuid, key text)
        on conflict do nothing""",
    ("tag", False): """
        delete from tag t using json_to_recordset(%(rows)s::json) as r (entity_id uuid, key text)
        where t.organization_id = %(organization_id)s and t.entity_id = r.entity_id and t.tag = r.key
          and %(now)s is not null""",
    ("attribute", True): """
        insert into attribute (organization_id, entity_id, key, value, updated_at)
        select %(organization_id)s, r.entity_id, r.key, r.value, %(now)s
        from json_to_recordset(%(rows)s::json) as r (entity_id uuid, key text, value text)
        on conflict (organization_id, entity_id, key)
            do update set value = excluded.value, updated_at = excluded.updated_at""",
    ("counter", True): """
        insert into counter (organization_id, entity_id, key, value, reset_after, last_reset_at)
        select %(organization_id)s, r.entity_id, r.key, r.value, r.reset_after, r.last_reset_at
        from json_to_recordset(%(rows)s::json) as r (
            entity_id uuid, key text, value numeric, reset_after text, last_reset_at timestamptz)
        where %(now)s is not null
        on conflict (organization_id, entity_id, key) do update set
            value = excluded.value, reset_after = excluded.reset_after, last_reset_at = excluded.last_reset_at""",
}


async def _write(tx: Transaction, world: World, outcomes: Sequence[Outcome], retries: RetryPolicy) -> None:
    changes = world.state.changes
    if changes:
        await _write_rows(tx, _INSERT_HISTORY, [_history_row(change) for change in changes])
        for kind, rows in _final_state(changes).items():
            await _write_rows(tx, _WRITE_STATE[kind], rows)
    await _write_events(tx, outcomes, retries)
    await journal.write(tx, world.books)


async def _write_events(tx: Transaction, outcomes: Sequence[Outcome], retries: RetryPolicy) -> None:
    await _write_rows(tx, _UPDATE_EVENTS, [_event_row(outcome, tx.now, retries) for outcome in outcomes])


async def _write_rows(tx: Transaction, statement: Any, rows: Sequence[dict[str, Any]]) -> None:
    await tx.execute(statement, {"organization_id": tx.organization_id, "now": tx.now, "rows": json.parameter(rows)})


def _final_state(changes: Sequence[Change]) -> dict[tuple[str, bool], list[dict[str, Any]]]:
    """What to store, by kind and presence: of each tag, counter and attribute only the last state counts."""
    last = {(change.holder.id, change.state_type, change.key): change for change in changes}
    rows: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for change in last.values():
        row: dict[str, Any] = {"entity_id": change.holder.id, "key": change.key}
        if isinstance(change.new, CounterState):
            row |= change.new._asdict()
        elif change.state_type == "attribute":
            row["value"] = change.new
        rows.setdefault((change.state_type, change.new is not None), []).append(row)
    return rows


def _history_row(change: Change) -> dict[str, Any]:
    return {
        "entity_id": change.holder.id,
        "id": new_id(),
        "state_type": change.state_type,
        "key": change.key,
        "operation": history_operation(change),
        "old_value": history_value(change.state_type, change.old),
        "new_value": history_value(change.state_type, change.new),
        "event_id": change.event_id,
        "rule_id": change.rule_id,
    }


def _event_row(outcome: Outcome, now: datetime, retries: RetryPolicy) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": outcome.event.id,
        "participant_id": outcome.participant_id,
        "recipient_id": outcome.recipient_id,
        "error_message": outcome.error,
        "attempts": outcome.event.attempts + 1,
        "evaluations": outcome.evaluations,
        "matched": outcome.matched,
    }
    if _is_final_failure(outcome, retries) or outcome.verdict == "COMPLETED":
        status = "COMPLETED" if outcome.verdict == "COMPLETED" else "FAILED"
        return row | {"status": status, "due_at": None, "processed_at": format_timestamp(now)}
    wait = retries.wait_after(outcome.event.attempts + 1)
    assert wait is not None
    return row | {"status": "PENDING", "due_at": now + wait, "processed_at": None}


def _is_final_failure(outcome: Outcome, retries: RetryPolicy) -> bool:
    last = retries.wait_after(outcome.event.attempts + 1) is None
    return outcome.verdict == "FAILED" or (outcome.verdict == "RETRY" and last)
