"""Lots and holds between memory and tables: what an operation needs is loaded under its lock, what it did is written.

FIFO is read in pages, only as far as the amount reaches: spending from a holder with a hundred thousand lots costs what
spending from one with ten costs. Contract: holders.md 6.8 and 7.
"""

from collections.abc import Collection, Iterable
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from db import json
from db.session import Transaction
from domain import limits
from domain.ledger.holds import Hold, HoldBook
from domain.ledger.lots import Lot, LotBook, LotChangeRow, Selection
from domain.money import EXACT, ZERO

LOT_COLUMNS = """
id, entity_type, entity_id, asset_id, program_id, status, amount, remaining, created_at, expires_at, matures_at,
reference_id, hold_id, is_provisional, entry_id
"""

# A condition that doesn't narrow is left out rather than written as `x is null or ...`, which no index can serve.
_NARROWING = {
    "spendable_at": "and (expires_at is null or expires_at > %(spendable_at)s)",
    "reference_id": "and reference_id = %(reference_id)s",
    "lot_ids": "and id = any(%(lot_ids)s)",
    "earned_from": "and created_at >= %(earned_from)s",
    "earned_to": "and created_at <= %(earned_to)s",
    "hold_id": "and hold_id = %(hold_id)s",
}
_UNRESERVED = """
and not exists (select from hold h where h.organization_id = lot.organization_id and h.id = lot.hold_id
                and h.kind = 'REDEMPTION')
"""

HOLD_COLUMNS = """
id, entity_type, entity_id, program_id, asset_id, kind, amount, remaining, status, reference_id, description,
expires_at, on_expiry, carrier, entry_id, created_at
"""


async def load_lots(
    tx: Transaction, lots: LotBook, selection: Selection, amount: Decimal | None, counted: Selection | None = None
) -> tuple[datetime, UUID] | None:
    """Bring the lots that match into `lots`, FIFO, until they make `amount`; None brings all of them.

    With `counted` only what matches that, too, counts towards the amount. What counts is what remains of them in
    `lots`: something that was done in this transaction is not in the table yet. Lots that were made in it don't count,
    as older ones may still have to be loaded. The caller holds the holder's lock. The result is where it stopped, as
    (created_at, id) of the last one; None when no further ones match.
    """
    params: dict[str, Any] = {
        name: list(value) if name == "lot_ids" else value
        for name in _NARROWING
        if (value := getattr(selection, name)) is not None
    }
    query = f"""
        select {LOT_COLUMNS} from lot
        where organization_id = %(organization_id)s and entity_id = %(entity_id)s and asset_id = %(asset_id)s
          and status = %(status)s and remaining > 0 {" ".join(_NARROWING[name] for name in params)}
          {"and is_provisional" if selection.only_provisional else ""}
          {_UNRESERVED if selection.status == "HELD" and selection.hold_id is None else ""}
          {{after}}
        order by created_at, id limit {limits.LOTS_PER_PAGE}
    """
    params |= {
        "organization_id": tx.organization_id,
        "entity_id": selection.entity_id,
        "asset_id": selection.asset_id,
        "status": selection.status,
    }
    found, after = ZERO, ""
    while True:
        rows = await (await tx.execute(query.format(after=after), params)).fetchall()
        page = lots.add(Lot(*row) for row in rows)
        for lot in filter((counted or selection).matches, page):
            found = EXACT.add(found, lot.remaining)
        if len(page) < limits.LOTS_PER_PAGE:
            return None
        if amount is not None and found >= amount:
            return page[-1].created_at, page[-1].id
        after = "and (created_at, id) > (%(after_created_at)s, %(after_id)s)"
        params |= {"after_created_at": page[-1].created_at, "after_id": page[-1].id}


async def load_holds(tx: Transaction, holds: HoldBook, hold_ids: Collection[UUID]) -> None:
    """Bring these holds into `holds`."""
    if not hold_ids:
        return
    rows = await tx.execute(
        f"select {HOLD_COLUMNS} from hold where organization_id = %s and id = any(%s)",
        (tx.organization_id, list(hold_ids)),
    )
    holds.add(Hold(*row) for row in await rows.fetchall())


