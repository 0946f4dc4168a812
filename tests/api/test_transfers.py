"""Transfers over HTTP. Contract: redemptions.md 1, 5 and 10 F and G."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
import pytest

from db.session import Database
from domain.ids import new_id
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
from tests.conftest import Tenant
from tests.ledger_invariants import assert_ledger_invariants


@pytest.fixture(autouse=True)
async def sound_ledger(database: Database, organization: Tenant) -> AsyncIterator[None]:
    yield
    async with database.transaction(organization.id) as tx:
        await assert_ledger_invariants(tx.connection, organization.id)


@dataclass(frozen=True)
class Market:
    """A program with an asset, and alice, bob, a platform's account and a family, by their ids."""

    client: httpx.AsyncClient
    program_id: str
    asset_id: str
    alice: str
    bob: str
    platform: str
    family: str

    async def credit(self, holder: str, amount: str) -> None:
        kind = "groups" if holder == self.family else "participants"
        body = {**self.context(), "type": "CREDIT", "amount": amount, "description": "Opening"}
        answer = await self.client.post(f"/{kind}/{holder}/balances/adjust", json=body)
        assert answer.status_code == 200, answer.text

    async def balance(self, holder: str) -> str:
        """What a participant can spend, or what a group has in all."""
        kind, field = ("groups", "balance") if holder == self.family else ("participants", "available")
        data = (await self.client.get(f"/{kind}/{holder}/balances")).json()["data"]
        return next((str(row[field]) for row in data if row["asset_id"] == self.asset_id), "none")

    def context(self) -> dict[str, Any]:
        return {"program_id": self.program_id, "asset_id": self.asset_id}

    def body(self, *recipients: tuple[str, str], **fields: Any) -> dict[str, Any]:
        """A transfer from alice, unless `fields` say otherwise."""
        rows = [
            {"group_id" if recipient == self.family else "participant_id": recipient, "amount": amount}
            for recipient, amount in recipients
        ]
        source = {} if any(name.startswith("source_") for name in fields) else {"source_participant_id": self.alice}
        return {**self.context(), **source, "recipients": rows, "description": "Dinner", **fields}

    async def send(self, *recipients: tuple[str, str], **fields: Any) -> httpx.Response:
        return await self.client.post("/transfers", json=self.body(*recipients, **fields))


@pytest.fixture
async def market(client: httpx.AsyncClient) -> Market:
    program = await new_program(client)
    asset = await new_asset(client, program["id"])
    alice, bob, platform = [
        (await new_participant(client, external_id=name))["id"] for name in ("alice", "bob", "platform_account")
    ]
    family = await new_group(client, alice, bob)
    return Market(client, program["id"], asset["id"], alice, bob, platform, family["id"])


async def test_a_transfer_splits_what_the_source_gives(market: Market) -> None:  # example F
    await market.credit(market.alice, "100")
    rows = [{"external_id": "bob", "amount": "95"}, {"external_id": "platform_account", "amount": "5"}]

    answer = await market.send(source_external_id="alice", recipients=rows, metadata={"order": 12.50, "n": [1, None]})

    assert answer.status_code == 201
    assert '"order":12.5' in answer.text
    transfer = answer.json()
    assert UUID(transfer.pop("id"))
    entry_id = transfer.pop("journal_entry_id")
    assert transfer.pop("created_at").endswith("Z")
    assert transfer == {
        **market.context(),
        "source_type": "PARTICIPANT",
        "source_id": market.alice,
        "source_external_id": "alice",
        "recipient_count": 2,
        "total_amount": "100.00",
        "description": "Dinner",
        "metadata": {"order": 12.5, "n": [1, None]},
        "recipients": [
            {"participant_id": market.bob, "external_id": "bob", "amount": "95.00"},
            {"participant_id": market.platform, "external_id": "platform_account", "amount": "5.00"},
        ],
    }
    shown = [await market.balance(holder) for holder in (market.alice, market.bob, market.platform)]
    assert shown == ["0.00", "95.00", "5.00"]
    entry = (await market.client.get(f"/journal-entries/{entry_id}")).json()
    assert (entry["action_type"], entry["description"], entry["event_id"], entry["rule_id"]) == (
        "TRANSFER",
        "Dinner",
        None,
        None,
    )
    assert entry["created_by_api_key_id"] is not None
    assert [(p["participant_id"], p["bucket"], p["amount"]) for p in entry["postings"]] == [
        (market.alice, "AVAILABLE", "-100.00"),
        (market.bob, "AVAILABLE", "95.00"),
        (market.platform, "AVAILABLE", "5.00"),
    ]


