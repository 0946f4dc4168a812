"""Tags, attributes, counters and their history, over HTTP. Contract: holders.md 5 and 9, basics.md 5.8."""

import asyncio
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.api.calls import all_pages, new_participant, new_program, problem, wrong_fields
from tests.conftest import SettableClock, Tenant


@pytest.fixture(params=["participants", "programs"])
async def entity(client: httpx.AsyncClient, request: pytest.FixtureRequest) -> str:
    """The path of an entity that has state: the endpoints are the same for both kinds."""
    make = new_participant if request.param == "participants" else new_program
    return f"/{request.param}/{(await make(client))['id']}"


async def participant_path(client: httpx.AsyncClient) -> str:
    return f"/participants/{(await new_participant(client))['id']}"


async def tags(client: httpx.AsyncClient, entity: str) -> list[str]:
    body = (await client.get(f"{entity}/state/tags")).json()
    assert body["pagination"] == {"has_more": False, "next_cursor": None}
    return [row["tag"] for row in body["data"]]


async def changes(client: httpx.AsyncClient, entity: str, **params: Any) -> list[tuple[str, str, str, Any, Any]]:
    """A participant's history as (type, key, operation, old, new), oldest first."""
    rows = await all_pages(client, f"{entity}/activity/state-history", **params)
    names = ("state_type", "key", "operation", "old_value", "new_value")
    return [tuple(row[name] for name in names) for row in reversed(rows)]


# --- Tags --------------------------------------------------------------------------------------------------------


async def test_a_tag_is_stored_once_in_lower_case(client: httpx.AsyncClient, entity: str) -> None:  # example 13
    first = await client.put(f"{entity}/state/tags/VIP")
    second = await client.put(f"{entity}/state/tags/vip")

    assert (first.status_code, first.json()) == (201, {"tag": "vip"})
    assert (second.status_code, second.json()) == (200, {"tag": "vip"})
    assert await tags(client, entity) == ["vip"]
    gone = await client.delete(f"{entity}/state/tags/missing")
    assert (gone.status_code, gone.content) == (204, b"")
    assert (await client.delete(f"{entity}/state/tags/Vip")).status_code == 204
    assert await tags(client, entity) == []


async def test_tags_are_replaced_as_a_whole(client: httpx.AsyncClient, entity: str) -> None:
    await client.put(f"{entity}/state/tags", json={"tags": ["a", "b"]})
    replaced = await client.put(f"{entity}/state/tags", json={"tags": ["B", "b", "c"]})
    assert (replaced.status_code, replaced.json()) == (200, {"tags": ["b", "c"]})
    assert await tags(client, entity) == ["b", "c"]
    assert (await client.put(f"{entity}/state/tags", json={"tags": []})).json() == {"tags": []}
    assert wrong_fields(await client.put(f"{entity}/state/tags", json={})) == {"tags": "required"}


async def test_a_tag_has_at_most_255_characters_as_it_is_stored(client: httpx.AsyncClient, entity: str) -> None:
    assert (await client.put(f"{entity}/state/tags/{'x' * 255}")).status_code == 201
    assert wrong_fields(await client.put(f"{entity}/state/tags/{'x' * 256}")) == {"tag": "invalid"}
    # The lower case of this letter has two characters.
    assert wrong_fields(await client.put(f"{entity}/state/tags/{'İ' * 200}")) == {"tag": "invalid"}


async def test_tags_and_keys_may_contain_slashes(client: httpx.AsyncClient, entity: str) -> None:
    assert (await client.put(f"{entity}/state/tags/a%2Fb")).json() == {"tag": "a/b"}
    assert (await client.put(f"{entity}/state/attributes/x%2Fy", json={"value": "1"})).json()["key"] == "x/y"
    assert (await client.put(f"{entity}/state/counters/p%2Fq", json={"value": "1"})).json()["key"] == "p/q"
    assert (await client.delete(f"{entity}/state/tags/a%2Fb")).status_code == 204
    assert await tags(client, entity) == []


async def test_concurrent_tag_writes_all_take_effect(client: httpx.AsyncClient, entity: str) -> None:
    answers = await asyncio.gather(*(client.put(f"{entity}/state/tags/t{i % 5}") for i in range(15)))
    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [201] * 5
    assert await tags(client, entity) == ["t0", "t1", "t2", "t3", "t4"]


# --- Attributes --------------------------------------------------------------------------------------------------


async def test_attributes_merge(client: httpx.AsyncClient, entity: str) -> None:  # example 14
    await client.patch(f"{entity}/state/attributes", json={"attributes": {"a": "1"}})
    merged = await client.patch(f"{entity}/state/attributes", json={"attributes": {"b": "2"}})
    assert (merged.status_code, merged.json()) == (200, {"attributes": {"a": "1", "b": "2"}})
    listed = (await client.get(f"{entity}/state/attributes")).json()["data"]
    assert listed == [{"key": "a", "value": "1"}, {"key": "b", "value": "2"}]


