"""The rewards catalog over HTTP. Contract: redemptions.md 4, worked examples D, E and H of section 10."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from db.session import Database
from domain import rewards
from domain.limits import EXPRESSION_CHARS
from tests.api.calls import all_pages, created, new_asset, new_participant, new_program, problem, wrong_fields
from tests.conftest import SettableClock, Tenant

PLAIN_FIELDS = {
    "id",
    "program_id",
    "name",
    "description",
    "category",
    "redemption_type",
    "asset_id",
    "unit_cost",
    "status",
    "max_total",
    "max_per_participant",
    "redeemed_count",
    "available_from",
    "available_until",
    "metadata",
    "created_at",
    "updated_at",
}


@pytest.fixture
async def program(client: httpx.AsyncClient) -> str:
    """The id of a program."""
    program_id: str = (await new_program(client))["id"]
    return program_id


@pytest.fixture
async def asset(client: httpx.AsyncClient, program: str) -> str:
    """The id of an asset of scale 2 that is linked to the program."""
    asset_id: str = (await new_asset(client, program))["id"]
    return asset_id


@pytest.fixture
def path(program: str) -> str:
    """Where the program's rewards are."""
    return f"/programs/{program}/rewards"


def mug(asset: str, **fields: Any) -> dict[str, Any]:
    """The body of a DRAFT UNIT_BASED reward; `fields` overrides its members."""
    return {
        "name": "Mug",
        "redemption_type": "UNIT_BASED",
        "asset_id": asset,
        "unit_cost": "5",
        "status": "DRAFT",
        **fields,
    }


async def names(client: httpx.AsyncClient, path: str, **params: object) -> list[str]:
    return [reward["name"] for reward in await all_pages(client, path, **params)]


@pytest.fixture
def sell(client: httpx.AsyncClient, database: Database, organization: Tenant) -> Any:
    """Take units of a reward for a new participant, as a redemption does."""

    async def take(reward: dict[str, Any], quantity: int) -> None:
        buyer = UUID((await new_participant(client))["id"])
        async with database.transaction(organization.id) as tx:
            locked = await rewards.lock(tx, UUID(reward["program_id"]), UUID(reward["id"]))
            await rewards.take(tx, locked, buyer, quantity)

    return take


# --- create ----------------------------------------------------------------------------------------------------------


async def test_a_reward_needs_five_fields_and_shows_every_other_as_null(
    client: httpx.AsyncClient, path: str, program: str, asset: str
) -> None:
    reward = await created(client, path, mug(asset))

    assert reward.keys() == PLAIN_FIELDS
    assert {name: reward[name] for name in ("program_id", "name", "redemption_type", "asset_id", "status")} == {
        "program_id": program,
        "name": "Mug",
        "redemption_type": "UNIT_BASED",
        "asset_id": asset,
        "status": "DRAFT",
    }
    assert reward["unit_cost"] == "5.00"
    assert reward["redeemed_count"] == 0
    for field in ("description", "category", "max_total", "max_per_participant", "metadata"):
        assert reward[field] is None
    assert reward["available_from"] is reward["available_until"] is None
    assert (await client.get(f"{path}/{reward['id']}")).json() == reward


async def test_a_reward_with_everything_comes_back_as_it_was_sent(
    client: httpx.AsyncClient, path: str, asset: str
) -> None:
    everything = mug(
        asset,
        unit_cost="12.34",
        description="d" * 1000,
        category="c" * 100,
        max_total=100,
        max_per_participant=2,
        available_from="2026-01-01T00:00:00+01:00",
        available_until="2027-01-01T00:00:00Z",
        metadata={"sku": "M-1", "price": 1.50, "nested": {"list": [1, True, None]}},
        requires_confirmation=True,
        eligibility='"vip" in participant.tags && now() > timestamp("2026-01-01T00:00:00Z")',
    )

    reward = await created(client, path, everything)

    assert reward.keys() == PLAIN_FIELDS | {"requires_confirmation", "eligibility"}
    assert {name: reward[name] for name in everything} == {
        **everything,
        "available_from": "2025-12-31T23:00:00Z",
    }
    assert (await client.get(f"{path}/{reward['id']}")).json() == reward
    assert (await client.get(path)).json()["data"] == [reward]


