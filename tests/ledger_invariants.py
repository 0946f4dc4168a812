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
from tests.redemption_invariants import assert_redemption_invariants

_POSTINGS = """
select p.*, a.entity_type, a.entity_id, a.bucket, a.asset_id as account_asset_id,
       e.sequence, e.id is not null as is_sealed
from posting p
left join account a on a.organization_id = p.organization_id and a.id = p.account_id
left join journal_entry e on e.organization_id = p.organization_id and e.id = p.entry_id
where p.organization_id = %s
order by e.sequence, p.ordinal
"""


_LOT_CHANGES = """
select c.*, e.sequence from lot_change c
left join journal_entry e on e.organization_id = c.organization_id and e.id = c.entry_id
where c.organization_id = %s order by e.sequence, c.ordinal
"""

_HOLD_CHANGES = """
select c.*, e.sequence from hold_change c
left join journal_entry e on e.organization_id = c.organization_id and e.id = c.entry_id
where c.organization_id = %s order by e.sequence
"""

_OPEN_LOTS = {"DEFERRED", "AVAILABLE", "HELD"}
_ENDED_HOLDS = {"RELEASED", "FORFEITED", "SETTLED", "VOIDED", "EXPIRED"}

# (entity, asset, bucket) -> balance, of participants and groups.
Buckets = dict[tuple[UUID, UUID, str], Decimal]


async def assert_ledger_invariants(connection: psycopg.AsyncConnection[Any], organization_id: UUID) -> None:
    """Assert that the ledger of `organization_id` is sound; `connection` must see it (`tx.connection` does).

    Entries sum to zero, and so do all accounts of an asset; running balances equal the sums of amounts, versions have
    no holes and rise along the chain; the chain verifies; every idempotency key's entry exists; lots and holds sum to
    the buckets, and are what their changes made of them; redemptions agree with what they did.
    """
    entries = await _rows(
        connection, "select * from journal_entry where organization_id = %s order by sequence", organization_id
    )
    postings = await _rows(connection, _POSTINGS, organization_id)
    (head,) = await _rows(connection, "select * from chain_head where organization_id = %s", organization_id)
    keys = await _rows(connection, "select * from idempotency_key where organization_id = %s", organization_id)
    assets = await _rows(connection, "select * from asset where organization_id = %s", organization_id)
    lots = await _rows(connection, "select * from lot where organization_id = %s", organization_id)
    lot_changes = await _rows(connection, _LOT_CHANGES, organization_id)
    holds = await _rows(connection, "select * from hold where organization_id = %s", organization_id)
    hold_changes = await _rows(connection, _HOLD_CHANGES, organization_id)

    by_entry: dict[UUID, list[dict[str, Any]]] = defaultdict(list)
    for posting in postings:
        assert posting["is_sealed"], f"posting {posting['id']} has no entry"
        assert posting["asset_id"] == posting["account_asset_id"]
        by_entry[posting["entry_id"]].append(posting)
    _assert_sums(by_entry, postings)
    buckets = _assert_running_balances(postings)
    _assert_chain(organization_id, entries, by_entry, head)
    entry_ids = {entry["id"] for entry in entries}
    _assert_keys(keys, entry_ids)
    lot_assets = {asset["id"] for asset in assets if asset["inventory_mode"] == "LOT"}
    _assert_lots_sum_to_buckets(buckets, lot_assets, lots)
    _assert_holds_sum_to_held(buckets, lot_assets, lots, holds)
    _assert_projections(lots, lot_changes, "lot_id", entry_ids, {0: {"CONSUMED", "EXPIRED"}, 1: _OPEN_LOTS})
    _assert_projections(holds, hold_changes, "hold_id", entry_ids, {0: _ENDED_HOLDS, 1: {"ACTIVE"}})
    _assert_made_as_they_are(lots, {change["lot_id"] for change in lot_changes}, by_entry)
    _assert_made_as_they_are(holds, {change["hold_id"] for change in hold_changes}, by_entry)
    await assert_redemption_invariants(connection, organization_id)


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


def _assert_running_balances(postings: list[dict[str, Any]]) -> Buckets:
    buckets: Buckets = {}
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
        if posting["entity_type"] in ("PARTICIPANT", "GROUP"):
            buckets[posting["entity_id"], posting["asset_id"], posting["bucket"]] = balance
    return buckets