async def test_one_cent_too_little_moves_nothing(market: Market) -> None:  # example F
    await market.credit(market.alice, "99.99")

    problem(await market.send((market.bob, "95"), (market.platform, "5")), 422, "insufficient_balance")

    assert [await market.balance(holder) for holder in (market.alice, market.bob)] == ["99.99", "none"]


@pytest.mark.parametrize("status", ["SUSPENDED", "CLOSED"])
async def test_one_inactive_recipient_of_two_moves_nothing(market: Market, status: str) -> None:  # example F
    await market.credit(market.alice, "100")
    await market.client.patch(f"/participants/{market.platform}/status", json={"status": status})

    body = problem(await market.send((market.bob, "95"), (market.platform, "5")), 409, "participant_inactive")

    assert body["details"]["field"] == "recipients[1].participant_id"
    assert [await market.balance(holder) for holder in (market.alice, market.bob)] == ["100.00", "none"]


async def test_nobody_sends_to_itself_under_another_name(market: Market) -> None:  # example F
    await market.credit(market.alice, "100")

    answer = await market.send((market.bob, "1"), (market.alice, "1"), source_external_id="alice")

    problem(answer, 400, "self_transfer")


async def test_a_hundred_recipients_are_fine_and_one_more_is_not(market: Market) -> None:  # example F
    await market.credit(market.alice, "101")

    assert wrong_fields(await market.send(*[(market.bob, "1")] * 101)) == {"recipients": "invalid"}
    answer = await market.send(*[(market.bob, "1")] * 100)

    assert (answer.status_code, answer.json()["recipient_count"]) == (201, 100)
    assert await market.balance(market.bob) == "100.00"


@pytest.mark.parametrize(("count", "expected"), [(0, "at least 1 items"), (101, "at most 100 items")])
async def test_the_number_of_recipients_is_said(market: Market, count: int, expected: str) -> None:
    details = problem(await market.send(*[(market.bob, "1")] * count))["details"]

    assert (details["field"], details["expected"], details["received"]) == ("recipients", expected, "array")


async def test_value_goes_to_a_group_and_back(market: Market) -> None:  # example F
    await market.credit(market.alice, "10")

    there = (await market.send((market.family, "10"))).json()
    back = (await market.send((market.alice, "4"), source_group_id=market.family)).json()

    assert there["recipients"] == [{"group_id": market.family, "amount": "10.00"}]
    assert (back["source_type"], back["source_id"]) == ("GROUP", market.family)
    assert "source_external_id" not in back
    assert "metadata" not in back
    assert (await market.balance(market.alice), await market.balance(market.family)) == ("4.00", "6.00")


async def test_the_total_is_capped_as_each_amount_is(client: httpx.AsyncClient, market: Market) -> None:  # example G
    capped = await new_asset(client, market.program_id, max_transaction_amount="500")
    for _ in range(2):
        credit = {"program_id": market.program_id, "asset_id": capped["id"], "type": "CREDIT", "amount": "500"}
        path = f"/participants/{market.alice}/balances/adjust"
        assert (await client.post(path, json={**credit, "description": "Opening"})).status_code == 200
    rows = [(market.bob, "300"), (market.platform, "300")]

    refused = await market.send(*rows, asset_id=capped["id"])
    taken = await market.send((market.bob, "300"), (market.platform, "200"), asset_id=capped["id"])

    body = problem(refused, 422, "max_transaction_amount_exceeded")
    assert (body["details"]["field"], body["details"]["received"]) == ("total_amount", "600.00")
    assert taken.status_code == 201


