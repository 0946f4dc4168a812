"""Balance operations over HTTP. Contract: holders.md 4.3, 6.2 and 6.3; basics.md 2 and 8."""

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from db.session import Database
from domain.ids import new_id
from tests.api.calls import problem, wrong_fields
from tests.builders import Shop, make_group, open_shop
from tests.conftest import Tenant
from tests.due_support import timed_hold
from tests.holdings_support import Desk
from tests.ledger_invariants import assert_ledger_invariants
from workflows.gateway import Gateway


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


async def test_a_debit_of_held_tells_the_workflow_of_a_hold_that_it_settles(
    client: httpx.AsyncClient, database: Database, organization: Tenant, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[UUID] = []
    monkeypatch.setattr(Gateway, "tell_holds_ended", lambda _, hold_ids: told.extend(hold_ids))
    desk = Desk.of(database, organization.id, shop)
    await desk.credit("10")
    hold_id = await timed_hold(desk, "10", database.clock() + timedelta(days=1), carrier="WORKFLOW")

    answer = await client.post(path(shop.alice), json=an_adjust(shop, type="DEBIT", bucket="HELD"))

    assert answer.status_code == 200
    assert told == [hold_id]


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
        ({"bucket": "HELD", "type": "DEBIT", "allow_negative": True}, "allow_negative"),
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


# --- Hold, release, forfeit, void-hold -------------------------------------------------------------------------------


@pytest.fixture
async def lots(database: Database, organization: Tenant) -> Shop:
    """A shop with a LOT asset."""
    return await open_shop(database, organization.id, inventory_mode="LOT")


def an_operation(shop: Shop, **fields: Any) -> dict[str, Any]:
    return {
        "program_id": str(shop.program_id),
        "asset_id": str(shop.asset_id),
        "description": "Card authorization",
        **fields,
    }


def at(shop: Shop, operation: str) -> str:
    return f"/participants/{shop.alice}/balances/{operation}"


async def credit(client: httpx.AsyncClient, shop: Shop, amount: str = "100", **fields: Any) -> None:
    answer = await client.post(path(shop.alice), json=an_adjust(shop, amount=amount, **fields))
    assert answer.status_code == 200, answer.text


async def test_a_hold_and_a_release_answer_with_the_balance_after_them(client: httpx.AsyncClient, shop: Shop) -> None:
    # holders.md example 8
    await credit(client, shop, "1000")

    held = (await client.post(at(shop, "hold"), json=an_operation(shop, amount="150"))).json()
    released = await client.post(at(shop, "release"), json=an_operation(shop))
    too_much = await client.post(at(shop, "hold"), json=an_operation(shop, amount="1000.01"))

    assert UUID(held.pop("journal_entry_id"))
    assert UUID(held.pop("hold_id"))
    assert held == {
        "amount_processed": "150.00",
        "asset_id": str(shop.asset_id),
        "balance": {"available": "850.00", "held": "150.00", "deferred": "0.00"},
        "message": "Processed 150.00",
        "operation": "HOLD",
        "program_id": str(shop.program_id),
    }
    assert released.json()["balance"] == {"available": "1000.00", "held": "0.00", "deferred": "0.00"}
    assert released.json()["operation"] == "RELEASE"
    assert "hold_id" not in released.json()
    problem(too_much, 422, "insufficient_balance")


async def test_lot_operations_name_the_lots_and_the_reference(client: httpx.AsyncClient, lots: Shop) -> None:
    await credit(client, lots, "10")
    await credit(client, lots, "5")

    held = (await client.post(at(lots, "hold"), json=an_operation(lots, amount="12", reference_id="auth1"))).json()
    wanted = an_operation(lots, amount="100", reference_id="auth1")
    released = (await client.post(at(lots, "release"), json=wanted)).json()

    assert [lot["amount"] for lot in held["lots_processed"]] == ["10.00", "2.00"]
    assert held["reference_id"] == "auth1"
    assert released["amount_processed"] == "12.00"
    assert released["message"] == "Processed 12.00"
    assert released["lots_processed"] == held["lots_processed"]


async def test_provisional_value_is_voided(client: httpx.AsyncClient, lots: Shop) -> None:
    # An adjust cannot stamp a reference, so nothing that it made can be voided: that is for rules.
    await credit(client, lots, "10", bucket="HELD")

    nothing = await client.post(at(lots, "void-hold"), json=an_operation(lots, reference_id="auth1"))
    missing = await client.post(at(lots, "void-hold"), json=an_operation(lots))
    partial = await client.post(at(lots, "void-hold"), json=an_operation(lots, reference_id="auth1", amount="1"))

    problem(nothing, 422, "insufficient_balance")
    assert wrong_fields(missing) == {"reference_id": "required"}
    assert wrong_fields(partial) == {"amount": "invalid"}


async def test_a_closed_participant_can_only_lose(client: httpx.AsyncClient, shop: Shop) -> None:
    # holders.md example 12
    await credit(client, shop)
    await client.patch(f"/participants/{shop.alice}/status", json={"status": "CLOSED"})

    for operation in ("hold", "release"):
        problem(await client.post(at(shop, operation), json=an_operation(shop)), 409, "participant_inactive")
    problem(await client.post(path(shop.alice), json=an_adjust(shop)), 409, "participant_inactive")
    without_bucket = await client.post(at(shop, "forfeit"), json=an_operation(shop))
    forfeited = await client.post(at(shop, "forfeit"), json=an_operation(shop, bucket="AVAILABLE"))

    assert wrong_fields(without_bucket) == {"bucket": "required"}
    assert forfeited.status_code == 200
    assert forfeited.json()["amount_processed"] == "100.00"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"amount": "0"}, "amount"),
        ({"amount": 5}, "amount"),
        ({"amount": ""}, "amount"),
        ({"description": ""}, "description"),
        ({"description": None}, "description"),
        ({"lot_ids": []}, "lot_ids"),
        ({"lot_ids": "all"}, "lot_ids"),
        ({"lot_ids": ["x"]}, "lot_ids[0]"),
        ({"lot_ids": [str(new_id())] * 1001}, "lot_ids"),
        ({"earned_from": "yesterday"}, "earned_from"),
        ({"earned_from": "2025-01-02T00:00:00Z", "earned_to": "2025-01-01T00:00:00Z"}, "earned_to"),
        ({"reference_id": ""}, "reference_id"),
        ({"reference_id": "x" * 256}, "reference_id"),
        ({"expires_in": "1d"}, "expires_in"),
        ({"expires_in": 60}, "expires_in"),
        ({"expires_in": "0s"}, "expires_in"),
        ({"expires_in": "-1h"}, "expires_in"),
        ({"expires_in": "9" * 70 + "h"}, "expires_in"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2120-01-01"}, "expires_at"),
        ({"expires_at": "2120-01-01T00:00:00Z", "expires_in": "1h"}, "expires_in"),
        ({"on_expiry": "FORFEIT"}, "on_expiry"),
        ({"on_expiry": "BURN", "expires_in": "1h"}, "on_expiry"),
        ({"idempotency_key": "automation:1"}, "idempotency_key"),
    ],
)
async def test_what_is_wrong_with_a_hold_is_named(
    client: httpx.AsyncClient, lots: Shop, change: dict[str, Any], field: str
) -> None:
    await credit(client, lots)

    answer = await client.post(at(lots, "hold"), json=an_operation(lots, **change))

    assert list(wrong_fields(answer)) == [field]


