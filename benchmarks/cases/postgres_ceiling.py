"""What this Postgres takes when nothing but the rows has to be written: the ceiling of the batch case.

The rows that the batch case left behind (event, journal entries, postings, state history, and a counter per event) go
by COPY into plain copies of the tables, with their indexes, without row-level security, triggers and constraints, on
one connection, with a commit for every 200 events as in the original.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, LiteralString
from uuid import UUID, uuid4

import psycopg
from psycopg import sql

from benchmarks.case import Bench, Case, Figure
from benchmarks.load import middle
from domain.limits import BATCH_EVENTS

# The newest events of the program, in the order in which they were accepted; every query below joins them.
_PICK = """
create table {schema}.picked as
select id, seq from event where organization_id = {organization_id} and program_id = {program_id}
order by seq desc limit {events}
"""

_ROWS: Mapping[str, LiteralString] = {
    "event": """
        select e.* from {schema}.picked p join event e on e.organization_id = {organization_id} and e.id = p.id
        order by p.seq""",
    "journal_entry": """
        select j.* from {schema}.picked p
        join journal_entry j on j.organization_id = {organization_id} and j.event_id = p.id order by j.sequence""",
    "posting": """
        select o.* from {schema}.picked p
        join journal_entry j on j.organization_id = {organization_id} and j.event_id = p.id
        join posting o on o.organization_id = {organization_id} and o.entry_id = j.id order by j.sequence, o.ordinal""",
    "state_history": """
        select h.* from {schema}.picked p
        join state_history h on h.organization_id = {organization_id} and h.event_id = p.id order by p.seq""",
    # The system updates a counter in place; here each event has a row of its own, under the event's id.
    "counter": """
        select h.organization_id, p.id, h.key, h.new_value::numeric, null, h.changed_at from {schema}.picked p
        join state_history h on h.organization_id = {organization_id} and h.event_id = p.id order by p.seq""",
}


def run(bench: Bench) -> Iterator[Figure]:
    """Yield rows and events per second, and the share of it that Scrip reaches."""
    batch = bench.figures["events_per_s_batch"]
    program_id, servers = bench.programs["batch"].id, bench.servers
    with psycopg.connect(servers.owner_database_url, autocommit=True) as connection, _schema(connection) as schema:
        rows = _read(connection, schema, servers.organization_id, program_id, bench.sizes.batch_events)
        events, total = len(rows["event"]), sum(len(lines) for lines in rows.values())
        seconds = [_write(connection, schema, rows) for _ in range(bench.sizes.repetitions)]
    row_rates = tuple(total / each for each in seconds)
    event_rates = tuple(events / each for each in seconds)
    yield Figure("postgres_ceiling_rows_per_s", middle(row_rates), "/s", row_rates)
    yield Figure("postgres_ceiling_events_per_s", middle(event_rates), "/s", event_rates)
    yield Figure("batch_share_of_postgres_ceiling", batch.value / middle(event_rates), "x", (), batch.client_cpu_share)


@contextmanager
def _schema(connection: psycopg.Connection[Any]) -> Iterator[sql.Identifier]:
    schema = sql.Identifier(f"benchmark_{uuid4().hex}")
    connection.execute(sql.SQL("create schema {}").format(schema))
    try:
        yield schema
    finally:
        connection.execute(sql.SQL("drop schema {} cascade").format(schema))


def _read(
    connection: psycopg.Connection[Any], schema: sql.Identifier, organization_id: UUID, program_id: UUID, events: int
) -> dict[str, list[bytes]]:
    """The rows of each table as lines of COPY's text format."""
    scope = {
        "schema": schema,
        "organization_id": sql.Literal(organization_id),
        "program_id": sql.Literal(program_id),
        "events": sql.Literal(events),
    }
    connection.execute(sql.SQL(_PICK).format(**scope))
    rows = {}
    for table, query in _ROWS.items():
        statement = sql.SQL("copy ({}) to stdout").format(sql.SQL(query).format(**scope))
        with connection.cursor() as cursor, cursor.copy(statement) as copy:
            rows[table] = [bytes(line) for line in copy]
    return rows


def _write(connection: psycopg.Connection[Any], schema: sql.Identifier, rows: Mapping[str, Sequence[bytes]]) -> float:
    """Seconds that it takes to write `rows` into new copies of their tables."""
    tables = {name: sql.SQL("{}.{}").format(schema, sql.Identifier(name)) for name in rows}
    for name, copied in tables.items():
        connection.execute(sql.SQL("drop table if exists {}").format(copied))
        connection.execute(
            sql.SQL("create table {} (like {} including indexes)").format(copied, sql.Identifier("public", name))
        )
    batches = -(-len(rows["event"]) // BATCH_EVENTS)
    started = time.perf_counter()
    for number in range(batches):
        with connection.transaction(), connection.cursor() as cursor:
            for name, lines in rows.items():
                first, end = (len(lines) * edge // batches for edge in (number, number + 1))
                with cursor.copy(sql.SQL("copy {} from stdin").format(tables[name])) as copy:
                    copy.write(b"".join(lines[first:end]))
    return time.perf_counter() - started


CASE = Case(
    "postgres_ceiling",
    "Baseline: the same rows by COPY",
    ("postgres_ceiling_rows_per_s", "postgres_ceiling_events_per_s", "batch_share_of_postgres_ceiling"),
    run,
    after=("batch",),
    needs_servers=True,
)
