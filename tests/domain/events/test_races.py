"""Drains beside each other and beside direct operations: nothing lost, nothing doubled, no deadlock for anybody.

Contract: rules-and-events.md 7.6, 7.7; holders.md 6.9.
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from decimal import Decimal
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest

from db.session import Database, Transaction
from domain import limits, participants, state, wallet
from domain.events import batch as batches
from domain.events.drain import drain
from domain.participants import StateChanges
from domain.rules import compiled
from domain.rules.cel import Expression, compile_expression
from domain.rules.store import patch_rule
from domain.wallet import WalletRequest
from tests.conftest import Tenant
from tests.events_support import NO_RETRIES, TO_PROGRAM, EventProgram, attribute, counter, credit, debit, to_participant


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DRAIN_LINGER_MS", -1)


async def drained(program: EventProgram) -> None:
    await drain(program.database, program.organization_id, program.id, NO_RETRIES, lambda _: None)


async def until_empty(program: EventProgram, limit: int) -> None:
    """Batches of `limit` until nothing is due; whatever Postgres has to say comes out."""
    while (await program.batch(limit)).events:
        pass


async def at_once(*calls: Awaitable[Any]) -> None:
    """Run everything at once; the first exception of any of them is the test's."""
    await asyncio.gather(*calls)


async def link(program: EventProgram, asset_id: UUID) -> None:
    await program.sql(
        "insert into program_asset (organization_id, program_id, asset_id, created_at) values (%s, %s, %s, now())",
        program.organization_id,
        program.id,
        asset_id,
    )


async def all_completed(program: EventProgram) -> bool:
    return await program.sql("select distinct status from event") == [("COMPLETED",)]


async def change_rule(program: EventProgram, rule_id: UUID, *actions: dict[str, Any]) -> None:
    """Give a rule other actions."""
    async with program.database.transaction(program.organization_id) as tx:
        await patch_rule(tx, rule_id, {"actions": list(actions)})


async def until_blocked_by(owner: psycopg.Connection[Any], holder: Transaction) -> None:
    """Return as soon as somebody waits for a lock of `holder`."""
    query = "select exists (select from pg_stat_activity where %s = any(pg_blocking_pids(pid)))"
    for _ in range(10_000):
        if owner.execute(query, (holder.connection.info.backend_pid,)).fetchone() == (True,):
            return
        await asyncio.sleep(0.001)
    raise AssertionError("nobody waits")


async def adjust(client: httpx.AsyncClient, program: EventProgram, who: UUID, asset_id: UUID, **fields: Any) -> str:
    """Adjust by an API call; the code of its refusal, or `ok`."""
    body = {"program_id": str(program.id), "asset_id": str(asset_id), "description": "by hand", **fields}
    answer = await client.post(f"/participants/{who}/balances/adjust", json=body)
    return "ok" if answer.status_code == 200 else str(answer.json()["code"])


async def test_direct_adjustments_beside_a_drain_lose_nothing(program: EventProgram, client: httpx.AsyncClient) -> None:
    points = await program.asset()
    alice = await program.participant("alice")
    await program.rule("true", credit(points, "1"))
    await program.ingest([program.event("alice") for _ in range(60)])

    async def by_hand(kind: str, amount: str) -> None:
        assert await adjust(client, program, alice, points, type=kind, amount=amount, allow_negative=True) == "ok"

    await at_once(
        until_empty(program, 7),
        *(by_hand("CREDIT", "100") for _ in range(15)),
        *(by_hand("DEBIT", "10") for _ in range(15)),
    )

    assert await program.balance("alice", points) == 60 + 1_500 - 150
    assert await all_completed(program)


async def test_counter_writes_by_hand_beside_a_drain_are_neither_lost_nor_torn(program: EventProgram) -> None:
    alice = await program.participant("alice")
    await program.rule("true", counter("n", "1"))
    await program.ingest([program.event("alice") for _ in range(60)])

    async def put(value: str) -> None:
        async with program.database.transaction(program.organization_id) as tx:
            await state.set_counter(tx, await state.lock(tx, "participant", alice), "n", value, None)

    await at_once(until_empty(program, 5), *(put(str(1_000 * n)) for n in range(1, 11)))

    # The history is one unbroken chain: every change began at what the one before it left.
    chain = [(old, new) for _, _, _, old, new in await program.history()]
    increments = [1 for old, new in chain if Decimal(new or 0) - Decimal(old or 0) == 1]
    links = {new for _, new in chain}
    assert sum(old not in links for old, _ in chain) == 1, "only the very first change begins at nothing"
    assert len(increments) == 60
    final = (await program.counters())["n"]
    assert str(final.normalize()) not in {old for old, _ in chain}