BOB = {"external_id": "bob", "amount": "1"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"program_id": None}, "program_id"),
        ({"asset_id": "points"}, "asset_id"),
        ({"source_participant_id": None}, "source_external_id"),
        ({"source_external_id": "alice"}, "source_participant_id"),
        ({"source_group_id": str(new_id())}, "source_group_id"),
        ({"source_participant_id": "alice"}, "source_participant_id"),
        ({"source_participant_id": None, "source_external_id": ""}, "source_external_id"),
        ({"source_participant_id": None, "source_external_id": "x" * 256}, "source_external_id"),
        ({"source_participant_id": None, "source_external_id": 5}, "source_external_id"),
        ({"recipients": None}, "recipients"),
        ({"recipients": []}, "recipients"),
        ({"recipients": BOB}, "recipients"),
        ({"recipients": ["bob"]}, "recipients[0]"),
        ({"recipients": [BOB, {"amount": "1"}]}, "recipients[1]"),
        ({"recipients": [{**BOB, "group_id": str(new_id())}]}, "recipients[0]"),
        ({"recipients": [{**BOB, "participant_id": str(new_id())}]}, "recipients[0]"),
        ({"recipients": [{"group_id": "family", "amount": "1"}]}, "recipients[0].group_id"),
        ({"recipients": [{"external_id": "bob"}]}, "recipients[0].amount"),
        ({"recipients": [{**BOB, "amount": 1}]}, "recipients[0].amount"),
        ({"recipients": [BOB, {**BOB, "amount": "0"}]}, "recipients[1].amount"),
        ({"recipients": [{**BOB, "amount": "-1"}]}, "recipients[0].amount"),
        ({"recipients": [{**BOB, "amount": "1e2"}]}, "recipients[0].amount"),
        ({"recipients": [{**BOB, "amount": "1" + "0" * 20}]}, "recipients[0].amount"),
        ({"description": None}, "description"),
        ({"description": ""}, "description"),
        ({"description": "x" * 501}, "description"),
        ({"metadata": []}, "metadata"),
        ({"metadata": "order 12"}, "metadata"),
        ({"metadata": {"note": "x" * (16 * 1024 - 10)}}, "metadata"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "x" * 256}, "idempotency_key"),
        ({"idempotency_key": "automation:1"}, "idempotency_key"),
    ],
)
async def test_what_is_wrong_is_named(market: Market, change: dict[str, Any], field: str) -> None:
    await market.credit(market.alice, "100")
    body = {**market.body(recipients=[BOB]), **change}

    answer = await market.client.post("/transfers", json=body)

    assert wrong_fields(answer).keys() == {field}


async def test_metadata_of_just_the_limit_is_taken(market: Market) -> None:
    await market.credit(market.alice, "100")
    # 16,384 bytes of UTF-8: eleven of JSON around the text, whose letters take two each.
    text = "ä" * 8_186 + "x"
    assert len(f'{{"note":"{text}"}}'.encode()) == 16_384

    taken = await market.send((market.bob, "1"), metadata={"note": text})
    refused = await market.send((market.bob, "1"), metadata={"note": text + "x"})

    assert (taken.status_code, taken.json()["metadata"]) == (201, {"note": text})
    assert wrong_fields(refused) == {"metadata": "invalid"}


async def test_refusals_carry_their_status(market: Market) -> None:
    await market.credit(market.alice, "100")
    client = market.client
    unlinked = await new_asset(client, (await new_program(client))["id"])

    body = problem(await market.send((market.bob, "1"), (market.platform, "1.005")), 400, "invalid_scale")
    assert body["details"]["field"] == "recipients[1].amount"
    problem(await market.send(recipients=[{"external_id": "nobody", "amount": "1"}]), 404, "not_found")
    problem(await market.send((market.bob, "1"), source_external_id="nobody"), 404, "not_found")
    problem(await market.send((market.bob, "1"), asset_id=unlinked["id"]), 422, "asset_not_linked")
    await client.delete(f"/groups/{market.family}")
    problem(await market.send((market.family, "1")), 409, "group_archived")
    await client.patch(f"/assets/{market.asset_id}", json={"status": "ARCHIVED"})
    problem(await market.send((market.bob, "1")), 409, "asset_archived")
    await client.patch(f"/programs/{market.program_id}", json={"status": "SUSPENDED"})
    problem(await market.send((market.bob, "1")), 409, "program_inactive")
    assert (await client.get("/participants", params={"external_id": "nobody"})).json()["data"] == []


