"""What a batch waits for. Goal: nothing that somebody else is changing is read before the change is over.

Method: a direct operation is done but not committed; a batch that needs the same row must wait for exactly that row,
and what it does afterwards must follow from what the operation has left. Contract: holders.md 6.9, rules-and-events.md
7.2; the order of locks is that of domain/locks.py.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, LiteralString
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from db.session import Database, Transaction
from domain import participants, state, wallet
from domain.events.batch import BatchResult
from domain.ids import new_id
from domain.participants import StateChanges
from domain.rules.budgets import BudgetDraft
from domain.rules.store import patch_rule, reset_budget
from domain.state import EntityKind
from domain.wallet import WalletRequest
from tests.builders import make_group
from tests.conftest import Tenant
from tests.events_support import TO_PROGRAM, EventProgram, counter, credit, tag, to_participant

LOOKS = 20_000
"""How often a test looks for a batch that waits; one that doesn't wait ends long before."""

Work = Callable[[Transaction], Awaitable[Any]]


@dataclass(frozen=True)
class Row:
    """A row that is locked: the one of `table` whose `column` is `id`."""

    table: str
    id: UUID
    column: str = "id"

    def select(self, what: LiteralString, lock: LiteralString = "") -> sql.Composed:
        """The query that reads `what` of this row."""
        return sql.SQL("select {} from {} where {} = {} {}").format(
            sql.SQL(what),
            sql.Identifier(self.table),
            sql.Identifier(self.column),
            sql.Literal(self.id),
            sql.SQL(lock),
        )


class Locks:
    """The row locks of this database, seen from a connection that takes none for longer than a statement."""

    def __init__(self, owner: psycopg.Connection[Any]) -> None:
        self._owner = owner

    def waiting_for(self, row: Row) -> list[tuple[int, list[int]]]:
        """Who is next to lock this row, and by whom each is kept from it: backend pids.

        Whoever waits for a row holds Postgres' lock on that one tuple until the row itself is his.
        """
        found = self._owner.execute(row.select("ctid::text")).fetchone()
        assert found is not None, f"there is no {row}"
        query = """
            select pid, pg_blocking_pids(pid) from pg_locks
            where locktype = 'tuple' and granted and relation = %s::regclass
              and database = (select oid from pg_database where datname = current_database())
              and format('(%%s,%%s)', page, tuple) = %s"""
        return [(pid, blockers) for pid, blockers in self._owner.execute(query, (row.table, found[0])) if blockers]

    def is_free(self, row: Row) -> bool:
        """Whether nobody has locked this row."""
        try:
            self._owner.execute(row.select("", "for no key update nowait"))
        except psycopg.errors.LockNotAvailable:
            return False
        return True

    async def until_waiting(self, batch: "asyncio.Task[BatchResult]", row: Row, holder: Transaction) -> None:
        """Return once somebody waits for this row, kept from it by `holder` alone; fails where the batch goes on."""
        for _ in range(LOOKS):
            waiting = self.waiting_for(row)
            if waiting:
                assert [blockers for _, blockers in waiting] == [[holder.connection.info.backend_pid]]
                return
            assert not batch.done(), f"the batch didn't wait for {row}: {batch}"
            await asyncio.sleep(0.001)
        pytest.fail(f"the batch waits for something else than {row}")


@pytest.fixture
def locks(owner: psycopg.Connection[Any]) -> Locks:
    return Locks(owner)


async def batch_beside(program: EventProgram, locks: Locks, row: Row, work: Work) -> BatchResult:
    """Do `work`, begin a batch, and commit the work only when the batch waits for `row`; the batch's result."""
    batch: asyncio.Task[BatchResult] | None = None
    try:
        async with program.database.transaction(program.organization_id) as tx:
            await work(tx)
            batch = asyncio.create_task(program.batch())
            await locks.until_waiting(batch, row, tx)
        return await batch
    finally:
        if batch is not None:
            await asyncio.wait([batch])


def counting(kind: EntityKind, entity_id: UUID, key: str, value: str) -> Work:
    """Set a counter by hand."""

    async def work(tx: Transaction) -> None:
        await state.set_counter(tx, await state.lock(tx, kind, entity_id), key, value, None)

    return work


def tagging(kind: EntityKind, entity_id: UUID, name: str) -> Work:
    """Add a tag by hand."""

    async def work(tx: Transaction) -> None:
        await state.add_tag(tx, await state.lock(tx, kind, entity_id), name)

    return work


