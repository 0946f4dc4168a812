"""Redemptions and reversals over HTTP. Contract: redemptions.md 2; worked examples A to E and G of section 10."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from db.session import Database
from domain import redemptions
from domain.ids import new_id
from domain.redemptions import RedemptionRequest
from tests.api.calls import (
    all_pages,
    created,
    new_asset,
    new_group,
    new_participant,
    new_program,
    problem,
    wrong_fields,
)
from tests.conftest import SettableClock, Tenant
from tests.ledger_invariants import assert_ledger_invariants

NOON = "2025-01-15T12:00:00Z"
PLAIN_FIELDS = {
    "id",
    "participant_id",
    "program_id",
    "asset_id",
    "amount",
    "description",
    "reversed_amount",
    "status",
    "journal_entry_id",
    "created_at",
    "updated_at",
}


class Counter:
    """Where alice redeems: a program with a SIMPLE asset of scale 2."""

    def __init__(self, client: httpx.AsyncClient, program: str, asset: str, alice: str) -> None:
        self.client, self.program, self.asset, self.alice = client, program, asset, alice

    async def adjust(self, amount: str, **fields: Any) -> None:
        body = {"program_id": self.program, "asset_id": self.asset, "description": "x", "type": "CREDIT", **fields}
        answer = await self.client.post(f"/participants/{self.alice}/balances/adjust", json={**body, "amount": amount})
        assert answer.status_code == 200, answer.text

    async def hold(self, amount: str) -> None:
        body = {"program_id": self.program, "asset_id": self.asset, "description": "x", "amount": amount}
        assert (await self.client.post(f"/participants/{self.alice}/balances/hold", json=body)).status_code == 200

    async def redeem(self, amount: str, **fields: Any) -> httpx.Response:
        body = {
            "program_id": self.program,
            "asset_id": self.asset,
            "amount": amount,
            "description": "Cash-out",
            **fields,
        }
        return await self.client.post(f"/participants/{self.alice}/redemptions", json=body)

    async def buy(self, reward: str, **fields: Any) -> httpx.Response:
        body = {"program_id": self.program, "reward_id": reward, **fields}
        return await self.client.post(f"/participants/{self.alice}/redemptions/items", json=body)

    async def reverse(self, redemption: str, **fields: Any) -> httpx.Response:
        return await self.client.post(f"/redemptions/{redemption}/reverse", json={"reason": "Returned", **fields})

    async def get(self, redemption: str) -> dict[str, Any]:
        answer = await self.client.get(f"/redemptions/{redemption}")
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def reward(self, **fields: Any) -> str:
        """An ACTIVE mug of 10.00; `fields` overrides members."""
        body = {
            "name": f"Mug {uuid4().hex}",
            "redemption_type": "UNIT_BASED",
            "asset_id": self.asset,
            "unit_cost": "10",
            "status": "ACTIVE",
            **fields,
        }
        reward_id: str = (await created(self.client, f"/programs/{self.program}/rewards", body))["id"]
        return reward_id

    async def reward_now(self, reward: str) -> dict[str, Any]:
        body: dict[str, Any] = (await self.client.get(f"/programs/{self.program}/rewards/{reward}")).json()
        return body

    async def balance(self) -> tuple[str, str]:
        """AVAILABLE and HELD."""
        (balance,) = (await self.client.get(f"/participants/{self.alice}/balances")).json()["data"]
        return balance["available"], balance["held"]


@pytest.fixture
async def counter(client: httpx.AsyncClient, database: Database, organization: Tenant) -> Any:
    """A counter where alice has 1500."""
    program = (await new_program(client))["id"]
    asset = (await new_asset(client, program))["id"]
    alice = (await new_participant(client))["id"]
    counter = Counter(client, program, asset, alice)
    await counter.adjust("1500")
    yield counter
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


def ok(answer: httpx.Response, status: int = 201) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers.get("Idempotent-Replayed") == ("true" if status == 200 else None)
    body: dict[str, Any] = answer.json()
    return body


# --- worked examples -------------------------------------------------------------------------------------------------


async def test_example_a_amount_redemption(counter: Counter) -> None:
    await counter.adjust("200")
    await counter.hold("200")

    made = ok(await counter.redeem("1000"))

    assert made.keys() == PLAIN_FIELDS
    assert (made["amount"], made["status"], made["reversed_amount"]) == ("1000.00", "COMPLETED", "0.00")
    assert await counter.balance() == ("500.00", "200.00")
    entry = (await counter.client.get(f"/journal-entries/{made['journal_entry_id']}")).json()
    assert (entry["action_type"], entry["description"], entry["reference_id"]) == ("REDEMPTION", "Cash-out", None)
    assert (entry["event_id"], entry["rule_id"]) == (None, None)
    assert entry["created_by_api_key_id"]
    assert [(p["entity_type"], p["amount"]) for p in entry["postings"]] == [
        ("PARTICIPANT", "-1000.00"),
        ("SYSTEM_REDEMPTION", "1000.00"),
    ]
    problem(await counter.redeem("600"), 422, "insufficient_balance")
    assert await counter.balance() == ("500.00", "200.00")
    for amount in ("0", "-1"):
        problem(await counter.redeem(amount))
    problem(await counter.redeem("1.005"), 400, "invalid_scale")
    for description in ("", "x" * 501):
        assert wrong_fields(await counter.redeem("1", description=description)) == {"description": "invalid"}


async def test_example_b_idempotency(counter: Counter) -> None:
    first = ok(await counter.redeem("50", idempotency_key="k"))
    assert ok(await counter.redeem("50.00", idempotency_key="k"), 200) == first
    problem(await counter.redeem("51", idempotency_key="k"), 409, "idempotency_conflict")
    other = (await new_program(counter.client))["id"]
    assert (await counter.client.post(f"/programs/{other}/assets", json={"asset_id": counter.asset})).is_success
    elsewhere = Counter(counter.client, other, counter.asset, counter.alice)
    assert ok(await elsewhere.redeem("50", idempotency_key="k"))["id"] != first["id"]
    ok(await counter.reverse(first["id"], amount="10"))
    assert ok(await counter.redeem("50", idempotency_key="k"), 200)["status"] == "PARTIALLY_REVERSED"


async def test_example_c_partial_reversals(counter: Counter) -> None:
    made = ok(await counter.redeem("1000"))
    first = ok(await counter.reverse(made["id"], amount="300"))
    assert first.keys() == {"id", "redemption_id", "amount", "reason", "journal_entry_id", "created_at"}
    assert (first["amount"], first["reason"], first["redemption_id"]) == ("300.00", "Returned", made["id"])
    now = await counter.get(made["id"])
    assert (now["status"], now["reversed_amount"]) == ("PARTIALLY_REVERSED", "300.00")
    problem(await counter.reverse(made["id"], amount="700.01"), 422, "reversal_exceeds_redemption")
    assert await counter.get(made["id"]) == now
    last = ok(await counter.reverse(made["id"]))
    assert last["amount"] == "700.00"
    assert (await counter.get(made["id"]))["status"] == "FULLY_REVERSED"
    problem(await counter.reverse(made["id"]), 422, "already_fully_reversed")
    assert await all_pages(counter.client, f"/redemptions/{made['id']}/reversals", limit=1) == [first, last]
    assert wrong_fields(await counter.client.post(f"/redemptions/{made['id']}/reverse", json={})) == {
        "reason": "required"
    }
    entry = (await counter.client.get(f"/journal-entries/{last['journal_entry_id']}")).json()
    assert (entry["action_type"], entry["description"]) == ("REDEMPTION_REVERSAL", "Returned")
    assert await counter.balance() == ("1500.00", "0.00")


async def test_example_d_amount_based_reward(counter: Counter) -> None:
    reward = await counter.reward(redemption_type="AMOUNT_BASED", unit_cost="25.00", name="Statement credit")
    problem(await counter.buy(reward, amount="24.99"), 422, "amount_below_minimum")
    ok(await counter.buy(reward, amount="25"))
    made = ok(await counter.buy(reward, amount="30.50"))
    assert made.keys() == PLAIN_FIELDS | {"reward_id", "unit_cost"}
    assert (made["amount"], made["unit_cost"], made["description"]) == ("30.50", "25.00", "Redeemed: Statement credit")
    assert (await counter.reward_now(reward))["redeemed_count"] == 0
    assert wrong_fields(await counter.reverse(made["id"], quantity=1)) == {"quantity": "invalid"}


async def test_example_e_gates(counter: Counter, clock: SettableClock) -> None:
    clock.set(NOON)
    for fields in (
        {"status": "DRAFT"},
        {"status": "ARCHIVED"},
        {"available_from": "2025-01-16T12:00:00Z"},
        {"available_until": "2025-01-14T12:00:00Z"},
    ):
        problem(await counter.buy(await counter.reward(**fields)), 422, "reward_not_available")
    reward = await counter.reward()
    status = f"/participants/{counter.alice}/status"
    assert (await counter.client.patch(status, json={"status": "SUSPENDED"})).status_code == 200
    for answer in (await counter.buy(reward), await counter.redeem("1")):
        problem(answer, 409, "participant_inactive")
    assert (await counter.client.patch(status, json={"status": "ACTIVE"})).status_code == 200
    for state in ("SUSPENDED", "ARCHIVED"):
        await counter.client.patch(f"/programs/{counter.program}", json={"status": state})
        for answer in (await counter.buy(reward), await counter.redeem("1")):
            problem(answer, 409, "program_inactive")
    await counter.client.patch(f"/programs/{counter.program}", json={"status": "ACTIVE"})
    foreign = (await new_asset(counter.client, (await new_program(counter.client))["id"]))["id"]
    problem(await counter.redeem("1", asset_id=foreign), 422, "asset_not_linked")
    assert await counter.balance() == ("1500.00", "0.00")


async def test_example_g_cap(counter: Counter) -> None:
    assert (await counter.client.patch(f"/assets/{counter.asset}", json={"max_transaction_amount": "500"})).is_success

    ok(await counter.redeem("500"))
    problem(await counter.redeem("500.01"), 422, "max_transaction_amount_exceeded")


# --- items -----------------------------------------------------------------------------------------------------------


async def test_a_unit_based_item_shows_its_units(counter: Counter) -> None:
    reward = await counter.reward(max_total=3, max_per_participant=2)

    made = ok(await counter.buy(reward, quantity=2, description="Two mugs", idempotency_key="k"))

    assert made.keys() == PLAIN_FIELDS | {"reward_id", "unit_cost", "quantity", "reversed_quantity"}
    assert (made["amount"], made["unit_cost"], made["quantity"], made["reversed_quantity"]) == ("20.00", "10.00", 2, 0)
    problem(await counter.buy(reward), 422, "participant_limit_exceeded")
    assert ok(await counter.buy(reward, quantity=2, description="Two mugs", idempotency_key="k"), 200) == made
    back = ok(await counter.reverse(made["id"], quantity=1))
    assert (back["amount"], back["quantity"]) == ("10.00", 1)
    assert (await counter.get(made["id"]))["reversed_quantity"] == 1
    assert (await counter.reward_now(reward))["redeemed_count"] == 1
    problem(await counter.reverse(made["id"], quantity=2), 422, "reversal_exceeds_redemption")


async def test_stock_is_all_or_nothing(counter: Counter) -> None:
    reward = await counter.reward(max_total=2)

    problem(await counter.buy(reward, quantity=3), 422, "reward_out_of_stock")
    made = ok(await counter.buy(reward, quantity=2))
    assert (await counter.reward_now(reward))["status"] == "OUT_OF_STOCK"
    problem(await counter.buy(reward), 422, "reward_out_of_stock")
    ok(await counter.reverse(made["id"]))
    assert (await counter.reward_now(reward))["status"] == "ACTIVE"


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"amount": "10"}, {"amount": "invalid"}),
        ({"quantity": 0}, {"quantity": "invalid"}),
        ({"quantity": "1"}, {"quantity": "invalid"}),
        ({"quantity": 1.5}, {"quantity": "invalid"}),
        ({"description": "x" * 501}, {"description": "invalid"}),
    ],
)
async def test_an_item_is_asked_for_in_its_unit(
    counter: Counter, fields: dict[str, Any], wrong: dict[str, str]
) -> None:
    assert wrong_fields(await counter.buy(await counter.reward(), **fields)) == wrong


async def test_an_amount_based_item_needs_its_amount(counter: Counter) -> None:
    reward = await counter.reward(redemption_type="AMOUNT_BASED")

    assert wrong_fields(await counter.buy(reward)) == {"amount": "required"}
    assert wrong_fields(await counter.buy(reward, amount="10", quantity=1)) == {"quantity": "invalid"}
    problem(await counter.buy(reward, amount="10.001"), 400, "invalid_scale")


async def test_a_reward_belongs_to_its_program(counter: Counter) -> None:
    reward = await counter.reward()
    other = (await new_program(counter.client))["id"]

    problem(await counter.buy(reward, program_id=other), 404, "not_found")
    problem(await counter.buy(str(uuid4())), 404, "not_found")


# --- shapes ----------------------------------------------------------------------------------------------------------


async def test_metadata_comes_back_as_it_was_sent(counter: Counter) -> None:
    fields = f'"program_id": "{counter.program}", "asset_id": "{counter.asset}", "amount": "1", "description": "x"'
    raw = "{" + fields + ', "metadata": {"card": "4711", "rate": 1.10, "n": [1, null]}}'
    answer = await counter.client.post(f"/participants/{counter.alice}/redemptions", content=raw)

    made = ok(answer)
    assert '"metadata":{"card":"4711","rate":1.10,"n":[1,null]}' in answer.text
    assert (await counter.get(made["id"]))["metadata"] == made["metadata"]


@pytest.mark.parametrize("metadata", ["text", 1, [], {"x": "y" * 16_384}])
async def test_metadata_is_a_small_object(counter: Counter, metadata: Any) -> None:
    assert wrong_fields(await counter.redeem("1", metadata=metadata)) == {"metadata": "invalid"}


async def test_metadata_of_just_16_kib_is_kept(counter: Counter) -> None:
    metadata = {"x": "y" * (16_384 - len('{"x":""}'))}

    assert ok(await counter.redeem("1", metadata=metadata))["metadata"] == metadata


@pytest.mark.parametrize("missing", ["program_id", "asset_id", "amount", "description"])
async def test_an_amount_redemption_needs_its_fields(counter: Counter, missing: str) -> None:
    body = {"program_id": counter.program, "asset_id": counter.asset, "amount": "1", "description": "x"}
    del body[missing]

    answer = await counter.client.post(f"/participants/{counter.alice}/redemptions", json=body)

    assert wrong_fields(answer) == {missing: "required"}


@pytest.mark.parametrize("fields", [{"expires_in_seconds": 60}, {"expires_in": "1h"}])
async def test_only_what_is_to_be_confirmed_expires(counter: Counter, fields: dict[str, Any]) -> None:
    assert wrong_fields(await counter.redeem("1", **fields)) == dict.fromkeys(fields, "invalid")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"expires_in_seconds": 59}, "expires_in_seconds"),
        ({"expires_in_seconds": 2_592_001}, "expires_in_seconds"),
        ({"expires_in": "59s"}, "expires_in"),
        ({"expires_in": "721h"}, "expires_in"),
        ({"expires_in": "1h", "expires_in_seconds": 60}, "expires_in"),
        ({"expires_in": "soon"}, "expires_in"),
        ({"requires_confirmation": "yes"}, "requires_confirmation"),
    ],
)
async def test_the_fields_of_two_steps_are_checked(counter: Counter, fields: dict[str, Any], field: str) -> None:
    answer = await counter.redeem("1", **{"requires_confirmation": True, **fields})

    assert wrong_fields(answer) == {field: "invalid"}


async def test_a_wrong_number_is_shown_with_what_is_expected(counter: Counter) -> None:
    reward = await counter.reward()
    made = ok(await counter.buy(reward, quantity=2))["id"]

    def said(answer: httpx.Response) -> tuple[str, str, str]:
        details = problem(answer)["details"]
        return details["field"], details["received"], details["expected"]

    assert said(await counter.buy(reward, quantity=0)) == ("quantity", "0", "at least 1")
    assert said(await counter.reverse(made, quantity=-1)) == ("quantity", "-1", "at least 1")
    assert said(await counter.redeem("1", requires_confirmation=True, expires_in_seconds=59)) == (
        "expires_in_seconds",
        "59",
        "at least 60",
    )


@pytest.mark.parametrize("key", [{}, {"idempotency_key": "z"}])
async def test_a_quantity_has_an_end(counter: Counter, key: dict[str, str]) -> None:
    reward = await counter.reward()
    made = ok(await counter.buy(reward, quantity=2))["id"]

    for quantity in (10**12 + 1, 10**30):
        assert wrong_fields(await counter.reverse(made, quantity=quantity, **key)) == {"quantity": "invalid"}
        assert wrong_fields(await counter.buy(reward, quantity=quantity, **key)) == {"quantity": "invalid"}
    problem(await counter.reverse(made, quantity=10**12, **key), 422, "reversal_exceeds_redemption")


async def test_keys_of_automations_are_refused(counter: Counter) -> None:
    assert wrong_fields(await counter.redeem("1", idempotency_key="automation:x")) == {"idempotency_key": "invalid"}


async def test_unknown_ids_answer_404(counter: Counter, other_client: httpx.AsyncClient) -> None:
    made = ok(await counter.redeem("1"))

    for answer in (
        await counter.redeem("1", program_id=str(uuid4())),
        await counter.redeem("1", asset_id=str(uuid4())),
        await Counter(counter.client, counter.program, counter.asset, str(uuid4())).redeem("1"),
        await counter.client.get(f"/participants/{uuid4()}/redemptions"),
        await counter.client.get(f"/redemptions/{uuid4()}"),
        await counter.client.get(f"/redemptions/{uuid4()}/reversals"),
        await counter.reverse(str(uuid4())),
        await other_client.get(f"/redemptions/{made['id']}"),
        await other_client.post(f"/redemptions/{made['id']}/reverse", json={"reason": "mine"}),
        await other_client.get(f"/redemptions/{made['id']}/reversals"),
    ):
        problem(answer, 404, "not_found")


# --- targets ---------------------------------------------------------------------------------------------------------


async def test_a_ledger_entity_gets_the_value_and_never_stops_a_refund(counter: Counter) -> None:
    group = (await new_group(counter.client))["id"]
    target = {"redemption_target_type": "LEDGER_ENTITY", "redemption_target_entity_id": group}
    assert (await counter.client.patch(f"/programs/{counter.program}", json=target)).is_success
    made = ok(await counter.redeem("100"))
    spend = {
        "program_id": counter.program,
        "asset_id": counter.asset,
        "type": "DEBIT",
        "amount": "100",
        "description": "spent",
    }
    assert (await counter.client.post(f"/groups/{group}/balances/adjust", json=spend)).is_success
    await counter.client.patch(f"/programs/{counter.program}", json={"redemption_target_type": "SYSTEM_BREAKAGE"})

    ok(await counter.reverse(made["id"], amount="40"))

    (balance,) = (await counter.client.get(f"/groups/{group}/balances")).json()["data"]
    assert balance["balance"] == "-40.00"
    assert await counter.balance() == ("1440.00", "0.00")


# --- what a read finds overdue ---------------------------------------------------------------------------------------


async def test_a_read_lets_an_overdue_one_expire_and_signs_nothing(
    counter: Counter, database: Database, organization: Tenant, clock: SettableClock
) -> None:
    clock.set(NOON)
    request = RedemptionRequest(
        participant_id=UUID(counter.alice),
        program_id=UUID(counter.program),
        asset_id=UUID(counter.asset),
        amount="100",
        description="Voucher",
        requires_confirmation=True,
    )
    async with database.transaction(organization.id) as tx:
        made = (await redemptions.reserve(tx, request, new_id())).redemption
    pending = await counter.get(str(made.id))
    assert pending.keys() == PLAIN_FIELDS | {"requested_amount", "expires_at"}
    assert (pending["status"], pending["expires_at"]) == ("PENDING", "2025-01-16T12:00:00Z")
    problem(await counter.reverse(pending["id"]), 409, "redemption_not_confirmed")
    clock.advance(days=1)

    assert (await counter.get(pending["id"]))["status"] == "EXPIRED"

    assert await counter.balance() == ("1500.00", "0.00")
    entries = await counter.client.get("/journal-entries", params={"reference_id": pending["id"]})
    release, hold = entries.json()["data"]
    assert (release["action_type"], release["created_by_api_key_id"]) == ("RELEASE", None)
    assert hold["action_type"] == "HOLD"


# --- lists and races -------------------------------------------------------------------------------------------------


async def test_the_list_is_filtered_and_paged(counter: Counter) -> None:
    reward = await counter.reward()
    amount = ok(await counter.redeem("1"))
    item = ok(await counter.buy(reward))
    ok(await counter.reverse(amount["id"]))
    path = f"/participants/{counter.alice}/redemptions"

    async def ids(**params: Any) -> list[str]:
        return [row["id"] for row in await all_pages(counter.client, path, **params)]

    assert await ids(limit=1) == [item["id"], amount["id"]]
    assert await ids(status="FULLY_REVERSED") == [amount["id"]]
    assert await ids(reward_catalog_item_id=reward) == [item["id"]]
    assert await ids(program_id=counter.program, asset_id=counter.asset, status="COMPLETED") == [item["id"]]
    assert await ids(program_id=str(uuid4())) == []
    assert await ids(**{"from": item["created_at"]}) == [item["id"]]
    assert await ids(to=amount["created_at"]) == [amount["id"]]
    assert wrong_fields(await counter.client.get(path, params={"status": "DONE"})) == {"status": "invalid"}
    assert wrong_fields(await counter.client.get(path, params={"cursor": "x"})) == {"cursor": "invalid"}


async def test_twenty_calls_with_one_key_make_one_redemption(counter: Counter) -> None:
    answers = await asyncio.gather(*(counter.redeem("10", idempotency_key="k") for _ in range(20)))

    assert sorted(answer.status_code for answer in answers) == [200] * 19 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert await counter.balance() == ("1490.00", "0.00")


async def test_concurrent_reversals_with_one_key_give_back_once(counter: Counter) -> None:
    made = ok(await counter.redeem("10"))

    answers = await asyncio.gather(*(counter.reverse(made["id"], amount="1", idempotency_key="k") for _ in range(10)))

    assert sorted(answer.status_code for answer in answers) == [200] * 9 + [201]
    assert (await counter.get(made["id"]))["reversed_amount"] == "1.00"
    problem(await counter.reverse(made["id"], amount="2", idempotency_key="k"), 409, "idempotency_conflict")
