"""Paging through lists. Contract: basics.md 2.3."""

import base64
import json
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest

from tests.api.calls import all_pages, new_participant, new_program, wrong_fields
from tests.conftest import SettableClock, Tenant


async def page(client: httpx.AsyncClient, **params: Any) -> tuple[list[str], str | None]:
    answer = await client.get("/participants", params=params)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["pagination"]["has_more"] == (body["pagination"]["next_cursor"] is not None)
    return [item["external_id"] for item in body["data"]], body["pagination"]["next_cursor"]


async def test_rows_inserted_and_deleted_between_pages_cause_neither_skips_nor_duplicates(
    client: httpx.AsyncClient, owner: psycopg.Connection[Any], organization: Tenant
) -> None:
    ids = [(await new_participant(client, external_id=f"p{n}"))["id"] for n in range(8)]

    first, cursor = await page(client, limit=3)
    assert first == ["p7", "p6", "p5"]
    await new_participant(client, external_id="late")
    for gone in (7, 5, 4):  # one seen, the one the cursor stands on, one not seen
        owner.execute(
            "delete from participant where organization_id = %s and id = %s", (organization.id, UUID(ids[gone]))
        )

    second, cursor = await page(client, limit=3, cursor=cursor)
    third, end = await page(client, limit=3, cursor=cursor)
    assert second + third == ["p3", "p2", "p1", "p0"]
    assert end is None


async def test_rows_of_the_same_instant_are_told_apart_by_id(client: httpx.AsyncClient, clock: SettableClock) -> None:
    clock.set("2030-01-01T00:00:00Z")
    made = {(await new_participant(client))["external_id"] for _ in range(7)}
    listed = [row["external_id"] for row in await all_pages(client, "/participants", limit=2)]
    assert len(listed) == 7
    assert set(listed) == made


async def test_a_full_last_page_ends_the_list(client: httpx.AsyncClient) -> None:
    for _ in range(4):
        await new_program(client)
    assert len(await all_pages(client, "/programs", limit=2)) == 4


async def test_the_limit_defaults_to_50_and_is_clamped_to_200(
    client: httpx.AsyncClient, owner: psycopg.Connection[Any], organization: Tenant
) -> None:
    owner.execute(
        "insert into participant (organization_id, id, external_id, status, created_at, updated_at)"
        " select %s, gen_random_uuid(), n::text, 'ACTIVE', now(), now() from generate_series(1, 201) n",
        (organization.id,),
    )
    assert len((await page(client))[0]) == 50
    assert len((await page(client, limit=200))[0]) == 200
    assert len((await page(client, limit=10**9))[0]) == 200
    assert len(await all_pages(client, "/participants")) == 201


@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "ten", "", "0x10", "9" * 5000])
async def test_a_limit_is_an_integer_from_1_on(client: httpx.AsyncClient, limit: str) -> None:
    assert wrong_fields(await client.get("/programs", params={"limit": limit})) == {"limit": "invalid"}


def forged(*values: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(values).encode()).rstrip(b"=").decode()


ID = "0197f3b4-c1d2-7c3e-8f00-000000000000"


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "abc",
        "not base64!",
        "ÿ",
        "a" * 50_000,
        forged(),
        forged("-created_at,id"),
        forged("+created_at,id", "2030-01-01T00:00:00Z", ID),
        forged("-created_at,id", "2030-01-01T00:00:00Z", ID, "more"),
        forged("-created_at,id", "2030-01-01T00:00:00", ID),
        forged("-created_at,id", "0001-01-01T00:00:00+14:00", ID),
        forged("-created_at,id", "2030-01-01T00:00:00Z", "'; drop table program; --"),
        forged("-created_at,id", 5, ID),
        forged("-created_at,id", None, ID),
        forged("-created_at,id", ["x"], {"y": 1}),
        forged({"a": 1}, 1, 2),
    ],
)
async def test_a_cursor_that_cannot_be_read_is_refused(client: httpx.AsyncClient, cursor: str) -> None:
    await new_program(client)
    assert wrong_fields(await client.get("/programs", params={"cursor": cursor})) == {"cursor": "invalid"}


async def test_a_cursor_belongs_to_its_sort(client: httpx.AsyncClient) -> None:
    for _ in range(3):
        await new_program(client)
    first = (await client.get("/programs", params={"limit": 1})).json()
    cursor = first["pagination"]["next_cursor"]
    for other in ({"sort_by": "name"}, {"sort_dir": "asc"}):
        answer = await client.get("/programs", params={"limit": 1, "cursor": cursor, **other})
        assert wrong_fields(answer) == {"cursor": "invalid"}
    assert (await client.get("/programs", params={"limit": 1, "cursor": cursor})).status_code == 200


async def test_text_sort_keys_may_hold_anything(client: httpx.AsyncClient) -> None:
    names = ["a", "a'b", 'a"b', "a,b", "ä", "日本", "a\\b", "%", " "]
    for name in names:
        await new_program(client, name=name)
    listed = [row["name"] for row in await all_pages(client, "/programs", sort_by="name", limit=1)]
    assert sorted(listed) == sorted(names)


async def test_a_cursor_of_another_organization_shows_nothing_of_it(
    client: httpx.AsyncClient, other_client: httpx.AsyncClient
) -> None:
    for _ in range(3):
        await new_program(client, name="secret")
    await new_program(other_client, name="own")
    cursor = (await client.get("/programs", params={"limit": 1})).json()["pagination"]["next_cursor"]
    answer = (await other_client.get("/programs", params={"cursor": cursor})).json()
    assert {row["name"] for row in answer["data"]} <= {"own"}
