"""What callers see when connections are lost or run out: one error, which says whether something may have been done."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql

from db.session import Database, DatabaseUnavailable, OutcomeUnknown, Tally, Transaction
from domain.clock import system_clock
from tests.conftest import Tenant
from tests.servers import Postgres


@asynccontextmanager
async def opened(postgres: Postgres, **options: Any) -> AsyncIterator[Database]:
    """A pool of the test's own: `options` override two connections and a wait of ten seconds."""
    database = Database(postgres.app_url, **{"size": 2, "timeout_s": 10, "clock": system_clock, **options})
    await database.open()
    try:
        yield database
    finally:
        await database.close()


async def backends(database: Database, organization: Tenant, count: int) -> list[int]:
    """The server processes of `count` connections, which lie in the pool afterwards."""
    async with AsyncExitStack() as stack:
        transactions = [await stack.enter_async_context(database.transaction(organization.id)) for _ in range(count)]
        return [tx.connection.info.backend_pid for tx in transactions]


def terminate(postgres: Postgres, pids: list[int]) -> None:
    """End server processes, and wait until they are gone."""
    with psycopg.connect(postgres.superuser_url, autocommit=True) as superuser:
        for pid in pids:
            assert superuser.execute("select pg_terminate_backend(%s, 10000)", (pid,)).fetchone() == (True,)


async def until_it_waits(postgres: Postgres, pid: int) -> None:
    """Return once the server process waits for a lock."""
    connection = await psycopg.AsyncConnection.connect(postgres.superuser_url, autocommit=True)
    async with connection, asyncio.timeout(10):
        while True:
            cursor = await connection.execute("select pg_blocking_pids(%s)", (pid,))
            if await cursor.fetchone() != ([],):
                return


@asynccontextmanager
async def held_commit(
    database: Database, postgres: Postgres, organization: Tenant
) -> AsyncIterator[tuple[asyncio.Task[None], int]]:
    """A transaction whose commit waits for the chain head, which another session holds; and its server process."""
    lock = sql.SQL("select 1 from chain_head where organization_id = {} for no key update").format(
        sql.Literal(organization.id)
    )
    begun: asyncio.Queue[int] = asyncio.Queue()

    async def write() -> None:
        async with database.transaction(organization.id) as tx:
            await tx.execute(
                "insert into tag (organization_id, entity_id, tag, created_at) values (%s, %s, 'x', now())",
                (organization.id, organization.id),
            )
            tx.after_commit(lambda: pytest.fail("it has not committed"))
            tx.commit_with(lock)
            begun.put_nowait(tx.connection.info.backend_pid)

    holder = await psycopg.AsyncConnection.connect(postgres.owner_url)
    async with holder:
        await holder.execute(lock)
        writing = asyncio.create_task(write())
        pid = await begun.get()
        await until_it_waits(postgres, pid)
        yield writing, pid


def tags(owner: psycopg.Connection[Any], organization: Tenant) -> int:
    """How many rows the transactions left."""
    cursor = owner.execute("select 1 from tag where organization_id = %s", (organization.id,))
    return len(cursor.fetchall())


@pytest.mark.parametrize("lost", [1, 3])
async def test_connections_that_died_in_the_pool_are_replaced_unnoticed(
    postgres: Postgres, organization: Tenant, lost: int
) -> None:
    async with opened(postgres, size=3) as database:
        terminate(postgres, await backends(database, organization, lost))
        assert await database.system_rows("select %s::int", (7,)) == [(7,)]

        terminate(postgres, await backends(database, organization, lost))
        async with database.transaction(organization.id) as tx:
            assert await tx.rows("select 7 as n") == [{"n": 7}]


async def test_a_system_query_that_fails_for_good_says_so_in_one_error(postgres: Postgres) -> None:
    async with opened(postgres, size=1) as database:
        with pytest.raises(DatabaseUnavailable, match="closes its connections"):
            await database.system_rows("select pg_terminate_backend(pg_backend_pid())")
        with pytest.raises(psycopg.errors.UndefinedTable):
            await database.system_rows("select * from nowhere")
        await database.system_rows("select set_config('statement_timeout', '50', false)")
        with pytest.raises(DatabaseUnavailable, match="statement timeout"):
            await database.system_rows("select pg_sleep(60)")