async def test_one_attribute_is_set_and_deleted(client: httpx.AsyncClient, entity: str) -> None:
    path = f"{entity}/state/attributes/birthday"
    for _ in range(2):
        answer = await client.put(path, json={"value": "06-15"})
        assert (answer.status_code, answer.json()) == (200, {"key": "birthday", "value": "06-15"})
    assert (await client.delete(path)).status_code == 204
    assert (await client.delete(path)).status_code == 204
    assert (await client.get(f"{entity}/state/attributes")).json()["data"] == []
    problem(await client.get(path), 405)


@pytest.mark.parametrize("value", ["", "x" * 4097, 5, None, {}])
async def test_an_attribute_is_a_string_of_1_to_4096_characters(
    client: httpx.AsyncClient, entity: str, value: object
) -> None:
    assert wrong_fields(await client.put(f"{entity}/state/attributes/a", json={"value": value})) == {"value": "invalid"}
    assert (await client.put(f"{entity}/state/attributes/a", json={"value": "x" * 4096})).status_code == 200


async def test_an_entity_has_at_most_1000_attributes(client: httpx.AsyncClient, entity: str) -> None:
    full = {f"k{i}": "1" for i in range(1000)}
    assert (await client.patch(f"{entity}/state/attributes", json={"attributes": full})).status_code == 200
    assert (await client.put(f"{entity}/state/attributes/k0", json={"value": "2"})).status_code == 200
    answer = await client.put(f"{entity}/state/attributes/one-more", json={"value": "1"})
    assert wrong_fields(answer) == {"attributes": "invalid"}


# --- Counters ----------------------------------------------------------------------------------------------------


async def test_a_counter_with_auto_reset_is_set_absolutely(  # example 5
    client: httpx.AsyncClient, entity: str, clock: SettableClock
) -> None:
    clock.set("2030-01-01T00:00:00Z")
    body = {"value": "42", "reset_after": "720h"}
    answer = await client.put(f"{entity}/state/counters/purchases", json=body)
    expected = {"key": "purchases", "value": "42", "reset_after": "720h", "last_reset_at": "2030-01-01T00:00:00Z"}
    assert (answer.status_code, answer.json()) == (200, expected)
    assert (await client.get(f"{entity}/state/counters/purchases")).json() == expected
    assert (await client.get(f"{entity}/state/counters")).json()["data"] == [expected]


async def test_a_counter_without_auto_reset_shows_no_window(client: httpx.AsyncClient, entity: str) -> None:
    path = f"{entity}/state/counters/c"
    assert (await client.put(path, json={"value": "389.990"})).json() == {"key": "c", "value": "389.99"}
    assert (await client.put(path, json={"value": "-0.000000000000000001"})).json()["value"] == "-0.000000000000000001"


async def test_an_elapsed_window_reads_as_zero_and_not_before(
    client: httpx.AsyncClient, entity: str, clock: SettableClock
) -> None:
    clock.set("2030-01-01T00:00:00Z")
    path = f"{entity}/state/counters/c"
    await client.put(path, json={"value": "5", "reset_after": "24h"})
    clock.advance(hours=24)
    assert (await client.get(path)).json()["value"] == "5"
    clock.advance(microseconds=1)
    assert (await client.get(path)).json()["value"] == "0"
    # The configuration stays, and being set begins a new window.
    again = (await client.put(path, json={"value": "7"})).json()
    assert (again["value"], again["reset_after"]) == ("7", "24h")
    assert again["last_reset_at"] == "2030-01-02T00:00:00.000001Z"
    assert (await client.put(path, json={"value": "7", "reset_after": ""})).json() == {"key": "c", "value": "7"}
    clock.advance(hours=48)
    assert (await client.get(path)).json() == {"key": "c", "value": "7"}


async def test_a_deleted_counter_is_unknown(client: httpx.AsyncClient, entity: str) -> None:
    path = f"{entity}/state/counters/c"
    problem(await client.get(path), 404, "not_found")
    await client.put(path, json={"value": "1"})
    assert (await client.delete(path)).status_code == 204
    assert (await client.delete(path)).status_code == 204
    problem(await client.get(path), 404, "not_found")
    assert (await client.get(f"{entity}/state/counters")).json()["data"] == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "value"),
        ({"value": 5}, "value"),
        ({"value": ""}, "value"),
        ({"value": "five"}, "value"),
        ({"value": "NaN"}, "value"),
        ({"value": "1e3"}, "value"),
        ({"value": "1" * 21}, "value"),
        ({"value": "0." + "1" * 19}, "value"),
        ({"value": "1", "reset_after": "30d"}, "reset_after"),
        ({"value": "1", "reset_after": "-1h"}, "reset_after"),
        ({"value": "1", "reset_after": "0s"}, "reset_after"),
        ({"value": "1", "reset_after": 5}, "reset_after"),
    ],
)
async def test_a_counter_that_breaks_its_limits_is_refused(
    client: httpx.AsyncClient, entity: str, body: dict[str, Any], field: str
) -> None:
    assert list(wrong_fields(await client.put(f"{entity}/state/counters/c", json=body))) == [field]


# --- History -----------------------------------------------------------------------------------------------------