def renaming(participant_id: UUID, external_id: str) -> Work:
    """Give a participant another external id."""

    async def work(tx: Transaction) -> None:
        await participants.update(tx, participant_id, {"external_id": external_id}, StateChanges())

    return work


def to_group(group_id: UUID) -> dict[str, Any]:
    return {"target": {"type": "GROUP", "id": str(group_id)}}


def to_other_program(program_id: UUID) -> dict[str, Any]:
    return {"target": {"type": "PROGRAM", "id": str(program_id)}}


# --- budgets ---


async def consumed(program: EventProgram, rule_id: UUID) -> Decimal:
    ((amount,),) = await program.sql("select consumed from rule_budget where rule_id = %s", rule_id)
    return Decimal(amount)


async def test_a_budget_that_is_being_reset_is_waited_for_and_stays_reset(program: EventProgram, locks: Locks) -> None:
    points = await program.asset()
    rule = await program.rule("true", credit(points, "60"), budgets=[BudgetDraft(points, "100")])
    await program.run()
    await program.send()

    result = await batch_beside(
        program, locks, Row("rule_budget", rule.id, "rule_id"), lambda tx: reset_budget(tx, rule.id, points)
    )

    assert result.completed == 1
    assert await program.balance("alice", points) == 120
    assert await consumed(program, rule.id) == 60


async def test_a_reset_of_a_budget_is_not_overwritten_by_the_credit_beside_it(
    program: EventProgram, locks: Locks
) -> None:
    points = await program.asset()
    rule = await program.rule("true", credit(points, "30"), budgets=[BudgetDraft(points, "100")])
    await program.run()
    await program.send()

    await batch_beside(
        program, locks, Row("rule_budget", rule.id, "rule_id"), lambda tx: reset_budget(tx, rule.id, points)
    )

    assert await program.balance("alice", points) == 60
    assert await consumed(program, rule.id) == 30


@pytest.mark.parametrize(("before", "after", "issued"), [("150", "60", 60), ("60", "150", 120)])
async def test_a_limit_that_is_being_changed_is_waited_for_and_counts(
    program: EventProgram, locks: Locks, before: str, after: str, issued: int
) -> None:
    """Whether the second credit of 60 is covered is a question of the limit that is committed by then."""
    points = await program.asset()
    rule = await program.rule("true", credit(points, "60"), budgets=[BudgetDraft(points, before)])
    await program.run()
    await program.send()

    await batch_beside(
        program,
        locks,
        Row("rule_budget", rule.id, "rule_id"),
        lambda tx: patch_rule(tx, rule.id, {"budgets": [BudgetDraft(points, after)]}),
    )

    assert await program.balance("alice", points) == issued
    assert await consumed(program, rule.id) == issued


# --- the program: its wallet and its state ---


@pytest.mark.parametrize(
    ("operation", "funded", "status", "left"), [("burn", "60", "FAILED", 0), ("fund", "10", "COMPLETED", 10)]
)
async def test_a_wallet_that_is_being_used_is_waited_for(
    program: EventProgram, locks: Locks, operation: str, funded: str, status: str, left: int
) -> None:
    points = await program.asset(issuance_policy="PREFUNDED")
    await program.rule("true", credit(points, "60"))
    request = WalletRequest(program_id=program.id, asset_id=points, amount=funded)
    async with program.database.transaction(program.organization_id) as tx:
        await wallet.fund(tx, request)
    event = await program.send()

    async def work(tx: Transaction) -> None:
        if operation == "burn":
            await wallet.burn(tx, request)
        else:
            await wallet.fund(tx, WalletRequest(program_id=program.id, asset_id=points, amount="60"))

    await batch_beside(program, locks, Row("program", program.id), work)

    assert (await program.status(event))[0] == status
    assert await program.balance(program.id, points) == left


async def test_program_state_that_is_being_written_is_waited_for_by_who_writes_it(
    program: EventProgram, locks: Locks
) -> None:
    await program.rule("true", counter("n", "1", **TO_PROGRAM))
    await program.send()

    await batch_beside(program, locks, Row("program", program.id), counting("program", program.id, "n", "100"))

    assert await program.counters(program.id) == {"n": 101}


async def test_program_state_that_is_being_written_is_waited_for_by_who_reads_it(
    program: EventProgram, locks: Locks
) -> None:
    points = await program.asset()
    await program.rule("'open' in program.tags", credit(points, "1"))
    await program.send()

    await batch_beside(program, locks, Row("program", program.id), tagging("program", program.id, "open"))

    assert await program.balance("alice", points) == 1


