"""Loading accounts for a write. Contract: holders.md 8.4."""

import pytest

from db.session import Database
from domain.ledger import journal
from domain.ledger.books import SYSTEM_TYPES
from domain.ledger.journal import load_accounts
from tests.builders import make_asset, make_program
from tests.conftest import Tenant


async def test_assets_that_are_kept_and_new_ones_come_together_when_the_kept_ones_are_cleared(
    database: Database, organization: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_SYSTEM_ACCOUNTS", {})
    monkeypatch.setattr(journal, "_SYSTEM_ACCOUNTS_KEPT", 1)
    async with database.transaction(organization.id) as tx:
        program_id = await make_program(tx)
        first, second, third = [await make_asset(tx, program_id) for _ in range(3)]
        await load_accounts(tx, [], [first, second])

        books = await load_accounts(tx, [], [first, third])

        for asset_id in (first, third):
            for kind in SYSTEM_TYPES:
                assert books.system(kind, asset_id).asset_id == asset_id
        assert journal._SYSTEM_ACCOUNTS.keys() == {third}