async def test_metadata_comes_back_number_by_number(client: httpx.AsyncClient, path: str, asset: str) -> None:
    body = f'{{"name":"Mug","redemption_type":"UNIT_BASED","asset_id":"{asset}","unit_cost":"5","status":"DRAFT",'
    answer = await client.post(path, content=body + '"metadata":{"a":1.10,"b":12345678901234567890.5}}')
    assert answer.status_code == 201
    assert '"metadata":{"a":1.10,"b":12345678901234567890.5}' in answer.text
    assert '"metadata":{"a":1.10,"b":12345678901234567890.5}' in (await client.get(path)).text


@pytest.mark.parametrize("status", ["DRAFT", "ACTIVE", "OUT_OF_STOCK", "ARCHIVED"])
async def test_a_reward_can_begin_in_every_status(
    client: httpx.AsyncClient, path: str, asset: str, status: str
) -> None:
    assert (await created(client, path, mug(asset, status=status)))["status"] == status


@pytest.mark.parametrize("field", ["name", "redemption_type", "asset_id", "unit_cost", "status"])
async def test_required_fields_are_required(client: httpx.AsyncClient, path: str, asset: str, field: str) -> None:
    body = mug(asset)
    del body[field]
    assert wrong_fields(await client.post(path, json=body)) == {field: "required"}
    assert wrong_fields(await client.post(path, json={**body, field: None})) == {field: "invalid"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "x" * 256),
        ("redemption_type", "FREE"),
        ("asset_id", "x"),
        ("unit_cost", "0"),
        ("unit_cost", "-1"),
        ("unit_cost", "NaN"),
        ("unit_cost", "1e3"),
        ("unit_cost", 5),
        ("unit_cost", "1" + "0" * 20),
        ("status", "SOLD"),
        ("description", "x" * 1001),
        ("category", "x" * 101),
        ("max_total", 0),
        ("max_total", 1.5),
        ("max_total", "5"),
        ("max_total", True),
        ("max_total", 10**30),
        ("max_per_participant", 0),
        ("max_per_participant", -1),
        ("available_from", "2026-01-01"),
        ("available_until", "tomorrow"),
        ("metadata", [1]),
        ("metadata", "text"),
        ("metadata", {"a": "x" * 16 * 1024}),
        ("requires_confirmation", "true"),
        ("requires_confirmation", None),
        ("eligibility", ""),
        ("eligibility", 1),
    ],
)
async def test_a_reward_that_breaks_its_limits_is_refused(
    client: httpx.AsyncClient, path: str, asset: str, field: str, value: object
) -> None:
    assert wrong_fields(await client.post(path, json=mug(asset, **{field: value}))) == {field: "invalid"}
    assert await names(client, path, include_archived=True) == []


async def test_the_window_must_have_a_duration(client: httpx.AsyncClient, path: str, asset: str) -> None:
    for end in ("2026-01-01T00:00:00Z", "2025-12-31T00:00:00Z"):
        body = mug(asset, available_from="2026-01-01T00:00:00Z", available_until=end)
        assert wrong_fields(await client.post(path, json=body)) == {"available_until": "invalid"}


async def test_a_price_has_the_decimals_of_its_asset(client: httpx.AsyncClient, path: str, asset: str) -> None:
    body = problem(await client.post(path, json=mug(asset, unit_cost="1.005")), 400, "invalid_scale")
    assert body["details"]["field"] == "unit_cost"
    assert (await created(client, path, mug(asset, unit_cost="1.5000")))["unit_cost"] == "1.50"


