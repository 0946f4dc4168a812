"""Resources made over HTTP, for tests that are about something else."""

from typing import Any
from uuid import uuid4

import httpx


async def new_program(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    return await created(client, "/programs", {"name": "Loyalty", **fields})


async def new_asset(client: httpx.AsyncClient, program_id: str, **fields: Any) -> dict[str, Any]:
    asset = {
        "program_id": program_id,
        "name": "Points",
        "symbol": uuid4().hex[:12],
        "inventory_mode": "SIMPLE",
        "issuance_policy": "UNLIMITED",
        "scale": 2,
        **fields,
    }
    return await created(client, "/assets", asset)


async def new_participant(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    return await created(client, "/participants", {"external_id": uuid4().hex, **fields})


async def new_group(client: httpx.AsyncClient, *members: str, **fields: Any) -> dict[str, Any]:
    """A group of one new ADMIN, or of these participants, the first one as ADMIN."""
    admin, *others = members or ((await new_participant(client))["id"],)
    joining = [{"participant_id": admin, "role": "ADMIN"}, *({"participant_id": other} for other in others)]
    return await created(client, "/groups", {"name": "Family", "members": joining, **fields})


async def created(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 201, answer.text
    result: dict[str, Any] = answer.json()
    return result


def problem(answer: httpx.Response, status: int = 400, code: str = "bad_request") -> dict[str, Any]:
    """The body of an error with this status and code."""
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = answer.json()
    assert body["code"] == code
    assert body["request_id"] == answer.headers["X-Request-Id"]
    assert body["message"]
    return body


def wrong_fields(answer: httpx.Response) -> dict[str, str]:
    """The fields that a 400 names, each with its reason."""
    details = problem(answer)["details"]
    first = details["fields"][0]
    assert {name: details[name] for name in ("field", "expected", "received", "reason")} == {
        name: first[name] for name in ("field", "expected", "received", "reason")
    }
    return {field["field"]: field["reason"] for field in details["fields"]}


async def all_pages(client: httpx.AsyncClient, path: str, **params: Any) -> list[dict[str, Any]]:
    """Every item of a list, page by page."""
    items: list[dict[str, Any]] = []
    for _ in range(100):
        page = (await client.get(path, params=params)).json()
        items += page["data"]
        if not page["pagination"]["has_more"]:
            assert page["pagination"]["next_cursor"] is None
            return items
        params["cursor"] = page["pagination"]["next_cursor"]
    raise AssertionError("the list does not end")
