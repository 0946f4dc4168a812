"""What must hold of every redemption after every test: redemptions.md 9. Written against the tables alone."""

from collections import Counter, defaultdict
from decimal import Decimal
from itertools import pairwise
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from domain.money import EXACT

_POSTINGS = """
select p.entry_id, p.amount, a.entity_type, a.entity_id, a.bucket, e.action_type
from posting p
join account a on a.organization_id = p.organization_id and a.id = p.account_id
join journal_entry e on e.organization_id = p.organization_id and e.id = p.entry_id
where p.organization_id = %s and e.action_type in ('HOLD', 'REDEMPTION', 'REDEMPTION_REVERSAL')
order by p.entry_id, p.ordinal
"""

_LOTS = "select * from redemption_lot where organization_id = %s order by redemption_id, ordinal"

_UNDONE = {"CANCELED", "EXPIRED"}
_RESERVED = {"PENDING", *_UNDONE}
_HOLD_STATUS = {"PENDING": "ACTIVE", "CANCELED": "RELEASED", "EXPIRED": "EXPIRED"}


async def assert_redemption_invariants(connection: psycopg.AsyncConnection[Any], organization_id: UUID) -> None:
    """Assert that redemptions, reversals, lots, holds, stock and entries of an organization agree with each other."""
    redemptions = await _rows(connection, "select * from redemption where organization_id = %s", organization_id)
    rewards = await _rows(connection, "select * from reward where organization_id = %s", organization_id)
    usages = await _rows(connection, "select * from reward_usage where organization_id = %s", organization_id)
    reversals = await _rows(connection, "select * from redemption_reversal where organization_id = %s", organization_id)
    holds = await _rows(
        connection, "select * from hold where organization_id = %s and kind = 'REDEMPTION'", organization_id
    )
    assets = await _rows(connection, "select * from asset where organization_id = %s", organization_id)
    postings: dict[UUID, list[dict[str, Any]]] = defaultdict(list)
    for posting in await _rows(connection, _POSTINGS, organization_id):
        postings[posting["entry_id"]].append(posting)
    lots: dict[UUID, list[dict[str, Any]]] = defaultdict(list)
    for lot in await _rows(connection, _LOTS, organization_id):
        lots[lot["redemption_id"]].append(lot)
    reversals_of: dict[UUID, list[dict[str, Any]]] = defaultdict(list)
    for reversal in reversals:
        reversals_of[reversal["redemption_id"]].append(reversal)
    with_lots = {asset["id"] for asset in assets if asset["inventory_mode"] == "LOT"}

    for redemption in redemptions:
        _assert_amounts(redemption, reversals_of[redemption["id"]])
        _assert_entries(redemption, reversals_of[redemption["id"]], postings)
        _assert_lots(redemption, lots[redemption["id"]], redemption["asset_id"] in with_lots)
    _assert_holds(redemptions, holds)
    _assert_stock(redemptions, rewards, usages)
    booked = Counter(lines[0]["action_type"] for lines in postings.values())
    taken = sum(redemption["status"] not in _RESERVED for redemption in redemptions)
    assert booked["REDEMPTION"] == taken, "a REDEMPTION entry per redemption that was completed"
    assert booked["REDEMPTION_REVERSAL"] == len(reversals), "a REDEMPTION_REVERSAL entry per reversal"


def _assert_amounts(redemption: dict[str, Any], reversals: list[dict[str, Any]]) -> None:
    amount, reversed_amount = redemption["amount"], redemption["reversed_amount"]
    assert 0 <= reversed_amount <= amount
    assert reversed_amount == _sum(reversal["amount"] for reversal in reversals)
    if redemption["status"] in _RESERVED:
        assert not reversals, "nothing was taken that could be reversed"
    elif not reversed_amount:
        assert redemption["status"] == "COMPLETED"
    else:
        assert redemption["status"] == ("FULLY_REVERSED" if reversed_amount == amount else "PARTIALLY_REVERSED")
    if redemption["quantity"] is not None:
        assert amount == EXACT.multiply(redemption["unit_cost"], Decimal(redemption["quantity"]))
        units = sum(reversal["quantity"] for reversal in reversals)
        assert redemption["reversed_quantity"] == units
        assert reversed_amount == EXACT.multiply(redemption["unit_cost"], Decimal(units))
    if redemption["requested_amount"] is not None:
        assert amount <= redemption["requested_amount"], "no more is taken than was reserved"


