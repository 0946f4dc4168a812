"""What a balance costs on a long account, as the application's role. Contract: holders.md 6.1."""

from typing import Any
from uuid import UUID

import pytest

from db.session import Database
from domain.ids import new_id
from domain.ledger import balances, journal, movements
from domain.ledger.balances import holder_balances
from domain.ledger.journal import load_accounts, write
from domain.ledger.movements import Cause, Position
from domain.locks import lock_participants
from tests.builders import Shop, d, open_shop
from tests.conftest import Tenant
from tests.domain.ledger.test_moments import assert_indexed, explain

POSTINGS = 20_000


@pytest.fixture
async def shop(database: Database, organization: Tenant) -> Shop:
    """Alice with 20,000 postings and as many lots, of which the statistics know nothing yet."""
    shop = await open_shop(database, organization.id, inventory_mode="LOT")
    position = Position("PARTICIPANT", shop.alice, shop.asset_id, has_lots=True)
    async with database.transaction(organization.id) as tx:
        await lock_participants(tx, [shop.alice])
        books = await load_accounts(tx, [shop.alice], [shop.asset_id])
        source = books.system("SYSTEM_ISSUANCE", shop.asset_id)
        for _ in range(POSTINGS):
            movements.credit(books, position, Cause(new_id(), shop.program_id, tx.now, "filler"), d("1"), source)
        await write(tx, books)
    return shop


def entry_point(shop: Shop, organization_id: UUID, name: str) -> tuple[str, Any]:
    """The query behind a function, with its parameters."""
    if name == "holder_balances":
        wanted = {"organization_id": organization_id, "entity_ids": [shop.alice], "asset_id": None}
        return balances._BALANCES, wanted
    return journal._LOAD, (organization_id, [shop.alice], [shop.asset_id])


@pytest.mark.parametrize("name", ["holder_balances", "load_accounts"])
async def test_a_balance_is_the_newest_posting_found_by_index(
    database: Database, organization: Tenant, shop: Shop, name: str
) -> None:
    query, params = entry_point(shop, organization.id, name)
    async with database.transaction(organization.id) as tx:
        (balance,) = await holder_balances(tx, [shop.alice])
        lines = await explain(tx, query, params)

    assert balance.available == POSTINGS
    assert any("posting_version_key" in line for line in lines), "\n".join(lines)
    assert_indexed(lines, pages=50)
