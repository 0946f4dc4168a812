"""What must hold in every ledger after every test, whatever the test was about.

It is written against the tables and shares nothing with the code under test but the canonical form of an entry.
"""

import hashlib
from collections import defaultdict
from decimal import Decimal
from itertools import groupby
from typing import Any
from uuid import UUID

import psycopg
import rfc8785
from psycopg.rows import dict_row

from domain.clock import format_timestamp
from domain.money import EXACT, format_plain

_POSTINGS = """
select p.*, a.entity_type, a.entity_id, a.bucket, a.asset_id as account_asset_id,
       e.sequence, e.id is not null as is_sealed
from posting p
left join account a on a.organization_id = p.organization_id and a.id = p.account_id
left join journal_entry e on e.organization_id = p.organization_id and e.id = p.entry_id
where p.organization_id = %s
order by e.sequence, p.ordinal
"""


async def assert_ledger_invariants(connection: psycopg.AsyncConnection[Any], organization_id: UUID) -> None:
    """Assert that the ledger of `organization_id` is sound; `connection` must see it (`tx.connection` does).

    Entries sum to zero, and so do all accounts of an asset; running balances equal the sums of amounts, versions have
    no holes and rise along the chain; the chain verifies; every idempotency key's entry exists.
    """
    entries = await _rows(
        connection, "select * from journal_entry where organization_id = %s order by sequence", organization_id
    )
    postings = await _rows(connection, _POSTINGS, organization_id)
    (head,) = await _rows(connection, "select * from chain_head where organization_id = %s", organization_id)
    keys = await _rows(connection, "select * from idempotency_key where organization_id = %s", organization_id)

    by_entry: dict[UUID, list[dict[str, Any]]] = defaultdict(list)
    for posting in postings:
        assert posting["is_sealed"], f"posting {posting['id']} has no entry"
        assert posting["asset_id"] == posting["account_asset_id"]
        by_entry[posting["entry_id"]].append(posting)
    _assert_sums(by_entry, postings)
    _assert_running_balances(postings)
    _assert_chain(organization_id, entries, by_entry, head)
    _assert_keys(keys, {entry["id"] for entry in entries})


def canonical_document(
    organization_id: UUID, entry: dict[str, Any], postings: list[dict[str, Any]], prev_hash: bytes, sequence: int
) -> dict[str, Any]:
    """The document whose RFC 8785 form is hashed, as README.md "Hash chain" words it."""
    return {
        "version": 1,
        "sequence": sequence,
        "prev_hash": prev_hash.hex(),
        "id": str(entry["id"]),
        "organization_id": str(organization_id),
        "program_id": str(entry["program_id"]),
        "action_type": entry["action_type"],
        "description": entry["description"],
        "event_id": _text(entry["event_id"]),
        "rule_id": _text(entry["rule_id"]),
        "reference_id": entry["reference_id"],
        "created_by_api_key_id": _text(entry["api_key_id"]),
        "created_at": format_timestamp(entry["created_at"]),
        "postings": [
            {
                "id": str(posting["id"]),
                "entity_type": posting["entity_type"],
                "entity_id": _text(posting["entity_id"]),
                "asset_id": str(posting["asset_id"]),
                "bucket": posting["bucket"],
                "amount": format_plain(posting["amount"]),
            }
            for posting in postings
        ],
    }


def _assert_sums(by_entry: dict[UUID, list[dict[str, Any]]], postings: list[dict[str, Any]]) -> None:
    per_asset: dict[UUID, Decimal] = defaultdict(Decimal)
    for entry_id, lines in by_entry.items():
        totals: dict[UUID, Decimal] = defaultdict(Decimal)
        for line in lines:
            totals[line["asset_id"]] = EXACT.add(totals[line["asset_id"]], line["amount"])
        assert len(lines) >= 2, f"entry {entry_id} has one posting"
        assert not any(totals.values()), f"entry {entry_id} doesn't sum to zero"
        assert [line["ordinal"] for line in lines] == list(range(len(lines)))
    for posting in postings:
        per_asset[posting["asset_id"]] = EXACT.add(per_asset[posting["asset_id"]], posting["amount"])
    assert not any(per_asset.values()), f"an asset's accounts don't sum to zero: {per_asset}"


def _assert_running_balances(postings: list[dict[str, Any]]) -> None:
    accounts: dict[UUID, tuple[int, Decimal]] = {}
    for posting in postings:
        if posting["entity_id"] is None:
            assert posting["version"] is None
            assert posting["balance"] is None
            continue
        version, balance = accounts.get(posting["account_id"], (0, Decimal(0)))
        version, balance = version + 1, EXACT.add(balance, posting["amount"])
        assert (posting["version"], posting["balance"]) == (version, balance), f"posting {posting['id']}"
        accounts[posting["account_id"]] = version, balance


def _assert_chain(
    organization_id: UUID,
    entries: list[dict[str, Any]],
    by_entry: dict[UUID, list[dict[str, Any]]],
    head: dict[str, Any],
) -> None:
    previous = bytes(32)
    created_at = None
    for sequence, entry in enumerate(entries, start=1):
        assert entry["sequence"] == sequence, "the sequence has a hole"
        assert entry["prev_hash"] == previous
        document = canonical_document(organization_id, entry, by_entry[entry["id"]], previous, sequence)
        previous = hashlib.sha256(rfc8785.dumps(document)).digest()
        assert entry["entry_hash"] == previous, f"entry {entry['id']} doesn't have its hash"
        assert created_at is None or created_at <= entry["created_at"], "time runs backwards along the chain"
        created_at = entry["created_at"]
    assert (head["sequence"], head["hash"]) == (len(entries), previous)


def _assert_keys(keys: list[dict[str, Any]], entry_ids: set[UUID]) -> None:
    named = [key for key in keys if key["result"].get("journal_entry_id") is not None]
    for key in named:
        assert UUID(key["result"]["journal_entry_id"]) in entry_ids, f"key {key['key']} names no entry"
    by_entry = sorted((key["result"]["journal_entry_id"], key["operation"]) for key in named)
    for entry_id, sharing in groupby(by_entry, key=lambda pair: pair[0]):
        assert len(list(sharing)) == 1, f"two keys claim entry {entry_id}"


async def _rows(connection: psycopg.AsyncConnection[Any], query: str, organization_id: UUID) -> list[dict[str, Any]]:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query, (organization_id,))
        return await cursor.fetchall()


def _text(value: UUID | None) -> str | None:
    return None if value is None else str(value)