def _assert_entries(
    redemption: dict[str, Any], reversals: list[dict[str, Any]], postings: dict[UUID, list[dict[str, Any]]]
) -> None:
    reserved = redemption["status"] in _RESERVED
    source = "HELD" if not reserved and redemption["requested_amount"] is not None else "AVAILABLE"
    out, into = postings[redemption["journal_entry_id"]]
    assert out["action_type"] == ("HOLD" if reserved else "REDEMPTION")
    assert (out["entity_id"], out["bucket"]) == (redemption["participant_id"], source)
    assert out["amount"] == -redemption["amount"]
    if not reserved:
        _assert_target(redemption, into)
    for reversal in reversals:
        out, into = postings[reversal["journal_entry_id"]]
        assert out["action_type"] == "REDEMPTION_REVERSAL"
        _assert_target(redemption, out)
        assert (into["entity_id"], into["bucket"]) == (redemption["participant_id"], "AVAILABLE")
        assert into["amount"] == reversal["amount"]


def _assert_target(redemption: dict[str, Any], posting: dict[str, Any]) -> None:
    is_entity = redemption["target_type"] == "LEDGER_ENTITY"
    expected = redemption["target_entity_type"] if is_entity else redemption["target_type"]
    assert (posting["entity_type"], posting["entity_id"]) == (expected, redemption["target_entity_id"])
    assert posting["bucket"] == "AVAILABLE"


def _assert_lots(redemption: dict[str, Any], lots: list[dict[str, Any]], has_lots: bool) -> None:
    """What is left of the list of lots is what is left of the redemption; what went back came from the list's end."""
    assert bool(lots) == has_lots
    if not has_lots:
        return
    left = Decimal(0)
    if redemption["status"] not in _UNDONE:
        left = EXACT.subtract(redemption["amount"], redemption["reversed_amount"])
    assert _sum(EXACT.subtract(lot["amount"], lot["refilled"]) for lot in lots) == left
    assert [lot["ordinal"] for lot in lots] == list(range(len(lots)))
    for lot, following in pairwise(lots):
        assert not lot["refilled"] or following["refilled"] == following["amount"], (
            "the last one taken is refilled first"
        )


def _assert_holds(redemptions: list[dict[str, Any]], holds: list[dict[str, Any]]) -> None:
    by_id = {hold["id"]: hold for hold in holds}
    reserved = {r["id"]: r for r in redemptions if r["requested_amount"] is not None}
    assert by_id.keys() == reserved.keys(), "a hold per two-step redemption"
    for redemption in reserved.values():
        hold = by_id[redemption["id"]]
        assert hold["reference_id"] == str(redemption["id"])
        assert hold["amount"] == redemption["requested_amount"]
        assert hold["expires_at"] == redemption["expires_at"]
        assert hold["status"] == _HOLD_STATUS.get(redemption["status"], "SETTLED")
        assert hold["remaining"] == (hold["amount"] if redemption["status"] == "PENDING" else 0)


def _assert_stock(
    redemptions: list[dict[str, Any]], rewards: list[dict[str, Any]], usages: list[dict[str, Any]]
) -> None:
    counts: Counter[UUID] = Counter()
    of_participants: Counter[tuple[UUID, UUID]] = Counter()
    for redemption in redemptions:
        if redemption["quantity"] is not None and redemption["status"] not in _UNDONE:
            units = redemption["quantity"] - redemption["reversed_quantity"]
            counts[redemption["reward_id"]] += units
            of_participants[redemption["reward_id"], redemption["participant_id"]] += units
    for reward in rewards:
        assert reward["redeemed_count"] == counts[reward["id"]], f"reward {reward['id']}"
        if reward["max_total"] is None:
            assert reward["status"] != "OUT_OF_STOCK"
            continue
        assert reward["redeemed_count"] <= reward["max_total"]
        if reward["status"] in ("ACTIVE", "OUT_OF_STOCK"):
            sold_out = reward["redeemed_count"] == reward["max_total"]
            assert (reward["status"] == "OUT_OF_STOCK") == sold_out
    recorded = {(usage["reward_id"], usage["participant_id"]): usage["quantity"] for usage in usages}
    assert {key: units for key, units in recorded.items() if units} == {k: n for k, n in of_participants.items() if n}


def _sum(amounts: Any) -> Decimal:
    result = Decimal(0)
    for amount in amounts:
        result = EXACT.add(result, amount)
    return result


async def _rows(connection: psycopg.AsyncConnection[Any], query: str, organization_id: UUID) -> list[dict[str, Any]]:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query, (organization_id,))
        return await cursor.fetchall()