async def test_two_drains_at_once_never_overlap_or_double(program: EventProgram) -> None:
    points = await program.asset()
    await program.rule(
        "true", credit(points, "1"), attribute("trail", 'get(participant.attributes, "trail", "") + event.step')
    )
    steps = [chr(ord("a") + n % 26) for n in range(80)]
    await program.ingest([program.event("alice", step=step) for step in steps])

    await at_once(until_empty(program, 3), until_empty(program, 5), drained(program), until_empty(program, 1))

    assert await program.balance("alice", points) == 80
    assert await program.attributes() == {"trail": "".join(steps)}
    assert await program.sql("select count(*)::int, count(distinct event_id)::int from journal_entry") == [(80, 80)]


async def test_programs_that_reach_for_each_others_participants_never_deadlock(
    database: Database, organization: Tenant
) -> None:
    names = [f"p{n}" for n in range(8)]
    programs = [await EventProgram.open(database, organization.id) for _ in range(3)]
    points = await programs[0].asset()
    pool = await programs[0].asset(issuance_policy="PREFUNDED")
    for number, program in enumerate(programs):
        if number:
            await link(program, points)
            await link(program, pool)
        async with database.transaction(organization.id) as tx:
            await wallet.fund(tx, WalletRequest(program_id=program.id, asset_id=pool, amount="1000"))
        await program.rule(
            "true",
            credit(points, "2"),
            credit(pool, "1", **to_participant(external_id="event.to")),
            debit(points, "1", allow_negative=True, **to_participant(external_id="event.to")),
            counter("seen", "1", **to_participant(external_id="event.to")),
            counter("total", "1", **TO_PROGRAM),
        )
        shuffled = names[number:] + names[:number]
        if number % 2:
            shuffled.reverse()
        await program.ingest([program.event(shuffled[n % 8], to=shuffled[(n * 3 + number + 1) % 8]) for n in range(48)])

    await at_once(*(until_empty(program, 6) for program in programs))

    assert await all_completed(programs[0])
    first = programs[0]
    assert sum(await first.balances(points, *names)) == 3 * 48
    assert sum(await first.balances(pool, *names)) == 3 * 48
    assert sum([(await first.counters(name))["seen"] for name in names]) == 3 * 48
    assert [await program.counters(program.id) for program in programs] == [{"total": 48}] * 3
    assert await first.balances(pool, *(program.id for program in programs)) == [952] * 3


async def test_one_unknown_participant_in_many_places_is_made_once(database: Database, organization: Tenant) -> None:
    """Programs and API calls come upon the same unknown external ids at once, in different orders."""
    names = [f"new{n}" for n in range(10)]
    programs = [await EventProgram.open(database, organization.id) for _ in range(3)]
    for number, program in enumerate(programs):
        await program.rule("true", counter("n", "1"), counter("n", "1", **to_participant(external_id="event.to")))
        order = names if number % 2 else names[::-1]
        await program.ingest([program.event(name, to=names[(n + number) % 10]) for n, name in enumerate(order)])

    async def upsert(name: str) -> None:
        async def work(tx: Any) -> None:
            await participants.upsert(
                tx, name, profile={}, changes=StateChanges({"by": "api"}), program_id=programs[0].id
            )

        await database.repeat(organization.id, work)

    await at_once(*(drained(program) for program in programs), *(upsert(name) for name in names))
    await at_once(*(until_empty(program, 50) for program in programs))

    first = programs[0]
    assert await first.sql("select count(*)::int from participant") == [(10,)]
    assert sum([(await first.counters(name))["n"] for name in names]) == 2 * 3 * 10
    assert all([(await first.attributes(name)) == {"by": "api"} for name in names])
    assert await first.sql("select count(*)::int from enrollment where status = 'ACTIVE'") == [(30,)]


async def test_a_wallet_that_rules_and_people_use_at_once_is_never_overdrawn(
    program: EventProgram, client: httpx.AsyncClient
) -> None:
    points = await program.asset(issuance_policy="PREFUNDED")
    await program.rule("true", credit(points, "10"))
    await program.ingest([program.event(f"p{n}") for n in range(30)])
    alice = await program.participant("alice")
    answers: list[str] = []

    async def fund() -> None:
        path = f"/programs/{program.id}/assets/{points}/fund"
        assert (await client.post(path, json={"amount": "25"})).status_code == 200

    async def by_hand() -> None:
        answers.append(await adjust(client, program, alice, points, type="CREDIT", amount="10"))

    await at_once(until_empty(program, 4), *(fund() for _ in range(4)), *(by_hand() for _ in range(8)))

    completed = (await program.sql("select count(*)::int from event where status = 'COMPLETED'"))[0][0]
    assert set(answers) <= {"ok", "insufficient_program_balance"}
    assert await program.balance("alice", points) == 10 * answers.count("ok")
    left = await program.balance(program.id, points)
    assert left == 100 - 10 * completed - 10 * answers.count("ok")
    assert left >= 0