@pytest.mark.parametrize("field", ["max_total", "max_per_participant"])
async def test_amounts_are_not_counted(client: httpx.AsyncClient, path: str, asset: str, field: str) -> None:  # D
    cash = mug(asset, redemption_type="AMOUNT_BASED")
    assert wrong_fields(await client.post(path, json={**cash, field: 5})) == {field: "invalid"}
    reward = await created(client, path, {**cash, field: None})
    assert wrong_fields(await client.patch(f"{path}/{reward['id']}", json={field: 5})) == {field: "invalid"}
    assert (await client.patch(f"{path}/{reward['id']}", json={field: None})).status_code == 200


async def test_the_program_and_the_asset_must_exist_and_be_linked(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient, path: str, asset: str
) -> None:
    elsewhere = (await new_program(client))["id"]
    unlinked = (await new_asset(client, elsewhere))["id"]
    foreign = await new_program(other_client)

    problem(await client.post(path, json=mug(unlinked)), 422, "asset_not_linked")
    problem(await client.post(path, json=mug(str(uuid4()))), 404, "not_found")
    problem(await client.post(f"/programs/{uuid4()}/rewards", json=mug(asset)), 404, "not_found")
    problem(await client.post(f"/programs/{foreign['id']}/rewards", json=mug(asset)), 404, "not_found")


# --- names -----------------------------------------------------------------------------------------------------------


async def test_a_name_is_taken_once_per_program(client: httpx.AsyncClient, path: str, asset: str) -> None:  # H
    first = await created(client, path, mug(asset))
    other = (await new_program(client))["id"]
    other_asset = (await new_asset(client, other))["id"]

    again = await client.post(path, json=mug(asset))

    assert problem(again, 409, "conflict")["details"]["field"] == "name"
    await created(client, f"/programs/{other}/rewards", mug(other_asset))
    await client.patch(f"{path}/{first['id']}", json={"status": "ARCHIVED"})
    problem(await client.post(path, json=mug(asset)), 409, "conflict")


async def test_a_new_name_must_be_free_but_may_be_the_old_one(client: httpx.AsyncClient, path: str, asset: str) -> None:
    reward = await created(client, path, mug(asset))
    await created(client, path, mug(asset, name="Cup"))

    problem(await client.patch(f"{path}/{reward['id']}", json={"name": "Cup"}), 409, "conflict")
    assert (await client.patch(f"{path}/{reward['id']}", json={"name": "Mug"})).status_code == 200
    assert (await client.patch(f"{path}/{reward['id']}", json={"name": "Glass"})).json()["name"] == "Glass"