@pytest.mark.parametrize("field", ["lot_ids", "earned_from", "earned_to", "reference_id"])
async def test_lot_fields_on_a_simple_asset_are_refused(client: httpx.AsyncClient, shop: Shop, field: str) -> None:
    await credit(client, shop)
    values = {"lot_ids": [str(new_id())], "reference_id": "auth1"}

    answer = await client.post(
        at(shop, "hold"), json=an_operation(shop, **{field: values.get(field, "2025-01-01T00:00:00Z")})
    )

    assert list(wrong_fields(answer)) == [field]


async def test_fields_of_other_operations_are_ignored(client: httpx.AsyncClient, shop: Shop) -> None:
    await credit(client, shop)

    held = await client.post(at(shop, "hold"), json=an_operation(shop, amount="1", bucket="DEFERRED"))
    released = await client.post(at(shop, "release"), json=an_operation(shop, bucket=7, expires_in="never"))

    assert (held.status_code, released.status_code) == (200, 200)


async def test_an_operation_is_replayed(client: httpx.AsyncClient, lots: Shop, running_worker: None) -> None:
    await credit(client, lots)
    body = an_operation(lots, amount="10", reference_id="a", expires_in="24h", idempotency_key="k")
    first = await client.post(at(lots, "hold"), json=body)
    again = await client.post(at(lots, "hold"), json={**body, "amount": "10.000", "on_expiry": "RELEASE"})
    other = await client.post(at(lots, "hold"), json={**body, "expires_in": "25h"})

    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert (again.status_code, again.json()) == (200, first.json())
    problem(other, 409, "idempotency_conflict")


async def test_a_groups_adjust_shows_no_balance_and_its_other_operations_do(
    client: httpx.AsyncClient, shop: Shop, database: Database, organization: Tenant
) -> None:
    async with database.transaction(organization.id) as tx:
        group = await make_group(tx)
    adjusted = (await client.post(f"/groups/{group}/balances/adjust", json=an_adjust(shop))).json()

    assert UUID(adjusted.pop("journal_entry_id"))
    assert adjusted == {
        "amount": "10.00",
        "asset_id": str(shop.asset_id),
        "bucket": "AVAILABLE",
        "message": "Group balance adjusted successfully",
        "program_id": str(shop.program_id),
        "type": "CREDIT",
    }
    for operation, fields, balance in (
        ("hold", {"amount": "6"}, ("4.00", "6.00")),
        ("release", {"amount": "1"}, ("5.00", "5.00")),
        ("forfeit", {"bucket": "HELD"}, ("5.00", "0.00")),
    ):
        answer = await client.post(f"/groups/{group}/balances/{operation}", json=an_operation(shop, **fields))
        after = answer.json()["balance"]
        assert (after["available"], after["held"]) == balance
    await client.delete(f"/groups/{group}")
    for operation, fields in (("hold", {}), ("release", {}), ("forfeit", {"bucket": "HELD"})):
        answer = await client.post(f"/groups/{group}/balances/{operation}", json=an_operation(shop, **fields))
        problem(answer, 409, "group_archived")
    answer = await client.post(f"/groups/{shop.alice}/balances/adjust", json=an_adjust(shop))
    problem(answer, 404, "not_found")
