"""Simulations over HTTP. Contract: README.md "Simulations", rules-and-events.md 7.6.

What a simulation computes is tested with the domain (tests/domain/test_simulations.py); here it is about asking for
one, seeing how far it is, what it says, and cancelling it.
"""

import asyncio
import time
from typing import Any
from uuid import UUID

import httpx
import pytest

from api.app import create_app
from api.simulations import SimulationOut, SimulationSummary
from db.session import Database
from domain import limits
from domain.ids import new_id
from domain.simulations import records
from settings import Settings
from tests.api.calls import all_pages, wrong_fields
from tests.conftest import SettableClock, Tenant
from tests.events_support import SETTLED_WITHIN_S, HttpProgram, credit, schedule, tag
from workflows import queues
from workflows.gateway import Gateway
from workflows.reconcile import reconcile_simulations

ALL_TIME = {"from": "2000-01-01T00:00:00Z", "to": "2100-01-01T00:00:00Z"}
NOBODY: dict[str, Any] = {
    "matches": 0,
    "failed": 0,
    "skipped_budget": 0,
    "errors": 0,
    "scheduled_events": 0,
    "broadcasts": 0,
    "issued": [],
}


@pytest.fixture
async def program(client: httpx.AsyncClient) -> HttpProgram:
    return await HttpProgram.open(client)


