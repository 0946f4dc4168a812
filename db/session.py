"""Connections and transactions: who opens one owns it, everything inside only joins it.

A `Transaction` is what domain functions receive. They run statements and never commit. The edges (an API request, an
activity, a command) open one with `Database`, which also repeats it when Postgres asks for that.
"""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, LiteralString, TypeVar
from uuid import UUID

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import DictRow, TupleRow, dict_row, tuple_row
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests
from sqlalchemy import insert
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.sql import ClauseElement
from sqlmodel import SQLModel
from sqlmodel.sql.expression import SelectOfScalar

from db import json, tables  # noqa: F401  (registers the tables and how JSON is read and written)

logger = logging.getLogger("scrip.db")

T = TypeVar("T")
Row = TypeVar("Row", bound=SQLModel)

# Whole transactions are repeated for these; everything they did was rolled back by Postgres.
REPEATABLE = (
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
    psycopg.errors.UniqueViolation,
)
ATTEMPTS = 4
LOCK_TIMEOUT_MS = 5_000
# What `refuse_late` raises (db/migrations/sql/0003_guards.sql).
_TOO_LATE = "SC001"
_SESSION_OPTIONS = (
    f"-c timezone=UTC -c lock_timeout={LOCK_TIMEOUT_MS} -c statement_timeout=60000"
    " -c idle_in_transaction_session_timeout=120000"
)
# A database that has been silent for longer, while connections wait for it, counts as lost and not as busy.
_SILENCE_S = 30.0
_DIALECT = PGDialect_psycopg(paramstyle="pyformat")  # type: ignore[no-untyped-call]


class DatabaseUnavailable(Exception):
    """Postgres is out of reach, or too busy to serve this call in time. Nothing was done, but for `OutcomeUnknown`."""


class OutcomeUnknown(DatabaseUnavailable):
    """Nobody can tell now whether it was done: all of it was, or nothing.

    The connection was lost while the commit was under way, or what another process did could not be read in time.
    """