async def load_lots_by_id(tx: Transaction, lots: LotBook, lot_ids: Collection[UUID]) -> list[Lot]:
    """Bring these lots into `lots`; they are returned in no order. The caller holds their holders' locks."""
    rows = await tx.execute(
        f"select {LOT_COLUMNS} from lot where organization_id = %s and id = any(%s)",
        (tx.organization_id, list(lot_ids)),
    )
    return lots.add([Lot(*row) for row in await rows.fetchall()])


async def load_lots_of_holds(tx: Transaction, lots: LotBook, hold_ids: Collection[UUID]) -> None:
    """Bring the lots that lie in these holds into `lots`. The caller holds their holders' locks."""
    rows = await tx.execute(
        f"select {LOT_COLUMNS} from lot"
        " where organization_id = %s and hold_id = any(%s) and status = 'HELD' and remaining > 0",
        (tx.organization_id, list(hold_ids)),
    )
    lots.add(Lot(*row) for row in await rows.fetchall())


async def load_oldest_holds(
    tx: Transaction, holds: HoldBook, entity_id: UUID, asset_id: UUID, amount: Decimal | None
) -> tuple[datetime, UUID] | None:
    """Bring the holder's active holds of an asset into `holds`, the oldest first, until they make `amount`.

    As with lots, what counts is what remains of them in `holds`, and the result is where it stopped.
    """
    query = f"""
        select {HOLD_COLUMNS} from hold
        where organization_id = %(organization_id)s and entity_id = %(entity_id)s and asset_id = %(asset_id)s
          and status = 'ACTIVE' and kind <> 'REDEMPTION' {{after}}
        order by created_at, id limit {limits.LOTS_PER_PAGE}
    """
    params: dict[str, Any] = {
        "organization_id": tx.organization_id,
        "entity_id": entity_id,
        "asset_id": asset_id,
    }
    found, after = ZERO, ""
    while True:
        rows = await (await tx.execute(query.format(after=after), params)).fetchall()
        page = [Hold(*row) for row in rows]
        holds.add(page)
        for hold in page:
            found = EXACT.add(found, holds.get(hold.id).remaining)
        if len(page) < limits.LOTS_PER_PAGE:
            return None
        if amount is not None and found >= amount:
            return page[-1].created_at, page[-1].id
        after = "and (created_at, id) > (%(after_created_at)s, %(after_id)s)"
        params |= {"after_created_at": page[-1].created_at, "after_id": page[-1].id}


async def write_holdings(tx: Transaction, lots: LotBook, holds: HoldBook) -> None:
    """Write what was done to lots and holds; called by `journal.write` before the entries are sealed."""
    for query, rows in (
        (_INSERT_LOTS, [_lot_row(lot) for lot in lots.opened]),
        (_UPDATE_LOTS, [_lot_row(lot) for lot in _changed(lots)]),
        (_INSERT_LOT_CHANGES, [_lot_change_row(change, i) for i, change in enumerate(lots.changes)]),
        (_INSERT_HOLDS, [_hold_row(hold) for hold in holds.opened]),
        (_UPDATE_HOLDS, [_hold_row(hold) for hold in _reduced(holds)]),
        (_INSERT_HOLD_CHANGES, _hold_change_rows(holds)),
    ):
        if rows:
            params = {"organization_id": tx.organization_id, "now": tx.now, "rows": json.parameter(rows)}
            await tx.execute(query, params)


_LOT_RECORD = """
json_to_recordset(%(rows)s::json) as r (
    id uuid, entity_type text, entity_id uuid, asset_id uuid, program_id uuid, status text, amount numeric,
    remaining numeric, created_at timestamptz, expires_at timestamptz, matures_at timestamptz, reference_id text,
    hold_id uuid, is_provisional boolean, entry_id uuid)
"""

_INSERT_LOTS = f"""
insert into lot (organization_id, {LOT_COLUMNS})
select %(organization_id)s, {LOT_COLUMNS} from {_LOT_RECORD}
"""

