"""The row locks of business operations, and the one order in which they are taken.

Whoever needs several locks takes them in this order, and those of one kind sorted by id, so that no two transactions
can wait for each other (drawn in docs/ledger.md):

1. the idempotency key (`domain.idempotency.claim`)
2. event rows
3. rewards, by id
4. the rule that is being changed (`domain.rules.store`)
5. rule budgets, by rule and asset
6. programs, by id
7. groups, by id
8. participants, by id
9. the organization's chain head (`domain.ledger.journal.write`, released by the commit that comes with it)

A holder's row (program, group or participant) guards everything that hangs on it: accounts, lots, holds, counters,
tags, attributes, tiers, the wallet, the members of a group. Locks are FOR NO KEY UPDATE: rows that point to a holder by
a foreign key can still be inserted by others. Under READ COMMITTED a statement sees what was committed when it began,
so what a lock guards is read by a later statement than the one that took the lock. Contract: holders.md 6.9.
"""

from collections.abc import Collection, Iterable
from typing import LiteralString
from uuid import UUID

from psycopg.rows import DictRow

from db.session import Transaction

_LOCK_PROGRAMS = """
select id, name, status, on_unknown_participant, redemption_target_type, redemption_target_entity_id, rules_version
from program where organization_id = %s and id = any(%s) order by id for no key update
"""

_LOCK_GROUPS = """
select id, name, status, created_at, updated_at, deleted_at
from holder_group where organization_id = %s and id = any(%s) order by id for no key update
"""

_LOCK_PARTICIPANTS = """
select id, external_id, status, email, phone, first_name, last_name, display_name, created_at
from participant where organization_id = %s and id = any(%s) order by id for no key update
"""


async def lock_programs(tx: Transaction, ids: Iterable[UUID]) -> dict[UUID, DictRow]:
    """Lock these programs, and with them their wallets and state; their rows by id, unknown ids left out.

    Raises psycopg.errors.LockNotAvailable after the session's lock timeout.
    """
    return await _lock(tx, _LOCK_PROGRAMS, set(ids))


async def lock_groups(tx: Transaction, ids: Iterable[UUID]) -> dict[UUID, DictRow]:
    """Lock these groups, and with them their members, balances and state; their rows by id, unknown ids left out.

    Raises psycopg.errors.LockNotAvailable after the session's lock timeout.
    """
    return await _lock(tx, _LOCK_GROUPS, set(ids))


async def lock_participants(tx: Transaction, ids: Iterable[UUID]) -> dict[UUID, DictRow]:
    """Lock these participants, and with them their balances and state; their rows by id, unknown ids left out.

    Raises psycopg.errors.LockNotAvailable after the session's lock timeout.
    """
    return await _lock(tx, _LOCK_PARTICIPANTS, set(ids))


async def lock_holders(tx: Transaction, holders: Iterable[tuple[str, UUID]]) -> None:
    """Lock these holders of balances, pairs of PARTICIPANT or GROUP and an id, in the global order.

    Raises psycopg.errors.LockNotAvailable after the session's lock timeout.
    """
    wanted = set(holders)
    await lock_groups(tx, [id for kind, id in wanted if kind == "GROUP"])
    await lock_participants(tx, [id for kind, id in wanted if kind == "PARTICIPANT"])


async def _lock(tx: Transaction, query: LiteralString, ids: Collection[UUID]) -> dict[UUID, DictRow]:
    if not ids:
        return {}
    return {row["id"]: row for row in await tx.rows(query, (tx.organization_id, list(ids)))}
