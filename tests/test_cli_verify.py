"""`scrip verify`: the whole chain of one organization or of all. Contract: holders.md 8.4."""

import asyncio
import json
from typing import Any
from uuid import UUID

import psycopg
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

import cli
from db.session import Database
from domain import balances
from domain.balances import AdjustRequest, Holder
from domain.clock import system_clock
from domain.ids import new_id
from settings import Settings
from tests.builders import open_shop
from tests.conftest import Tenant
from tests.servers import Postgres


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    monkeypatch.setattr(cli, "get_settings", lambda: settings)


@pytest.fixture
def entry_ids(postgres: Postgres, organization: Tenant) -> list[UUID]:
    """Three credits in the organization's ledger."""

    async def write() -> list[UUID]:
        database = Database(postgres.app_url, size=1, timeout_s=5, clock=system_clock)
        await database.open()
        shop = await open_shop(database, organization.id)
        request = AdjustRequest(
            program_id=shop.program_id, asset_id=shop.asset_id, type="CREDIT", amount="1", description="x"
        )
        found = []
        for _ in range(3):
            async with database.transaction(organization.id) as tx:
                found.append((await balances.adjust(tx, Holder("PARTICIPANT", shop.alice), request)).journal_entry_id)
        await database.close()
        return found

    return asyncio.run(write())


def verify(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["verify", "--json", *arguments])


def row_of(result: Any, organization: Tenant) -> dict[str, Any]:
    return next(row for row in json.loads(result.stdout) if row["organization_id"] == str(organization.id))


def test_a_sound_ledger_passes(organization: Tenant, entry_ids: list[UUID]) -> None:
    result = verify("--org", str(organization.id))

    assert result.exit_code == 0
    row = row_of(result, organization)
    assert (row["valid"], row["entries_checked"], row["first_invalid_entry_id"]) == (True, 3, None)


def test_a_changed_entry_fails_and_is_named(
    organization: Tenant, entry_ids: list[UUID], postgres: Postgres, new_organization: Any
) -> None:
    sound = new_organization()
    with psycopg.connect(postgres.superuser_url, autocommit=True) as attacker:
        attacker.execute("set session_replication_role = replica")
        attacker.execute("update journal_entry set description = 'y' where id = %s", (entry_ids[1],))

    result = verify()

    assert result.exit_code == 1
    row = row_of(result, organization)
    assert (row["valid"], row["first_invalid_entry_id"]) == (False, str(entry_ids[1]))
    assert row_of(result, sound)["valid"] is True


def test_what_cannot_be_checked_is_not_called_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify("--org", str(new_id())).exit_code == 2

    nowhere = SecretStr("postgresql://scrip_app@127.0.0.1:1/scrip")
    monkeypatch.setattr(cli, "get_settings", lambda: Settings(database_url=nowhere, owner_database_url=nowhere))
    assert verify().exit_code == 2