async def test_a_program_whose_rules_need_nothing_of_it_is_not_waited_for(program: EventProgram) -> None:
    """Direct operations on the wallet and events that don't touch it need not wait for each other."""
    points = await program.asset()
    await program.rule("true", credit(points, "1"), counter("n", "1"))
    await program.send()

    async with program.database.transaction(program.organization_id) as tx:
        await state.lock(tx, "program", program.id)
        assert (await program.batch()).completed == 1


# --- targets ---


async def test_a_participant_whose_state_is_being_written_is_waited_for(program: EventProgram, locks: Locks) -> None:
    alice = await program.participant("alice")
    await program.rule("true", counter("n", "1"))
    await program.send()

    await batch_beside(program, locks, Row("participant", alice), counting("participant", alice, "n", "100"))

    assert await program.counters() == {"n": 101}


async def test_a_group_whose_state_is_being_written_is_waited_for(program: EventProgram, locks: Locks) -> None:
    async with program.database.transaction(program.organization_id) as tx:
        family = await make_group(tx)
    await program.rule("true", counter("n", "1", **to_group(family)))
    await program.send()

    await batch_beside(program, locks, Row("holder_group", family), counting("group", family, "n", "100"))

    assert await program.counters(family) == {"n": 101}


async def test_another_program_whose_state_is_being_written_is_waited_for(program: EventProgram, locks: Locks) -> None:
    other = await EventProgram.open(program.database, program.organization_id)
    await program.rule("true", counter("n", "1", **to_other_program(other.id)))
    await program.send()

    await batch_beside(program, locks, Row("program", other.id), counting("program", other.id, "n", "100"))

    assert await program.counters(other.id) == {"n": 101}


# --- the order ---


async def open_group(program: EventProgram, group_id: UUID) -> None:
    """A group without members."""
    await program.sql(
        "insert into holder_group (organization_id, id, name, status, created_at, updated_at)"
        " values (%s, %s, 'Family', 'ACTIVE', now(), now())",
        program.organization_id,
        group_id,
    )


async def program_that_locks_everything(database: Database, organization_id: UUID) -> tuple[EventProgram, list[Row]]:
    """A program whose next event needs two rows of every kind, and those rows in the order of locks.

    Rows with the greater id are made first and used first, so that nothing but sorting brings them into order.
    """
    low, high = sorted(new_id() for _ in range(2))
    program = await EventProgram.open(database, organization_id, id=high)
    other = await EventProgram.open(database, organization_id, id=low)
    assets = sorted([await program.asset(issuance_policy="PREFUNDED") for _ in range(2)])
    groups, people = sorted(new_id() for _ in range(2)), sorted(new_id() for _ in range(2))
    for asset_id in assets:
        async with database.transaction(organization_id) as tx:
            await wallet.fund(tx, WalletRequest(program_id=program.id, asset_id=asset_id, amount="10"))
    for group_id in reversed(groups):
        await open_group(program, group_id)
    for number in (1, 0):
        await program.participant(f"p{number}", id=people[number])
    await program.rule(
        "true",
        counter("n", "1"),
        counter("n", "1", **to_participant(external_id="'p0'")),
        *(counter("n", "1", **to_group(group_id)) for group_id in reversed(groups)),
        counter("n", "1", **TO_PROGRAM),
        counter("n", "1", **to_other_program(other.id)),
        *(credit(asset_id, "1") for asset_id in reversed(assets)),
        budgets=[BudgetDraft(asset_id, "100") for asset_id in reversed(assets)],
    )
    return program, [
        *(Row("rule_budget", asset_id, "asset_id") for asset_id in assets),
        Row("program", other.id),
        Row("program", program.id),
        *(Row("holder_group", group_id) for group_id in groups),
        *(Row("participant", participant_id) for participant_id in people),
    ]


@asynccontextmanager
async def held(program: EventProgram, row: Row) -> AsyncIterator[Transaction]:
    """Somebody holds this row, which must be free."""
    async with program.database.transaction(program.organization_id) as tx:
        await tx.connection.execute(row.select("", "for no key update nowait"))
        yield tx


