"""Statements, histories and balances at an instant over HTTP.

Contract: webhooks-and-reports.md 16, basics.md 5.9 and 8 (24, 25), holders.md 3.9 and 6.1.
"""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from db.session import Database
from domain import faults
from domain.clock import format_timestamp
from domain.ledger.journal import load_accounts, write
from tests.api.calls import all_pages, created, new_asset, new_participant, new_program, problem, wrong_fields
from tests.builders import Shop, d, open_shop
from tests.conftest import SettableClock, Tenant
from tests.events_support import HttpProgram, credit
from tests.ledger_invariants import assert_ledger_invariants


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


@pytest.fixture
async def shop(database: Database, organization: Tenant) -> Shop:
    return await open_shop(database, organization.id)


async def get(client: httpx.AsyncClient, path: str, **params: Any) -> Any:
    answer = await client.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def adjust(client: httpx.AsyncClient, shop: Shop, amount: str, **fields: Any) -> dict[str, Any]:
    """Credit alice, or debit her for a negative amount."""
    body = {
        "program_id": str(shop.program_id),
        "asset_id": str(shop.asset_id),
        "type": "DEBIT" if amount.startswith("-") else "CREDIT",
        "amount": amount.lstrip("-"),
        "description": "Correction",
        **fields,
    }
    answer = await client.post(f"/participants/{shop.alice}/balances/adjust", json=body)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


async def created_at(client: httpx.AsyncClient, entry_id: str) -> str:
    return str((await get(client, f"/journal-entries/{entry_id}"))["created_at"])


# --- wallets ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("running_worker")
async def test_a_wallets_history_and_statement(client: httpx.AsyncClient) -> None:  # examples 24 and 25
    program = await HttpProgram.open(client)
    asset = await program.asset(issuance_policy="PREFUNDED")
    await program.rule("event.type == 'purchase'", credit(asset, "200"))
    path = f"/programs/{program.id}/assets/{asset}"
    funded = (await client.post(f"{path}/fund", json={"amount": "10000.00", "description": "Q1"})).json()
    burned = (await client.post(f"{path}/burn", json={"amount": "500.00"})).json()
    event = await program.run(type="purchase")

    history = await get(client, f"/programs/{program.id}/history")
    rows = history["data"]
    assert [(row["action_type"], row["amount"]) for row in rows] == [
        ("CREDIT", "-200.00"),
        ("BURN", "-500.00"),
        ("FUND", "10000.00"),
    ]
    assert history["pagination"] == {"has_more": False, "next_cursor": None}
    assert (rows[0]["event_id"], rows[0]["event_timestamp"]) == (event["id"], "2025-01-15T10:00:00Z")
    assert set(rows[0]) - set(rows[1]) == {"event_timestamp"}
    assert rows[2] == {
        "journal_entry_id": funded["journal_entry_id"],
        "action_type": "FUND",
        "asset_id": asset,
        "amount": "10000.00",
        "bucket": "AVAILABLE",
        "description": "Q1",
        "event_id": None,
        "created_by_api_key_id": rows[2]["created_by_api_key_id"],
        "created_at": await created_at(client, funded["journal_entry_id"]),
    }

    begin = await created_at(client, burned["journal_entry_id"])
    cursor: dict[str, str] = {}
    lines = []
    for _ in range(2):
        page = await get(
            client, f"/programs/{program.id}/statement", asset_id=asset, limit=1, **{"from": begin}, **cursor
        )
        assert (page["opening_balance"], page["closing_balance"]) == ("10000.00", "9300.00")
        assert (page["asset_id"], page["from"]) == (asset, begin)
        assert not {"bucket", "to"} & set(page)
        lines += page["data"]
        cursor = {"cursor": page["pagination"]["next_cursor"]}
    assert cursor == {"cursor": None}
    assert [(line["amount"], line["running_balance"]) for line in lines] == [
        ("-500.00", "9500.00"),
        ("-200.00", "9300.00"),
    ]


async def test_an_asset_without_a_wallet_has_an_empty_statement(client: httpx.AsyncClient, shop: Shop) -> None:
    await adjust(client, shop, "10")

    page = await get(client, f"/programs/{shop.program_id}/statement", asset_id=str(shop.asset_id), bucket="AVAILABLE")
    assert page == {
        "asset_id": str(shop.asset_id),
        "bucket": "AVAILABLE",
        "opening_balance": "0.00",
        "closing_balance": "0.00",
        "data": [],
        "pagination": {"has_more": False, "next_cursor": None},
    }


