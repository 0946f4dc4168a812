"""Groups, their members, state and totals over HTTP. Contract: holders.md 4 and 5."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from db.session import Database
from domain.ledger.journal import load_accounts, write
from domain.locks import lock_groups
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
from tests.builders import d
from tests.conftest import SettableClock, Tenant

Person = str


async def person(client: httpx.AsyncClient, **fields: Any) -> Person:
    """The id of a new participant."""
    return str((await new_participant(client, **fields))["id"])


async def members(client: httpx.AsyncClient, group: str, **params: Any) -> dict[Person, tuple[str, str]]:
    """Role and status of every member."""
    rows = await all_pages(client, f"{group}/members", **params)
    return {row["participant_id"]: (row["role"], row["status"]) for row in rows}


async def names(client: httpx.AsyncClient, **params: Any) -> list[str]:
    return [group["name"] for group in await all_pages(client, "/groups", **params)]


# --- Creating ----------------------------------------------------------------------------------------------------


async def test_a_group_begins_with_its_members(client: httpx.AsyncClient, clock: SettableClock) -> None:
    clock.set("2030-01-01T00:00:00Z")
    alice, bob = await person(client, external_id="alice"), await person(client, external_id="bob")
    body = {"name": "The Smiths", "members": [{"participant_id": alice, "role": "ADMIN"}, {"participant_id": bob}]}
    answer = await client.post("/groups", json={**body, "on_behalf_of_participant_id": alice})

    assert answer.status_code == 201
    group = answer.json()
    assert group == {
        "id": group["id"],
        "name": "The Smiths",
        "status": "ACTIVE",
        "created_at": "2030-01-01T00:00:00Z",
        "updated_at": "2030-01-01T00:00:00Z",
    }
    assert (await client.get(f"/groups/{group['id']}")).json() == {**group, "balances": {}}
    listed = await all_pages(client, f"/groups/{group['id']}/members")
    assert sorted(listed, key=lambda row: row["external_id"]) == [
        {
            "participant_id": participant_id,
            "external_id": external_id,
            "role": role,
            "status": "ACTIVE",
            "joined_at": "2030-01-01T00:00:00Z",
        }
        for participant_id, external_id, role in ((alice, "alice", "ADMIN"), (bob, "bob", "MEMBER"))
    ]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": None}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x" * 256}, "name"),
        ({"members": None}, "members"),
        ({"members": []}, "members"),
        ({"members": [{}]}, "members[0].participant_id"),
        ({"members": [{"participant_id": "bob"}]}, "members[0].participant_id"),
        ({"members": [{"participant_id": str(uuid4()), "role": "OWNER"}]}, "members[0].role"),
        ({"members": [{"participant_id": str(uuid4()), "role": "MEMBER"}]}, "members"),
        ({"members": [{"participant_id": str(uuid4())} for _ in range(101)]}, "members"),
        ({"on_behalf_of_participant_id": "me"}, "on_behalf_of_participant_id"),
    ],
)
async def test_what_is_wrong_with_a_new_group_is_named(
    client: httpx.AsyncClient, change: dict[str, Any], field: str
) -> None:
    body = {"name": "Family", "members": [{"participant_id": str(uuid4()), "role": "ADMIN"}], **change}
    assert list(wrong_fields(await client.post("/groups", json=body))) == [field]


async def test_a_group_may_begin_with_a_hundred_members(client: httpx.AsyncClient) -> None:
    people = await asyncio.gather(*(person(client) for _ in range(100)))
    group = await new_group(client, *people)
    assert len(await members(client, f"/groups/{group['id']}", limit=33)) == 100


async def test_a_participant_is_a_member_once(client: httpx.AsyncClient) -> None:
    alice = await person(client)
    body = {"name": "x", "members": [{"participant_id": alice, "role": "ADMIN"}, {"participant_id": alice}]}
    assert wrong_fields(await client.post("/groups", json=body)) == {"members[1].participant_id": "invalid"}


async def test_members_are_participants_of_the_organization(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient
) -> None:
    alice = await person(client)
    for stranger in (str(uuid4()), await person(other_client)):
        member = {"participant_id": stranger, "role": "ADMIN"}
        problem(await client.post("/groups", json={"name": "x", "members": [member]}), 404, "not_found")
        body = {"name": "x", "members": [{"participant_id": alice, "role": "ADMIN"}]}
        answer = await client.post("/groups", json={**body, "on_behalf_of_participant_id": stranger})
        problem(answer, 404, "not_found")
    assert await names(client) == []


async def test_members_may_have_any_status_and_several_groups(client: httpx.AsyncClient) -> None:
    closed = await person(client, status="CLOSED")
    for _ in range(2):
        group = await new_group(client, closed)
        assert await members(client, f"/groups/{group['id']}") == {closed: ("ADMIN", "ACTIVE")}


# --- Reading and changing ----------------------------------------------------------------------------------------


async def test_groups_are_listed_in_the_order_asked_for(client: httpx.AsyncClient) -> None:
    for name in ("b", "c", "a"):
        await new_group(client, name=name)
    assert await names(client) == ["a", "c", "b"]
    assert await names(client, sort_dir="asc") == ["b", "c", "a"]
    assert await names(client, sort_by="name", sort_dir="asc", limit=1) == ["a", "b", "c"]
    assert wrong_fields(await client.get("/groups", params={"sort_by": "status"})) == {"sort_by": "invalid"}


async def test_archived_groups_are_listed_only_when_asked_for(client: httpx.AsyncClient) -> None:
    await new_group(client, name="kept")
    gone = await new_group(client, name="gone")
    await client.delete(f"/groups/{gone['id']}")
    assert await names(client) == ["kept"]
    assert await names(client, include_archived=True) == ["gone", "kept"]
    assert await names(client, status="ARCHIVED") == ["gone"]
    assert await names(client, status="ACTIVE", include_archived=True) == ["kept"]


async def test_search_looks_at_the_name(client: httpx.AsyncClient) -> None:
    await new_group(client, name="The Smiths")
    await new_group(client, name="100% Jones")
    assert await names(client, search="SMITH") == ["The Smiths"]
    assert await names(client, search="%") == ["100% Jones"]


async def test_a_group_is_renamed(client: httpx.AsyncClient) -> None:
    group = await new_group(client)
    path = f"/groups/{group['id']}"
    renamed = (await client.patch(path, json={"name": "Clan"})).json()
    assert renamed == {**group, "name": "Clan", "updated_at": renamed["updated_at"]}
    assert renamed["updated_at"] > group["updated_at"]
    # What is not sent stays.
    assert (await client.patch(path, json={})).json() == renamed
    for wrong in (None, "", "x" * 256):
        assert wrong_fields(await client.patch(path, json={"name": wrong})) == {"name": "invalid"}


async def test_archiving_is_final_and_may_be_repeated(client: httpx.AsyncClient, clock: SettableClock) -> None:
    clock.set("2030-01-01T00:00:00Z")
    group = await new_group(client)
    path = f"/groups/{group['id']}"
    clock.advance(hours=1)
    archived = await client.delete(path)
    instant = "2030-01-01T01:00:00Z"
    assert archived.status_code == 200
    assert archived.json() == {**group, "status": "ARCHIVED", "updated_at": instant, "deleted_at": instant}
    clock.advance(hours=1)
    again = await client.delete(path)
    assert (again.status_code, again.json()) == (200, archived.json())


async def test_an_archived_group_refuses_every_change_and_stays_readable(client: httpx.AsyncClient) -> None:
    alice, bob = await person(client), await person(client)
    path = f"/groups/{(await new_group(client, alice, bob))['id']}"
    await client.put(f"{path}/state/tags/vip")
    await client.put(f"{path}/state/attributes/city", json={"value": "Berlin"})
    await client.put(f"{path}/state/counters/trips", json={"value": "3"})
    archived = (await client.delete(path)).json()

    for refused in (
        await client.patch(path, json={"name": "Clan"}),
        await client.patch(path, json={}),
        await client.post(f"{path}/members", json={"participant_id": await person(client)}),
        await client.post(f"{path}/members", json={"participant_id": str(uuid4())}),
        await client.patch(f"{path}/members/{bob}", json={"role": "ADMIN"}),
        await client.delete(f"{path}/members/{bob}"),
        await client.put(f"{path}/state/tags", json={"tags": []}),
        await client.put(f"{path}/state/tags/vip"),
        await client.delete(f"{path}/state/tags/vip"),
        await client.patch(f"{path}/state/attributes", json={"attributes": {}}),
        await client.put(f"{path}/state/attributes/city", json={"value": "Rome"}),
        await client.delete(f"{path}/state/attributes/city"),
        await client.put(f"{path}/state/counters/trips", json={"value": "4"}),
        await client.delete(f"{path}/state/counters/trips"),
    ):
        problem(refused, 409, "group_archived")

    assert (await client.get(path)).json() == {**archived, "balances": {}}
    assert await members(client, path) == {alice: ("ADMIN", "ACTIVE"), bob: ("MEMBER", "ACTIVE")}
    assert (await client.get(f"{path}/balances")).json()["data"] == []
    assert (await client.get(f"{path}/state/tags")).json()["data"] == [{"tag": "vip"}]
    assert (await client.get(f"{path}/state/attributes")).json()["data"] == [{"key": "city", "value": "Berlin"}]
    assert (await client.get(f"{path}/state/counters/trips")).json() == {"key": "trips", "value": "3"}
    assert len(await all_pages(client, f"{path}/activity/state-history")) == 3


async def test_what_is_not_the_organizations_group_does_not_exist(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient
) -> None:
    admin = await person(other_client)
    foreign = f"/groups/{(await new_group(other_client, admin))['id']}"
    mine = await person(client)
    for path in (foreign, f"/groups/{uuid4()}"):
        for answer in (
            await client.get(path),
            await client.patch(path, json={"name": "mine"}),
            await client.delete(path),
            await client.get(f"{path}/members"),
            await client.post(f"{path}/members", json={"participant_id": mine}),
            await client.patch(f"{path}/members/{admin}", json={"role": "MEMBER"}),
            await client.delete(f"{path}/members/{admin}"),
            await client.get(f"{path}/balances"),
            await client.get(f"{path}/activity/state-history"),
            await client.get(f"{path}/state/tags"),
            await client.put(f"{path}/state/tags/vip"),
            await client.put(f"{path}/state/attributes/a", json={"value": "1"}),
            await client.put(f"{path}/state/counters/c", json={"value": "1"}),
        ):
            problem(answer, 404, "not_found")
    assert await names(client, include_archived=True) == []
    assert await members(other_client, foreign) == {admin: ("ADMIN", "ACTIVE")}


# --- Members -----------------------------------------------------------------------------------------------------


async def test_one_member_or_several_are_added(client: httpx.AsyncClient) -> None:
    alice, bob, carol, dave = [await person(client) for _ in range(4)]
    path = f"/groups/{(await new_group(client, alice))['id']}"

    one = await client.post(f"{path}/members", json={"participant_id": bob, "on_behalf_of_participant_id": alice})
    joining = [{"participant_id": carol, "role": "ADMIN"}, {"participant_id": dave}]
    several = await client.post(f"{path}/members", json={"members": joining})

    for answer in (one, several):
        assert (answer.status_code, answer.json()) == (201, {"message": "Member(s) added to group"})
    assert await members(client, path, limit=1) == {
        alice: ("ADMIN", "ACTIVE"),
        bob: ("MEMBER", "ACTIVE"),
        carol: ("ADMIN", "ACTIVE"),
        dave: ("MEMBER", "ACTIVE"),
    }


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "participant_id"),
        ({"role": "ADMIN"}, "participant_id"),
        ({"participant_id": "bob"}, "participant_id"),
        ({"participant_id": str(uuid4()), "role": "admin"}, "role"),
        ({"members": []}, "members"),
        ({"members": [{"participant_id": str(uuid4())}], "participant_id": str(uuid4())}, "members"),
        ({"members": [{"participant_id": str(uuid4())}], "role": "ADMIN"}, "members"),
        ({"members": [{"participant_id": str(UUID(int=7))}] * 2}, "members[1].participant_id"),
        ({"members": [{"participant_id": str(uuid4())} for _ in range(101)]}, "members"),
    ],
)
async def test_what_is_wrong_with_new_members_is_named(
    client: httpx.AsyncClient, body: dict[str, Any], field: str
) -> None:
    path = f"/groups/{(await new_group(client))['id']}"
    assert list(wrong_fields(await client.post(f"{path}/members", json=body))) == [field]


async def test_several_members_join_together_or_not_at_all(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient
) -> None:
    alice, bob = await person(client), await person(client)
    path = f"/groups/{(await new_group(client, alice))['id']}"
    for other, status, code in (
        (alice, 409, "conflict"),
        (str(uuid4()), 404, "not_found"),
        (await person(other_client), 404, "not_found"),
    ):
        joining = [{"participant_id": bob}, {"participant_id": other}]
        problem(await client.post(f"{path}/members", json={"members": joining}), status, code)
    assert await members(client, path) == {alice: ("ADMIN", "ACTIVE")}


async def test_who_left_is_listed_when_asked_for_and_may_come_back(
    client: httpx.AsyncClient, clock: SettableClock
) -> None:
    clock.set("2030-01-01T00:00:00Z")
    alice, bob = await person(client), await person(client, external_id="bob")
    path = f"/groups/{(await new_group(client, alice, bob))['id']}"
    clock.set("2030-01-02T00:00:00Z")
    left = await client.delete(f"{path}/members/{bob}")

    assert (left.status_code, left.content) == (204, b"")
    assert await members(client, path) == {alice: ("ADMIN", "ACTIVE")}
    former = {
        "participant_id": bob,
        "external_id": "bob",
        "role": "MEMBER",
        "status": "LEFT",
        "joined_at": "2030-01-01T00:00:00Z",
        "left_at": "2030-01-02T00:00:00Z",
    }
    assert former in await all_pages(client, f"{path}/members", include_former=True)

    clock.set("2030-01-03T00:00:00Z")
    assert (await client.delete(f"{path}/members/{bob}")).status_code == 204
    problem(await client.patch(f"{path}/members/{bob}", json={"role": "ADMIN"}), 404, "not_found")
    assert former in await all_pages(client, f"{path}/members", include_former=True)

    await created(client, f"{path}/members", {"participant_id": bob, "role": "ADMIN"})
    (latest, _) = await all_pages(client, f"{path}/members", include_former=True, limit=1)
    del former["left_at"]
    assert latest == {**former, "role": "ADMIN", "status": "ACTIVE", "joined_at": "2030-01-03T00:00:00Z"}
    again = await client.post(f"{path}/members", json={"participant_id": bob})
    problem(again, 409, "conflict")


async def test_a_role_is_changed(client: httpx.AsyncClient) -> None:
    alice, bob = await person(client), await person(client)
    path = f"/groups/{(await new_group(client, alice, bob))['id']}"
    for role in ("ADMIN", "ADMIN", "MEMBER"):
        body = {"role": role, "on_behalf_of_participant_id": alice}
        answer = await client.patch(f"{path}/members/{bob}", json=body)
        assert answer.status_code == 200
        assert answer.json() == {"message": "Member role updated", "participant_id": bob, "role": role}
        assert (await members(client, path))[bob] == (role, "ACTIVE")
    assert wrong_fields(await client.patch(f"{path}/members/{bob}", json={})) == {"role": "required"}
    assert wrong_fields(await client.patch(f"{path}/members/{bob}", json={"role": "BOSS"})) == {"role": "invalid"}
    unknown = {"role": "ADMIN", "on_behalf_of_participant_id": str(uuid4())}
    problem(await client.patch(f"{path}/members/{bob}", json=unknown), 404, "not_found")


async def test_who_never_was_a_member_cannot_leave_or_rise(client: httpx.AsyncClient) -> None:
    path = f"/groups/{(await new_group(client))['id']}/members/{await person(client)}"
    problem(await client.delete(path), 404, "not_found")
    problem(await client.patch(path, json={"role": "ADMIN"}), 404, "not_found")


async def test_the_last_admin_stays_until_another_is_there(client: httpx.AsyncClient) -> None:
    alice, bob, carol = [await person(client) for _ in range(3)]
    path = f"/groups/{(await new_group(client, alice, bob, carol))['id']}"
    # A former ADMIN is none.
    await client.patch(f"{path}/members/{carol}", json={"role": "ADMIN"})
    await client.delete(f"{path}/members/{carol}")

    problem(await client.delete(f"{path}/members/{alice}"), 409, "last_admin")
    problem(await client.patch(f"{path}/members/{alice}", json={"role": "MEMBER"}), 409, "last_admin")
    assert (await client.patch(f"{path}/members/{alice}", json={"role": "ADMIN"})).status_code == 200

    await client.patch(f"{path}/members/{bob}", json={"role": "ADMIN"})
    assert (await client.delete(f"{path}/members/{alice}")).status_code == 204
    problem(await client.delete(f"{path}/members/{bob}"), 409, "last_admin")
    assert await members(client, path) == {bob: ("ADMIN", "ACTIVE")}


async def test_twenty_admins_who_go_at_once_leave_one(client: httpx.AsyncClient) -> None:
    people = await asyncio.gather(*(person(client) for _ in range(20)))
    joining = [{"participant_id": one, "role": "ADMIN"} for one in people]
    path = f"/groups/{(await created(client, '/groups', {'name': 'x', 'members': joining}))['id']}"

    removals = (client.delete(f"{path}/members/{one}") for one in people[:10])
    demotions = (client.patch(f"{path}/members/{one}", json={"role": "MEMBER"}) for one in people[10:])
    answers = await asyncio.gather(*removals, *demotions)

    refused = [answer for answer in answers if answer.status_code not in (200, 204)]
    assert len(refused) == 1
    problem(refused[0], 409, "last_admin")
    assert [role for role, _ in (await members(client, path)).values()].count("ADMIN") == 1


# --- What a group has --------------------------------------------------------------------------------------------


async def test_balances_are_totals_per_asset(
    client: httpx.AsyncClient, database: Database, organization: Tenant
) -> None:
    program_id, elsewhere = (await new_program(client))["id"], (await new_program(client))["id"]
    asset_id = (await new_asset(client, program_id))["id"]
    group_id = (await new_group(client))["id"]
    async with database.transaction(organization.id) as tx:
        await lock_groups(tx, [UUID(group_id)])
        books = await load_accounts(tx, [UUID(group_id)], [UUID(asset_id)])
        source = books.system("SYSTEM_ISSUANCE", UUID(asset_id))
        for bucket, amount in (("AVAILABLE", d("100")), ("HELD", d("2.5"))):
            wallet = books.account("GROUP", UUID(group_id), UUID(asset_id), bucket)  # type: ignore[arg-type]
            books.post("CREDIT", [(source, -amount), (wallet, amount)], program_id=UUID(program_id))
        await write(tx, books)

    assert (await client.get(f"/groups/{group_id}")).json()["balances"] == {asset_id: "102.50"}
    path = f"/groups/{group_id}/balances"
    envelope = {
        "data": [{"asset_id": asset_id, "balance": "102.50"}],
        "pagination": {"has_more": False, "next_cursor": None},
    }
    assert (await client.get(path)).json() == envelope
    assert (await client.get(path, params={"program_id": program_id})).json() == envelope
    assert (await client.get(path, params={"program_id": elsewhere})).json()["data"] == []
    assert wrong_fields(await client.get(path, params={"program_id": "all"})) == {"program_id": "invalid"}
    # Value stays where it is when people leave, and when the group is archived.
    await client.delete(f"/groups/{group_id}")
    assert (await client.get(path)).json() == envelope


async def test_balances_are_shown_as_of_an_instant(client: httpx.AsyncClient, clock: SettableClock) -> None:
    clock.set("2030-01-01T12:00:00Z")
    program_id, elsewhere = (await new_program(client))["id"], (await new_program(client))["id"]
    asset_id = (await new_asset(client, program_id))["id"]
    path = f"/groups/{(await new_group(client))['id']}/balances"

    async def credit(amount: str) -> None:
        body = {"program_id": program_id, "asset_id": asset_id, "type": "CREDIT", "amount": amount, "description": "x"}
        assert (await client.post(f"{path}/adjust", json=body)).status_code == 200

    async def shown(**params: str) -> dict[str, str]:
        answer = await client.get(path, params=params)
        return {row["asset_id"]: row["balance"] for row in answer.json()["data"]}

    await credit("10")
    clock.advance(hours=1)
    await credit("5")

    assert await shown() == {asset_id: "15.00"}
    assert await shown(as_of="2030-01-01T12:30:00Z") == {asset_id: "10.00"}
    assert await shown(as_of="2030-01-01T12:30:00Z", program_id=program_id) == {asset_id: "10.00"}
    assert await shown(as_of="2030-01-01T12:30:00Z", program_id=elsewhere) == {}
    assert await shown(as_of="2030-01-01T11:59:59Z") == {}
    assert await shown(as_of="2031-01-01T00:00:00Z") == {asset_id: "15.00"}
    assert wrong_fields(await client.get(path, params={"as_of": "noon"})) == {"as_of": "invalid"}


async def test_a_group_can_be_a_redemption_target(client: httpx.AsyncClient, other_client: httpx.AsyncClient) -> None:
    path = f"/programs/{(await new_program(client))['id']}"
    group_id = (await new_group(client))["id"]
    target = {"redemption_target_type": "LEDGER_ENTITY", "redemption_target_entity_id": group_id}
    assert (await client.patch(path, json=target)).json()["redemption_target_entity_id"] == group_id
    foreign = {**target, "redemption_target_entity_id": (await new_group(other_client))["id"]}
    problem(await client.patch(path, json=foreign), 404, "not_found")


# --- State -------------------------------------------------------------------------------------------------------


async def test_groups_have_tags_attributes_and_counters(client: httpx.AsyncClient) -> None:
    path = f"/groups/{(await new_group(client))['id']}/state"
    first, second = await client.put(f"{path}/tags/VIP"), await client.put(f"{path}/tags/vip")
    assert (first.status_code, second.status_code, second.json()) == (201, 200, {"tag": "vip"})
    assert (await client.put(f"{path}/tags", json={"tags": ["B", "b"]})).json() == {"tags": ["b"]}
    assert (await client.delete(f"{path}/tags/b")).status_code == 204
    assert (await client.get(f"{path}/tags")).json()["data"] == []

    await client.put(f"{path}/attributes/a", json={"value": "1"})
    merged = await client.patch(f"{path}/attributes", json={"attributes": {"b": "2"}})
    assert merged.json() == {"attributes": {"a": "1", "b": "2"}}
    assert (await client.delete(f"{path}/attributes/a")).status_code == 204
    assert (await client.get(f"{path}/attributes")).json()["data"] == [{"key": "b", "value": "2"}]

    assert (await client.put(f"{path}/counters/c", json={"value": "1.50"})).json() == {"key": "c", "value": "1.5"}
    assert (await client.get(f"{path}/counters")).json()["data"] == [{"key": "c", "value": "1.5"}]
    assert (await client.delete(f"{path}/counters/c")).status_code == 204
    problem(await client.get(f"{path}/counters/c"), 404, "not_found")


async def test_concurrent_tags_of_a_group_all_take_effect(client: httpx.AsyncClient) -> None:
    path = f"/groups/{(await new_group(client))['id']}/state/tags"
    answers = await asyncio.gather(*(client.put(f"{path}/t{i % 5}") for i in range(15)))
    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [201] * 5


async def test_the_state_history_of_a_group(
    client: httpx.AsyncClient, clock: SettableClock, organization: Tenant
) -> None:
    path = f"/groups/{(await new_group(client))['id']}"
    for hour, tag in enumerate(("a", "b", "c")):
        clock.set(f"2030-01-01T0{hour}:00:00Z")
        await client.put(f"{path}/state/tags/{tag}")
    await client.put(f"{path}/state/counters/a", json={"value": "1"})

    async def keys(**params: Any) -> list[str]:
        return [row["key"] for row in await all_pages(client, f"{path}/activity/state-history", limit=1, **params)]

    assert await keys(state_type="tag", operation="add") == ["c", "b", "a"]
    assert await keys(key="a", state_type="counter") == ["a"]
    assert await keys(**{"from": "2030-01-01T01:00:00Z", "to": "2030-01-01T01:00:00Z"}) == ["b"]
    (row, *_) = (await client.get(f"{path}/activity/state-history", params={"key": "b"})).json()["data"]
    assert row == {
        "id": row["id"],
        "state_type": "tag",
        "key": "b",
        "operation": "add",
        "old_value": None,
        "new_value": "b",
        "event_id": None,
        "rule_id": None,
        "changed_by_api_key_id": str(organization.api_key_id),
        "program_id": None,
        "changed_at": "2030-01-01T01:00:00Z",
    }


async def test_the_state_history_of_a_group_has_200_rows_per_page(client: httpx.AsyncClient) -> None:
    path = f"/groups/{(await new_group(client))['id']}"
    await client.put(f"{path}/state/tags", json={"tags": [f"t{number}" for number in range(205)]})
    page = (await client.get(f"{path}/activity/state-history", params={"limit": 1_000})).json()
    assert len(page["data"]) == 200
    assert page["pagination"]["has_more"]