@dataclass(slots=True)
class Transaction:
    """An open transaction of one organization: the connection, who asked, and the instant it all happens at.

    `begun_at` is when it began by the database's clock, which all processes share; `now` is by the application's.
    """

    connection: AsyncConnection[Any]
    organization_id: UUID
    now: datetime
    api_key_id: UUID | None = None
    request_id: str | None = None
    begun_at: datetime | None = None
    _last_statement: sql.Composable | None = None
    _deadline: tuple[datetime, Exception] | None = None
    _after_commit: list[Callable[[], None]] = field(default_factory=list)

    async def execute(self, query: LiteralString, params: Any = None) -> psycopg.AsyncCursor[TupleRow]:
        """Run one statement; rows come as tuples."""
        return await self.connection.execute(query, params)

    async def rows(self, query: LiteralString, params: Any = None) -> list[DictRow]:
        """Run one query; rows come as dicts."""
        async with self.connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(query, params)
            return await cursor.fetchall()

    async def row(self, query: LiteralString, params: Any = None) -> DictRow | None:
        """Run one query; its first row as a dict, or None."""
        rows = await self.rows(query, params)
        return rows[0] if rows else None

    async def all(self, statement: SelectOfScalar[Row]) -> list[Row]:
        """Run a SQLModel `select(Table)` and return its rows as objects of the table."""
        entity: type[Row] = statement.column_descriptions[0]["entity"]
        query, params = _compile(statement)
        return [entity(**row) for row in await self.rows(query, params)]

    async def first(self, statement: SelectOfScalar[Row]) -> Row | None:
        """Run a SQLModel `select(Table)` and return its first row, or None."""
        rows = await self.all(statement)
        return rows[0] if rows else None

    async def run(self, statement: ClauseElement) -> int:
        """Run an SQLAlchemy insert, update or delete; the number of rows it touched."""
        query, params = _compile(statement)
        return (await self.execute(query, params)).rowcount

    async def insert(self, row: SQLModel) -> None:
        """Insert one row of a table."""
        await self.run(insert(type(row)).values(row.model_dump()))

    def commit_with(self, statement: sql.Composable) -> None:
        """Send `statement` together with the commit, in one message.

        For the statement that takes the organization's chain head: its lock then lasts as short as can be, and no
        scheduling on our side lengthens it.
        """
        assert self._last_statement is None, "a transaction seals once"
        self._last_statement = statement

    def commit_by(self, not_after: datetime, late: Exception) -> None:
        """Commit until `not_after` or not at all, by the database's clock; raise `late` instead.

        The database judges it in the message that commits, so that a process which stands still beforehand, for
        however long, commits nothing afterwards.
        """
        assert self._deadline is None, "a transaction has one deadline"
        self._deadline = (not_after, late)

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the transaction has committed; never if it rolls back."""
        self._after_commit.append(callback)

    async def _commit(self) -> None:
        statements = [] if self._last_statement is None else [self._last_statement]
        if self._deadline is not None:
            # After the statement, which may have waited for its lock.
            statements.append(sql.SQL("select refuse_late({})").format(sql.Literal(self._deadline[0])))
        try:
            await self.connection.execute(sql.SQL("; ").join([*statements, sql.SQL("commit")]))
        except psycopg.DatabaseError as error:
            if self._deadline is not None and error.sqlstate == _TOO_LATE:
                raise self._deadline[1] from None
            if not isinstance(error, psycopg.OperationalError):
                raise
            # An error that leaves the connection alive is Postgres's word that it rolled back.
            if not self.connection.closed:
                raise
            raise OutcomeUnknown(f"the connection was lost during the commit: {str(error).strip()}") from error
        for callback in self._after_commit:
            callback()


@dataclass(frozen=True, slots=True)
class Tally:
    """How many transactions there were, and how many of them Postgres gave up for a conflict (REPEATABLE).

    Those were rolled back, and repeated by whoever had begun them. Where locks are taken in one order there are none.
    """

    begun: int = 0
    conflicted: int = 0


@dataclass(frozen=True, slots=True)
class Login:
    """What an API key stands for. Rates are requests per second and burst."""

    api_key_id: UUID
    organization_id: UUID
    rate_per_second: int
    rate_burst: int


class Database:
    """A bounded pool of connections to Postgres and the transactions on it.

    A call waits at most `timeout_s` seconds for one of `size` connections, and at most `max_waiting` calls wait.
    """

    def __init__(
        self, url: str, *, size: int, timeout_s: float, clock: Callable[[], datetime], max_waiting: int = 1_000
    ) -> None:
        self.clock = clock
        self._lent = 0
        self._tally = Tally()
        self._answered_at = float("-inf")
        self._pool: AsyncConnectionPool[AsyncConnection[TupleRow]] = AsyncConnectionPool(
            conninfo(url),
            min_size=1,
            max_size=size,
            timeout=timeout_s,
            max_waiting=max_waiting,
            open=False,
            kwargs={"autocommit": True, "row_factory": tuple_row},
            reconnect_timeout=30,
            name="scrip",
        )

    async def open(self) -> None:
        """Start the pool; returns without waiting for Postgres, which may come up later."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.close(timeout=5)

    @asynccontextmanager
    async def transaction(
        self,
        organization_id: UUID,
        *,
        api_key_id: UUID | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[Transaction]:
        """One transaction of `organization_id`: committed at the end of the block, rolled back on any exception.

        Raises DatabaseUnavailable when no connection can be had, OutcomeUnknown when it is lost during the commit.
        """
        begin = sql.SQL("begin; select clock_timestamp(), set_config('app.org', {}, true)").format(
            sql.Literal(str(organization_id))
        )
        async with self._begun(begin) as (connection, found):
            assert found is not None, "it selects one row"
            tx = Transaction(connection, organization_id, self.clock(), api_key_id, request_id, found[0])
            yield tx
            await tx._commit()

    @asynccontextmanager
    async def login(self, key_hash: bytes, request_id: str) -> AsyncIterator[tuple[Transaction, Login] | None]:
        """One transaction of the organization that the API key with this SHA-256 belongs to; None for no such key.

        The key is looked up in the message that begins the transaction, so authentication costs no round trip and a
        revoked key is refused from the very next request on. Raises what `transaction` raises.
        """
        begin = sql.SQL("begin; select clock_timestamp(), l.* from login({}) l").format(sql.Literal(key_hash))
        async with self._begun(begin) as (connection, found):
            if found is None:
                yield None
                await connection.execute("rollback")
                return
            begun_at, *columns = found
            login = Login(*columns)
            tx = Transaction(connection, login.organization_id, self.clock(), login.api_key_id, request_id, begun_at)
            yield tx, login
            await tx._commit()

    async def repeat(
        self,
        organization_id: UUID,
        work: Callable[[Transaction], Awaitable[T]],
        *,
        api_key_id: UUID | None = None,
        request_id: str | None = None,
    ) -> T:
        """Run `work` in a transaction, repeated when Postgres reports a conflict; the result of the one that held.

        Raises DatabaseUnavailable after four conflicts in a row.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with self.transaction(organization_id, api_key_id=api_key_id, request_id=request_id) as tx:
                    return await work(tx)
            except REPEATABLE as error:
                logger.info("transaction repeated", extra={"attempt": attempt, "reason": str(error)})
        raise DatabaseUnavailable("too many conflicting transactions")

    async def system_rows(self, query: LiteralString, params: Sequence[Any] = ()) -> list[TupleRow]:
        """Run one query outside every organization: it sees only what a security-definer function shows.

        It must only read, as it is run again where a connection turns out to be lost. Raises DatabaseUnavailable.
        """
        connection, cursor = await self._start(query, params)
        try:
            return await cursor.fetchall()
        finally:
            await self._give_back(connection)

    @property
    def tally(self) -> Tally:
        """The transactions on this pool so far."""
        return self._tally

    def is_busy(self) -> bool:
        """Whether connections are in use and Postgres has answered lately: who gets none now only has to wait."""
        return self._lent > 0 and time.monotonic() - self._answered_at < _SILENCE_S

    @asynccontextmanager
    async def _begun(self, begin: sql.Composed) -> AsyncIterator[tuple[AsyncConnection[TupleRow], TupleRow | None]]:
        """A connection on which `begin; select ...` ran, with the row of that select."""
        connection, found = await self._take(begin)
        self._tally = replace(self._tally, begun=self._tally.begun + 1)
        try:
            yield connection, found
        except BaseException as error:
            await _rollback(connection)
            if isinstance(error, REPEATABLE):
                self._note_conflict(error)
            if isinstance(error, psycopg.OperationalError) and not isinstance(error, REPEATABLE):
                # Lock and statement timeouts, a lost connection, a full disk: repeating at once would not help.
                raise DatabaseUnavailable(str(error).strip()) from error
            raise
        finally:
            await self._give_back(connection)

    def _note_conflict(self, error: psycopg.Error) -> None:
        self._tally = replace(self._tally, conflicted=self._tally.conflicted + 1)
        about = {"reason": type(error).__name__, "conflicted": self._tally.conflicted, "begun": self._tally.begun}
        logger.info("transaction given up for a conflict", extra=about)

    async def _take(self, begin: sql.Composed) -> tuple[AsyncConnection[TupleRow], TupleRow | None]:
        connection, cursor = await self._start(begin)
        cursor.nextset()
        return connection, await cursor.fetchone()

    async def _start(
        self, statement: LiteralString | sql.Composed, params: Sequence[Any] | None = None
    ) -> tuple[AsyncConnection[TupleRow], psycopg.AsyncCursor[TupleRow]]:
        """A connection on which `statement` ran first. The caller gives it back."""
        # Connections that died while they lay in the pool show it at their first statement: nothing was done yet.
        for _ in range(self._pool.max_size + 1):
            connection = await self._lend()
            try:
                cursor = await connection.execute(statement, params)
            except BaseException as error:
                lost = connection.closed
                await _rollback(connection)
                await self._give_back(connection)
                if not isinstance(error, psycopg.OperationalError) or isinstance(error, REPEATABLE):
                    raise
                if not lost:
                    raise DatabaseUnavailable(str(error).strip()) from error
            else:
                self._answered_at = time.monotonic()
                return connection, cursor
        raise DatabaseUnavailable("the database closes its connections")

    async def _lend(self) -> AsyncConnection[TupleRow]:
        try:
            connection = await self._pool.getconn()
        except (PoolTimeout, PoolClosed, TooManyRequests) as error:
            raise DatabaseUnavailable(f"no database connection: {error}") from error
        self._lent += 1
        return connection

    async def _give_back(self, connection: AsyncConnection[TupleRow]) -> None:
        self._lent -= 1
        await self._pool.putconn(connection)


def conninfo(url: str) -> str:
    """`url` with the session settings that every connection of ours has."""
    return make_conninfo(url, options=_SESSION_OPTIONS, application_name="scrip", connect_timeout=5)


async def _rollback(connection: AsyncConnection[TupleRow]) -> None:
    if connection.closed:
        return
    try:
        await connection.execute("rollback")
    except psycopg.Error:
        await connection.close()


def _compile(statement: ClauseElement) -> tuple[str, dict[str, Any]]:
    compiled = statement.compile(dialect=_DIALECT, compile_kwargs={"render_postcompile": True})
    processors = compiled._bind_processors  # type: ignore[attr-defined]
    params = dict(compiled.params)
    return str(compiled), {
        name: processors[name](value) if name in processors else value for name, value in params.items()
    }