async def test_every_change_is_in_the_history_and_no_other(client: httpx.AsyncClient, organization: Tenant) -> None:
    participant = await participant_path(client)
    await client.put(f"{participant}/state/tags/VIP")
    await client.put(f"{participant}/state/tags/vip")
    await client.put(f"{participant}/state/attributes/a", json={"value": "1"})
    await client.put(f"{participant}/state/attributes/a", json={"value": "1"})
    await client.put(f"{participant}/state/attributes/a", json={"value": "2"})
    await client.put(f"{participant}/state/counters/c", json={"value": "1.50"})
    await client.delete(f"{participant}/state/tags/vip")
    await client.delete(f"{participant}/state/attributes/a")
    await client.delete(f"{participant}/state/counters/c")
    await client.delete(f"{participant}/state/counters/c")

    assert await changes(client, participant) == [
        ("tag", "vip", "add", None, "vip"),
        ("attribute", "a", "set", None, "1"),
        ("attribute", "a", "set", "1", "2"),
        ("counter", "c", "set", None, "1.5"),
        ("tag", "vip", "remove", "vip", None),
        ("attribute", "a", "delete", "2", None),
        ("counter", "c", "delete", "1.5", None),
    ]
    (row, *_) = (await client.get(f"{participant}/activity/state-history", params={"limit": 1})).json()["data"]
    assert row["changed_by_api_key_id"] == str(organization.api_key_id)
    assert (row["event_id"], row["rule_id"], row["program_id"]) == (None, None, None)


async def test_a_set_after_the_window_is_a_reset_and_then_a_set(
    client: httpx.AsyncClient, clock: SettableClock
) -> None:
    clock.set("2030-01-01T00:00:00Z")
    participant = await participant_path(client)
    await client.put(f"{participant}/state/counters/c", json={"value": "5", "reset_after": "1h"})
    clock.advance(hours=2)
    await client.put(f"{participant}/state/counters/c", json={"value": "3"})
    assert (await changes(client, participant))[1:] == [
        ("counter", "c", "auto_reset", "5", "0"),
        ("counter", "c", "set", "0", "3"),
    ]


async def test_the_history_is_filtered(client: httpx.AsyncClient, clock: SettableClock) -> None:
    participant = await participant_path(client)
    for hour, tag in enumerate(("a", "b", "c")):
        clock.set(f"2030-01-01T0{hour}:00:00Z")
        await client.put(f"{participant}/state/tags/{tag}")
    await client.delete(f"{participant}/state/tags/a")
    await client.put(f"{participant}/state/attributes/a", json={"value": "1"})

    async def keys(**params: Any) -> list[str]:
        return [change[1] for change in await changes(client, participant, limit=1, **params)]

    assert await keys(state_type="tag", operation="add") == ["a", "b", "c"]
    assert await keys(key="a", state_type="attribute") == ["a"]
    assert await keys(**{"from": "2030-01-01T01:00:00Z", "to": "2030-01-01T01:00:00Z"}) == ["b"]
    assert await keys(event_from="2030-01-01T01:00:00Z", event_to="2030-01-01T01:30:00Z") == ["b"]
    assert await keys(operation="remove") == ["a"]
    assert await keys(program_id=str(uuid4())) == []
    for bad in ({"state_type": "mood"}, {"operation": "eat"}, {"from": "yesterday"}, {"from": "2030-01-01"}):
        assert list(wrong_fields(await client.get(f"{participant}/activity/state-history", params=bad))) == list(bad)


async def test_state_of_what_does_not_exist_is_404(client: httpx.AsyncClient, other_client: httpx.AsyncClient) -> None:
    foreign = await participant_path(other_client)
    for path in (foreign, f"/participants/{uuid4()}", f"/programs/{uuid4()}"):
        for answer in (
            await client.get(f"{path}/state/tags"),
            await client.put(f"{path}/state/tags", json={"tags": []}),
            await client.put(f"{path}/state/tags/x"),
            await client.delete(f"{path}/state/tags/x"),
            await client.get(f"{path}/state/attributes"),
            await client.patch(f"{path}/state/attributes", json={"attributes": {}}),
            await client.put(f"{path}/state/attributes/x", json={"value": "1"}),
            await client.delete(f"{path}/state/attributes/x"),
            await client.get(f"{path}/state/counters"),
            await client.get(f"{path}/state/counters/x"),
            await client.put(f"{path}/state/counters/x", json={"value": "1"}),
            await client.delete(f"{path}/state/counters/x"),
        ):
            problem(answer, 404, "not_found")
    problem(await client.get(f"{foreign}/activity/state-history"), 404, "not_found")


async def test_state_may_change_whatever_the_status(client: httpx.AsyncClient) -> None:
    participant = await participant_path(client)
    for status in ("SUSPENDED", "CLOSED"):
        await client.patch(f"{participant}/status", json={"status": status})
        assert (await client.put(f"{participant}/state/tags/{status}")).status_code == 201
        assert (await client.put(f"{participant}/state/counters/c", json={"value": "1"})).status_code == 200
