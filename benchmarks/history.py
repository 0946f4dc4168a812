"""A long history of one account, made by Postgres: a million entries in a minute or so, where the API takes an hour.

It is the history of one participant's share of a LOT asset: every tenth entry is a credit of 1,000 that makes a lot,
each of the others a debit of 1 that takes from the oldest lot. What is left behind is what the API would have left,
hash chain, running balances, versions, lots and their changes included, so `scrip verify` finds it sound.

It is written as the owner of the tables, in one transaction, through the database's own guards: postings that don't sum
to zero are refused, and `seal_entries` numbers and hashes the entries.
"""

from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID

import psycopg

POSTINGS_PER_LOT = 10
CREDIT = 1_000
ENTRIES_PER_STATEMENT = 10_000

_PREPARE: LiteralString = """
create temp table made_lot on commit drop as
select k, uuidv7() as id, uuidv7() as entry_id from generate_series(0, (%(count)s - 1) / %(per_lot)s) k;
create unique index on made_lot (k);
analyze made_lot;
insert into account (organization_id, id, entity_type, entity_id, asset_id, bucket)
values (%(organization_id)s, uuidv7(), 'PARTICIPANT', %(participant_id)s, %(asset_id)s, 'AVAILABLE');
create temp table place on commit drop as
select (select id from account where organization_id = %(organization_id)s and entity_id = %(participant_id)s
            and asset_id = %(asset_id)s and bucket = 'AVAILABLE') as own,
       (select id from account where organization_id = %(organization_id)s and entity_id is null
            and asset_id = %(asset_id)s and entity_type = 'SYSTEM_ISSUANCE') as issuance,
       (select id from account where organization_id = %(organization_id)s and entity_id is null
            and asset_id = %(asset_id)s and entity_type = 'SYSTEM_BREAKAGE') as breakage;
create temp table made_entry (
    n bigint, entry_id uuid, own_id uuid, other_id uuid, is_credit boolean, amount bigint, balance bigint, debits bigint
) on commit drop
"""

# Entry n, from 0, is a credit where n is a multiple of `per_lot`; `debits` counts the debits up to and with it.
_ENTRIES: LiteralString = """
truncate made_entry;
insert into made_entry
select n, coalesce(l.entry_id, uuidv7()), uuidv7(), uuidv7(), l.k is not null,
       case when l.k is null then -1 else %(credit)s end,
       %(credit)s * (n / %(per_lot)s + 1) - (n - n / %(per_lot)s), n - n / %(per_lot)s
from generate_series(%(first)s, %(last)s) n
left join made_lot l on n %% %(per_lot)s = 0 and l.k = n / %(per_lot)s;
insert into posting (organization_id, entry_id, ordinal, id, account_id, asset_id, amount, version, balance)
select %(organization_id)s, entry_id, case when is_credit then 1 else 0 end, own_id, place.own, %(asset_id)s, amount,
       n + 1, balance
from made_entry, place
union all
select %(organization_id)s, entry_id, case when is_credit then 0 else 1 end, other_id,
       case when is_credit then place.issuance else place.breakage end, %(asset_id)s, -amount, null, null
from made_entry, place;
insert into lot_change (organization_id, entry_id, ordinal, lot_id, delta, status)
select %(organization_id)s, e.entry_id, 0, l.id, -1,
       case when e.debits %% %(credit)s = 0 then 'CONSUMED' else 'AVAILABLE' end
from made_entry e join made_lot l on l.k = (e.debits - 1) / %(credit)s
where not e.is_credit;
"""

# Where the canonical form of an entry (docs/ledger.md) comes prepared for its place in the chain.
_SEAL: LiteralString = """
with own as (
    select *, format('{"amount":"%%s","asset_id":"%%s","bucket":"AVAILABLE","entity_id":"%%s",'
                     '"entity_type":"PARTICIPANT","id":"%%s"}',
                     amount, %(asset_id)s::uuid, %(participant_id)s::uuid, own_id) as own_line,
              format('{"amount":"%%s","asset_id":"%%s","bucket":"AVAILABLE","entity_id":null,'
                     '"entity_type":"%%s","id":"%%s"}',
                     -amount, %(asset_id)s::uuid,
                     case when is_credit then 'SYSTEM_ISSUANCE' else 'SYSTEM_BREAKAGE' end, other_id) as other_line
    from made_entry
)
select seal_entries(%(organization_id)s, clock_timestamp(), json_agg(json_build_object(
    'id', entry_id, 'program_id', %(program_id)s::uuid, 'description', 'benchmark',
    'action_type', case when is_credit then 'CREDIT' else 'DEBIT' end,
    'body', format('"created_by_api_key_id":null,"description":"benchmark","event_id":null,"id":"%%s",'
                   '"organization_id":"%%s","postings":[%%s,%%s]', entry_id, %(organization_id)s::uuid,
                   case when is_credit then other_line else own_line end,
                   case when is_credit then own_line else other_line end),
    'tail', format('"program_id":"%%s","reference_id":null,"rule_id":null', %(program_id)s::uuid)) order by n))
from own
"""

_LOTS: LiteralString = """
insert into lot (organization_id, id, entity_type, entity_id, asset_id, program_id, status, amount, remaining,
                 created_at, is_provisional, entry_id)
select %(organization_id)s, id, 'PARTICIPANT', %(participant_id)s, %(asset_id)s, %(program_id)s,
       case when remaining = 0 then 'CONSUMED' else 'AVAILABLE' end, %(credit)s, remaining,
       now() + k * interval '1 microsecond', false, entry_id
from (select *, least(greatest(%(credit)s * (k + 1) - %(debits)s, 0), %(credit)s) as remaining from made_lot) l
order by k
"""


@dataclass(frozen=True, slots=True)
class Account:
    """Whose history is written: a participant who has nothing of this LOT asset yet."""

    organization_id: UUID
    program_id: UUID
    asset_id: UUID
    participant_id: UUID


def write_history(connection: psycopg.Connection[Any], account: Account, count: int) -> None:
    """Write `count` entries with a posting of the account each, and a lot for every tenth of them.

    `connection` is the owner's, in autocommit. Until the end the organization's other writers wait.
    """
    params = {
        "organization_id": account.organization_id,
        "program_id": account.program_id,
        "asset_id": account.asset_id,
        "participant_id": account.participant_id,
        "count": count,
        "credit": CREDIT,
        "per_lot": POSTINGS_PER_LOT,
        "debits": _debits(count),
    }
    # Several statements at a time, with values in them: the server can't have these as parameters.
    with connection.transaction(), psycopg.ClientCursor(connection) as cursor:
        cursor.execute(_PREPARE, params)
        for first in range(0, count, ENTRIES_PER_STATEMENT):
            chunk = params | {"first": first, "last": min(first + ENTRIES_PER_STATEMENT, count) - 1}
            cursor.execute(_ENTRIES, chunk)
            cursor.execute(_SEAL, chunk)
        cursor.execute(_LOTS, params)
    # The planner would otherwise learn of all this at some moment while it is being read.
    connection.execute("analyze account, posting, journal_entry, lot, lot_change")


def balance_after(count: int) -> int:
    """What the account has after `count` entries."""
    return CREDIT * (count - _debits(count)) - _debits(count)


def _debits(count: int) -> int:
    return count - -(-count // POSTINGS_PER_LOT)
