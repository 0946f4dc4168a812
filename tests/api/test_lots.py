"""Listing lots over HTTP. Contract: holders.md 7.5."""

from datetime import datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import dict_row

from db.session import Database
from domain import lots
from domain.balances import Holder
from domain.ids import new_id
from domain.lots import LotFilter
from domain.pagination import PageRequest
from tests.api.calls import all_pages, problem, wrong_fields
from tests.builders import Shop, make_asset, make_group, open_shop
from tests.conftest import SettableClock, Tenant
from tests.holdings_support import Desk

MORNING = datetime.fromisoformat("2025-01-15T10:00:00+00:00")


@pytest.fixture
async def shop(database: Database, organization: Tenant) -> Shop:
    return await open_shop(database, organization.id, inventory_mode="LOT")


@pytest.fixture
def desk(database: Database, organization: Tenant, shop: Shop) -> Desk:
    return Desk.of(database, organization.id, shop)


def path(shop: Shop) -> str:
    return f"/participants/{shop.alice}/balances/lots"


async def test_a_lot_is_shown(client: httpx.AsyncClient, shop: Shop, desk: Desk, clock: SettableClock) -> None:
    # holders.md example 7
    clock.set(MORNING)
    await desk.grant("100", expires_at=MORNING + timedelta(hours=8760))
    (stored,) = await desk.lot_rows()

    answer = await client.get(path(shop), params={"asset_id": str(shop.asset_id)})

    assert answer.json() == {
        "data": [
            {
                "id": str(stored["id"]),
                "asset_id": str(shop.asset_id),
                "amount": "100.00",
                "remaining": "100.00",
                "status": "AVAILABLE",
                "created_at": "2025-01-15T10:00:00Z",
                "expires_at": "2026-01-15T10:00:00Z",
                "matures_at": None,
                "reference_id": None,
            }
        ],
        "pagination": {"has_more": False, "next_cursor": None},
    }


async def test_lots_are_listed_in_the_order_of_spending_and_filtered(
    client: httpx.AsyncClient, shop: Shop, desk: Desk, clock: SettableClock
) -> None:
    clock.set(MORNING)
    day = timedelta(days=1)
    await desk.grant("1", expires_at=MORNING + 5 * day)  # consumed below
    for n, terms in enumerate([{"expires_at": MORNING + 2 * day}, {}, {"matures_at": MORNING + 9 * day}], start=2):
        clock.advance(hours=1)
        await desk.grant(str(n), **terms)
    await desk.provision("5", "auth1")
    await desk.debit("1")

    async def listed(**params: Any) -> list[str]:
        wanted = {"asset_id": str(shop.asset_id), "limit": 2, **params}
        return [lot["amount"] for lot in await all_pages(client, path(shop), **wanted)]

    assert await listed() == ["1.00", "2.00", "3.00", "4.00", "5.00"]
    assert await listed(status="AVAILABLE") == ["2.00", "3.00"]
    assert await listed(status="DEFERRED") == ["4.00"]
    assert await listed(status="HELD") == ["5.00"]
    assert await listed(status="CONSUMED") == ["1.00"]
    assert await listed(status="EXPIRED") == []
    assert await listed(reference_id="auth1") == ["5.00"]
    assert await listed(expires_before="2025-01-18T10:00:00Z") == ["2.00"]
    assert await listed(expires_after="2025-01-18T10:00:00Z") == ["1.00"]
    assert await listed(program_id=str(shop.program_id), status="AVAILABLE") == ["2.00", "3.00"]
    assert await listed(program_id=str(new_id())) == []


async def test_a_groups_lots_are_listed_alike(
    client: httpx.AsyncClient, shop: Shop, desk: Desk, database: Database, organization: Tenant
) -> None:
    async with database.transaction(organization.id) as tx:
        group = await make_group(tx)
    await desk.using(holder=Holder("GROUP", group)).credit("7")

    answer = await client.get(f"/groups/{group}/balances/lots", params={"asset_id": str(shop.asset_id)})

    assert [lot["amount"] for lot in answer.json()["data"]] == ["7.00"]


