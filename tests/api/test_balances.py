"""Adjusting balances over HTTP. Contract: holders.md 6.2; basics.md 2 and 8."""

import asyncio
from typing import Any
from uuid import UUID

import httpx
import pytest

from db.session import Database
from domain.ids import new_id
from tests.builders import Shop, open_shop
from tests.conftest import Tenant
from tests.ledger_invariants import assert_ledger_invariants


@pytest.fixture
async def shop(database: Database, organization: Tenant) -> Shop:
    return await open_shop(database, organization.id)


def an_adjust(shop: Shop, **fields: Any) -> dict[str, Any]:
    return {
        "program_id": str(shop.program_id),
        "asset_id": str(shop.asset_id),
        "type": "CREDIT",
        "amount": "10",
        "description": "Goodwill",
        **fields,
    }


def path(holder: UUID) -> str:
    return f"/participants/{holder}/balances/adjust"


async def test_a_credit_shows_the_balance_after_it(client: httpx.AsyncClient, shop: Shop) -> None:
    answer = await client.post(path(shop.alice), json=an_adjust(shop))

    assert answer.status_code == 200
    body = answer.json()
    assert UUID(body.pop("journal_entry_id"))
    assert body == {
        "amount": "10.00",
        "asset_id": str(shop.asset_id),
        "balance": {"available": "10.00", "deferred": "0.00", "held": "0.00"},
        "bucket": "AVAILABLE",
        "message": "Balance adjusted successfully",
        "program_id": str(shop.program_id),
        "type": "CREDIT",
    }


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"amount": "0"}, "amount"),
        ({"amount": "-5"}, "amount"),
        ({"amount": ""}, "amount"),
        ({"amount": 5}, "amount"),
        ({"amount": "1e2"}, "amount"),
        ({"amount": "NaN"}, "amount"),
        ({"amount": "100000000000000000000"}, "amount"),
        ({"type": "TRANSFER"}, "type"),
        ({"description": ""}, "description"),
        ({"description": "x" * 501}, "description"),
        ({"description": None}, "description"),
        ({"bucket": "DEFERRED"}, "bucket"),
        ({"bucket": "HELD"}, "bucket"),
        ({"bucket": "HELD", "type": "DEBIT", "allow_negative": True}, "bucket"),
        ({"allow_negative": "true"}, "allow_negative"),
        ({"asset_id": "points"}, "asset_id"),
        ({"program_id": None}, "program_id"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "x" * 256}, "idempotency_key"),
        ({"idempotency_key": "automation:1"}, "idempotency_key"),
    ],
)
async def test_what_is_wrong_is_named(
    client: httpx.AsyncClient, shop: Shop, change: dict[str, Any], field: str
) -> None:
    answer = await client.post(path(shop.alice), json=an_adjust(shop, **change))

    assert answer.status_code == 400
    assert answer.json()["code"] == "bad_request"
    assert answer.json()["details"]["field"] == field


async def test_refusals_carry_their_status(client: httpx.AsyncClient, shop: Shop) -> None:
    scale = await client.post(path(shop.alice), json=an_adjust(shop, amount="1.005"))  # basics.md example 16
    short = await client.post(path(shop.alice), json=an_adjust(shop, type="DEBIT"))
    unknown = await client.post(path(new_id()), json=an_adjust(shop))

    assert (scale.status_code, scale.json()["code"]) == (400, "invalid_scale")
    assert scale.json()["details"]["field"] == "amount"
    assert (short.status_code, short.json()["code"]) == (422, "insufficient_balance")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")


async def test_a_replay_says_so(client: httpx.AsyncClient, shop: Shop) -> None:
    # basics.md example 27, for adjust: members reordered, 10.0 for 10
    body = an_adjust(shop, idempotency_key="goodwill-1")
    first = await client.post(path(shop.alice), json=body)
    again = await client.post(path(shop.alice), json={**dict(reversed(body.items())), "amount": "10.0"})

    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert (again.status_code, again.json()) == (200, first.json())


async def test_another_payload_under_the_same_key_conflicts(client: httpx.AsyncClient, shop: Shop) -> None:
    await client.post(path(shop.alice), json=an_adjust(shop, idempotency_key="k"))

    answer = await client.post(path(shop.alice), json=an_adjust(shop, idempotency_key="k", amount="11"))

    assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_conflict")


async def test_concurrent_calls_with_one_key_make_one_entry(
    client: httpx.AsyncClient, shop: Shop, database: Database, organization: Tenant
) -> None:
    body = an_adjust(shop, idempotency_key="race")

    answers = await asyncio.gather(*(client.post(path(shop.alice), json=body) for _ in range(20)))

    assert {answer.status_code for answer in answers} == {200}
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 19
    assert len({answer.json()["journal_entry_id"] for answer in answers}) == 1
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


async def test_another_organization_sees_nothing(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient, shop: Shop
) -> None:
    entry_id = (await client.post(path(shop.alice), json=an_adjust(shop))).json()["journal_entry_id"]

    assert (await other_client.post(path(shop.alice), json=an_adjust(shop))).status_code == 404
    assert (await other_client.get(f"/journal-entries/{entry_id}")).status_code == 404
    assert (await other_client.get("/journal-entries")).json()["data"] == []
    assert (await other_client.get(f"/programs/{shop.program_id}/balance")).status_code == 404
