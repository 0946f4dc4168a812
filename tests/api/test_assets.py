"""Assets and their links, over HTTP. Contract: basics.md 5.10 and 6, worked examples of section 8."""

import asyncio
from typing import Any

import httpx
import psycopg
import pytest

from tests.api.calls import all_pages, new_asset, new_participant, new_program, problem, wrong_fields


async def test_an_asset_is_created_active_and_linked(client: httpx.AsyncClient, owner: psycopg.Connection[Any]) -> None:
    program = await new_program(client)
    asset = await new_asset(client, program["id"], symbol="PTS", max_transaction_amount="100.5")

    assert asset["program_ids"] == [program["id"]]
    assert asset["status"] == "ACTIVE"
    assert asset["max_transaction_amount"] == "100.50"
    assert (await client.get(f"/assets/{asset['id']}")).json() == asset
    accounts = owner.execute(
        "select entity_type, entity_id, bucket from account where asset_id = %s order by 1", (asset["id"],)
    ).fetchall()
    assert accounts == [(f"SYSTEM_{kind}", None, "AVAILABLE") for kind in ("BREAKAGE", "ISSUANCE", "REDEMPTION")]


@pytest.mark.parametrize(("scale", "accepted"), [(19, False), (-1, False), (0, True), (18, True)])
async def test_the_scale_is_from_0_to_18(client: httpx.AsyncClient, scale: int, accepted: bool) -> None:  # example 12
    asset = {
        "program_id": (await new_program(client))["id"],
        "name": "x",
        "symbol": "X",
        "inventory_mode": "LOT",
        "issuance_policy": "PREFUNDED",
        "scale": scale,
    }
    answer = await client.post("/assets", json=asset)
    if accepted:
        assert answer.json()["scale"] == scale
    else:
        assert wrong_fields(answer) == {"scale": "invalid"}


@pytest.mark.parametrize("scale", ["2", True, 2.5, None])
async def test_the_scale_is_an_integer(client: httpx.AsyncClient, scale: object) -> None:
    program_id = (await new_program(client))["id"]
    body = {"program_id": program_id, "name": "x", "symbol": "X", "scale": scale}
    body |= {"inventory_mode": "SIMPLE", "issuance_policy": "UNLIMITED"}
    assert wrong_fields(await client.post("/assets", json=body)) == {"scale": "invalid"}


@pytest.mark.parametrize("symbol", ["A" * 17, "", "P-T", "P T", "PÄT"])
async def test_a_symbol_is_1_to_16_letters_and_digits(client: httpx.AsyncClient, symbol: str) -> None:  # example 13
    body = {"program_id": (await new_program(client))["id"], "name": "x", "symbol": symbol, "scale": 0}
    body |= {"inventory_mode": "SIMPLE", "issuance_policy": "UNLIMITED"}
    assert wrong_fields(await client.post("/assets", json=body)) == {"symbol": "invalid"}


async def test_a_symbol_is_unique_within_its_organization(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient
) -> None:  # example 13
    program_id = (await new_program(client))["id"]
    first = await new_asset(client, program_id, symbol="PTS")
    await client.patch(f"/assets/{first['id']}", json={"status": "ARCHIVED"})

    again = {"program_id": program_id, "name": "x", "symbol": "pts", "scale": 0}
    again |= {"inventory_mode": "SIMPLE", "issuance_policy": "UNLIMITED"}
    problem(await client.post("/assets", json=again), 409, "conflict")
    await new_asset(other_client, (await new_program(other_client))["id"], symbol="PTS")


