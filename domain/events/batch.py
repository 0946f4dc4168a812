"""One batch of events in one transaction: lock, load, apply in memory, write in bulk.

The order of things is what keeps money right (docs/decisions/0004-batches.md): the program's advisory lock, so that two
attempts never overlap; the events in the order of acceptance; new participants; then the locks of everything the events
touch in the global order; then the state, read again under them. What expressions will touch is learnt by applying the
batch once on unlocked reads (the scout pass), only where rules have targets at all. Contract: rules-and-events.md 4, 7.
"""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from psycopg.rows import DictRow

from db.session import Database, Transaction
from domain import automations, faults, limits
from domain.events.engine import Outcome, apply_event
from domain.events.loading import Wanted, crowded_holders, load_world
from domain.events.retries import RetryPolicy
from domain.events.world import QueuedEvent, Reference, World
from domain.events.writing import is_final_failure, write_outcomes, write_world
from domain.rules.compiled import RuleSet, known_rule_set, learn_rules


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What one batch did. `entries` is the number of journal entries it wrote."""

    events: int = 0
    completed: int = 0
    failed: int = 0
    entries: int = 0
    news: "News | None" = None


@dataclass(frozen=True, slots=True)
class News:
    """What other workflows are to be told of, once it is committed: they carry on what events began.

    `has_new_ends` of holds that the program carries, `has_broadcasts` to be fanned out, `ended_holds` that had a
    workflow of their own.
    """

    organization_id: UUID
    program_id: UUID
    program_name: str
    has_new_ends: bool
    has_broadcasts: bool
    ended_holds: tuple[UUID, ...]


async def process_batch(
    database: Database,
    organization_id: UUID,
    program_id: UUID,
    limit: int,
    retries: RetryPolicy,
    poison: str | None = None,
    only: UUID | None = None,
    progress: Callable[[], None] = lambda: None,
    turns: AbstractContextManager[object] | None = None,
) -> BatchResult:
    """Process up to `limit` due events of a program in one transaction; zero events when none is due.

    With `poison` the events are not applied but end FAILED with that message: it is what happens to the one event of a
    batch that cannot be processed at all. With `only` the batch is that event alone, and nothing when it isn't the next
    one any more: another attempt has taken it, or a wait has ended meanwhile. `progress` is called after each event.
    `turns` is entered for the transaction. Raises what the database raises; then nothing of the batch has happened.
    """
    for _ in range(limits.RULE_LOADS):
        with turns or nullcontext():
            result = await _process(database, organization_id, program_id, limit, retries, poison, only, progress)
        if result is not None:
            return result
        await learn_rules(database, organization_id, program_id, progress)
    # Rules that are changed all the time: whoever drains looks again.
    return BatchResult()


async def _process(
    database: Database,
    organization_id: UUID,
    program_id: UUID,
    limit: int,
    retries: RetryPolicy,
    poison: str | None,
    only: UUID | None,
    progress: Callable[[], None],
) -> BatchResult | None:
    """One batch; None when this process has yet to learn the rules as they are now."""
    async with database.transaction(organization_id) as tx:
        await _take_lane(tx, program_id)
        program = await _program(tx, program_id)
        if program is None or program["processing_paused"]:
            return BatchResult()
        if only is None and program["has_due_automations"]:
            await automations.release_due(tx, program_id, limit)
        events = await _due_events(tx, program_id, limit if only is None else 1)
        if not events or (only is not None and events[0].id != only):
            return BatchResult()
        if poison is not None:
            await write_outcomes(tx, [Outcome(event, "FAILED", error=poison) for event in events], retries)
            return BatchResult(len(events), failed=len(events))
        rules = known_rule_set(organization_id, program_id, program["rules_version"])
        if rules is None:
            return None
        world, outcomes = await _apply(tx, program, rules, events, progress)
        await faults.reach("batch.applied")
        await write_world(tx, world, outcomes, retries)
        await faults.reach("batch.written")
    await faults.reach("batch.committed")
    return BatchResult(
        len(outcomes),
        sum(outcome.verdict == "COMPLETED" for outcome in outcomes),
        sum(is_final_failure(outcome, retries) for outcome in outcomes),
        len(world.books.entries),
        _news(organization_id, program, world),
    )


def _news(organization_id: UUID, program: DictRow, world: World) -> News | None:
    """What others are to be told of; None for nothing."""
    holds = world.books.holds
    has_new_ends = any(hold.carrier == "PROGRAM" for hold in holds.opened)
    has_broadcasts = any(automation.kind == "BROADCAST" for automation in world.automations)
    ended = tuple(hold.id for hold in holds.ended if hold.carrier == "WORKFLOW")
    if not (has_new_ends or has_broadcasts or ended):
        return None
    return News(organization_id, program["id"], program["name"], has_new_ends, has_broadcasts, ended)


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
        if program["has_due_automations"]:
            await automations.release_due(tx, program_id, 1)
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
        waiting = [
            instant for instant in (row[1], await automations.next_trigger(tx, program_id)) if instant is not None
        ]
        return Outlook(tx.now if row[0] else min(waiting, default=None), is_paused=False)


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
    select {_EVENT_COLUMNS}, due_at, seq from event
    where organization_id = %(organization_id)s and program_id = %(program_id)s
      and status in ('RECEIVED', 'PENDING') and due_at is not null and due_at <= %(now)s
    order by due_at, seq limit greatest(%(limit)s / 4, 1)
) waited
union all
select * from (
    select {_EVENT_COLUMNS}, due_at, seq from event
    where organization_id = %(organization_id)s and program_id = %(program_id)s
      and status in ('RECEIVED', 'PENDING') and due_at is null
    order by seq limit %(limit)s
) fresh
order by due_at, seq limit %(limit)s
"""


