"""Draining a queue: promises, poison, lost workers, outages.

Contract: rules-and-events.md 7.6; docs/decisions/0004 and 0005.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from db.session import DatabaseUnavailable
from domain import faults, limits
from domain.events import batch, writing
from domain.events.drain import DrainResult, drain, lane_of, programs_with_events_due_at
from domain.events.queries import retry
from domain.events.retries import RetryPolicy
from domain.locks import lock_participants
from domain.rules.budgets import BudgetDraft
from tests.conftest import SettableClock
from tests.events_support import NO_RETRIES, EventProgram, attribute, counter, credit, debit, schedule, tag
from tests.servers import Postgres

BROADCAST: dict[str, Any] = {"type": "BROADCAST", "event_name": "digest"}


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain here looks once more and ends, instead of waiting for events that don't come."""
    monkeypatch.setattr(limits, "DRAIN_LINGER_MS", -1)


async def drained(program: EventProgram, *, after_loss: bool = False, retries: RetryPolicy = NO_RETRIES) -> DrainResult:
    return await drain(
        program.database, program.organization_id, program.id, retries, lambda _: None, after_loss=after_loss
    )


async def is_promised(program: EventProgram) -> bool:
    return (await lane_of(program.database, program.organization_id, program.id)).is_drained


async def statuses(program: EventProgram) -> list[tuple[str, int]]:
    return await program.sql("select status, count(*)::int from event group by status order by status")


# --- what a drain does and reports ---


