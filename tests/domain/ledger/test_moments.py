"""What a moment covers, and that it covers the same for ever. Contract: webhooks-and-reports.md 9."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql

from db.session import Database, Transaction
from domain.ledger import moments, statements
from domain.ledger.balances import holder_balances_at
from domain.ledger.journal import load_accounts, write
from domain.ledger.moments import Mark, Moment, Position
from domain.locks import lock_participants
from tests.builders import Shop, d, make_participant, open_shop
from tests.conftest import SettableClock, Tenant
from tests.ledger_invariants import assert_ledger_invariants

MICROSECOND = timedelta(microseconds=1)

Credit = Callable[..., Awaitable[datetime]]


@pytest.fixture
async def shop(database: Database, organization: Tenant) -> Shop:
    return await open_shop(database, organization.id)


async def post_credit(tx: Transaction, shop: Shop, count: int = 1) -> None:
    """Write entries of 1 for alice: everything but the sealing, which comes with the commit."""
    await lock_participants(tx, [shop.alice])
    books = await load_accounts(tx, [shop.alice], [shop.asset_id])
    alice = books.account("PARTICIPANT", shop.alice, shop.asset_id, "AVAILABLE")
    source = books.system("SYSTEM_ISSUANCE", shop.asset_id)
    for _ in range(count):
        books.post("CREDIT", [(source, d("-1")), (alice, d("1"))], program_id=shop.program_id)
    await write(tx, books)


@pytest.fixture
def credit(database: Database, organization: Tenant, owner: psycopg.Connection[Any], shop: Shop) -> Credit:
    """Credit alice with `count` entries of 1 in one transaction; when they were created."""

    async def run(count: int = 1) -> datetime:
        async with database.transaction(organization.id) as tx:
            await post_credit(tx, shop, count)
        return newest(owner, organization)

    return run


def newest(owner: psycopg.Connection[Any], organization: Tenant) -> datetime:
    row = owner.execute(
        "select created_at from journal_entry where organization_id = %s order by sequence desc limit 1",
        (organization.id,),
    ).fetchone()
    assert row is not None
    instant: datetime = row[0]
    return instant


@pytest.fixture
def at(database: Database, organization: Tenant) -> Callable[..., Awaitable[Moment]]:
    """The moment of an instant, in a transaction of its own."""

    async def run(instant: datetime | None = None) -> Moment:
        async with database.transaction(organization.id) as tx:
            return await moments.at(tx, instant)

    return run


async def test_a_moment_covers_what_was_created_at_or_before_it(
    database: Database, organization: Tenant, credit: Credit, at: Callable[..., Awaitable[Moment]]
) -> None:
    created = [await credit(count) for count in (1, 3, 1, 2)]

    covered = [(await at(instant)).sequence for instant in created]
    assert covered == [1, 4, 5, 7]
    assert [(await at(instant - MICROSECOND)).sequence for instant in created] == [0, 1, 4, 5]
    async with database.transaction(organization.id) as tx:
        assert [await moments.sequence_before(tx, instant) for instant in created] == [0, 1, 4, 5]
        assert [await moments.sequence_before(tx, instant + MICROSECOND) for instant in created] == covered


async def test_an_empty_ledger_has_moments_too(at: Callable[..., Awaitable[Moment]], clock: SettableClock) -> None:
    clock.set("2024-06-01T00:00:00Z")

    assert await at() == Moment(clock(), 0)
    assert (await at(clock() - timedelta(days=10_000))).sequence == 0


async def test_without_an_instant_and_in_the_future_it_is_the_present(
    credit: Credit, at: Callable[..., Awaitable[Moment]], clock: SettableClock
) -> None:
    clock.set("2024-06-01T00:00:00Z")
    await credit(2)
    clock.advance(hours=1)

    assert await at() == Moment(clock(), 2)
    assert await at(clock() + timedelta(days=1)) == Moment(clock(), 2)


async def test_a_clock_behind_the_chain_sees_all_of_it(
    credit: Credit, at: Callable[..., Awaitable[Moment]], clock: SettableClock
) -> None:
    clock.set("2024-06-01T12:00:00Z")
    created_at = await credit()
    clock.advance(seconds=-5)
    created_at = await credit()

    assert await at() == Moment(created_at, 2)


async def test_a_writer_that_was_open_is_sealed_after_the_moment(
    database: Database,
    organization: Tenant,
    owner: psycopg.Connection[Any],
    shop: Shop,
    credit: Credit,
    at: Callable[..., Awaitable[Moment]],
) -> None:
    await credit()
    async with database.transaction(organization.id) as writer:
        await post_credit(writer, shop)
        moment = await at()
        assert moment.instant > writer.now
        assert moment.sequence == 1

    assert newest(owner, organization) > moment.instant
    assert await at(moment.instant) == moment
    assert (await at()).sequence == 2


async def test_a_writer_that_is_committing_is_waited_for(
    database: Database,
    organization: Tenant,
    owner: psycopg.Connection[Any],
    shop: Shop,
    at: Callable[..., Awaitable[Moment]],
) -> None:
    async with database.transaction(organization.id) as writer:
        await post_credit(writer, shop)
        assert writer._last_statement is not None
        seal, writer._last_statement = writer._last_statement, None
        await writer.connection.execute(sql.SQL("{}").format(seal))
        report = asyncio.ensure_future(at())
        await until_blocked_by(owner, writer)
        assert not report.done()

    moment = await report
    assert moment.sequence == 1
    assert moment.instant >= newest(owner, organization)


async def until_blocked_by(owner: psycopg.Connection[Any], writer: Transaction) -> None:
    """Return as soon as somebody waits for a lock of `writer`."""
    query = "select exists (select from pg_stat_activity where %s = any(pg_blocking_pids(pid)))"
    for _ in range(10_000):
        if owner.execute(query, (writer.connection.info.backend_pid,)).fetchone() == (True,):
            return
        await asyncio.sleep(0)
    raise AssertionError("nobody waits")


async def test_a_moment_holds_no_lock(
    database: Database, organization: Tenant, owner: psycopg.Connection[Any], shop: Shop, credit: Credit
) -> None:
    async with database.transaction(organization.id) as report:
        moment = await moments.at(report)
        created_at = await credit()
        # The report goes on, still in its organization.
        assert await report.row("select count(*) as n from journal_entry") == {"n": 1}
        assert await holder_balances_at(report, shop.alice, moment) == []

    assert created_at > moment.instant


async def test_moments_and_writers_at_once_never_contradict_each_other(
    database: Database,
    organization: Tenant,
    owner: psycopg.Connection[Any],
    shop: Shop,
    at: Callable[..., Awaitable[Moment]],
) -> None:
    async with database.transaction(organization.id) as tx:
        holders = [await make_participant(tx) for _ in range(8)]
    shops = [Shop(shop.program_id, shop.asset_id, holder) for holder in holders]
    taken: list[Moment] = []

    async def write_some(own: Shop) -> None:
        for _ in range(10):
            async with database.transaction(organization.id) as tx:
                await post_credit(tx, own)

    async def take_some() -> None:
        for _ in range(15):
            taken.append(await at())

    await asyncio.gather(*(write_some(own) for own in shops[:4]), *(take_some() for _ in range(3)))

    for moment in taken:
        assert await at(moment.instant) == moment
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


async def test_a_moment_comes_before_anything_is_written(database: Database, organization: Tenant) -> None:
    async with database.transaction(organization.id) as tx:
        await make_participant(tx)
        with pytest.raises(AssertionError):
            await moments.at(tx)


async def test_marks_are_the_newest_postings_up_to_each_position(
    database: Database, organization: Tenant, shop: Shop, credit: Credit
) -> None:
    await credit(5)
    async with database.transaction(organization.id) as tx:
        (account,) = (await statements._accounts(tx, "participant", shop.alice, None, None)).values()
        positions = [Position(0), Position(1, 0), Position(1, 1), Position(4), Position(5), Position(10**18)]
        found = await moments.marks(tx, [account.id], positions)

        # In these entries alice's posting is the second one, with ordinal 1.
        assert found == {
            account.id: (Mark(), Mark(), Mark(1, d("1")), Mark(4, d("4")), Mark(5, d("5")), Mark(5, d("5")))
        }
        assert await moments.marks(tx, [], positions) == {}


@pytest.mark.parametrize("analyzed", [False, True])
async def test_marks_in_long_ledgers_take_a_few_probes(
    database: Database, organization: Tenant, owner: psycopg.Connection[Any], shop: Shop, credit: Credit, analyzed: bool
) -> None:
    """As the application's role: row-level security turns index conditions into filters where one isn't careful."""
    await credit(20_000)
    if analyzed:
        owner.execute("analyze posting, journal_entry, account")
    async with database.transaction(organization.id) as tx:
        (account,) = (await statements._accounts(tx, "participant", shop.alice, None, None)).values()
        positions = [Position(1), Position(10_000), Position(20_000)]
        lines = await explain(
            tx,
            moments._MARKS,
            {
                "organization_id": tx.organization_id,
                "account_ids": [account.id],
                "sequences": [position.sequence for position in positions],
                "ordinals": [position.ordinal for position in positions],
            },
        )
        found = await moments.marks(tx, [account.id], positions)

    assert [mark.version for mark in found[account.id]] == [1, 10_000, 20_000]
    assert_indexed(lines, pages=1_000)


async def explain(tx: Transaction, query: Any, params: Any) -> list[str]:
    explained: Any = f"explain (analyze, buffers, costs off, timing off, summary off) {query}"
    return [line for (line,) in await (await tx.execute(explained, params)).fetchall()]


def assert_indexed(lines: list[str], *, pages: int) -> None:
    """Assert that a plan reads the ledger through indexes only, and no more than `pages` pages of 8 KiB."""
    assert not any(re.search(r"Seq Scan on (posting|journal_entry|event)", line) for line in lines), "\n".join(lines)
    buffers = next(line for line in lines if "Buffers:" in line)
    read = sum(int(n) for n in re.findall(r"(?:hit|read)=(\d+)", buffers))
    assert read <= pages, "\n".join(lines)