async def test_what_is_wrong_is_said(
    client: httpx.AsyncClient,
    other_client: httpx.AsyncClient,
    shop: Shop,
    database: Database,
    organization: Tenant,
) -> None:
    async with database.transaction(organization.id) as tx:
        simple = await make_asset(tx, shop.program_id)
    asset = {"asset_id": str(shop.asset_id)}

    assert wrong_fields(await client.get(path(shop))) == {"asset_id": "required"}
    assert list(wrong_fields(await client.get(path(shop), params={"asset_id": str(simple)}))) == ["asset_id"]
    for change in ({"status": "OPEN"}, {"expires_before": "soon"}, {"cursor": "x"}, {"limit": 0}, {"program_id": "p"}):
        assert list(wrong_fields(await client.get(path(shop), params={**asset, **change}))) == list(change)
    problem(await client.get(path(shop), params={"asset_id": str(new_id())}), 404, "not_found")
    problem(await client.get(f"/participants/{new_id()}/balances/lots", params=asset), 404, "not_found")
    problem(await client.get(f"/groups/{shop.alice}/balances/lots", params=asset), 404, "not_found")
    problem(await other_client.get(path(shop), params=asset), 404, "not_found")


async def test_a_page_of_a_hundred_thousand_lots_is_read_from_an_index(
    shop: Shop, desk: Desk, database: Database, organization: Tenant, owner: psycopg.Connection[Any]
) -> None:
    await make_many_lots(desk, owner, 100_000)

    for wanted in (
        LotFilter(asset_id=shop.asset_id),
        LotFilter(asset_id=shop.asset_id, status="AVAILABLE"),
        LotFilter(asset_id=shop.asset_id, status="HELD"),
        LotFilter(asset_id=shop.asset_id, reference_id="rare"),
    ):
        async with database.transaction(organization.id) as tx:
            first = (await lots.find(tx, shop.alice, wanted, PageRequest())).page
            before = await rows_read(tx.connection)
            second = (await lots.find(tx, shop.alice, wanted, PageRequest(cursor=first.next_cursor))).page
            read = await rows_read(tx.connection) - before
        assert len(first.items) == 50 or wanted.reference_id
        assert not {lot.id for lot in first.items} & {lot.id for lot in second.items} or first.next_cursor is None
        assert read <= 200, f"{wanted} read {read} rows"


async def rows_read(connection: psycopg.AsyncConnection[Any]) -> int:
    """How many rows of the table of lots this session has read in its transaction."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            "select seq_tup_read + idx_tup_fetch as n from pg_stat_xact_user_tables where relname = 'lot'"
        )
        row = await cursor.fetchone()
    assert row is not None
    count: int = row["n"]
    return count


async def make_many_lots(desk: Desk, owner: psycopg.Connection[Any], count: int) -> None:
    """Lots of which nine in ten are long spent, the oldest ones; a few are under the reference `rare`."""
    await desk.credit("1")
    owner.execute(
        "insert into lot (organization_id, id, entity_type, entity_id, asset_id, program_id, status, amount, remaining,"
        " created_at, reference_id, hold_id, is_provisional, entry_id)"
        " select organization_id, gen_random_uuid(), entity_type, entity_id, asset_id, program_id,"
        " case when n <= 90000 then 'CONSUMED' when n %% 2 = 0 then 'AVAILABLE' else 'HELD' end, 1,"
        " case when n <= 90000 then 0 else 1 end, created_at + n * interval '1 second',"
        " case when n %% 10000 = 0 then 'rare' end, case when n > 90000 then gen_random_uuid() end, false, entry_id"
        " from lot cross join generate_series(1, %s) n where organization_id = %s",
        (count, desk.organization_id),
    )
    owner.execute("analyze lot")