def _assert_lots_sum_to_buckets(buckets: Buckets, lot_assets: set[UUID], lots: list[dict[str, Any]]) -> None:
    """AVAILABLE is what its lots have, or no lot while it is overdrawn; HELD and DEFERRED are what theirs have."""
    sums: Buckets = defaultdict(Decimal)
    for lot in lots:
        assert lot["asset_id"] in lot_assets, f"lot {lot['id']} belongs to a SIMPLE asset"
        if lot["status"] in _OPEN_LOTS and lot["entity_type"] in ("PARTICIPANT", "GROUP"):
            place = lot["entity_id"], lot["asset_id"], lot["status"]
            sums[place] = EXACT.add(sums[place], lot["remaining"])
    for place in buckets.keys() | sums.keys():
        balance, lot_sum = buckets.get(place, Decimal(0)), sums.get(place, Decimal(0))
        if place[1] not in lot_assets:
            assert place[2] != "DEFERRED", "only lots mature"
        elif balance < 0:
            assert place[2] == "AVAILABLE", f"{place} is below zero"
            assert lot_sum == 0, f"{place} is overdrawn and has lots"
        else:
            assert balance == lot_sum, f"{place}: lots of {lot_sum} do not make {balance}"


def _assert_holds_sum_to_held(
    buckets: Buckets, lot_assets: set[UUID], lots: list[dict[str, Any]], holds: list[dict[str, Any]]
) -> None:
    """HELD is what the ACTIVE holds have, and a hold on lots has what its lots have."""
    sums: Buckets = defaultdict(Decimal)
    active = {hold["id"]: hold for hold in holds if hold["status"] == "ACTIVE"}
    for hold in active.values():
        place = hold["entity_id"], hold["asset_id"], "HELD"
        sums[place] = EXACT.add(sums[place], hold["remaining"])
    held = {place: balance for place, balance in buckets.items() if place[2] == "HELD" and balance}
    assert held == sums, "the active holds do not make HELD"

    by_hold: dict[UUID, Decimal] = defaultdict(Decimal)
    for lot in (lot for lot in lots if lot["status"] == "HELD"):
        hold = active[lot["hold_id"]]
        assert (lot["entity_id"], lot["asset_id"]) == (hold["entity_id"], hold["asset_id"])
        by_hold[hold["id"]] = EXACT.add(by_hold[hold["id"]], lot["remaining"])
    for hold in active.values():
        if hold["asset_id"] in lot_assets:
            lot_sum = by_hold[hold["id"]]
            assert lot_sum == hold["remaining"], f"the lots of hold {hold['id']} do not make what remains of it"


def _assert_projections(
    rows: list[dict[str, Any]],
    changes: list[dict[str, Any]],
    names: str,
    entry_ids: set[UUID],
    statuses: dict[int, set[str]],
) -> None:
    """Lots or holds are what their changes made of them; `statuses` are those of an empty one (0) and of others (1)."""
    by_row: dict[UUID, list[dict[str, Any]]] = defaultdict(list)
    for change in changes:
        assert change["sequence"] is not None, f"a change of {names} {change[names]} has no entry"
        by_row[change[names]].append(change)
    for row in rows:
        assert row["entry_id"] in entry_ids, f"{names} {row['id']} has no entry"
        remaining = row["amount"]
        for change in by_row[row["id"]]:
            remaining = EXACT.add(remaining, change["delta"])
            assert change["status"] in statuses[0 if remaining == 0 else 1]
        assert remaining == row["remaining"], f"{names} {row['id']} is not what its changes made of it"
        assert row["status"] in statuses[0 if remaining == 0 else 1], f"{names} {row['id']} is {row['status']}"
        if by_row[row["id"]]:
            assert row["status"] == by_row[row["id"]][-1]["status"], f"{names} {row['id']} is {row['status']}"
    assert by_row.keys() <= {row["id"] for row in rows}, f"changes of an unknown {names}"


def _assert_made_as_they_are(
    rows: list[dict[str, Any]], changed: set[UUID], by_entry: dict[UUID, list[dict[str, Any]]]
) -> None:
    """A lot or hold that nothing has changed is in the bucket into which the entry that made it has put value."""
    for row in rows:
        if row["id"] in changed:
            continue
        bucket = "HELD" if row["status"] == "ACTIVE" else row["status"]
        assert any(
            (line["entity_id"], line["asset_id"], line["bucket"]) == (row["entity_id"], row["asset_id"], bucket)
            and line["amount"] > 0
            for line in by_entry[row["entry_id"]]
        ), f"{row['id']} is {row['status']}, and its entry put nothing there"


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
