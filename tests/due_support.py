"""Holds with an end as rules make them, and what can be seen of entries that time makes."""

from datetime import datetime
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

from domain.ids import new_id
from domain.ledger import movements
from domain.ledger.holdings import load_lots
from domain.ledger.movements import HoldTerms
from tests.holdings_support import Desk


async def timed_hold(
    desk: Desk,
    amount: str,
    expires_at: datetime,
    *,
    on_expiry: Literal["RELEASE", "FORFEIT"] = "RELEASE",
    carrier: Literal["WORKFLOW", "PROGRAM"] = "PROGRAM",
    reference_id: str | None = None,
) -> UUID:
    """A hold with an end, whose workflow has been lost or which its program carries; its id."""
    hold_id = new_id()
    async with desk._posting() as (tx, terms, books):
        position = desk._position(terms)
        selection = position.select("AVAILABLE", tx.now)
        if terms.has_lots:
            await load_lots(tx, books.lots, selection, Decimal(amount))
        end = HoldTerms(hold_id, expires_at, on_expiry, carrier)
        movements.hold(books, position, desk._cause(tx, reference_id), Decimal(amount), end, selection)
    return hold_id


async def entries_of(desk: Desk, *action_types: str) -> list[dict[str, Any]]:
    """The journal entries of these types, in their order."""
    async with desk.database.transaction(desk.organization_id) as tx:
        return await tx.rows(
            "select * from journal_entry where organization_id = %s and action_type = any(%s) order by sequence",
            (desk.organization_id, list(action_types)),
        )
