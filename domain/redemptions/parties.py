"""Whose accounts a redemption touches, its participant's and its target's: their locks, their places in the books."""

from uuid import UUID

from psycopg.rows import DictRow

from db.session import Transaction
from domain.ledger.books import Books
from domain.ledger.holdings import load_lots_by_id
from domain.ledger.journal import load_accounts
from domain.ledger.lots import Lot
from domain.ledger.movements import HolderType, Position
from domain.ledger.spending import Reserved, Target
from domain.locks import lock_groups, lock_participants, lock_programs
from domain.redemptions.records import CapturedTarget, Redemption

_LOTS_OF = """
select redemption_id, lot_id, held_lot_id, amount from redemption_lot
where organization_id = %s and redemption_id = any(%s) order by redemption_id, ordinal
"""


async def lock_parties(tx: Transaction, participant_id: UUID, target: CapturedTarget) -> DictRow | None:
    """Lock the participant and the target's entity, in the global order; the participant's row, None for an unknown."""
    participant_ids = {participant_id}
    if target.entity_id is not None:
        if target.entity_type == "PROGRAM":
            await lock_programs(tx, [target.entity_id])
        elif target.entity_type == "GROUP":
            await lock_groups(tx, [target.entity_id])
        else:
            participant_ids.add(target.entity_id)
    return (await lock_participants(tx, participant_ids)).get(participant_id)


async def load_parties(tx: Transaction, participant_id: UUID, target: CapturedTarget, asset_id: UUID) -> Books:
    """The accounts of the participant and of the target's entity. Both are locked."""
    entities = [participant_id] if target.entity_id is None else [participant_id, target.entity_id]
    return await load_accounts(tx, entities, [asset_id])


def position_of(redemption: Redemption) -> Position:
    """The participant's share of the redemption's asset."""
    return Position("PARTICIPANT", redemption.participant_id, redemption.asset_id, redemption.has_lots)


def place_of(books: Books, target: CapturedTarget, asset_id: UUID, *, has_lots: bool, lot: Lot | None = None) -> Target:
    """The target in the books. A program's wallet has no lots, as what is funded and credited there has none."""
    if target.type != "LEDGER_ENTITY":
        return Target(books.system(target.type, asset_id))
    assert target.entity_id is not None
    if target.entity_type == "PROGRAM":
        return Target(books.account("PROGRAM", target.entity_id, asset_id, "AVAILABLE"))
    holder_type: HolderType = "GROUP" if target.entity_type == "GROUP" else "PARTICIPANT"
    position = Position(holder_type, target.entity_id, asset_id, has_lots)
    return Target(position.account(books, "AVAILABLE"), position if has_lots else None, lot)


async def load_reserved(tx: Transaction, books: Books, redemption_ids: list[UUID]) -> dict[UUID, list[Reserved]]:
    """The lots in which the value of these pending redemptions lies, in the order of taking, with those of origin."""
    if not redemption_ids:
        return {}
    rows = await (await tx.execute(_LOTS_OF, (tx.organization_id, redemption_ids))).fetchall()
    lot_ids = {lot_id for _, *pair, _ in rows for lot_id in pair}
    lots = {lot.id: lot for lot in await load_lots_by_id(tx, books.lots, lot_ids)}
    found: dict[UUID, list[Reserved]] = {}
    for redemption_id, lot_id, held_lot_id, amount in rows:
        found.setdefault(redemption_id, []).append(Reserved(lots[lot_id], lots[held_lot_id], amount))
    return found