async def test_a_drain_processes_everything_and_reports_it(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule("event.fail", debit(points, "1"))
    for start in range(0, 450, 90):
        await program.ingest([program.event(f"p{n % 5}", fail=n % 9 == 0) for n in range(start, start + 90)])

    told: list[int] = []
    result = await drain(program.database, program.organization_id, program.id, NO_RETRIES, told.append)

    assert (result.events, result.completed, result.failed, result.next_due_at) == (450, 400, 50, None)
    assert told == sorted(told)
    assert told[-1] == 450


async def test_a_drain_reports_when_the_next_event_falls_due(program: EventProgram, clock: SettableClock) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset()
    await program.rule("true", debit(points, "1"))
    await program.send()

    result = await drained(program, retries=RetryPolicy())

    assert (result.events, result.completed, result.failed) == (1, 0, 0)
    assert result.next_due_at == clock() + timedelta(seconds=2)


async def test_a_drain_of_an_empty_queue_does_nothing(program: EventProgram) -> None:
    assert await drained(program) == DrainResult(0, 0, 0, None, is_paused=False)


async def test_a_drain_promises_to_look_and_takes_it_back(program: EventProgram) -> None:
    assert not await is_promised(program)
    with faults.arm("drain.promised=fail"), pytest.raises(faults.InjectedFault):
        await drained(program)
    assert await is_promised(program), "it was interrupted: the promise stands until it runs out"

    await drained(program)
    assert not await is_promised(program)


async def test_an_event_committed_under_the_promise_is_found_by_the_last_look(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API saw the promise and woke nobody; the drain has withdrawn it meanwhile and must still find the event."""
    sent: list[UUID] = []

    async def commit_at_the_last_moment(point: str, *_: object) -> None:
        if point == "drain.withdrawn":
            sent.append(await program.send())

    monkeypatch.setattr(faults, "reach", commit_at_the_last_moment)

    assert (await drained(program)).events == 1
    assert (await program.status(sent[0]))[0] == "COMPLETED"


async def test_a_promise_that_nobody_keeps_runs_out(program: EventProgram) -> None:
    await program.sql("update lane set drained_until = clock_timestamp() - interval '1 microsecond'")
    assert not await is_promised(program)


async def test_due_events_are_found_by_age_whatever_their_kind(program: EventProgram, clock: SettableClock) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset()
    await program.rule("event.wait", debit(points, "1"))
    own = (program.organization_id, program.id)

    async def found(**offset: float) -> bool:
        return own in await programs_with_events_due_at(program.database, clock() + timedelta(**offset))

    assert not await found(days=1)
    await program.send(wait=True)
    assert await found()
    assert not await found(microseconds=-1)
    await program.settle(retries=RetryPolicy())
    assert not await found(seconds=1)
    assert await found(seconds=2)
    await program.sql("update program set processing_paused = true")
    assert not await found(seconds=2)


# --- what a batch takes ---


@pytest.mark.parametrize(("limit", "first"), [(8, "AB abcdef"), (7, "A abcdef"), (4, "A abc"), (1, "A ")])
async def test_waited_events_come_first_and_are_a_quarter_of_a_batch_at_most(
    program: EventProgram, clock: SettableClock, limit: int, first: str
) -> None:
    """Of many that wait again and many fresh ones a batch holds both: neither kind can keep the other out."""
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset()
    await program.rule("event.type == 'earn'", credit(points, "100"))
    await program.rule("event.type == 'spend'", debit(points, "1"))
    await program.rule("has(event.step)", attribute("trail", 'get(participant.attributes, "trail", "") + event.step'))
    for step in "ABCDE":
        await program.send(type="spend", step=step)
        await program.settle(retries=RetryPolicy())
        clock.advance(seconds=0.1)
    assert await statuses(program) == [("PENDING", 5)]
    await program.run(type="earn")
    clock.advance(seconds=60)
    await program.ingest([program.event(step=step) for step in "abcdefghijklmnopqrst"])

    result = await program.batch(limit)

    waited, fresh = first.split(" ")
    assert result.completed == len(waited) + len(fresh)
    assert await program.attributes() == {"trail": waited + fresh}


async def test_waited_events_are_a_quarter_of_a_batch_also_where_nothing_else_is_due(
    program: EventProgram, clock: SettableClock
) -> None:
    clock.set("2026-03-01T12:00:00Z")
    points = await program.asset()
    await program.rule("event.type == 'earn'", credit(points, "100"))
    await program.rule("event.type == 'spend'", debit(points, "1"))
    await program.ingest([program.event(type="spend") for _ in range(12)])
    await program.settle(retries=RetryPolicy())
    await program.run(type="earn")
    clock.advance(seconds=60)

    assert [(await program.batch(20)).completed for _ in range(4)] == [5, 5, 2, 0]


# --- events that fail ---


async def test_an_event_that_fails_leaves_nothing_of_what_its_earlier_rules_did(program: EventProgram) -> None:
    """Follow-up events, broadcasts and what was charged to a budget go with it; those of the events beside it stay."""
    points = await program.asset()
    budgets = [BudgetDraft(points, "10")]
    rule = await program.rule("true", credit(points, "5"), schedule("later", "1h"), BROADCAST, budgets=budgets)
    await program.rule("event.fail", debit(points, "1000"))
    names = ["alice", "bob", "carol"]
    events = {name: await program.send(name, fail=name == "bob") for name in names}

    result = await program.batch()

    assert (result.completed, result.failed) == (2, 1)
    # The budget has room for two: the third credit is covered because the second was given back.
    assert await program.balances(points, *names) == [5, 0, 5]
    assert await program.sql("select consumed from rule_budget where rule_id = %s", rule.id) == [(10,)]
    made = await program.sql("select event_id, event_name from automation order by event_name, event_id")
    stay = sorted((events["alice"], events["carol"]))
    assert made == [(event, name) for name in ("digest", "later") for event in stay]


async def test_an_event_that_fails_alone_changes_no_budget_and_makes_no_follow_up(program: EventProgram) -> None:
    points = await program.asset()
    rule = await program.rule(
        "true",
        credit(points, "5"),
        schedule("later", "1h"),
        BROADCAST,
        budgets=[BudgetDraft(points, "10", schedule_type="INTERVAL", interval="24h")],
    )
    await program.rule("true", debit(points, "1000"))
    budget = "select * from rule_budget where rule_id = %s"
    before = await program.sql(budget, rule.id)
    event = await program.send()

    assert (await program.batch()).news is None, "nobody is to be told of what has not come to be"

    assert (await program.status(event))[0] == "FAILED"
    assert await program.sql(budget, rule.id) == before
    assert await program.sql("select event_name from automation") == []


# --- events that cannot be processed ---


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events whose payload says so can't be written: something that no rule outcome covers."""
    true_row = writing._event_row

    def row(outcome: Any, *more: Any) -> dict[str, Any]:
        shown = true_row(outcome, *more)
        if outcome.event.data.get("poison") and outcome.error is None:
            shown["error_message"] = "\x00"
        return shown

    monkeypatch.setattr(writing, "_event_row", row)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("after_loss", [False, True])
async def test_a_poisoned_event_ends_failed_and_all_others_complete(program: EventProgram, after_loss: bool) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "1"))
    poisoned = [await program.send("alice", poison=n in (3, 7, 8, 19), n=n) for n in range(20)]

    result = await drained(program, after_loss=after_loss)

    assert (result.events, result.completed, result.failed) == (20, 16, 4)
    for n in (3, 7, 8, 19):
        event = await program.outcome(poisoned[n])
        assert event.status == "FAILED"
        assert (event.error_message or "").startswith("processing failed: ")
    assert await program.balance("alice", points) == 16