async def test_of_many_at_once_one_gets_the_name(client: httpx.AsyncClient, path: str, asset: str) -> None:
    answers = await asyncio.gather(*(client.post(path, json=mug(asset)) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409, 409]

    rewards = [await created(client, path, mug(asset, name=f"Mug {n}")) for n in range(5)]
    renames = [client.patch(f"{path}/{reward['id']}", json={"name": "Cup"}) for reward in rewards]
    assert sorted(answer.status_code for answer in await asyncio.gather(*renames)) == [200, 409, 409, 409, 409]


# --- list ------------------------------------------------------------------------------------------------------------


async def test_a_catalog_is_listed_and_searched(client: httpx.AsyncClient, path: str, asset: str) -> None:  # H
    for name, status in (("Mug", "ACTIVE"), ("$10 Gift Card", "DRAFT"), ("Airline miles", "ARCHIVED")):
        await created(client, path, mug(asset, name=name, status=status))

    assert await names(client, path) == ["$10 Gift Card", "Mug"]
    assert await names(client, path, include_archived=True) == ["Airline miles", "$10 Gift Card", "Mug"]
    assert await names(client, path, status="ARCHIVED") == ["Airline miles"]
    assert await names(client, path, status="DRAFT", include_archived=True) == ["$10 Gift Card"]
    assert await names(client, path, search="gift") == ["$10 Gift Card"]
    assert await names(client, path, search="MI", include_archived=True) == ["Airline miles"]
    assert await names(client, path, search="%") == await names(client, path, search="_") == []
    by_name = sorted(["$10 Gift Card", "Airline miles", "Mug"])
    found = await names(client, path, sort_by="name", sort_dir="asc", include_archived=True)
    assert sorted(found) == by_name
    assert await names(client, path, sort_by="name", sort_dir="desc", include_archived=True) == found[::-1]
    assert await names(client, path, sort_by="name", sort_dir="asc", search="m", status="ACTIVE") == ["Mug"]


async def test_an_unknown_program_has_no_catalog_and_another_program_another_one(
    client: httpx.AsyncClient, path: str, asset: str
) -> None:
    await created(client, path, mug(asset))
    other = (await new_program(client))["id"]
    assert await names(client, f"/programs/{other}/rewards") == []
    problem(await client.get(f"/programs/{uuid4()}/rewards"), 404, "not_found")


@pytest.mark.parametrize("sort_by", ["created_at", "name"])
@pytest.mark.parametrize("sort_dir", ["asc", "desc"])
async def test_pages_make_up_the_list_while_rewards_come(
    client: httpx.AsyncClient, clock: SettableClock, path: str, asset: str, sort_by: str, sort_dir: str
) -> None:
    clock.set("2026-01-01T00:00:00Z")
    for name in ("b", "d", "a", "e", "c"):
        await created(client, path, mug(asset, name=name))
    order = {"sort_by": sort_by, "sort_dir": sort_dir}
    whole = await names(client, path, **order)
    first = (await client.get(path, params={**order, "limit": 2})).json()

    # Behind the first page in one direction, before it in the other: neither shifts what follows.
    late = "zz" if sort_dir == "desc" else "0"
    if sort_by == "name":
        await created(client, path, mug(asset, name=late))

    rest = await names(client, path, **order, limit=2, cursor=first["pagination"]["next_cursor"])
    assert [reward["name"] for reward in first["data"]] + rest == whole


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"status": "SOLD"}, "status"),
        ({"sort_by": "unit_cost"}, "sort_by"),
        ({"sort_dir": "up"}, "sort_dir"),
        ({"limit": 0}, "limit"),
        ({"cursor": "x"}, "cursor"),
        ({"include_archived": "maybe"}, "include_archived"),
    ],
)
async def test_wrong_filters_are_refused(
    client: httpx.AsyncClient, path: str, params: dict[str, Any], field: str
) -> None:
    assert wrong_fields(await client.get(path, params=params)) == {field: "invalid"}


async def test_a_cursor_belongs_to_its_sort(client: httpx.AsyncClient, path: str, asset: str) -> None:
    for name in ("a", "b"):
        await created(client, path, mug(asset, name=name))
    cursor = (await client.get(path, params={"limit": 1})).json()["pagination"]["next_cursor"]
    assert wrong_fields(await client.get(path, params={"cursor": cursor, "sort_by": "name"})) == {"cursor": "invalid"}


# --- get and tenants -------------------------------------------------------------------------------------------------


async def test_a_reward_is_reached_only_through_its_own_program_and_organization(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient, path: str, asset: str
) -> None:
    reward = await created(client, path, mug(asset))
    other = (await new_program(client))["id"]
    for caller, place in (
        (client, f"/programs/{other}/rewards/{reward['id']}"),
        (client, f"{path}/{uuid4()}"),
        (other_client, f"{path}/{reward['id']}"),
    ):
        problem(await caller.get(place), 404, "not_found")
        problem(await caller.patch(place, json={"name": "Cup"}), 404, "not_found")
    problem(await other_client.get(path), 404, "not_found")


async def test_there_is_no_delete(client: httpx.AsyncClient, path: str, asset: str) -> None:
    reward = await created(client, path, mug(asset))
    problem(await client.delete(f"{path}/{reward['id']}"), 405, "bad_request")


# --- update ----------------------------------------------------------------------------------------------------------