async def test_rules_that_change_during_a_drain_apply_whole_or_not_at_all(program: EventProgram) -> None:
    """Every event meets one version of the rules, the old or the new, and its records say which."""
    rule = await program.rule("true", counter("a", "1"), counter("b", "1"))
    await program.ingest([program.event("alice") for _ in range(40)])

    async def change(n: int) -> None:
        await change_rule(program, rule.id, counter("a", str(n)), counter("b", str(n)))

    async def changes() -> None:
        for n in range(2, 12):
            await change(n)

    async def drains() -> None:
        # A batch that never meets the rules it has just learnt does nothing, and whoever drains looks again.
        while await program.sql("select id from event where status = 'RECEIVED' limit 1"):
            await program.batch(2)

    await at_once(drains(), changes())

    values = await program.counters()
    assert values["a"] == values["b"] >= 40
    assert await all_completed(program)


async def test_rules_changed_between_two_batches_are_what_the_second_one_applies(program: EventProgram) -> None:
    rule = await program.rule("true", counter("a", "1"))
    await program.ingest([program.event() for _ in range(4)])

    assert (await program.batch(2)).completed == 2
    await change_rule(program, rule.id, counter("b", "1"))
    assert (await program.batch(2)).completed == 2

    assert await program.counters() == {"a": 2, "b": 2}


async def test_a_rule_made_or_archived_between_two_batches_counts_from_the_second_one_on(program: EventProgram) -> None:
    old = await program.rule("true", counter("old", "1"))
    await program.run()

    async with program.database.transaction(program.organization_id) as tx:
        await patch_rule(tx, old.id, {"status": "ARCHIVED"})
    await program.rule("true", counter("new", "1"))
    await program.run()

    assert await program.counters() == {"old": 1, "new": 1}


async def test_rules_changed_while_a_batch_waits_for_its_turn_are_what_it_applies(
    program: EventProgram, owner: psycopg.Connection[Any]
) -> None:
    rule = await program.rule("true", counter("a", "1"))
    await program.run()
    await program.send()

    async with program.database.transaction(program.organization_id) as attempt:
        await attempt.execute("select pg_advisory_xact_lock(hashtextextended(%s, 0))", (str(program.id),))
        batch = asyncio.create_task(program.batch())
        await until_blocked_by(owner, attempt)
        await change_rule(program, rule.id, counter("b", "1"))
    assert (await batch).completed == 1

    assert await program.counters() == {"a": 1, "b": 1}


async def test_rules_changed_while_they_are_learnt_are_learnt_again(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = await program.rule("true", counter("a", "1"))
    await program.send()
    learnt = 0

    async def learn_and_change(*args: Any) -> None:
        nonlocal learnt
        await compiled.learn_rules(*args)
        learnt += 1
        if learnt == 1:
            await change_rule(program, rule.id, counter("b", "1"))

    monkeypatch.setattr(batches, "learn_rules", learn_and_change)

    assert (await program.batch()).completed == 1
    assert learnt == 2
    assert await program.counters() == {"b": 1}


async def test_rules_changed_while_they_are_read_are_read_again(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old rules must never be taken for the new version: they would stay in use until the next change."""
    rule = await program.rule("true", counter("a", "1"))
    await program.send()
    read = Transaction.all

    async def read_and_change(tx: Transaction, statement: Any) -> Any:
        monkeypatch.setattr(Transaction, "all", read)
        rows = await read(tx, statement)
        await change_rule(program, rule.id, counter("b", "1"))
        return rows

    monkeypatch.setattr(Transaction, "all", read_and_change)

    assert (await program.batch()).completed == 1
    assert await program.counters() == {"b": 1}


async def test_rules_that_never_stop_changing_hold_up_their_own_program_and_lose_nothing(
    program: EventProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = await program.rule("true", counter("n", "1"))
    event = await program.send()
    values = iter(range(2, 100))

    async def learn_and_change(*args: Any) -> None:
        await compiled.learn_rules(*args)
        await change_rule(program, rule.id, counter("n", str(next(values))))

    with monkeypatch.context() as busy:
        busy.setattr(batches, "learn_rules", learn_and_change)
        assert (await program.batch()).events == 0
    assert (await program.status(event))[0] == "RECEIVED"
    assert (await program.batch()).completed == 1

    assert await program.counters() == {"n": next(values) - 1}


async def test_rules_are_compiled_while_no_transaction_is_open(
    program: EventProgram, database_url: str, owner: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules at their limits take seconds to compile: nobody must wait for a lock of the batch meanwhile."""
    await program.rule("event.page == 'compiled here for the first time'", counter("n", "1"))
    await program.send(page="compiled here for the first time")
    seen: list[str] = []
    # One connection, so it is the only one that this batch can have a transaction on.
    alone = Database(database_url, size=1, timeout_s=5, clock=program.database.clock)
    await alone.open()
    async with alone.transaction(program.organization_id) as tx:
        own = tx.connection.info.backend_pid

    def compile_and_look(text: str) -> Expression:
        row = owner.execute("select state from pg_stat_activity where pid = %s", (own,)).fetchone()
        assert row is not None
        seen.append(row[0])
        return compile_expression(text)

    monkeypatch.setattr(compiled, "compile_expression", compile_and_look)
    result = await replace(program, database=alone).batch()
    await alone.close()

    assert result.completed == 1
    assert seen == ["idle"], "not `idle in transaction`"
