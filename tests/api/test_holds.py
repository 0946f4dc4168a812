"""Hold records over HTTP. Contract: holders.md 6.8."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from db.session import Database
from domain.ids import new_id
from tests.api.calls import all_pages, problem, wrong_fields
from tests.builders import Shop, make_group, open_shop
from tests.conftest import Tenant


@pytest.fixture
async def shop(database: Database, organization: Tenant, client: httpx.AsyncClient) -> Shop:
    """A shop with a LOT asset of which alice has 100."""
    shop = await open_shop(database, organization.id, inventory_mode="LOT")
    body = {**operation(shop), "type": "CREDIT", "amount": "100"}
    assert (await client.post(f"/participants/{shop.alice}/balances/adjust", json=body)).status_code == 200
    return shop


def operation(shop: Shop, **fields: Any) -> dict[str, Any]:
    return {
        "program_id": str(shop.program_id),
        "asset_id": str(shop.asset_id),
        "description": "Card authorization",
        **fields,
    }


async def hold(client: httpx.AsyncClient, shop: Shop, **fields: Any) -> dict[str, Any]:
    answer = await client.post(f"/participants/{shop.alice}/balances/hold", json=operation(shop, **fields))
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


@pytest.mark.usefixtures("running_worker")
async def test_a_hold_is_recorded(client: httpx.AsyncClient, shop: Shop, running_worker: None) -> None:
    expires_at = (datetime.now(UTC) + timedelta(days=7)).isoformat().replace("+00:00", "Z")
    held = await hold(client, shop, amount="15", reference_id="auth1", expires_at=expires_at, on_expiry="FORFEIT")

    record = (await client.get(f"/holds/{held['hold_id']}")).json()

    assert record.pop("created_at") == record.pop("updated_at")
    assert record == {
        "hold_id": held["hold_id"],
        "participant_id": str(shop.alice),
        "program_id": str(shop.program_id),
        "asset_id": str(shop.asset_id),
        "amount": "15.00",
        "remaining": "15.00",
        "status": "ACTIVE",
        "reference_id": "auth1",
        "description": "Card authorization",
        "expires_at": expires_at,
        "on_expiry": "FORFEIT",
        "journal_entry_id": held["journal_entry_id"],
    }


async def test_a_hold_is_ended_in_parts(client: httpx.AsyncClient, shop: Shop) -> None:
    hold_id = (await hold(client, shop, amount="15", reference_id="auth1"))["hold_id"]

    released = await client.post(f"/holds/{hold_id}/release", json={"description": "Settled", "amount": "5"})
    after_release = (await client.get(f"/holds/{hold_id}")).json()
    forfeited = await client.post(f"/holds/{hold_id}/forfeit", json={"description": "Fraud"})
    after_forfeit = (await client.get(f"/holds/{hold_id}")).json()
    again = await client.post(f"/holds/{hold_id}/release", json={"description": "Settled"})

    body = released.json()
    assert UUID(body.pop("journal_entry_id"))
    assert [lot["amount"] for lot in body.pop("lots_processed")] == ["5.00"]
    assert body == {
        "amount_processed": "5.00",
        "asset_id": str(shop.asset_id),
        "balance": {"available": "90.00", "held": "10.00", "deferred": "0.00"},
        "hold_id": hold_id,
        "message": "Processed 5.00",
        "operation": "RELEASE",
        "program_id": str(shop.program_id),
    }
    assert forfeited.json()["operation"] == "FORFEIT"
    assert forfeited.json()["amount_processed"] == "10.00"
    assert (after_release["status"], after_release["remaining"]) == ("ACTIVE", "10.00")
    assert (after_forfeit["status"], after_forfeit["remaining"]) == ("FORFEITED", "0.00")
    assert after_forfeit["amount"] == "15.00"
    problem(again, 409, "hold_not_active")


async def test_what_is_wrong_with_an_end_is_said(client: httpx.AsyncClient, shop: Shop) -> None:
    hold_id = (await hold(client, shop, amount="15"))["hold_id"]

    async def release(**body: Any) -> httpx.Response:
        return await client.post(f"/holds/{hold_id}/release", json={"description": "x", **body})

    assert wrong_fields(await client.post(f"/holds/{hold_id}/release", json={})) == {"description": "required"}
    assert list(wrong_fields(await release(description="x" * 501))) == ["description"]
    assert list(wrong_fields(await release(amount="-1"))) == ["amount"]
    problem(await release(amount="0.001"), 400, "invalid_scale")
    problem(await release(amount="15.01"), 422, "insufficient_balance")
    problem(await client.post(f"/holds/{new_id()}/release", json={"description": "x"}), 404, "not_found")
    problem(await client.get(f"/holds/{new_id()}"), 404, "not_found")
    assert list(wrong_fields(await client.get("/holds/none"))) == ["id"]


async def test_an_end_is_replayed_although_the_hold_is_gone(client: httpx.AsyncClient, shop: Shop) -> None:
    hold_id = (await hold(client, shop, amount="15"))["hold_id"]
    body = {"description": "Settled", "idempotency_key": "k"}

    first = await client.post(f"/holds/{hold_id}/release", json=body)
    again = await client.post(f"/holds/{hold_id}/release", json=body)

    assert again.headers["Idempotent-Replayed"] == "true"
    assert (again.status_code, again.json()) == (200, first.json())


async def test_holds_are_listed_newest_first_in_pages(
    client: httpx.AsyncClient, shop: Shop, database: Database, organization: Tenant
) -> None:
    ids = [(await hold(client, shop, amount="1", reference_id=f"auth{n % 2}"))["hold_id"] for n in range(5)]
    await client.post(f"/holds/{ids[0]}/release", json={"description": "x"})
    async with database.transaction(organization.id) as tx:
        group = await make_group(tx)
    adjusted = {**operation(shop), "type": "CREDIT", "amount": "3", "bucket": "HELD"}
    await client.post(f"/groups/{group}/balances/adjust", json=adjusted)

    async def listed(**params: Any) -> list[str]:
        return [item["hold_id"] for item in await all_pages(client, "/holds", limit=2, **params)]

    (of_group,) = (await client.get("/holds", params={"group_id": str(group)})).json()["data"]
    assert (of_group["group_id"], "participant_id" in of_group) == (str(group), False)
    assert (of_group["expires_at"], of_group["on_expiry"], of_group["reference_id"]) == (None, None, None)
    assert await listed() == [of_group["hold_id"], *reversed(ids)]
    assert await listed(participant_id=str(shop.alice)) == ids[::-1]
    assert await listed(participant_id=str(shop.alice), status="RELEASED") == [ids[0]]
    assert await listed(reference_id="auth1") == [ids[3], ids[1]]
    assert await listed(program_id=str(new_id())) == []
    assert len(await listed(asset_id=str(shop.asset_id), status="ACTIVE")) == 5
    assert list(wrong_fields(await client.get("/holds", params={"status": "OPEN"}))) == ["status"]
    both = {"participant_id": str(shop.alice), "group_id": str(group)}
    assert list(wrong_fields(await client.get("/holds", params=both))) == ["group_id"]


async def test_another_organization_sees_no_holds(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient, shop: Shop
) -> None:
    hold_id = (await hold(client, shop, amount="1"))["hold_id"]

    assert (await other_client.get("/holds")).json()["data"] == []
    problem(await other_client.get(f"/holds/{hold_id}"), 404, "not_found")
    for operation_name in ("release", "forfeit"):
        answer = await other_client.post(f"/holds/{hold_id}/{operation_name}", json={"description": "x"})
        problem(answer, 404, "not_found")