# --- holders ---------------------------------------------------------------------------------------------------------


async def test_a_participants_statement(client: httpx.AsyncClient, organization: Tenant, shop: Shop) -> None:
    await adjust(client, shop, "250")
    entry_id = (await adjust(client, shop, "100", description="Bonus"))["journal_entry_id"]
    at = await created_at(client, entry_id)
    await adjust(client, shop, "-50")

    page = await get(
        client, f"/participants/{shop.alice}/statement", asset_id=str(shop.asset_id), **{"from": at, "to": at}
    )

    (line,) = page.pop("data")
    posting = (await get(client, f"/journal-entries/{entry_id}"))["postings"][1]
    assert page == {
        "asset_id": str(shop.asset_id),
        "opening_balance": "250.00",
        "closing_balance": "350.00",
        "from": at,
        "to": at,
        "pagination": {"has_more": False, "next_cursor": None},
    }
    assert line == {
        "posting_id": posting["id"],
        "journal_entry_id": entry_id,
        "action_type": "CREDIT",
        "amount": "100.00",
        "bucket": "AVAILABLE",
        "description": "Bonus",
        "created_at": at,
        "event_id": None,
        "created_by_api_key_id": str(organization.api_key_id),
        "running_balance": "350.00",
    }


async def test_a_participants_history_in_pages(client: httpx.AsyncClient, shop: Shop) -> None:
    for amount in ("1", "2", "3", "-4", "5"):
        await adjust(client, shop, amount)
    path = f"/participants/{shop.alice}/activity/history"

    rows = await all_pages(client, path, limit=2)
    assert [row["amount"] for row in rows] == ["5.00", "-4.00", "3.00", "2.00", "1.00"]
    assert [row["amount"] for row in await all_pages(client, path, event_from=rows[1]["created_at"])] == [
        "5.00",
        "-4.00",
    ]
    window = {"from": rows[3]["created_at"], "event_to": rows[2]["created_at"]}
    assert [row["amount"] for row in await all_pages(client, path, limit=1, **window)] == ["3.00", "2.00"]
    assert await all_pages(client, path, bucket="HELD") == []


async def test_a_group_has_both_too(
    client: httpx.AsyncClient, database: Database, organization: Tenant, shop: Shop
) -> None:
    members = [{"participant_id": str(shop.alice), "role": "ADMIN"}]
    group_id = (await created(client, "/groups", {"name": "Family", "members": members}))["id"]
    path = f"/groups/{group_id}"
    async with database.transaction(organization.id) as tx:
        books = await load_accounts(tx, [], [shop.asset_id])
        wallet = books.account("GROUP", group_id, shop.asset_id, "AVAILABLE")
        movements = [(books.system("SYSTEM_ISSUANCE", shop.asset_id), d("-7.5")), (wallet, d("7.5"))]
        books.post("CREDIT", movements, program_id=shop.program_id)
        await write(tx, books)

    assert [row["amount"] for row in await all_pages(client, f"{path}/activity/history")] == ["7.50"]
    statement = await get(client, f"{path}/statement", asset_id=str(shop.asset_id))
    assert [line["running_balance"] for line in statement["data"]] == ["7.50"]
    assert statement["closing_balance"] == "7.50"


# --- balances at an instant ------------------------------------------------------------------------------------------


async def test_balances_as_of_an_instant(client: httpx.AsyncClient, shop: Shop) -> None:
    path = f"/participants/{shop.alice}/balances"
    first = await created_at(client, (await adjust(client, shop, "10"))["journal_entry_id"])
    second = await created_at(client, (await adjust(client, shop, "-3"))["journal_entry_id"])

    async def available(as_of: str) -> list[str]:
        return [row["available"] for row in (await get(client, path, as_of=as_of))["data"]]

    assert await available("2000-01-01T00:00:00Z") == []
    assert await available(first) == ["10.00"]
    assert await available(second) == ["7.00"]
    assert await available("2999-01-01T00:00:00+01:00") == ["7.00"]
    assert await get(client, path, as_of=second) == await get(client, path)
    assert (await get(client, path, as_of=second, asset_id=str(uuid4())))["data"] == []
    assert wrong_fields(await client.get(path, params={"as_of": "2024-01-01"})) == {"as_of": "invalid"}
    problem(await client.get(f"/participants/{uuid4()}/balances", params={"as_of": first}), 404, "not_found")


