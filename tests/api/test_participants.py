"""Participants over HTTP. Contract: holders.md 3 and 6.1, worked examples of its section 9."""

import asyncio
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.api.calls import all_pages, new_asset, new_participant, new_program, problem, wrong_fields


async def test_a_new_participant_is_shown_in_full(client: httpx.AsyncClient) -> None:
    program_id = (await new_program(client))["id"]
    body = {
        "external_id": "user_123",
        "program_id": program_id,
        "email": "alice@example.com",
        "phone": "+49 30 123",
        "first_name": "Alice",
        "attributes": {"city": "Berlin"},
        "tags": ["VIP", "vip", "beta"],
    }
    created = await client.post("/participants", json=body)

    assert created.status_code == 201
    participant = created.json()
    assert participant == {
        "id": participant["id"],
        "external_id": "user_123",
        "status": "ACTIVE",
        "email": "alice@example.com",
        "phone": "+49 30 123",
        "first_name": "Alice",
        "last_name": None,
        "display_name": None,
        "attributes": {"city": "Berlin"},
        "tags": ["beta", "vip"],
        "counters": {},
        "tiers": {},
        "balances": [],
        "program_ids": [program_id],
        "created_at": participant["created_at"],
        "updated_at": participant["updated_at"],
    }
    assert (await client.get(f"/participants/{participant['id']}")).json() == participant


async def test_a_known_external_id_is_updated(client: httpx.AsyncClient) -> None:
    first, second = (await new_program(client))["id"], (await new_program(client))["id"]
    body: dict[str, Any] = {"external_id": "u", "program_id": first, "email": "a@example.com", "status": "SUSPENDED"}
    original = await new_participant(client, **body, attributes={"a": "1", "b": "1"}, tags=["x", "y"])

    update = {"external_id": "u", "program_id": second, "attributes": {"b": "2"}, "tags": ["z"], "last_name": "L"}
    answer = await client.post("/participants", json=update)

    assert answer.status_code == 200
    updated = answer.json()
    assert updated["id"] == original["id"]
    assert updated["email"] == "a@example.com"
    assert updated["status"] == "SUSPENDED"
    assert updated["attributes"] == {"a": "1", "b": "2"}
    assert updated["tags"] == ["z"]
    assert updated["program_ids"] == [first, second]
    again = (await client.post("/participants", json={"external_id": "u", "status": "ACTIVE"})).json()
    assert again["status"] == "ACTIVE"
    assert again["program_ids"] == [first, second]


async def test_concurrent_creations_of_one_external_id_make_one_participant(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(
        *(client.post("/participants", json={"external_id": "same", "tags": [f"t{i}"]}) for i in range(8))
    )
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1
    (participant,) = await all_pages(client, "/participants", external_id="same")
    tags = (await client.get(f"/participants/{participant['id']}")).json()["tags"]
    assert len(tags) == 1


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "external_id"),
        ({"external_id": ""}, "external_id"),
        ({"external_id": "x" * 256}, "external_id"),
        ({"external_id": 5}, "external_id"),
        ({"external_id": "x", "email": "not an address"}, "email"),
        ({"external_id": "x", "email": f"{'x' * 250}@example.com"}, "email"),
        ({"external_id": "x", "phone": "1" * 51}, "phone"),
        ({"external_id": "x", "status": "GONE"}, "status"),
        ({"external_id": "x", "program_id": "1"}, "program_id"),
        ({"external_id": "x", "tags": "vip"}, "tags"),
        ({"external_id": "x", "tags": [""]}, "tags"),
        ({"external_id": "x", "tags": ["x" * 256]}, "tags"),
        ({"external_id": "x", "tags": [f"t{i}" for i in range(1001)]}, "tags"),
        ({"external_id": "x", "attributes": {"a": 1}}, "attributes.a"),
        ({"external_id": "x", "attributes": {"a": "x" * 4097}}, "attributes.a"),
        ({"external_id": "x", "attributes": {"x" * 256: "1"}}, "attributes"),
        ({"external_id": "x", "attributes": {f"k{i}": "1" for i in range(1001)}}, "attributes"),
    ],
)
async def test_a_participant_that_breaks_its_limits_is_refused(
    client: httpx.AsyncClient, body: dict[str, Any], field: str
) -> None:
    assert list(wrong_fields(await client.post("/participants", json=body))) == [field]
    assert await all_pages(client, "/participants") == []


async def test_an_unknown_program_refuses_the_whole_upsert(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient
) -> None:
    foreign = (await new_program(other_client))["id"]
    for program_id in (foreign, str(uuid4())):
        answer = await client.post("/participants", json={"external_id": "x", "program_id": program_id})
        problem(answer, 404, "not_found")
    assert await all_pages(client, "/participants") == []


async def test_looking_up_an_external_id_lists_one_slim_item_or_none(client: httpx.AsyncClient) -> None:  # example 6
    participant = await new_participant(client, external_id="user_123", tags=["vip"])

    found = (await client.get("/participants", params={"external_id": "user_123"})).json()

    assert found["pagination"] == {"has_more": False, "next_cursor": None}
    slim = {"id", "external_id", "status", "email", "phone", "first_name", "last_name", "display_name"}
    slim |= {"created_at", "updated_at"}
    assert found["data"] == [{name: participant[name] for name in found["data"][0]}]
    assert set(found["data"][0]) == slim
    nothing = await client.get("/participants", params={"external_id": "USER_123"})
    assert (nothing.status_code, nothing.json()["data"]) == (200, [])