async def test_locks_are_taken_in_the_global_order_and_kept(
    database: Database, organization: Tenant, locks: Locks
) -> None:
    """Row by row: the batch waits for this one, has all before it and none behind it."""
    program, rows = await program_that_locks_everything(database, organization.id)
    event = await program.send("p1")
    async with AsyncExitStack() as stack:
        holding = await stack.enter_async_context(AsyncExitStack())
        holder = await holding.enter_async_context(held(program, rows[0]))
        batch = asyncio.create_task(program.batch())
        stack.push_async_callback(asyncio.wait, [batch])
        for place, row in enumerate(rows):
            await locks.until_waiting(batch, row, holder)
            assert [locks.is_free(row) for row in rows] == [False] * (place + 1) + [True] * (len(rows) - place - 1)
            # The next one is taken before this one is let go: the batch gets no further than there.
            let_go = holding.pop_all()
            if row != rows[-1]:
                holder = await holding.enter_async_context(held(program, rows[place + 1]))
            await let_go.aclose()
        assert (await batch).completed == 1
    assert await program.status(event) == ("COMPLETED", None)


# --- who it is that an event names, by the time that the locks are held ---


async def test_a_participant_renamed_meanwhile_is_not_whom_the_event_names(program: EventProgram, locks: Locks) -> None:
    """The name is free by then, and the program creates unknown participants: it is somebody new who gets it all."""
    points = await program.asset()
    renamed = await program.participant("alice")
    await program.rule("true", credit(points, "5"), counter("n", "1"), tag("seen"))
    event = await program.send("alice")

    await batch_beside(program, locks, Row("participant", renamed), renaming(renamed, "alice-before"))

    assert await program.status(event) == ("COMPLETED", None)
    new = await program.id_of("alice")
    assert new not in (None, renamed)
    assert (await program.outcome(event)).participant_id == new
    assert await program.balances(points, "alice", "alice-before") == [5, 0]
    assert await program.counters("alice") == {"n": 1}
    assert await program.tags("alice") == {"seen"}
    assert await program.history(renamed) == []
    assert await program.enrollment("alice") == "ACTIVE"
    assert await program.enrollment("alice-before") is None


async def test_an_event_is_about_whoever_has_been_given_the_name_meanwhile(program: EventProgram, locks: Locks) -> None:
    before, after = await program.participant("alice"), await program.participant("bob")
    await program.rule("true", counter("n", "1"))
    event = await program.send("alice")

    async def swap(tx: Transaction) -> None:
        await renaming(before, "alice-before")(tx)
        await renaming(after, "alice")(tx)

    await batch_beside(program, locks, Row("participant", before), swap)

    assert await program.status(event) == ("COMPLETED", None)
    assert (await program.outcome(event)).participant_id == after
    assert await program.counters(before) == {}
    assert await program.counters(after) == {"n": 1}


async def test_under_reject_a_name_that_nobody_has_any_more_is_unknown(
    database: Database, organization: Tenant, locks: Locks
) -> None:
    strict = await EventProgram.open(database, organization.id, on_unknown_participant="REJECT")
    renamed = await strict.participant("alice")
    await strict.rule("true", counter("n", "1"))
    event = await strict.send("alice")

    await batch_beside(strict, locks, Row("participant", renamed), renaming(renamed, "alice-before"))

    assert await strict.status(event) == ("FAILED", "unknown participant")
    assert await strict.sql("select external_id from participant") == [("alice-before",)]
    assert await strict.counters(renamed) == {}


async def test_a_target_renamed_meanwhile_is_not_whom_the_rule_names(program: EventProgram, locks: Locks) -> None:
    points = await program.asset()
    renamed = await program.participant("ref")
    await program.rule("true", credit(points, "5", **to_participant(external_id="event.to")))
    event = await program.send("alice", to="ref")

    await batch_beside(program, locks, Row("participant", renamed), renaming(renamed, "ref-before"))

    assert await program.status(event) == ("COMPLETED", None)
    assert await program.balances(points, "ref", "ref-before") == [5, 0]


async def test_nobody_is_created_whom_a_change_made_meanwhile_keeps_from_being_reached(
    program: EventProgram, locks: Locks
) -> None:
    """Whom the event reaches was learnt before the wait; what has been committed since decides."""
    points = await program.asset()
    alice = await program.participant("alice")
    await program.rule(
        "!('rewarded' in participant.tags)", credit(points, "5", **to_participant(external_id="event.to"))
    )
    event = await program.send("alice", to="nobody")

    await batch_beside(program, locks, Row("participant", alice), tagging("participant", alice, "rewarded"))

    assert await program.status(event) == ("COMPLETED", None)
    assert await program.sql("select external_id from participant") == [("alice",)]
