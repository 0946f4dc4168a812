"""Programs over HTTP. Contract: basics.md 5 and the worked examples of section 8."""

import httpx
import pytest

from tests.api.calls import all_pages, new_participant, new_program, problem, wrong_fields


async def names(client: httpx.AsyncClient, **params: object) -> list[str]:
    return [program["name"] for program in await all_pages(client, "/programs", **params)]


async def test_the_name_is_required(client: httpx.AsyncClient) -> None:  # example 4
    assert wrong_fields(await client.post("/programs", json={})) == {"name": "required"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "x" * 256}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x", "description": "x" * 1001}, "description"),
        ({"name": "x", "on_unknown_participant": "IGNORE"}, "on_unknown_participant"),
    ],
)
async def test_a_program_that_breaks_its_limits_is_refused(  # example 5
    client: httpx.AsyncClient, body: dict[str, str], field: str
) -> None:
    assert wrong_fields(await client.post("/programs", json=body)) == {field: "invalid"}


async def test_a_program_needs_only_a_name(client: httpx.AsyncClient) -> None:  # example 6
    program = await new_program(client, name="Customer Loyalty")

    assert program["status"] == "ACTIVE"
    assert program["on_unknown_participant"] == "CREATE"
    assert program["redemption_target_type"] == "SYSTEM_REDEMPTION"
    assert "redemption_target_entity_id" not in program
    assert program["deleted_at"] is None
    assert (await client.get(f"/programs/{program['id']}")).json() == program


async def test_names_at_their_limit_are_accepted_and_need_not_be_unique(client: httpx.AsyncClient) -> None:
    first = await new_program(client, name="x" * 255, description="y" * 1000)
    second = await new_program(client, name="x" * 255)
    assert first["id"] != second["id"]


async def test_the_redemption_target_is_no_field_of_creation(client: httpx.AsyncClient) -> None:
    program = await new_program(client, redemption_target_type="SYSTEM_BREAKAGE")
    assert program["redemption_target_type"] == "SYSTEM_REDEMPTION"


async def test_archived_programs_are_listed_only_when_asked_for(client: httpx.AsyncClient) -> None:  # example 7
    program = await new_program(client, name="old")
    await new_program(client, name="new")

    archived = await client.patch(f"/programs/{program['id']}", json={"status": "ARCHIVED"})

    assert archived.status_code == 200
    assert archived.json()["deleted_at"] is not None
    assert await names(client) == ["new"]
    assert await names(client, include_archived=True) == ["new", "old"]
    assert await names(client, status="ARCHIVED") == ["old"]
    assert (await client.get(f"/programs/{program['id']}")).json()["status"] == "ARCHIVED"


async def test_every_status_can_follow_every_other(client: httpx.AsyncClient) -> None:
    path = f"/programs/{(await new_program(client))['id']}"
    for status in ("SUSPENDED", "ACTIVE", "ARCHIVED", "SUSPENDED", "ARCHIVED", "ACTIVE"):
        changed = (await client.patch(path, json={"status": status})).json()
        assert changed["status"] == status
        assert (changed["deleted_at"] is not None) == (status == "ARCHIVED")


async def test_archiving_again_keeps_the_first_deleted_at(client: httpx.AsyncClient) -> None:
    path = f"/programs/{(await new_program(client))['id']}"
    first = (await client.patch(path, json={"status": "ARCHIVED"})).json()
    second = (await client.patch(path, json={"status": "ARCHIVED"})).json()
    assert first["deleted_at"] == second["deleted_at"]


async def test_a_ledger_entity_target_needs_its_entity(client: httpx.AsyncClient) -> None:  # example 8
    path = f"/programs/{(await new_program(client))['id']}"
    answer = await client.patch(path, json={"redemption_target_type": "LEDGER_ENTITY"})
    assert wrong_fields(answer) == {"redemption_target_entity_id": "required"}