async def test_participants_are_filtered_and_sorted(client: httpx.AsyncClient) -> None:
    program_id = (await new_program(client))["id"]
    first = await new_participant(client, external_id="b-1", first_name="Zoë", program_id=program_id)
    second = await new_participant(client, external_id="a-2", email="zoo@example.com", status="CLOSED")
    await new_participant(client, external_id="c-3", display_name="Kim")

    async def found(**params: Any) -> list[str]:
        return [item["external_id"] for item in await all_pages(client, "/participants", limit=1, **params)]

    assert await found() == ["c-3", "a-2", "b-1"]
    assert await found(sort_by="external_id", sort_dir="asc") == ["a-2", "b-1", "c-3"]
    assert await found(sort_by="status", sort_dir="desc") == ["a-2", "c-3", "b-1"]
    assert await found(program_id=program_id) == ["b-1"]
    assert await found(status="CLOSED") == ["a-2"]
    assert await found(search="ZO") == ["a-2", "b-1"]
    assert await found(search="kim") == ["c-3"]
    assert await found(**{"from": second["created_at"]}) == ["c-3", "a-2"]
    assert await found(to=first["created_at"]) == ["b-1"]


async def test_attributes_merge_tags_replace_and_an_empty_text_clears(client: httpx.AsyncClient) -> None:  # example 14
    participant = await new_participant(client, attributes={"a": "1"}, tags=["vip"], email="a@example.com")
    path = f"/participants/{participant['id']}"

    assert (await client.patch(path, json={"attributes": {"b": "2"}})).json()["attributes"] == {"a": "1", "b": "2"}
    assert (await client.patch(path, json={"tags": ["x"]})).json()["tags"] == ["x"]
    assert (await client.patch(path, json={"email": ""})).json()["email"] is None
    assert (await client.patch(path, json={"status": "SUSPENDED"})).json()["status"] == "ACTIVE"
    kept = (await client.patch(path, json={})).json()
    assert (kept["attributes"], kept["tags"]) == ({"a": "1", "b": "2"}, ["x"])


async def test_an_external_id_can_change_but_not_to_one_in_use(client: httpx.AsyncClient) -> None:
    participant = await new_participant(client, external_id="a")
    await new_participant(client, external_id="b")
    path = f"/participants/{participant['id']}"
    assert (await client.patch(path, json={"external_id": "c"})).json()["external_id"] == "c"
    assert (await client.patch(path, json={"external_id": "c"})).status_code == 200
    problem(await client.patch(path, json={"external_id": "b"}), 409, "conflict")
    assert wrong_fields(await client.patch(path, json={"external_id": None})) == {"external_id": "invalid"}


async def test_every_status_transition_is_allowed_and_the_same_again_changes_nothing(client: httpx.AsyncClient) -> None:
    participant = await new_participant(client)
    path = f"/participants/{participant['id']}/status"
    for status in ("SUSPENDED", "CLOSED", "SUSPENDED", "ACTIVE", "CLOSED", "ACTIVE"):
        changed = await client.patch(path, json={"status": status})
        assert (changed.status_code, changed.json()["status"]) == (200, status)
    again = (await client.patch(path, json={"status": "ACTIVE"})).json()
    assert again["updated_at"] == changed.json()["updated_at"]
    assert wrong_fields(await client.patch(path, json={})) == {"status": "required"}
    assert wrong_fields(await client.patch(path, json={"status": "GONE"})) == {"status": "invalid"}


async def test_balances_are_shown_per_asset_and_only_where_touched(client: httpx.AsyncClient) -> None:
    program_id = (await new_program(client))["id"]
    points = await new_asset(client, program_id, symbol="PTS", scale=0)
    money = await new_asset(client, program_id, symbol="EUR", scale=2)
    await new_asset(client, program_id, symbol="NOT")
    participant = await new_participant(client)
    path = f"/participants/{participant['id']}"
    for asset, amount, kind in ((points, "350", "CREDIT"), (money, "10.5", "CREDIT"), (money, "0.25", "DEBIT")):
        body = {"program_id": program_id, "asset_id": asset["id"], "type": kind, "amount": amount, "description": "x"}
        assert (await client.post(f"{path}/balances/adjust", json=body)).status_code == 200

    balances = (await client.get(f"{path}/balances")).json()
    assert balances == {
        "data": [
            {"asset_id": money["id"], "symbol": "EUR", "available": "10.25", "held": "0.00", "deferred": "0.00"},
            {"asset_id": points["id"], "symbol": "PTS", "available": "350", "held": "0", "deferred": "0"},
        ],
        "pagination": {"has_more": False, "next_cursor": None},
    }
    only = (await client.get(f"{path}/balances", params={"asset_id": points["id"]})).json()["data"]
    assert only == balances["data"][1:]
    detail = (await client.get(path)).json()["balances"]
    assert detail == [{name: row[name] for name in row if name != "symbol"} for row in balances["data"]]


async def test_another_organizations_participant_does_not_exist(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient
) -> None:
    participant = await new_participant(client, external_id="shared")
    path = f"/participants/{participant['id']}"
    problem(await other_client.get(path), 404, "not_found")
    problem(await other_client.patch(path, json={"email": "evil@example.com"}), 404, "not_found")
    problem(await other_client.patch(f"{path}/status", json={"status": "CLOSED"}), 404, "not_found")
    problem(await other_client.get(f"{path}/balances"), 404, "not_found")
    assert (await new_participant(other_client, external_id="shared"))["id"] != participant["id"]