async def _take_lane(tx: Transaction, program_id: UUID) -> None:
    """Wait until no other attempt works on this program; held to the end of the transaction."""
    await tx.execute("select pg_advisory_xact_lock(hashtextextended(%s, 0))", (str(program_id),))


_PROGRAM = """
select id, name, on_unknown_participant, rules_version, processing_paused,
       status = 'ACTIVE' and exists (
           select from automation where organization_id = %(organization_id)s and program_id = %(program_id)s
           and status = 'active' and trigger_type = 'one_time' and trigger_at <= %(now)s) as has_due_automations
from program where organization_id = %(organization_id)s and id = %(program_id)s
"""


async def _program(tx: Transaction, program_id: UUID) -> DictRow | None:
    params = {"organization_id": tx.organization_id, "program_id": program_id, "now": tx.now}
    return await tx.row(_PROGRAM, params)


async def _due_events(tx: Transaction, program_id: UUID, limit: int) -> list[QueuedEvent]:
    params = {"organization_id": tx.organization_id, "program_id": program_id, "now": tx.now, "limit": limit}
    return [QueuedEvent(*row[:-2]) for row in await (await tx.execute(_DUE, params)).fetchall()]


# --- applying --------------------------------------------------------------------------------------------------------


class BatchTooWide(Exception):
    """The batch kept reaching for more than was loaded; a smaller one is to be tried."""


async def _apply(
    tx: Transaction,
    program: DictRow,
    rules: RuleSet,
    events: Sequence[QueuedEvent],
    progress: Callable[[], None],
) -> tuple[World, list[Outcome]]:
    """Apply the events to a world whose every holder is locked, and return both; slow ones only as far as time went."""
    wanted = Wanted.by(events)
    scouting = rules.has_targets
    for _ in range(limits.BATCH_GROWTHS + scouting):
        await tx.execute("savepoint batch")
        world = await load_world(tx, program, rules, wanted, locked=not scouting)
        outcomes = await _apply_in_order(world, rules, events, tx.now, progress)
        wanted = wanted.grown(world)
        if not (world.unmet() or scouting or world.is_stale or _created_in_vain(world, wanted.references)):
            crowded = await crowded_holders(tx, world)
            if not crowded:
                return world, [outcome for outcome in outcomes if outcome is not None]
            wanted = replace(wanted, crowded=wanted.crowded | crowded)
        # Rolling back to the savepoint lets go of the locks, so that another set can be locked in order.
        await tx.execute("rollback to savepoint batch")
        scouting = scouting and bool(world.missing)
    raise BatchTooWide(f"{len(events)} events")


async def _apply_in_order(
    world: World, rules: RuleSet, events: Sequence[QueuedEvent], now: datetime, progress: Callable[[], None]
) -> list[Outcome | None]:
    """Apply the events one after another; slow or busy ones cut the batch short, and the rest waits for the next."""
    outcomes: list[Outcome | None] = []
    ends_at = time.monotonic() + limits.BATCH_CUT_MS / 1000
    actions = 0
    for event in events:
        if outcomes and (time.monotonic() > ends_at or actions > limits.BATCH_ACTIONS):
            break
        await faults.reach("event.applying", event.external_id)
        outcome = apply_event(world, rules, event, now)
        outcomes.append(outcome)
        actions += outcome.actions if outcome is not None else 0
        progress()
    return outcomes


def _created_in_vain(world: World, references: Collection[Reference]) -> bool:
    """Whether somebody was made whom no event reaches after all: an event before changed what the rules do."""
    return any(Reference(external_id=world.participants[id].external_id) not in references for id in world.created)