async def test_a_replay_says_so(market: Market) -> None:
    await market.credit(market.alice, "50")
    body = market.body((market.bob, "50"), idempotency_key="k", metadata={"a": 1, "b": 1.5})
    first = await market.client.post("/transfers", json=body)

    # Nothing is left, bob is named otherwise, and the amount has more zeros.
    rows = [{"amount": "50.000", "external_id": "bob"}]
    again = await market.client.post("/transfers", json={**body, "recipients": rows, "metadata": {"b": 1.50, "a": 1}})
    other = await market.client.post("/transfers", json={**body, "description": "Lunch"})

    assert (first.status_code, again.status_code) == (201, 200)
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.json() == first.json()
    problem(other, 409, "idempotency_conflict")
    assert await market.balance(market.bob) == "50.00"


async def test_concurrent_calls_with_one_key_make_one_transfer(market: Market) -> None:
    await market.credit(market.alice, "100")
    body = market.body((market.bob, "60"), idempotency_key="race")

    answers = await asyncio.gather(*(market.client.post("/transfers", json=body) for _ in range(20)))

    assert sorted(answer.status_code for answer in answers) == [200] * 19 + [201]
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 19
    assert len({answer.text for answer in answers}) == 1
    assert len(await all_pages(market.client, "/transfers")) == 1


async def test_transfers_both_ways_at_once_all_succeed(market: Market) -> None:
    await market.credit(market.alice, "100")
    await market.credit(market.bob, "100")
    ways = [
        market.body((market.bob, "1.01")),
        market.body((market.alice, "1"), source_participant_id=market.bob),
    ]

    answers = await asyncio.gather(*(market.client.post("/transfers", json=body) for body in ways * 25))

    assert {answer.status_code for answer in answers} == {201}
    assert (await market.balance(market.alice), await market.balance(market.bob)) == ("99.75", "100.25")


async def test_lists_show_transfers_without_their_recipients(market: Market) -> None:
    await market.credit(market.alice, "100")
    sent = [(await market.send((holder, "1"))).json() for holder in (market.bob, market.family, market.bob)]
    detail = (await market.client.get(f"/transfers/{sent[0]['id']}")).json()
    rows = [{name: value for name, value in transfer.items() if name != "recipients"} for transfer in reversed(sent)]

    async def listed(**query: Any) -> list[dict[str, Any]]:
        return await all_pages(market.client, "/transfers", limit=1, **query)

    assert detail == sent[0]
    assert await listed() == rows
    assert await listed(participant_id=market.bob) == [rows[0], rows[2]]
    assert await listed(participant_id=market.alice) == rows
    assert await listed(group_id=market.family) == [rows[1]]
    assert await listed(group_id=market.family, participant_id=market.alice) == [rows[1]]
    assert await listed(group_id=market.family, participant_id=market.bob) == []
    assert await listed(**market.context()) == rows
    assert await listed(asset_id=str(new_id())) == await listed(program_id=str(new_id())) == []
    second = sent[1]["created_at"]
    assert await listed(**{"from": second, "to": second}) == [rows[1]]
    assert await listed(**{"from": second}) == rows[:2]
    assert await listed(to=second) == rows[1:]


@pytest.mark.parametrize("query", [{"limit": "0"}, {"cursor": "nonsense"}, {"group_id": "family"}, {"from": "2025"}])
async def test_a_list_names_what_is_wrong(client: httpx.AsyncClient, query: dict[str, str]) -> None:
    assert wrong_fields(await client.get("/transfers", params=query)).keys() == query.keys()


async def test_another_organization_sees_nothing(market: Market, other_client: httpx.AsyncClient) -> None:
    await market.credit(market.alice, "100")
    sent = await created(market.client, "/transfers", market.body((market.bob, "1")))

    problem(await other_client.get(f"/transfers/{sent['id']}"), 404, "not_found")
    problem(await other_client.post("/transfers", json=market.body((market.bob, "1"))), 404, "not_found")
    assert await all_pages(other_client, "/transfers", participant_id=market.alice) == []
    problem(await market.client.get(f"/transfers/{new_id()}"), 404, "not_found")
