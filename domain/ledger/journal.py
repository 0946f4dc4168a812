"""Reading accounts under their holders' locks, and writing entries: the only code that writes to the ledger.

The write path is explicit SQL in bulk, one statement for all postings and one for all entries, whether there is one
entry or five hundred. Contract: holders.md 8.4, README.md "Hash chain"; docs/decisions/0003-database.md.
"""

from collections.abc import Collection, Iterable
from typing import Any
from uuid import UUID

from psycopg import sql

from db import json
from db.session import Transaction
from domain import faults
from domain.ids import new_id
from domain.ledger.books import SYSTEM_TYPES, Account, Books, Entry, Line
from domain.ledger.canonical import HashedPosting, entry_body, entry_tail
from domain.ledger.holdings import write_holdings

_LOAD = """
select a.id, a.entity_type, a.entity_id, a.asset_id, a.bucket, coalesce(p.version, 0), coalesce(p.balance, 0)
from account a
left join lateral (
    select version, balance from posting p
    where p.organization_id = a.organization_id and p.account_id = a.id
    order by version desc limit 1
) p on true
where a.organization_id = %s and a.entity_id = any(%s) and a.asset_id = any(%s)
"""

_LOAD_SYSTEM = """
select id, entity_type, asset_id, bucket from account
where organization_id = %s and entity_id is null and asset_id = any(%s)
"""

_INSERT_ACCOUNTS = """
insert into account (organization_id, id, entity_type, entity_id, asset_id, bucket)
select %(organization_id)s, id, entity_type, entity_id, asset_id, bucket
from json_to_recordset(%(accounts)s::json) as r (id uuid, entity_type text, entity_id uuid, asset_id uuid, bucket text)
"""

_INSERT_POSTINGS = """
insert into posting (organization_id, entry_id, ordinal, id, account_id, asset_id, amount, version, balance)
select %(organization_id)s, entry_id, ordinal, id, account_id, asset_id, amount, version, balance
from json_to_recordset(%(postings)s::json) as r (
    entry_id uuid, ordinal smallint, id uuid, account_id uuid, asset_id uuid, amount numeric, version bigint,
    balance numeric)
"""

_INSERT_BOTH = f"with opened as ({_INSERT_ACCOUNTS}) {_INSERT_POSTINGS}"


async def load_accounts(tx: Transaction, entity_ids: Collection[UUID], asset_ids: Collection[UUID]) -> Books:
    """The accounts of these holders in these assets, with the assets' system accounts.

    The caller holds the lock of every holder, so that the balances stay true until it commits.
    """
    books = Books()
    if not asset_ids:
        return books
    books.add(await _system_accounts(tx, asset_ids))
    if entity_ids:
        cursor = await tx.execute(_LOAD, (tx.organization_id, list(entity_ids), list(asset_ids)))
        books.add(Account(*row) for row in await cursor.fetchall())
    return books


async def open_system_accounts(tx: Transaction, asset_id: UUID) -> None:
    """Open the three system accounts of a new asset."""
    accounts = [Account(new_id(), kind, None, asset_id, "AVAILABLE") for kind in SYSTEM_TYPES]
    await tx.execute(
        _INSERT_ACCOUNTS, {"organization_id": tx.organization_id, "accounts": json.parameter(_account_rows(accounts))}
    )


async def write(tx: Transaction, books: Books, *, by_caller: bool = True) -> None:
    """Write every entry of `books`; they are sealed into the chain together with the commit.

    They carry the API key of the caller, unless it isn't `by_caller` that they are made: a read may find that something
    has fallen due.

    To be called once, last before the commit: the chain head is the last lock of the global order.
    """
    if not books.entries:
        return
    opened = [account for account in books.accounts.values() if account.is_new and account.version > 0]
    params = {
        "organization_id": tx.organization_id,
        "accounts": json.parameter(_account_rows(opened)),
        "postings": json.parameter([row for entry in books.entries for row in _posting_rows(entry)]),
    }
    await tx.execute(_INSERT_BOTH if opened else _INSERT_POSTINGS, params)
    await write_holdings(tx, books.lots, books.holds)
    await faults.reach("ledger.written")
    api_key_id = tx.api_key_id if by_caller else None
    sealed = json.parameter([_entry_row(tx, entry, api_key_id) for entry in books.entries])
    tx.commit_with(
        sql.SQL("select seal_entries({}, {}, {}::json)").format(
            sql.Literal(tx.organization_id), sql.Literal(tx.now), sql.Literal(sealed)
        )
    )


async def _system_accounts(tx: Transaction, asset_ids: Collection[UUID]) -> Iterable[Account]:
    """The system accounts of these assets: they never change, so each process reads them once."""
    # The answer comes from here alone: what is kept may be cleared at any moment, by this call or by another thread's.
    known = {asset_id: kept for asset_id in asset_ids if (kept := _SYSTEM_ACCOUNTS.get(asset_id))}
    missing = [asset_id for asset_id in asset_ids if asset_id not in known]
    if missing:
        found: dict[UUID, list[Account]] = {}
        for row in await tx.rows(_LOAD_SYSTEM, (tx.organization_id, missing)):
            account = Account(row["id"], row["entity_type"], None, row["asset_id"], row["bucket"])
            found.setdefault(account.asset_id, []).append(account)
        if len(_SYSTEM_ACCOUNTS) > _SYSTEM_ACCOUNTS_KEPT:
            _SYSTEM_ACCOUNTS.clear()
        # One assignment per asset, so that another thread sees all three accounts or none.
        for asset_id, accounts in found.items():
            known[asset_id] = _SYSTEM_ACCOUNTS[asset_id] = tuple(accounts)
    return [account for asset_id in asset_ids for account in known[asset_id]]


_SYSTEM_ACCOUNTS: dict[UUID, tuple[Account, ...]] = {}
_SYSTEM_ACCOUNTS_KEPT = 4096


def _account_rows(accounts: Iterable[Account]) -> list[dict[str, Any]]:
    return [
        {
            "id": account.id,
            "entity_type": account.entity_type,
            "entity_id": account.entity_id,
            "asset_id": account.asset_id,
            "bucket": account.bucket,
        }
        for account in accounts
    ]


def _posting_rows(entry: Entry) -> Iterable[dict[str, Any]]:
    for ordinal, line in enumerate(entry.lines):
        yield {
            "entry_id": entry.id,
            "ordinal": ordinal,
            "id": line.id,
            "account_id": line.account.id,
            "asset_id": line.account.asset_id,
            "amount": line.amount,
            "version": line.version,
            "balance": line.balance,
        }


def _entry_row(tx: Transaction, entry: Entry, api_key_id: UUID | None) -> dict[str, Any]:
    return {
        "id": entry.id,
        "program_id": entry.program_id,
        "action_type": entry.action_type,
        "description": entry.description,
        "event_id": entry.event_id,
        "rule_id": entry.rule_id,
        "reference_id": entry.reference_id,
        "api_key_id": api_key_id,
        "request_id": entry.request_id or tx.request_id,
        "body": entry_body(
            entry_id=entry.id,
            organization_id=tx.organization_id,
            api_key_id=api_key_id,
            description=entry.description,
            event_id=entry.event_id,
            postings=[_hashed(line) for line in entry.lines],
        ),
        "tail": entry_tail(program_id=entry.program_id, reference_id=entry.reference_id, rule_id=entry.rule_id),
    }


def _hashed(line: Line) -> HashedPosting:
    account = line.account
    return HashedPosting(line.id, account.entity_type, account.entity_id, account.asset_id, account.bucket, line.amount)