async def test_other_targets_refuse_an_entity_and_clear_a_stored_one(client: httpx.AsyncClient) -> None:  # example 9
    path = f"/programs/{(await new_program(client))['id']}"
    entity_id = (await new_participant(client))["id"]
    set_target = {"redemption_target_type": "LEDGER_ENTITY", "redemption_target_entity_id": entity_id}
    assert (await client.patch(path, json=set_target)).json()["redemption_target_entity_id"] == entity_id

    both = {"redemption_target_type": "SYSTEM_BREAKAGE", "redemption_target_entity_id": entity_id}
    assert wrong_fields(await client.patch(path, json=both)) == {"redemption_target_entity_id": "invalid"}
    cleared = (await client.patch(path, json={"redemption_target_type": "SYSTEM_BREAKAGE"})).json()
    assert "redemption_target_entity_id" not in cleared


async def test_a_target_entity_can_be_a_program_but_not_someone_elses(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient
) -> None:
    program_id = (await new_program(client))["id"]
    foreign_id = (await new_participant(other_client))["id"]

    def target(entity_id: str) -> dict[str, str]:
        return {"redemption_target_type": "LEDGER_ENTITY", "redemption_target_entity_id": entity_id}

    assert (await client.patch(f"/programs/{program_id}", json=target(program_id))).status_code == 200
    problem(await client.patch(f"/programs/{program_id}", json=target(foreign_id)), 404, "not_found")


async def test_an_update_changes_only_what_it_names(client: httpx.AsyncClient) -> None:
    program = await new_program(client, name="before", description="kept", on_unknown_participant="REJECT")
    changed = (await client.patch(f"/programs/{program['id']}", json={"name": "after"})).json()
    assert changed == {**program, "name": "after", "updated_at": changed["updated_at"]}

    cleared = (await client.patch(f"/programs/{program['id']}", json={"description": None})).json()
    assert cleared["description"] is None


@pytest.mark.parametrize("body", [{}, {"unknown": 1}])
async def test_an_update_of_nothing_is_refused(client: httpx.AsyncClient, body: dict[str, int]) -> None:
    path = f"/programs/{(await new_program(client))['id']}"
    assert wrong_fields(await client.patch(path, json=body)) == {"body": "required"}


@pytest.mark.parametrize("field", ["name", "status", "on_unknown_participant", "redemption_target_type"])
async def test_null_clears_only_what_can_be_empty(client: httpx.AsyncClient, field: str) -> None:
    path = f"/programs/{(await new_program(client))['id']}"
    assert wrong_fields(await client.patch(path, json={field: None})) == {field: "invalid"}


async def test_search_finds_parts_of_names_in_any_case_and_nothing_by_wildcards(client: httpx.AsyncClient) -> None:
    await new_program(client, name="Summer Sale 100%")
    await new_program(client, name="Winter_Sale")
    assert await names(client, search="sale") == ["Winter_Sale", "Summer Sale 100%"]
    assert await names(client, search="%") == ["Summer Sale 100%"]
    assert await names(client, search="_") == ["Winter_Sale"]


async def test_programs_are_listed_in_the_order_asked_for(client: httpx.AsyncClient) -> None:
    for name in ("b", "c", "a"):
        await new_program(client, name=name)
    assert await names(client) == ["a", "c", "b"]
    assert await names(client, sort_dir="asc") == ["b", "c", "a"]
    assert await names(client, sort_by="name", sort_dir="asc", limit=1) == ["a", "b", "c"]
    assert wrong_fields(await client.get("/programs", params={"sort_by": "status"})) == {"sort_by": "invalid"}


async def test_another_organizations_program_does_not_exist(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient
) -> None:
    path = f"/programs/{(await new_program(client))['id']}"
    problem(await other_client.get(path), 404, "not_found")
    problem(await other_client.patch(path, json={"name": "mine"}), 404, "not_found")
    assert await names(other_client) == []
