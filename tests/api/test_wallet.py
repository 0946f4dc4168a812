"""The program wallet over HTTP. Contract: basics.md 5.9 to 5.11 and 8."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import update
from sqlmodel import col

from db.session import Database
from db.tables import Asset, Program
from domain.ids import new_id
from tests.builders import Shop, d, make_asset, make_program, open_shop
from tests.conftest import Tenant
from tests.ledger_invariants import assert_ledger_invariants


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


@pytest.fixture
async def shop(database: Database, organization: Tenant) -> Shop:
    return await open_shop(database, organization.id, issuance_policy="PREFUNDED")


async def move(client: httpx.AsyncClient, shop: Shop, operation: str, amount: str, **fields: Any) -> httpx.Response:
    path = f"/programs/{shop.program_id}/assets/{shop.asset_id}/{operation}"
    return await client.post(path, json={"amount": amount, **fields})


async def wallet_of(client: httpx.AsyncClient, program_id: UUID, **query: Any) -> list[dict[str, Any]]:
    answer = await client.get(f"/programs/{program_id}/balance", params=query)
    assert answer.status_code == 200
    return list(answer.json()["data"])


async def entry(client: httpx.AsyncClient, answer: httpx.Response) -> dict[str, Any]:
    found = await client.get(f"/journal-entries/{answer.json()['journal_entry_id']}")
    return dict(found.json())


async def test_fund_and_burn(client: httpx.AsyncClient, shop: Shop) -> None:  # examples 19 and 20
    funded = await move(client, shop, "fund", "10000.00", description="Q1 budget")
    burned = await move(client, shop, "burn", "500.00")

    assert (funded.status_code, funded.json()["available"]) == (200, "10000.00")
    assert funded.json()["message"] == "Program funded successfully"
    assert (burned.status_code, burned.json()["available"]) == (200, "9500.00")
    assert burned.json()["message"] == "Program balance burned successfully"
    fund_entry, burn_entry = await entry(client, funded), await entry(client, burned)
    assert (fund_entry["action_type"], fund_entry["description"]) == ("FUND", "Q1 budget")
    assert [(p["entity_type"], p["amount"]) for p in fund_entry["postings"]] == [
        ("SYSTEM_ISSUANCE", "-10000.00"),
        ("PROGRAM", "10000.00"),
    ]
    assert (burn_entry["action_type"], burn_entry["description"]) == ("BURN", None)
    assert [(p["entity_type"], p["amount"]) for p in burn_entry["postings"]] == [
        ("PROGRAM", "-500.00"),
        ("SYSTEM_BREAKAGE", "500.00"),
    ]
    assert await wallet_of(client, shop.program_id) == [
        {
            "asset_id": str(shop.asset_id),
            "available": "9500.00",
            "deferred": "0.00",
            "held": "0.00",
            "issuance_policy": "PREFUNDED",
        }
    ]


async def test_scale_zero_prints_no_point(  # example 22
    client: httpx.AsyncClient, database: Database, organization: Tenant
) -> None:
    shop = await open_shop(database, organization.id, issuance_policy="PREFUNDED", scale=0)

    await move(client, shop, "fund", "100000")

    assert (await move(client, shop, "burn", "5000")).json()["available"] == "95000"


async def test_an_unlimited_asset_has_no_wallet(  # example 23
    client: httpx.AsyncClient, database: Database, organization: Tenant
) -> None:
    shop = await open_shop(database, organization.id)

    for operation in ("fund", "burn"):
        answer = await move(client, shop, operation, "100", idempotency_key="k")
        replay = await move(client, shop, operation, "100.0", idempotency_key="k")
        assert (answer.status_code, answer.json()["available"]) == (200, "0.00")
        assert answer.json()["journal_entry_id"] is None
        assert "UNLIMITED" in answer.json()["message"]
        assert (replay.json(), replay.headers["Idempotent-Replayed"]) == (answer.json(), "true")

    assert (await client.get("/journal-entries")).json()["data"] == []
    assert await wallet_of(client, shop.program_id) == []


async def test_a_burn_never_exceeds_the_wallet(client: httpx.AsyncClient, shop: Shop) -> None:
    await move(client, shop, "fund", "10")

    answer = await move(client, shop, "burn", "10.01")

    assert (answer.status_code, answer.json()["code"]) == (422, "insufficient_balance")
    assert (await move(client, shop, "burn", "10")).json()["available"] == "0.00"


async def test_concurrent_burns_never_exceed_the_wallet(client: httpx.AsyncClient, shop: Shop) -> None:
    await move(client, shop, "fund", "10")

    answers = await asyncio.gather(*(move(client, shop, "burn", "3") for _ in range(12)))

    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [422] * 9


@pytest.mark.parametrize("operation", ["fund", "burn"])
async def test_refusals(
    client: httpx.AsyncClient, database: Database, organization: Tenant, shop: Shop, operation: str
) -> None:
    async with database.transaction(organization.id) as tx:
        unlinked = Shop(await make_program(tx), shop.asset_id, shop.alice)

    async def code(shop: Shop, amount: str, **fields: Any) -> tuple[int, str]:
        answer = await move(client, shop, operation, amount, **fields)
        return answer.status_code, answer.json()["code"]

    assert await code(shop, "0") == (400, "bad_request")
    assert await code(shop, "-1") == (400, "bad_request")
    assert await code(shop, "1.001") == (400, "invalid_scale")
    assert await code(shop, "1", description="x" * 501) == (400, "bad_request")
    assert await code(unlinked, "1") == (422, "asset_not_linked")
    assert await code(Shop(new_id(), shop.asset_id, shop.alice), "1") == (404, "not_found")
    assert await code(Shop(shop.program_id, new_id(), shop.alice), "1") == (404, "not_found")
    async with database.transaction(organization.id) as tx:
        await tx.run(update(Program).where(col(Program.id) == shop.program_id).values(status="ARCHIVED"))
    assert await code(shop, "1") == (409, "program_inactive")
    async with database.transaction(organization.id) as tx:
        await tx.run(update(Program).where(col(Program.id) == shop.program_id).values(status="ACTIVE"))
        await tx.run(update(Asset).where(col(Asset.id) == shop.asset_id).values(status="ARCHIVED"))
    assert await code(shop, "1") == (409, "asset_archived")


async def test_a_suspended_program_can_be_funded_and_burned(
    client: httpx.AsyncClient, database: Database, organization: Tenant, shop: Shop
) -> None:
    async with database.transaction(organization.id) as tx:
        await tx.run(update(Program).where(col(Program.id) == shop.program_id).values(status="SUSPENDED"))

    assert (await move(client, shop, "fund", "10")).status_code == 200
    assert (await move(client, shop, "burn", "4")).json()["available"] == "6.00"


async def test_the_ceiling_of_the_asset_does_not_cap_funding(
    client: httpx.AsyncClient, database: Database, organization: Tenant
) -> None:
    shop = await open_shop(database, organization.id, issuance_policy="PREFUNDED", max_transaction_amount=d("5"))

    assert (await move(client, shop, "fund", "100")).status_code == 200
    assert (await move(client, shop, "burn", "50")).status_code == 200


async def test_a_key_is_scoped_by_operation(client: httpx.AsyncClient, shop: Shop) -> None:
    funded = await move(client, shop, "fund", "10", idempotency_key="k")
    burned = await move(client, shop, "burn", "10", idempotency_key="k")
    replay = await move(client, shop, "fund", "10.00", idempotency_key="k")
    conflict = await move(client, shop, "fund", "11", idempotency_key="k")

    assert burned.json()["available"] == "0.00"
    assert replay.headers["Idempotent-Replayed"] == "true"
    assert replay.json() == {**funded.json(), "available": "0.00"}
    assert (conflict.status_code, conflict.json()["code"]) == (409, "idempotency_conflict")


async def test_programs_that_share_an_asset_have_wallets_of_their_own(
    client: httpx.AsyncClient, database: Database, organization: Tenant
) -> None:
    async with database.transaction(organization.id) as tx:
        first, second = await make_program(tx), await make_program(tx)
        asset_id = await make_asset(tx, first, second, issuance_policy="PREFUNDED")
        other_asset = await make_asset(tx, first, issuance_policy="PREFUNDED")
        await make_asset(tx, first)
    await move(client, Shop(first, asset_id, first), "fund", "10")

    assert [row["available"] for row in await wallet_of(client, second)] == ["0.00"]
    assert [row["asset_id"] for row in await wallet_of(client, first)] == [str(other_asset), str(asset_id)]
    assert [row["available"] for row in await wallet_of(client, first, asset_id=str(asset_id))] == ["10.00"]


async def test_the_wallet_is_listed_in_pages(
    client: httpx.AsyncClient, database: Database, organization: Tenant
) -> None:
    async with database.transaction(organization.id) as tx:
        program_id = await make_program(tx)
        assets = [await make_asset(tx, program_id, issuance_policy="PREFUNDED") for _ in range(5)]
    found: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await client.get(f"/programs/{program_id}/balance", params={"limit": 2, **cursor})).json()
        found += [row["asset_id"] for row in page["data"]]
        if not page["pagination"]["has_more"]:
            break
        cursor = {"cursor": page["pagination"]["next_cursor"]}

    assert found == [str(asset_id) for asset_id in sorted(assets, reverse=True)]
    assert (await client.get(f"/programs/{program_id}/balance?cursor=x")).json()["details"]["field"] == "cursor"
    assert (await client.get(f"/programs/{new_id()}/balance")).status_code == 404