async def test_a_pool_that_has_no_connection_to_give_is_unavailable(postgres: Postgres, organization: Tenant) -> None:
    async with opened(postgres, size=1, timeout_s=0.05) as database:
        async with database.transaction(organization.id):
            assert database.is_busy()
            with pytest.raises(DatabaseUnavailable, match="couldn't get a connection"):
                await database.system_rows("select 7")
        assert not database.is_busy()


async def test_a_pool_that_too_many_wait_for_is_unavailable(postgres: Postgres, organization: Tenant) -> None:
    async with opened(postgres, size=1, max_waiting=1) as database:
        async with database.transaction(organization.id):
            calls = [asyncio.create_task(database.system_rows("select 7")) for _ in range(3)]
            done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            for call in done:
                with pytest.raises(DatabaseUnavailable, match="waiting"):
                    await call
        assert waiting
        await asyncio.wait(waiting)


async def test_a_closed_pool_is_unavailable(postgres: Postgres, organization: Tenant) -> None:
    async with opened(postgres) as database:
        await database.close()
        with pytest.raises(DatabaseUnavailable):
            await database.system_rows("select 7")
        with pytest.raises(DatabaseUnavailable):
            async with database.transaction(organization.id):
                pytest.fail("no transaction begins")


async def test_a_connection_lost_during_the_commit_leaves_the_outcome_unknown(
    postgres: Postgres, organization: Tenant, owner: psycopg.Connection[Any]
) -> None:
    async with opened(postgres) as database:
        async with held_commit(database, postgres, organization) as (writing, pid):
            terminate(postgres, [pid])
            with pytest.raises(OutcomeUnknown, match="lost during the commit"):
                await writing
        assert tags(owner, organization) == 0
        assert await database.system_rows("select 7") == [(7,)]


async def test_a_commit_that_postgres_refuses_is_known_to_have_done_nothing(
    postgres: Postgres, organization: Tenant, owner: psycopg.Connection[Any]
) -> None:
    async with opened(postgres) as database, held_commit(database, postgres, organization) as (writing, pid):
        with psycopg.connect(postgres.superuser_url, autocommit=True) as superuser:
            superuser.execute("select pg_cancel_backend(%s)", (pid,))
        with pytest.raises(DatabaseUnavailable, match="canceling statement") as refused:
            await writing
        assert not isinstance(refused.value, OutcomeUnknown)
        assert tags(owner, organization) == 0


class TooLate(Exception):
    """What a test's transaction raises after its deadline."""


@pytest.mark.parametrize(("seconds", "rows"), [(60, 1), (-60, 0)])
@pytest.mark.parametrize("last_statement", [None, "select 1"])
async def test_a_transaction_with_a_deadline_commits_in_time_or_never(
    postgres: Postgres,
    organization: Tenant,
    owner: psycopg.Connection[Any],
    seconds: int,
    rows: int,
    last_statement: LiteralString | None,
) -> None:
    async def write() -> None:
        async with database.transaction(organization.id) as tx:
            await tx.execute(
                "insert into tag (organization_id, entity_id, tag, created_at) values (%s, %s, 'x', now())",
                (organization.id, organization.id),
            )
            if last_statement is not None:
                tx.commit_with(sql.SQL(last_statement))
            tx.commit_by(datetime.now(UTC) + timedelta(seconds=seconds), TooLate())

    async with opened(postgres) as database:
        if rows:
            await write()
        else:
            with pytest.raises(TooLate):
                await write()
        assert tags(owner, organization) == rows
        assert await database.system_rows("select 7") == [(7,)]


async def test_what_had_to_be_repeated_is_counted_and_logged(
    postgres: Postgres, organization: Tenant, caplog: pytest.LogCaptureFixture
) -> None:
    """Conflicts only: neither a refusal nor an outage says anything about the order of locks."""
    attempts: list[int] = []

    async def conflicts_twice(tx: Transaction) -> int:
        attempts.append(len(attempts))
        if len(attempts) <= 2:
            await tx.execute("do $$ begin raise exception using errcode = '40P01'; end $$")
        return len(attempts)

    caplog.set_level("INFO", "scrip.db")
    async with opened(postgres) as database:
        assert await database.repeat(organization.id, conflicts_twice) == 3
        with pytest.raises(ValueError, match="refused"):
            async with database.transaction(organization.id):
                raise ValueError("refused")

        assert database.tally == Tally(begun=4, conflicted=2)
    noted = [record for record in caplog.records if record.message == "transaction given up for a conflict"]
    assert [(record.__dict__["conflicted"], record.__dict__["begun"]) for record in noted] == [(1, 1), (2, 2)]