async def test_an_update_changes_only_what_it_names(
    client: httpx.AsyncClient, clock: SettableClock, path: str, asset: str
) -> None:
    clock.set("2026-01-01T00:00:00Z")
    reward = await created(client, path, mug(asset, description="kept", max_total=9, metadata={"a": 1}))
    clock.advance(days=1)

    changed = (await client.patch(f"{path}/{reward['id']}", json={"unit_cost": "7.5"})).json()

    assert changed == {**reward, "unit_cost": "7.50", "updated_at": "2026-01-02T00:00:00Z"}
    assert (await client.get(f"{path}/{reward['id']}")).json() == changed


async def test_null_clears_what_can_be_empty(client: httpx.AsyncClient, path: str, asset: str) -> None:
    plain = await created(client, path, mug(asset, name="Plain"))
    full = {
        "description": "text",
        "category": "mugs",
        "max_total": 5,
        "max_per_participant": 1,
        "available_from": "2026-01-01T00:00:00Z",
        "available_until": "2027-01-01T00:00:00Z",
        "metadata": {"a": 1},
        "eligibility": "true",
    }
    reward = await created(client, path, mug(asset, **full))

    cleared = (await client.patch(f"{path}/{reward['id']}", json=dict.fromkeys(full))).json()

    own = {name: reward[name] for name in ("id", "name", "created_at")}
    assert cleared == {**plain, **own, "updated_at": cleared["updated_at"]}


@pytest.mark.parametrize("field", ["name", "unit_cost", "status", "requires_confirmation"])
async def test_null_clears_nothing_else(client: httpx.AsyncClient, path: str, asset: str, field: str) -> None:
    reward = await created(client, path, mug(asset))
    assert wrong_fields(await client.patch(f"{path}/{reward['id']}", json={field: None})) == {field: "invalid"}


@pytest.mark.parametrize("before", [{"a": 1, "b": 2}, {"b": 1}, None])
async def test_metadata_is_replaced_and_not_merged(
    client: httpx.AsyncClient, path: str, asset: str, before: dict[str, int] | None
) -> None:
    reward = await created(client, path, mug(asset, metadata=before))
    # true equals 1 in more languages than one should think.
    for after in ({"b": True}, {"b": 1}, {}):
        changed = (await client.patch(f"{path}/{reward['id']}", json={"metadata": after})).text
        assert httpx.Response(200, text=changed).json()["metadata"] == after
        assert ('"b":true' in changed) == (after.get("b") is True)


@pytest.mark.parametrize("field", ["redemption_type", "asset_id"])
async def test_what_is_fixed_at_creation_is_refused_whatever_its_value(
    client: httpx.AsyncClient, path: str, asset: str, field: str
) -> None:
    reward = await created(client, path, mug(asset))
    for value in (reward[field], None):
        answer = await client.patch(f"{path}/{reward['id']}", json={field: value, "name": "Cup"})
        assert wrong_fields(answer) == {field: "invalid"}
    assert (await client.get(f"{path}/{reward['id']}")).json() == reward


@pytest.mark.parametrize("body", [{}, {"redeemed_count": 0, "unknown": 1}])
async def test_an_update_of_nothing_is_refused(
    client: httpx.AsyncClient, path: str, asset: str, body: dict[str, int]
) -> None:
    reward = await created(client, path, mug(asset))
    assert wrong_fields(await client.patch(f"{path}/{reward['id']}", json=body)) == {"body": "required"}


async def test_an_update_is_checked_against_what_stays(client: httpx.AsyncClient, path: str, asset: str) -> None:
    reward = await created(client, path, mug(asset, available_from="2026-01-01T00:00:00Z"))
    place = f"{path}/{reward['id']}"

    early = await client.patch(place, json={"available_until": "2026-01-01T00:00:00Z"})
    assert wrong_fields(early) == {"available_until": "invalid"}
    both = {"available_from": None, "available_until": "2026-01-01T00:00:00Z"}
    assert (await client.patch(place, json=both)).status_code == 200
    problem(await client.patch(place, json={"unit_cost": "0.001"}), 400, "invalid_scale")
    assert wrong_fields(await client.patch(place, json={"unit_cost": "0"})) == {"unit_cost": "invalid"}
    assert wrong_fields(await client.patch(place, json={"metadata": {"a": "x" * 16_384}})) == {"metadata": "invalid"}