async def test_of_concurrent_creations_of_one_symbol_one_succeeds(client: httpx.AsyncClient) -> None:
    body = {"program_id": (await new_program(client))["id"], "name": "x", "symbol": "PTS", "scale": 0}
    body |= {"inventory_mode": "SIMPLE", "issuance_policy": "UNLIMITED"}
    answers = await asyncio.gather(*(client.post("/assets", json=body) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409, 409]
    assert len(await all_pages(client, "/assets")) == 1


async def test_an_archived_asset_stays_archived(client: httpx.AsyncClient) -> None:  # example 14
    path = f"/assets/{(await new_asset(client, (await new_program(client))['id']))['id']}"
    archived = (await client.patch(path, json={"status": "ARCHIVED"})).json()
    assert archived["status"] == "ARCHIVED"
    assert archived["deleted_at"] is not None

    assert wrong_fields(await client.patch(path, json={"status": "ACTIVE"})) == {"status": "invalid"}
    again = await client.patch(path, json={"status": "ARCHIVED"})
    assert (again.status_code, again.json()) == (200, archived)


async def test_null_removes_the_ceiling_and_leaving_it_out_keeps_it(client: httpx.AsyncClient) -> None:  # example 18
    asset = await new_asset(client, (await new_program(client))["id"], max_transaction_amount="5")
    path = f"/assets/{asset['id']}"
    assert (await client.patch(path, json={"name": "y"})).json()["max_transaction_amount"] == "5.00"
    assert (await client.patch(path, json={"max_transaction_amount": None})).json()["max_transaction_amount"] is None
    assert (await client.patch(path, json={"max_transaction_amount": "7"})).json()["max_transaction_amount"] == "7.00"


@pytest.mark.parametrize(
    ("ceiling", "code"),
    [
        ("1.005", "invalid_scale"),
        ("0", "bad_request"),
        ("-1", "bad_request"),
        ("1e2", "bad_request"),
        ("9" * 21, "bad_request"),
    ],
)
async def test_a_ceiling_is_a_positive_amount_of_the_asset(client: httpx.AsyncClient, ceiling: str, code: str) -> None:
    path = f"/assets/{(await new_asset(client, (await new_program(client))['id']))['id']}"
    answer = problem(await client.patch(path, json={"max_transaction_amount": ceiling}), 400, code)
    assert answer["details"]["field"] == "max_transaction_amount"


async def test_amounts_are_never_json_numbers(client: httpx.AsyncClient) -> None:
    path = f"/assets/{(await new_asset(client, (await new_program(client))['id']))['id']}"
    assert wrong_fields(await client.patch(path, json={"max_transaction_amount": 5})) == {
        "max_transaction_amount": "invalid"
    }


@pytest.mark.parametrize("field", ["inventory_mode", "issuance_policy", "scale", "symbol"])
async def test_what_is_fixed_cannot_be_sent(client: httpx.AsyncClient, field: str) -> None:
    asset = await new_asset(client, (await new_program(client))["id"])
    answer = await client.patch(f"/assets/{asset['id']}", json={"name": "y", field: asset[field]})
    assert wrong_fields(answer) == {field: "invalid"}
    assert wrong_fields(await client.patch(f"/assets/{asset['id']}", json={})) == {"body": "required"}


async def test_creation_names_an_existing_program_that_is_not_archived(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient
) -> None:
    program_id = (await new_program(client))["id"]
    body = {"program_id": program_id, "name": "x", "symbol": "X", "scale": 0}
    body |= {"inventory_mode": "SIMPLE", "issuance_policy": "UNLIMITED"}
    problem(await other_client.post("/assets", json=body), 404, "not_found")
    await client.patch(f"/programs/{program_id}", json={"status": "SUSPENDED"})
    await new_asset(client, program_id)
    await client.patch(f"/programs/{program_id}", json={"status": "ARCHIVED"})
    problem(await client.post("/assets", json=body), 409, "program_inactive")


async def test_assets_are_filtered(client: httpx.AsyncClient) -> None:
    first, second = (await new_program(client))["id"], (await new_program(client))["id"]
    points = await new_asset(client, first, name="Points", symbol="PTS")
    nights = await new_asset(client, second, name="Hotel nights", symbol="NGT")
    await client.patch(f"/assets/{points['id']}", json={"status": "ARCHIVED"})

    async def found(**params: str) -> list[str]:
        return [asset["symbol"] for asset in await all_pages(client, "/assets", **params)]

    assert await found() == ["NGT", "PTS"]
    assert await found(program_id=first) == ["PTS"]
    assert await found(status="ACTIVE") == ["NGT"]
    assert await found(search="night") == ["NGT"]
    assert await found(search="pt") == ["PTS"]
    assert (await client.get(f"/assets/{nights['id']}")).json() == nights


async def test_an_asset_is_linked_once(client: httpx.AsyncClient) -> None:  # example 26
    first, second = (await new_program(client))["id"], (await new_program(client))["id"]
    asset = await new_asset(client, first)

    linked = await client.post(f"/programs/{second}/assets", json={"asset_id": asset["id"]})
    assert linked.status_code == 201
    assert linked.json()["program_ids"] == [first, second]
    problem(await client.post(f"/programs/{second}/assets", json={"asset_id": asset["id"]}), 409, "conflict")
    assert await all_pages(client, f"/programs/{second}/assets") == [linked.json()]


async def test_links_refuse_what_is_unknown_or_archived(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient
) -> None:
    program_id, other_program_id = (await new_program(client))["id"], (await new_program(client))["id"]
    asset = await new_asset(client, program_id)
    path = f"/programs/{other_program_id}/assets"
    foreign = await new_asset(other_client, (await new_program(other_client))["id"])
    problem(await client.post(path, json={"asset_id": foreign["id"]}), 404, "not_found")
    problem(await other_client.get(path), 404, "not_found")
    assert wrong_fields(await client.post(path, json={})) == {"asset_id": "required"}

    await client.patch(f"/assets/{asset['id']}", json={"status": "ARCHIVED"})
    problem(await client.post(path, json={"asset_id": asset["id"]}), 409, "asset_archived")
    await client.patch(f"/programs/{other_program_id}", json={"status": "ARCHIVED"})
    problem(await client.post(path, json={"asset_id": asset["id"]}), 409, "program_inactive")


async def test_a_link_can_go_until_the_ledger_knows_it(client: httpx.AsyncClient) -> None:
    program_id, other_id = (await new_program(client))["id"], (await new_program(client))["id"]
    asset = await new_asset(client, program_id)
    await client.post(f"/programs/{other_id}/assets", json={"asset_id": asset["id"]})
    participant = await new_participant(client)
    credit = {"program_id": program_id, "asset_id": asset["id"], "type": "CREDIT", "amount": "1", "description": "x"}
    assert (await client.post(f"/participants/{participant['id']}/balances/adjust", json=credit)).status_code == 200

    problem(await client.delete(f"/programs/{program_id}/assets/{asset['id']}"), 409, "conflict")
    gone = await client.delete(f"/programs/{other_id}/assets/{asset['id']}")
    assert (gone.status_code, gone.content) == (204, b"")
    problem(await client.delete(f"/programs/{other_id}/assets/{asset['id']}"), 404, "not_found")
    assert (await client.get(f"/assets/{asset['id']}")).json()["program_ids"] == [program_id]
