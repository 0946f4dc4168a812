"""Points in time: which entries a moment covers, and what accounts held then. Contract: webhooks-and-reports.md 9.

An entry belongs to a moment when its `created_at` is at or before it. Along the chain `created_at` never falls, so a
moment is a prefix of the chain: everything up to one sequence. Along an account the sequence rises with the version, so
a prefix of the chain is a prefix of the account, and what the account held is the balance that the last posting of that
prefix carries. Both ends are found by bisection: about twenty probes of an index in a million rows, and nothing is
added up.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import LiteralString, NamedTuple
from uuid import UUID

from psycopg import sql

from db.session import Transaction
from domain.money import ZERO

LAST_ORDINAL = 2**15 - 1

# Within an organization created_at never falls along the sequence, so a bound in time is a bound in the sequence,
# found by bisection through the unique index. A hole, which only tampering can make, ends it early with `low` and
# `high` still apart: both remain safe bounds. `middle` is a column of its own because under row-level security only
# comparisons of plain columns become index conditions.
_BISECT = """
with recursive span (low, high, middle) as (
    select 1::bigint, top, (1 + top) / 2
    from (select coalesce((select sequence from chain_head where organization_id = %(organization_id)s), 0) + 1) h (top)
    union all
    select low, high, (low + high) / 2
    from (
        select case when is_before then middle + 1 else low end, case when is_before then high else middle end
        from span
        join lateral (
            select created_at < %(instant)s or (%(after)s and created_at = %(instant)s) as is_before
            from journal_entry where organization_id = %(organization_id)s and sequence = span.middle
        ) e on true
        where low < high
    ) narrower (low, high)
)
select low, high from span order by high - low limit 1
"""

_HEAD = """
select sequence, created_at, pg_current_xact_id_if_assigned() is not null as has_written
from chain_head where organization_id = %s
"""

# The head's time is raised to the moment: the next entry comes at least a microsecond later (`seal_entries`).
_CLOSE = sql.SQL("""
update chain_head set created_at = {instant} where organization_id = {organization_id} and created_at < {instant};
commit;
begin; select set_config('app.org', {organization_text}, true)
""")

# One bisection of the versions of each account for each position, all at once. `middle` and `version` are columns of
# their own because under row-level security only comparisons of plain columns become index conditions. Each probe has
# a `limit 1`, which keeps the planner from joining: for an organization that the statistics don't know yet it would
# take the whole journal for one row.
_MARKS: LiteralString = """
with recursive span (account_id, n, sequence, ordinal, low, high, middle) as (
    select a.id, b.n, b.sequence, b.ordinal, 1::bigint, newest.version + 1, (newest.version + 2) / 2
    from unnest(%(account_ids)s::uuid[]) a (id)
    cross join lateral (
        select version from posting
        where organization_id = %(organization_id)s and account_id = a.id
        order by version desc limit 1
    ) newest
    cross join unnest(%(sequences)s::bigint[], %(ordinals)s::bigint[]) with ordinality b (sequence, ordinal, n)
    union all
    select account_id, n, sequence, ordinal, low, high, (low + high) / 2
    from (
        select span.account_id, n, span.sequence, span.ordinal,
               case when is_within then middle + 1 else low end,
               case when is_within then high else middle end
        from span
        cross join lateral (
            select entry_id, ordinal from posting
            where organization_id = %(organization_id)s and account_id = span.account_id and version = span.middle
            limit 1
        ) p
        cross join lateral (
            select (sequence, p.ordinal) <= (span.sequence, span.ordinal) as is_within from journal_entry
            where organization_id = %(organization_id)s and id = p.entry_id
            limit 1
        ) e
        where low < high
    ) narrower (account_id, n, sequence, ordinal, low, high)
),
found as materialized (select account_id, n, low - 1 as version from span where low = high)
select f.account_id, f.n, p.version, p.balance
from found f
cross join lateral (
    select version, balance from posting
    where organization_id = %(organization_id)s and account_id = f.account_id and version = f.version
    limit 1
) p
"""


@dataclass(frozen=True, slots=True)
class Moment:
    """An instant and the newest sequence at it; 0 before the first entry."""

    instant: datetime
    sequence: int


class Position(NamedTuple):
    """A place between two postings of the ledger: after posting `ordinal` of entry `sequence`."""

    sequence: int
    ordinal: int = LAST_ORDINAL


class Mark(NamedTuple):
    """An account's newest posting up to a position: version 0 and no balance where there is none."""

    version: int = 0
    balance: Decimal = ZERO


async def at(tx: Transaction, instant: datetime | None = None) -> Moment:
    """The moment `instant`; without one, or for one in the future, the present.

    What a report finds up to the moment's sequence stays true for ever: no entry is ever sealed with a `created_at` at
    or before a moment that was once returned. A writer takes its time when it begins, so one that is still open might
    get such a `created_at`. Therefore a moment younger than the head of the chain raises the head's time first, and
    commits that: writers that hold the head are waited for (they are committing), all others are sealed later than the
    moment. A moment in the future can't be promised yet; the present one, which is returned in its place, can.

    The transaction must not have written anything: it is ended and begun anew, still of the same organization, so that
    the head is locked for an instant only.
    """
    sequence, newest_at, has_written = await _head(tx)
    present = max(tx.now, newest_at)
    moment = present if instant is None else min(instant, present)
    if newest_at < moment:
        assert not has_written, "a moment is taken before anything is written"
        await _close(tx, moment)
        sequence, newest_at, _ = await _head(tx)
    if moment >= newest_at:
        return Moment(moment, sequence)
    _, after = await bisect(tx, moment, after=True)
    return Moment(moment, after - 1)


async def sequence_before(tx: Transaction, instant: datetime) -> int:
    """The newest sequence strictly before `instant`: where a window that begins there opens.

    It stays true for ever where the window's end, at or after `instant`, came from `at`.
    """
    first, _ = await bisect(tx, instant)
    return first - 1


async def bisect(tx: Transaction, instant: datetime, *, after: bool = False) -> tuple[int, int]:
    """The sequence of the first entry at or after `instant` (strictly after it if `after`), as (low, high)."""
    row = await tx.row(_BISECT, {"organization_id": tx.organization_id, "instant": instant, "after": after})
    assert row is not None, "the span begins with one row"
    return row["low"], row["high"]


async def marks(
    tx: Transaction, account_ids: Collection[UUID], positions: Sequence[Position]
) -> dict[UUID, tuple[Mark, ...]]:
    """The newest posting of each account (of holders or programs) up to each of `positions`, in their order."""
    params = {
        "organization_id": tx.organization_id,
        "account_ids": list(account_ids),
        "sequences": [position.sequence for position in positions],
        "ordinals": [position.ordinal for position in positions],
    }
    found = {(account_id, n): mark for account_id, n, *mark in await (await tx.execute(_MARKS, params)).fetchall()}
    return {
        account_id: tuple(Mark(*found.get((account_id, n), ())) for n in range(1, len(positions) + 1))
        for account_id in account_ids
    }


async def _head(tx: Transaction) -> tuple[int, datetime, bool]:
    row = await tx.row(_HEAD, (tx.organization_id,))
    assert row is not None, "every organization has a chain"
    return row["sequence"], row["created_at"], row["has_written"]


async def _close(tx: Transaction, instant: datetime) -> None:
    """Make sure that every entry sealed from now on is later than `instant`. One message, so the lock is short."""
    await tx.connection.execute(
        _CLOSE.format(
            instant=sql.Literal(instant),
            organization_id=sql.Literal(tx.organization_id),
            organization_text=sql.Literal(str(tx.organization_id)),
        )
    )