@pytest.fixture
def nobody_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulations are started, and no worker serves their queue."""
    monkeypatch.setattr(queues, "LEDGER", f"nobody-{new_id().hex}")


async def post(program: HttpProgram, rules: Any = None, **fields: Any) -> httpx.Response:
    body = {**ALL_TIME, "rules": rules, **fields}
    return await program.client.post(f"/programs/{program.id}/simulations", json=body)


async def started(program: HttpProgram, rules: Any = None, **fields: Any) -> dict[str, Any]:
    answer = await post(program, rules, **fields)
    assert answer.status_code == 202, answer.text
    SimulationOut.model_validate(answer.json())
    shown: dict[str, Any] = answer.json()
    return shown


async def get(program: HttpProgram, simulation_id: str) -> dict[str, Any]:
    answer = await program.client.get(f"/programs/{program.id}/simulations/{simulation_id}")
    assert answer.status_code == 200, answer.text
    SimulationOut.model_validate(answer.json())
    shown: dict[str, Any] = answer.json()
    return shown


async def ended(program: HttpProgram, simulation_id: str) -> dict[str, Any]:
    """The simulation once it has ended; fails after twenty seconds."""
    deadline = time.monotonic() + SETTLED_WITHIN_S
    while True:
        shown = await get(program, simulation_id)
        if shown["status"] not in records.OPEN:
            return shown
        assert time.monotonic() < deadline, shown
        await asyncio.sleep(0.02)


async def simulated(program: HttpProgram, rules: Any = None, **fields: Any) -> dict[str, Any]:
    return await ended(program, (await started(program, rules, **fields))["id"])


def draft(condition: str, *actions: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"name": "draft", "condition": condition, "actions": list(actions), **fields}


# --- what it says ---


@pytest.mark.usefixtures("running_worker")
async def test_the_rules_as_they_are_beside_what_really_happened(program: HttpProgram) -> None:
    points = await program.asset()
    rule = await program.rule("event.type == 'buy'", credit(points, "event.amount"), name="Base")
    for amount in (5, 7.5):
        await program.run(type="buy", amount=amount)
    await program.run(type="other")
    await program.run(type="buy")

    shown = await simulated(program)

    tally = {**NOBODY, "matches": 3, "failed": 1, "issued": [{"asset_id": points, "amount": "12.50"}]}
    assert shown["rules"] == [
        {
            "rule_id": rule["id"],
            "name": "Base",
            "order": 10,
            "is_changed": False,
            "runs": True,
            "simulated": tally,
            "actual": tally,
        }
    ]
    assert shown["events"] == {
        "simulated": {"completed": 3, "failed": 1},
        "actual": {"completed": 3, "failed": 1},
        "left_out": 0,
    }
    assert shown["issued"] == {"simulated": tally["issued"], "actual": tally["issued"]}
    assert (shown["status"], shown["progress"]) == ("COMPLETED", {"events_done": 4, "events_total": 4})
    assert (shown["basis"], shown["notes"], shown["from"]) == ("BEGINNING", [], "2000-01-01T00:00:00Z")
    assert shown["created_at"] <= shown["finished_at"]
    assert "error" not in shown


@pytest.mark.usefixtures("running_worker")
async def test_one_changed_rule_among_the_others(program: HttpProgram) -> None:
    points = await program.asset()
    first = await program.rule("event.type == 'buy'", credit(points, "1"), name="first")
    second = await program.rule("event.type == 'buy'", credit(points, "2"), name="second")
    await program.run(type="buy")

    change = {"rule_id": first["id"], "changes": {"stop_after_match": True, "actions": [credit(points, "4")]}}
    shown = await simulated(program, change)

    assert [(rule["rule_id"], rule["is_changed"]) for rule in shown["rules"]] == [
        (first["id"], True),
        (second["id"], False),
    ]
    assert [rule["simulated"]["matches"] for rule in shown["rules"]] == [1, 0]
    assert [rule["actual"]["matches"] for rule in shown["rules"]] == [1, 1]
    assert shown["issued"] == {
        "simulated": [{"asset_id": points, "amount": "4.00"}],
        "actual": [{"asset_id": points, "amount": "3.00"}],
    }


@pytest.mark.usefixtures("running_worker")
async def test_a_rule_set_of_drafts_and_stored_rules(program: HttpProgram) -> None:
    points = await program.asset()
    stored = await program.rule("event.type == 'buy'", credit(points, "1"), name="stored", order=500)
    gone = await program.rule("event.type == 'buy'", tag("seen"), name="gone", order=600)
    await program.run(type="buy", amount=2)

    shown = await simulated(
        program,
        [
            draft("event.amount > 1", credit(points, "event.amount * 3"), schedule("check", "1h"), name="new"),
            {"rule_id": stored["id"]},
            draft("true", tag("off"), name="off", status="SUSPENDED", order=7),
        ],
    )

    assert [(rule["name"], rule["rule_id"], rule["order"], rule["runs"]) for rule in shown["rules"]] == [
        ("off", None, 7, False),
        ("stored", stored["id"], 500, True),
        ("new", None, 510, True),
        ("gone", gone["id"], None, False),
    ]
    simulated_new = {
        **NOBODY,
        "matches": 1,
        "scheduled_events": 1,
        "issued": [{"asset_id": points, "amount": "6.00"}],
    }
    assert [rule["simulated"] for rule in shown["rules"]] == [
        NOBODY,
        {**NOBODY, "matches": 1, "issued": [{"asset_id": points, "amount": "1.00"}]},
        simulated_new,
        NOBODY,
    ]
    assert [rule["actual"]["matches"] for rule in shown["rules"]] == [0, 1, 0, 1]
    assert len(shown["notes"]) == 1
    assert "counted, not run" in shown["notes"][0]


@pytest.mark.usefixtures("running_worker")
async def test_only_the_participants_that_the_filter_lets_in(program: HttpProgram) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "1"))
    for who in ("alice", "bob", "bob"):
        await program.run(who)

    shown = await simulated(
        program, participant_filter="participant.external_id == 'bob' && now > timestamp('2020-01-01')"
    )

    assert shown["participant_filter"].startswith("participant.external_id")
    assert shown["events"]["left_out"] == 1
    assert shown["events"]["simulated"] == shown["events"]["actual"] == {"completed": 2, "failed": 0}
    assert shown["progress"] == {"events_done": 3, "events_total": 3}


@pytest.mark.usefixtures("running_worker")
async def test_a_range_that_begins_in_the_middle_says_so(program: HttpProgram) -> None:
    points = await program.asset()
    await program.rule("true", credit(points, "1"))
    await program.run()
    middle = (await program.run())["processed_at"]

    shown = await simulated(program, **{"from": middle})

    assert (shown["basis"], shown["from"]) == ("STATE_AT_FROM", middle)
    assert shown["progress"]["events_total"] == 1
    assert "as far as the state history tells" in shown["notes"][0]


@pytest.mark.usefixtures("running_worker")
async def test_a_range_without_events_is_done_at_once(program: HttpProgram) -> None:
    shown = await simulated(program, **{"from": "2090-01-01T00:00:00Z"})

    assert (shown["status"], shown["progress"]) == ("COMPLETED", {"events_done": 0, "events_total": 0})
    assert shown["to"] == shown["from"]


# --- what is refused ---


async def refused(program: HttpProgram, rules: Any) -> tuple[int, str, set[str]]:
    """Status, code and fields of the refusal of these rules."""
    answer = await post(program, rules)
    body = answer.json()
    return answer.status_code, body["code"], {field["field"] for field in body["details"]["fields"]}


async def test_rules_are_checked_as_when_they_are_saved(program: HttpProgram) -> None:
    points = await program.asset()
    other = await HttpProgram.open(program.client)
    strange = await other.asset()
    good = draft("true", credit(points, "1"))

    assert await refused(program, []) == (400, "bad_request", {"rules"})
    assert await refused(program, "all") == (400, "bad_request", {"rules"})
    assert await refused(program, [good, 7]) == (400, "bad_request", {"rules[1]"})
    assert await refused(program, [good, {"name": "no more"}]) == (
        400,
        "bad_request",
        {"rules[1].condition", "rules[1].actions"},
    )
    assert await refused(program, [draft("event.amount >", credit(points, "1", amunt="2"))]) == (
        400,
        "bad_request",
        {"rules[0].condition", "rules[0].actions[0].amunt"},
    )
    assert await refused(program, [draft("true", credit(str(new_id()), "1"))]) == (
        404,
        "not_found",
        {"rules[0].actions[0].asset_id"},
    )
    assert await refused(program, [good, draft("true", credit(strange, "1"))]) == (
        422,
        "asset_not_linked",
        {"rules[1].actions[0].asset_id"},
    )
    budget = {"asset_id": points, "limit": "1.005"}
    assert await refused(program, [good | {"budgets": [budget]}]) == (
        400,
        "invalid_scale",
        {"rules[0].budgets[0].limit"},
    )
    window = {"active_from": "2026-01-02T00:00:00Z", "active_to": "2026-01-01T00:00:00Z"}
    assert await refused(program, [good | window]) == (400, "bad_request", {"rules[0].active_to"})
    assert await refused(program, [good | {"order": 0}]) == (400, "bad_request", {"rules[0].order"})
    assert await refused(program, [good | {"order": 3}, good | {"order": 3}]) == (409, "conflict", {"rules[1].order"})


async def test_a_changed_rule_is_one_of_the_program(program: HttpProgram) -> None:
    points = await program.asset()
    rule = await program.rule("true", credit(points, "1"), order=5)
    await program.rule("true", tag("second"), order=6)
    other = await HttpProgram.open(program.client)
    foreign = await other.rule("true", tag("x"))

    assert await refused(program, {"rule_id": foreign["id"]}) == (404, "not_found", {"rules.rule_id"})
    assert await refused(program, [{"rule_id": str(new_id())}]) == (404, "not_found", {"rules[0].rule_id"})
    assert await refused(program, [{"rule_id": "x"}]) == (400, "bad_request", {"rules[0].rule_id"})
    assert await refused(program, [{"rule_id": rule["id"]}] * 2) == (400, "bad_request", {"rules[1].rule_id"})
    assert await refused(program, {"rule_id": rule["id"], "changes": {"order": 6}}) == (
        409,
        "conflict",
        {"rules.changes.order"},
    )
    assert await refused(program, {"rule_id": rule["id"], "changes": {"condition": "("}}) == (
        400,
        "bad_request",
        {"rules.changes.condition"},
    )
    assert await refused(program, [{"rule_id": rule["id"], "changes": {"name": ""}}]) == (
        400,
        "bad_request",
        {"rules[0].changes.name"},
    )


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"from": None}, "from"),
        ({"to": "yesterday"}, "to"),
        ({"from": "2026-01-02T00:00:00Z", "to": "2026-01-01T00:00:00Z"}, "to"),
        ({"participant_filter": "event.amount > 1"}, "participant_filter"),
        ({"participant_filter": "participant.("}, "participant_filter"),
        ({"participant_filter": "groups.size() > 0"}, "participant_filter"),
        ({"participant_filter": ""}, "participant_filter"),
    ],
)
async def test_a_range_or_filter_that_makes_no_sense(program: HttpProgram, fields: dict[str, Any], wrong: str) -> None:
    answer = await post(program, **fields)

    assert set(wrong_fields(answer)) == {wrong}


@pytest.mark.usefixtures("nobody_works")
async def test_an_organization_has_five_at_once(program: HttpProgram, other_client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(post(program) for _ in range(limits.SIMULATIONS_AT_ONCE + 3)))
    assert sorted(answer.status_code for answer in answers) == [202] * limits.SIMULATIONS_AT_ONCE + [409] * 3
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} == {"conflict"}

    assert (await post(await HttpProgram.open(other_client))).status_code == 202
    accepted = next(answer.json() for answer in answers if answer.status_code == 202)
    await program.client.delete(f"/programs/{program.id}/simulations/{accepted['id']}")
    assert (await post(program)).status_code == 202


# --- finding, cancelling ---


@pytest.mark.usefixtures("nobody_works")
async def test_others_do_not_see_it(program: HttpProgram, other_client: httpx.AsyncClient) -> None:
    simulation_id = (await started(program))["id"]
    sibling = await HttpProgram.open(program.client)
    path = f"/programs/{program.id}/simulations"

    for method in ("GET", "DELETE"):
        assert (await other_client.request(method, f"{path}/{simulation_id}")).status_code == 404
        strange = f"/programs/{sibling.id}/simulations/{simulation_id}"
        assert (await program.client.request(method, strange)).status_code == 404
        assert (await program.client.request(method, f"{path}/{new_id()}")).status_code == 404
    assert (await other_client.get(path)).status_code == 404
    assert (await other_client.post(path, json=ALL_TIME)).status_code == 404
    assert (await get(program, simulation_id))["status"] == "PENDING"


@pytest.mark.usefixtures("nobody_works")
async def test_the_list_shows_the_newest_first(program: HttpProgram) -> None:
    ids = [(await started(program))["id"] for _ in range(3)]
    path = f"/programs/{program.id}/simulations"
    await program.client.delete(f"{path}/{ids[0]}")

    shown = await all_pages(program.client, path, limit=2)

    for row in shown:
        SimulationSummary.model_validate(row)
    assert [row["id"] for row in shown] == ids[::-1]
    assert "rules" not in shown[0]
    canceled = (await program.client.get(path, params={"status": "CANCELED"})).json()["data"]
    assert [row["id"] for row in canceled] == ids[:1]
    assert set(wrong_fields(await program.client.get(path, params={"status": "DONE"}))) == {"status"}


@pytest.mark.usefixtures("nobody_works")
async def test_it_is_cancelled_once_and_for_good(program: HttpProgram) -> None:
    simulation_id = (await started(program))["id"]
    path = f"/programs/{program.id}/simulations/{simulation_id}"

    first, second = await program.client.delete(path), await program.client.delete(path)

    assert (first.status_code, second.status_code) == (204, 204)
    shown = await get(program, simulation_id)
    assert (shown["status"], shown["finished_at"] is None) == ("CANCELED", False)


@pytest.mark.usefixtures("running_worker")
async def test_one_that_is_done_stays_done(program: HttpProgram) -> None:
    shown = await simulated(program)

    answer = await program.client.delete(f"/programs/{program.id}/simulations/{shown['id']}")

    assert answer.status_code == 204
    assert await get(program, shown["id"]) == shown


async def test_without_temporal_it_waits_until_reconciling_starts_it(
    settings: Settings,
    database: Database,
    shared_clock: SettableClock,
    organization: Tenant,
    program: HttpProgram,
    gateway: Gateway,
    running_worker: None,
) -> None:
    app = create_app(settings, database, shared_clock, Gateway.from_settings(settings))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://scrip.test/v1",
            headers={"Authorization": f"Bearer {organization.api_key}"},
        ) as client,
    ):
        shown = await started(HttpProgram(client, program.id))
    assert shown["status"] == "PENDING"
    assert UUID(shown["id"]) in {carried.id for carried in await records.open_simulations(database)}

    await reconcile_simulations(database, gateway)

    assert (await ended(program, shown["id"]))["status"] == "COMPLETED"