async def test_what_was_reported_as_of_now_never_changes(
    client: httpx.AsyncClient, shop: Shop, clock: SettableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A credit that began before the reports and is stored after them belongs to a later moment."""
    await adjust(client, shop, "10")
    written, release = asyncio.Event(), asyncio.Event()

    async def stall(point: str) -> None:
        if point == "ledger.written":
            written.set()
            await release.wait()

    monkeypatch.setattr(faults, "reach", stall)
    late = asyncio.create_task(adjust(client, shop, "90"))
    await written.wait()
    monkeypatch.undo()
    now = format_timestamp(clock())
    window = {"asset_id": str(shop.asset_id), "to": now}

    async def report() -> list[Any]:
        return [
            await get(client, f"/participants/{shop.alice}/balances", as_of=now),
            await get(client, f"/participants/{shop.alice}/statement", **window),
            await get(client, f"/participants/{shop.alice}/activity/history", **window),
        ]

    before = await report()
    release.set()
    await late

    assert before[1]["closing_balance"] == "10.00"
    assert await report() == before
    statement = await get(client, f"/participants/{shop.alice}/statement", asset_id=str(shop.asset_id))
    assert statement["closing_balance"] == "100.00"
    assert statement["data"][-1]["created_at"] > now


# --- refusals --------------------------------------------------------------------------------------------------------

OWNERS = ("participants", "groups", "programs")


def history_path(owners: str, id: Any) -> str:
    return f"/{owners}/{id}/history" if owners == "programs" else f"/{owners}/{id}/activity/history"


@pytest.mark.parametrize("owners", OWNERS)
async def test_unknown_owners_and_those_of_others_are_not_found(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient, owners: str
) -> None:
    program = await new_program(client)
    asset = await new_asset(client, program["id"])
    alice = await new_participant(client)
    group = await created(
        client, "/groups", {"name": "G", "members": [{"participant_id": alice["id"], "role": "ADMIN"}]}
    )
    own = {"participants": alice, "groups": group, "programs": program}[owners]["id"]

    for path in (f"/{owners}/{own}/statement", history_path(owners, own)):
        assert (await client.get(path, params={"asset_id": asset["id"]})).status_code == 200
        problem(await other_client.get(path, params={"asset_id": asset["id"]}), 404, "not_found")
        problem(await client.get(path, params={"asset_id": str(uuid4())}), 404, "not_found")
    for path in (f"/{owners}/{uuid4()}/statement", history_path(owners, uuid4())):
        problem(await client.get(path, params={"asset_id": asset["id"]}), 404, "not_found")


@pytest.mark.parametrize("owners", OWNERS)
async def test_bad_parameters_are_named(client: httpx.AsyncClient, owners: str) -> None:
    statement, history = f"/{owners}/{uuid4()}/statement", history_path(owners, uuid4())
    backwards = {"from": "2024-02-01T00:00:00Z", "to": "2024-01-01T00:00:00Z"}
    asset = {"asset_id": str(uuid4())}

    assert wrong_fields(await client.get(statement)) == {"asset_id": "required"}
    assert wrong_fields(await client.get(statement, params={"asset_id": "x"})) == {"asset_id": "invalid"}
    for path in (statement, history):
        assert wrong_fields(await client.get(path, params={**asset, "bucket": "SPENT"})) == {"bucket": "invalid"}
        assert wrong_fields(await client.get(path, params={**asset, "to": "yesterday"})) == {"to": "invalid"}
        assert wrong_fields(await client.get(path, params={**asset, "limit": "0"})) == {"limit": "invalid"}
        assert wrong_fields(await client.get(path, params={**asset, "cursor": "YWJjMTIz"})) == {"cursor": "invalid"}
        assert wrong_fields(await client.get(path, params={**asset, **backwards})) == {"from": "invalid"}
    backwards = {"event_from": backwards["from"], "event_to": backwards["to"]}
    assert wrong_fields(await client.get(history, params=backwards)) == {"event_from": "invalid"}


async def test_a_window_of_one_instant_is_no_error(client: httpx.AsyncClient, shop: Shop, clock: SettableClock) -> None:
    at = format_timestamp(clock() - timedelta(days=1))
    window = {"from": at, "to": at, "asset_id": str(shop.asset_id)}

    assert (await get(client, f"/participants/{shop.alice}/statement", **window))["data"] == []