async def test_requires_confirmation_is_shown_only_while_it_holds(
    client: httpx.AsyncClient, path: str, asset: str
) -> None:
    reward = await created(client, path, mug(asset, requires_confirmation=False))
    assert "requires_confirmation" not in reward
    on = (await client.patch(f"{path}/{reward['id']}", json={"requires_confirmation": True})).json()
    assert on["requires_confirmation"] is True
    off = (await client.patch(f"{path}/{reward['id']}", json={"requires_confirmation": False})).json()
    assert "requires_confirmation" not in off


# --- status ----------------------------------------------------------------------------------------------------------


async def test_draft_active_and_archived_follow_each_other_in_any_direction(
    client: httpx.AsyncClient, path: str, asset: str
) -> None:
    reward = await created(client, path, mug(asset))
    for status in ("ACTIVE", "DRAFT", "ARCHIVED", "DRAFT", "ACTIVE", "ARCHIVED", "ACTIVE", "ACTIVE"):
        assert (await client.patch(f"{path}/{reward['id']}", json={"status": status})).json()["status"] == status


async def test_out_of_stock_is_the_systems_word(client: httpx.AsyncClient, path: str, asset: str, sell: Any) -> None:
    reward = await created(client, path, mug(asset, status="ACTIVE", max_total=2))
    place = f"{path}/{reward['id']}"
    assert wrong_fields(await client.patch(place, json={"status": "OUT_OF_STOCK"})) == {"status": "invalid"}

    await sell(reward, 2)

    sold_out = (await client.get(place)).json()
    assert (sold_out["status"], sold_out["redeemed_count"]) == ("OUT_OF_STOCK", 2)
    assert await names(client, path, status="OUT_OF_STOCK") == ["Mug"]
    assert wrong_fields(await client.patch(place, json={"status": "OUT_OF_STOCK"})) == {"status": "invalid"}
    assert (await client.patch(place, json={"status": "ACTIVE"})).json()["status"] == "OUT_OF_STOCK"


@pytest.mark.parametrize(
    ("before", "changes", "after"),
    [
        ("OUT_OF_STOCK", {"max_total": 3}, "ACTIVE"),
        ("OUT_OF_STOCK", {"max_total": None}, "ACTIVE"),
        ("OUT_OF_STOCK", {"max_total": 3, "status": "ACTIVE"}, "ACTIVE"),
        ("OUT_OF_STOCK", {"max_total": 2}, "OUT_OF_STOCK"),
        ("OUT_OF_STOCK", {"name": "Cup"}, "OUT_OF_STOCK"),
        ("OUT_OF_STOCK", {"max_total": 3, "status": "DRAFT"}, "DRAFT"),
        ("OUT_OF_STOCK", {"status": "DRAFT"}, "DRAFT"),
        ("OUT_OF_STOCK", {"status": "ARCHIVED"}, "ARCHIVED"),
        ("DRAFT", {"status": "ACTIVE"}, "OUT_OF_STOCK"),
        ("DRAFT", {"max_total": 3}, "DRAFT"),
        ("DRAFT", {"max_total": 3, "status": "ACTIVE"}, "ACTIVE"),
        ("ARCHIVED", {"status": "ACTIVE"}, "OUT_OF_STOCK"),
        ("ARCHIVED", {"max_total": None}, "ARCHIVED"),
    ],
)
async def test_what_a_change_makes_of_a_reward_that_is_sold_out(
    client: httpx.AsyncClient,
    path: str,
    asset: str,
    sell: Any,
    before: str,
    changes: dict[str, Any],
    after: str,
) -> None:
    reward = await created(client, path, mug(asset, status="ACTIVE", max_total=2))
    place = f"{path}/{reward['id']}"
    await sell(reward, 2)
    if before != "OUT_OF_STOCK":
        await client.patch(place, json={"status": before})
    assert (await client.get(place)).json()["status"] == before

    changed = await client.patch(place, json=changes)

    assert changed.json()["status"] == after
    assert (await client.get(place)).json() == changed.json()