@pytest.mark.usefixtures("poison")
async def test_a_poisoned_event_can_be_retried(program: EventProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    event = await program.send(poison=True)
    await drained(program)
    monkeypatch.undo()

    async with program.database.transaction(program.organization_id) as tx:
        await retry(tx, event)
    await program.settle()

    assert await program.status(event) == ("COMPLETED", None)


async def test_an_event_that_brought_its_worker_down_three_times_is_given_up(program: EventProgram) -> None:
    """A kill can't be survived by this process; what it leaves is the mark, committed before the event is tried."""
    await program.rule("true", counter("n", "1"))
    deadly, harmless = await program.send("alice"), await program.send("bob")
    for n in range(1, limits.LOST_STARTS + 1):
        begun = await batch.mark_started(program.database, program.organization_id, program.id)
        assert begun == batch.Start(deadly, n)

    result = await drained(program, after_loss=True)

    assert (result.completed, result.failed) == (1, 1)
    assert await program.status(deadly) == ("FAILED", "processing brought its worker down 3 times")
    assert await program.status(harmless) == ("COMPLETED", None)


async def test_an_event_that_brought_its_worker_down_twice_completes(program: EventProgram) -> None:
    event = await program.send("alice")
    for _ in range(limits.LOST_STARTS - 1):
        await batch.mark_started(program.database, program.organization_id, program.id)

    await drained(program, after_loss=True)

    after = await program.outcome(event)
    assert (after.status, after.starts) == ("COMPLETED", 0)


# --- outages and conflicts, which are never an event's fault ---


@asynccontextmanager
async def held_participant(program: EventProgram, external_id: str) -> AsyncIterator[None]:
    """Somebody holds this participant's lock."""
    holder = await program.id_of(external_id)
    assert holder is not None
    async with program.database.transaction(program.organization_id) as tx:
        await lock_participants(tx, [holder])
        yield


async def cut_off_the_waiting_drain(postgres: Postgres) -> None:
    """End the connection of whoever waits for a row lock in this database, as soon as somebody does."""
    statement = (
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and wait_event_type = 'Lock' and wait_event in ('transactionid', 'tuple')"
    )
    connection = await psycopg.AsyncConnection.connect(postgres.superuser_url, autocommit=True)
    async with connection:
        for _ in range(2_000):
            if await (await connection.execute(statement)).fetchall():
                return
            await asyncio.sleep(0.005)
    pytest.fail("the drain never came to wait for the lock")


async def test_a_lost_connection_is_never_charged_to_an_event(program: EventProgram, postgres: Postgres) -> None:
    await program.rule("true", counter("n", "1"))
    await program.participant("alice")
    event = await program.send("alice")

    for attempt in range(limits.LOST_STARTS + 3):
        async with held_participant(program, "alice"):
            cut = asyncio.create_task(cut_off_the_waiting_drain(postgres))
            with pytest.raises(DatabaseUnavailable):
                await drained(program, after_loss=attempt > 0)
            await cut
        assert (await program.status(event))[0] == "RECEIVED"
    await drained(program, after_loss=True)

    after = await program.outcome(event)
    assert (after.status, after.error_message, after.attempts, after.starts) == ("COMPLETED", None, 1, 0)
    assert await program.counters() == {"n": 1}


@contextmanager
def without_right(owner: psycopg.Connection[Any], right: str) -> Iterator[None]:
    owner.execute(f"revoke {right} from scrip_app")
    try:
        yield
    finally:
        owner.execute(f"grant {right.replace('from', 'to')} to scrip_app")


@pytest.mark.parametrize("after_loss", [False, True])
async def test_a_database_that_is_not_as_it_should_be_is_never_charged_to_events(
    program: EventProgram, owner: psycopg.Connection[Any], after_loss: bool
) -> None:
    """A missing right, table or column (a migration that hasn't run yet) stops the queue instead of emptying it."""
    await program.rule("true", counter("n", "1"))
    events = [await program.send("alice") for _ in range(3)]

    with without_right(owner, "insert on state_history"), pytest.raises((DatabaseUnavailable, psycopg.Error)):
        await drained(program, after_loss=after_loss)
    assert await statuses(program) == [("RECEIVED", 3)]

    await drained(program, after_loss=True)
    assert [(await program.outcome(event)).attempts for event in events] == [1, 1, 1]
    assert await program.counters() == {"n": 3}


async def test_a_pause_is_no_lost_worker(program: EventProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """A careful drain of a paused program marks nothing, however often it looks."""
    monkeypatch.setattr(limits, "DRAIN_LINGER_MS", 100)
    event = await program.send()
    await program.sql("update program set processing_paused = true")
    await drained(program, after_loss=True)
    await program.sql("update program set processing_paused = false")
    await drained(program, after_loss=True)

    assert await program.status(event) == ("COMPLETED", None)


# --- two at once ---


async def test_two_drains_of_one_program_never_overlap_or_double(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule(
        "true",
        credit(points, "1"),
        counter("n", "1"),
        attribute("trail", 'get(participant.attributes, "trail", "") + event.step'),
    )
    for step in "abcdefghijklmnopqrst":
        await program.send("alice", step=step)

    results = await asyncio.gather(*(drained(program, after_loss=n == 1) for n in range(4)))

    assert sum(result.events for result in results) == 20
    assert await program.balance("alice", points) == 20
    assert await program.counters() == {"n": 20}
    assert await program.attributes() == {"trail": "abcdefghijklmnopqrst"}


async def test_events_that_arrive_during_a_drain_are_found_by_it(program: EventProgram) -> None:
    await program.rule("true", tag("seen"))
    sent: list[UUID] = []

    async def client() -> None:
        for n in range(40):
            sent.append(await program.send(f"p{n}"))

    async def drains() -> None:
        while True:
            await drained(program)

    draining = asyncio.create_task(drains())
    await client()
    draining.cancel()
    await asyncio.gather(draining, return_exceptions=True)
    await program.settle()

    assert await statuses(program) == [("COMPLETED", 40)]
    assert await program.sql("select count(*)::int from tag") == [(40,)]