_UPDATE_LOTS = f"""
update lot l set status = r.status, remaining = r.remaining, reference_id = r.reference_id, hold_id = r.hold_id,
                 is_provisional = r.is_provisional
from {_LOT_RECORD} where l.organization_id = %(organization_id)s and l.id = r.id
"""

_INSERT_LOT_CHANGES = """
insert into lot_change (organization_id, entry_id, ordinal, lot_id, delta, status)
select %(organization_id)s, entry_id, ordinal, lot_id, delta, status
from json_to_recordset(%(rows)s::json) as r (entry_id uuid, ordinal int, lot_id uuid, delta numeric, status text)
"""

_HOLD_RECORD = """
json_to_recordset(%(rows)s::json) as r (
    id uuid, entity_type text, entity_id uuid, program_id uuid, asset_id uuid, kind text, amount numeric,
    remaining numeric, status text, reference_id text, description text, expires_at timestamptz, on_expiry text,
    carrier text, entry_id uuid, created_at timestamptz)
"""

_INSERT_HOLDS = f"""
insert into hold (organization_id, {HOLD_COLUMNS}, updated_at)
select %(organization_id)s, {HOLD_COLUMNS}, %(now)s from {_HOLD_RECORD}
"""

_UPDATE_HOLDS = f"""
update hold h set status = r.status, remaining = r.remaining, updated_at = %(now)s
from {_HOLD_RECORD} where h.organization_id = %(organization_id)s and h.id = r.id
"""

_INSERT_HOLD_CHANGES = """
insert into hold_change (organization_id, entry_id, hold_id, delta, status)
select %(organization_id)s, entry_id, hold_id, delta, status
from json_to_recordset(%(rows)s::json) as r (entry_id uuid, hold_id uuid, delta numeric, status text)
"""


def _changed(lots: LotBook) -> Iterable[Lot]:
    """The lots from the table that were changed, each once."""
    return {change.lot.id: change.lot for change in lots.changes if not change.lot.is_new}.values()


def _reduced(holds: HoldBook) -> Iterable[Hold]:
    return {change.hold.id: change.hold for change in holds.changes if not change.hold.is_new}.values()


def _lot_row(lot: Lot) -> dict[str, Any]:
    return {
        "id": lot.id,
        "entity_type": lot.entity_type,
        "entity_id": lot.entity_id,
        "asset_id": lot.asset_id,
        "program_id": lot.program_id,
        "status": lot.status,
        "amount": lot.amount,
        "remaining": lot.remaining,
        "created_at": lot.created_at,
        "expires_at": lot.expires_at,
        "matures_at": lot.matures_at,
        "reference_id": lot.reference_id,
        "hold_id": lot.hold_id,
        "is_provisional": lot.is_provisional,
        "entry_id": lot.entry_id,
    }


def _lot_change_row(change: LotChangeRow, index: int) -> dict[str, Any]:
    return {
        "entry_id": change.entry_id,
        "ordinal": index,
        "lot_id": change.lot.id,
        "delta": change.delta,
        "status": change.status,
    }


def _hold_row(hold: Hold) -> dict[str, Any]:
    return {
        "id": hold.id,
        "entity_type": hold.entity_type,
        "entity_id": hold.entity_id,
        "program_id": hold.program_id,
        "asset_id": hold.asset_id,
        "kind": hold.kind,
        "amount": hold.amount,
        "remaining": hold.remaining,
        "status": hold.status,
        "reference_id": hold.reference_id,
        "description": hold.description,
        "expires_at": hold.expires_at,
        "on_expiry": hold.on_expiry,
        "carrier": hold.carrier,
        "entry_id": hold.entry_id,
        "created_at": hold.created_at,
    }


def _hold_change_rows(holds: HoldBook) -> list[dict[str, Any]]:
    return [
        {
            "entry_id": change.entry_id,
            "hold_id": change.hold.id,
            "delta": change.delta,
            "status": change.status,
        }
        for change in holds.changes
    ]