async def test_the_stock_can_be_lowered_to_what_is_redeemed_but_not_below(
    client: httpx.AsyncClient, path: str, asset: str, sell: Any
) -> None:
    reward = await created(client, path, mug(asset, status="ACTIVE"))
    place = f"{path}/{reward['id']}"
    await sell(reward, 3)

    below = problem(await client.patch(place, json={"max_total": 2}), 409, "conflict")
    assert below["details"]["field"] == "max_total"
    assert (await client.patch(place, json={"max_total": 4})).json()["status"] == "ACTIVE"
    assert (await client.patch(place, json={"max_total": 3})).json()["status"] == "OUT_OF_STOCK"
    await client.patch(place, json={"status": "DRAFT"})
    problem(await client.patch(place, json={"max_total": 2}), 409, "conflict")


async def test_a_reward_that_was_created_out_of_stock_goes_on_sale_by_hand(
    client: httpx.AsyncClient, path: str, asset: str
) -> None:
    reward = await created(client, path, mug(asset, status="OUT_OF_STOCK", max_total=5))
    place = f"{path}/{reward['id']}"
    assert (await client.patch(place, json={"name": "Cup"})).json()["status"] == "OUT_OF_STOCK"
    assert (await client.patch(place, json={"max_total": 4})).json()["status"] == "OUT_OF_STOCK"
    assert (await client.patch(place, json={"status": "ACTIVE"})).json()["status"] == "ACTIVE"


async def test_what_happens_to_the_asset_never_changes_the_status(
    client: httpx.AsyncClient, path: str, program: str, asset: str
) -> None:
    reward = await created(client, path, mug(asset, status="ACTIVE", available_until="2020-01-01T00:00:00Z"))
    await client.patch(f"/assets/{asset}", json={"status": "ARCHIVED"})
    assert (await client.delete(f"/programs/{program}/assets/{asset}")).status_code == 204
    assert (await client.get(f"{path}/{reward['id']}")).json() == reward


# --- eligibility -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    [
        "participant.tags ==",
        "participant.tags = 1",
        "nonsense(participant)",
        "customer.tags.size() > 0",
        "event.amount > 10",
        "has(event.amount)",
        '"vip" in participant.tags || event.type == "purchase"',
        '"vip" in participant.tags || program.counters.sold < 10',
        "groups.exists(g, g.name == participant.id)",
        "group.id == participant.id",
        "participant.tags.exists(t, t == event.tag)",
        "a" * (EXPRESSION_CHARS + 1),
        " ",
    ],
)
async def test_an_expression_must_compile_and_read_only_the_participant_and_the_time(
    client: httpx.AsyncClient, path: str, asset: str, expression: str
) -> None:
    assert wrong_fields(await client.post(path, json=mug(asset, eligibility=expression))) == {"eligibility": "invalid"}
    reward = await created(client, path, mug(asset))
    answer = await client.patch(f"{path}/{reward['id']}", json={"eligibility": expression})
    assert wrong_fields(answer) == {"eligibility": "invalid"}


@pytest.mark.parametrize(
    "expression",
    [
        '"event" in participant.tags',
        'participant.attributes.event == "program"',
        "participant.tags.exists(group, group == 'vip')",
        "participant.tiers.loyalty.level == 'gold'",
        "now() > timestamp('2026-01-01T00:00:00Z')",
    ],
)
async def test_words_that_only_look_like_other_variables_are_fine(
    client: httpx.AsyncClient, path: str, asset: str, expression: str
) -> None:
    assert (await created(client, path, mug(asset, eligibility=expression)))["eligibility"] == expression
